"""Verdicts on kernels of others in registries: exported, imported, shown, revoked, explained as our own are."""

import hashlib
import json

import others
import pytest
import torch
import triton
from click.testing import CliRunner
from served import GPU, on_an_h200, stored, verdict

from tilebook.cli import main
from tilebook.foreign import serving
from tilebook.foreign.kernel import Kernel, Unfit, key_of
from tilebook.registry import Device, Miss, Registry, ledger

X = torch.randn(100)
ARGS = (X, torch.empty_like(X), 100, 3.0)
TUNER = others.scale_kernel
OP = "others:scale_kernel"


def tilebook(*arguments, status=0):
    done = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.output


def ranked():
    serving.reload()
    kernel = Kernel(TUNER)
    return [config["BLOCK"] for config in serving.book().ranked(kernel, kernel.problem(key_of(TUNER, ARGS, {})), True)]


@pytest.fixture
def registry(tmp_path, monkeypatch):
    place = tmp_path / "registry.db"
    on_an_h200(monkeypatch, place)
    stored(place, verdict(TUNER, ARGS, TUNER.configs[2], TUNER.configs[1]))
    return place


def test_a_verdict_goes_from_registry_to_registry_and_serves_there_once_it_is_trusted(registry, tmp_path, monkeypatch):
    file = tmp_path / "verdicts.jsonl"
    tilebook("export", file, "--op", OP)
    for trust, expected in ([], []), (["--trust"], [64, 32]):
        other = tmp_path / f"other{len(trust)}.db"
        monkeypatch.setenv("TILEBOOK_REGISTRY", str(other))
        assert "1 verdicts imported" in tilebook("import", file, "--registry", other, *trust)
        assert ranked() == expected
        with Registry.open(registry) as first, Registry.open(other) as second:
            assert [v.portable() for v in first.verdicts()] == [v.portable() for v in second.verdicts()]


def test_show_and_explain_tell_them_as_they_tell_ours(registry):
    (row,) = (row for row in json.loads(tilebook("show", "--op", OP, "--format", "json")))
    assert (row["op"], row["problem"], row["config"]["BLOCK"]) == (OP, "n=100 fp32,fp32", 64)
    assert not row["retired"]
    told = tilebook("explain", OP, "--shape", "n=100", "--gpu", "H200")
    assert "runs     BLOCK=64" in told
    assert "measured verdict for exactly this problem" in told
    assert "n=100 fp32,fp32" in tilebook("explain", OP, "--shape", "n=7", "--gpu", "H200", status=2)


def test_a_revoked_winner_gives_way_to_the_next_finalist_and_comes_back_when_it_is_undone(registry):
    assert ranked() == [64, 32]
    tilebook("revoke", OP, "--yes", "--config", "BLOCK=64", "--reason", "wrong at n=7")
    assert ranked() == [32]
    told = tilebook("explain", OP, "--shape", "n=100", "--gpu", "H200")
    assert "runs     BLOCK=32" in told
    assert "measured 2 ms" in told, "the numbers of what runs, not the winner's"
    (revoked,) = [row for row in json.loads(tilebook("revoke", "--list", "--format", "json")) if row["op"] == OP]
    tilebook("revoke", "--undo", revoked["id"])
    assert ranked() == [64, 32]


def test_other_source_serves_nothing_and_explain_says_so(registry):
    stored(registry, verdict(TUNER, ARGS, TUNER.configs[1], digest="ab" * 32))
    assert ranked() == [64, 32]


def test_a_config_that_the_kernel_does_not_have_never_runs(registry):
    hostile = triton.Config({"BLOCK": 4096, "FAULT": 0})
    stored(registry, verdict(TUNER, ARGS, hostile, TUNER.configs[1]))
    assert ranked() == [32]


class Store(dict):
    """What brings a process group together."""

    def compare_set(self, key, expected, value):
        return self.setdefault(key, value).encode()


def test_processes_of_one_program_run_the_same_config_whatever_their_registries_say(registry, tmp_path):
    kernel, store = Kernel(TUNER), Store()
    problem = kernel.problem(key_of(TUNER, ARGS, {}))
    stored(tmp_path / "other.db", verdict(TUNER, ARGS, TUNER.configs[0]))
    stored(tmp_path / "none.db")
    found = []
    for place in (registry, tmp_path / "other.db", tmp_path / "none.db"):
        book = serving.Book(GPU, str(place))
        book._agreement._store = store
        found.append(book.chosen(kernel, problem, True)[0]["BLOCK"])
    assert found == [64, 64, 64]


def test_status_lists_what_kernels_of_others_asked_for(registry):
    kernel = Kernel(TUNER)
    problem = kernel.problem(("many", "torch.float16"))
    ledger.count([Miss(OP, problem, Device(*GPU.identity), 5, 1.0)])
    assert f"{OP} n=many fp16" in tilebook("status", "--gpu", "H200", "--registry", registry)


def test_a_key_keeps_what_json_can_say_and_is_refused_otherwise():
    kernel = Kernel(TUNER)
    assert kernel.problem((True, "torch.bfloat16", "torch.int64")) == '{"dtype":"bf16,int64","key":{"n":true}}'
    assert kernel.problem((torch.float16,)) == '{"dtype":"","key":{"n":"torch.float16"}}'
    for wrong in (object(), "x" * 3000, torch.tensor(7)):
        with pytest.raises(Unfit):
            kernel.problem((wrong,))


def test_verdicts_are_written_as_flash_linear_attention_reads_them(registry, tmp_path):
    tilebook("export", tmp_path / "configs", "--as", "fla")
    (file,) = (tmp_path / "configs").iterdir()
    content = json.loads(file.read_text())
    key = [100, "torch.float32", "torch.float32"]
    assert (file.name, content["triton_version"]) == ("scale_kernel.json", "3.6.0")
    hashed = hashlib.md5(json.dumps(key, separators=(",", ":")).encode()).hexdigest()
    assert content["autotune_entries"][hashed]["autotune_key"] == key
    config = content["default_config"]
    assert (config["kwargs"], config["num_warps"], config["maxnreg"]) == ({"BLOCK": 64, "FAULT": 0}, 4, None)
