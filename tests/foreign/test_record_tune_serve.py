"""A program is recorded, its kernels are tuned offline, and it is served: three processes, the program unchanged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import others
import pytest
import torch

from tilebook.foreign import record
from tilebook.foreign.kernel import key_of
from tilebook.registry import Registry

pytestmark = pytest.mark.usefixtures("forked_here")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command, **variables):
    paths = os.pathsep.join(map(str, (ROOT, HERE, ROOT / "tests", ROOT / "tests" / "tuner")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    done = run(HERE / "program.py", TILEBOOK_TRITON=f"record:{folder}")
    assert done.stdout.splitlines() == ["100 16 3", "70 16 6"]
    assert done.stderr == ""
    return folder


def test_a_program_is_recorded_tuned_and_served_with_no_line_changed(recorded, tmp_path):
    registry = tmp_path / "registry.db"
    tuned = run(HERE / "tune_on_cpu.py", "tune", "--recorded", recorded, "--registry", registry, "--format", "json")
    rows = json.loads(tuned.stdout)
    assert {(row["op"], row["problem"], row["config"]["BLOCK"]) for row in rows} == {
        ("program:double_kernel", "n=100 fp32,fp32", 64),
        ("program:double_kernel", "n=70 fp32,fp32", 64),
    }
    assert not any(row["retired"] for row in rows)
    served = run(
        HERE / "program.py", TILEBOOK_TRITON="serve", TILEBOOK_REGISTRY=str(registry), TILEBOOK_TEST_GPU="H200"
    )
    assert served.stdout.splitlines() == ["100 64 0", "70 64 0"]
    assert served.stderr == ""
    with Registry.open(registry) as held:
        assert all(verdict.measured for verdict in held.verdicts())


@pytest.mark.long
def test_a_kernel_without_an_autotuner_is_tuned_in_the_space_of_a_file_and_served(tmp_path):
    spaces, registry, program = tmp_path / "spaces.json", tmp_path / "registry.db", HERE / "plain_program.py"
    spaces.write_text('{"plain:shift_kernel": {"space": {"BLOCK": [16, 32, 64], "num_warps": [2, 4]}, "key": ["n"]}}')
    command = ("-m", "tilebook.cli", "record", "--to", tmp_path / "records", "--spaces", spaces)
    told = run(*command, "--", sys.executable, program).stderr
    assert "1 kernel and 1 problem recorded in " in told
    run(HERE / "tune_on_cpu.py", "tune", "--recorded", tmp_path / "records", "--registry", registry)
    variables = {"TILEBOOK_REGISTRY": str(registry), "TILEBOOK_TEST_GPU": "H200", "TILEBOOK_SPACES": str(spaces)}
    served = run(program, TILEBOOK_TRITON="serve", **variables)
    assert (served.stdout, served.stderr) == ("64\n", "")


def test_what_no_verdict_covers_is_searched_as_ever(tmp_path):
    missing = tmp_path / "registry.db"
    done = run(HERE / "program.py", TILEBOOK_TRITON="serve", TILEBOOK_REGISTRY=str(missing), TILEBOOK_TEST_GPU="H200")
    assert done.stdout.splitlines() == ["100 16 3", "70 16 6"]
    assert done.stderr.count("without its verdicts") == 1


@pytest.mark.long
def test_a_script_tunes_what_it_calls_and_is_served(tmp_path):
    registry = tmp_path / "registry.db"
    done = run(HERE / "tuned_in_code.py", registry, TILEBOOK_REGISTRY=str(registry))
    assert done.stdout.splitlines() == [
        "16 tuned_in_code:double_kernel n=100 fp32,fp32 64 64",
        "16 tuned_in_code:plain_kernel BLOCK=16 fp32,fp32 64 64",
        "no autotuned kernel that can be tuned was called: it called none"
        " (tilebook's own functions are tuned by the command `tilebook tune`)",
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("asked", ["record:/proc/no/such/folder", "sing"])
def test_a_failure_breaks_no_program(asked):
    done = run(HERE / "program.py", TILEBOOK_TRITON=asked)
    assert done.stdout.splitlines() == ["100 16 3", "70 16 6"]
    assert ("neither recorded nor served" in done.stderr) == (asked == "sing")


@pytest.mark.long
def test_a_file_of_spaces_that_is_none_is_a_warning_and_all_else_goes_on(tmp_path):
    done = run(HERE / "program.py", TILEBOOK_TRITON=f"record:{tmp_path}", TILEBOOK_SPACES=str(tmp_path / "none.json"))
    assert done.stdout.splitlines() == ["100 16 3", "70 16 6"]
    assert "none.json has no spaces" in done.stderr
    assert "neither recorded nor served" not in done.stderr
    assert [each.name for each in record.read(tmp_path)] == ["double_kernel"]


def test_a_record_says_what_calls_were_like_and_nothing_of_what_tensors_held(recorded):
    (file,) = recorded.iterdir()
    (entry,) = record.read(recorded)
    assert (entry.module, entry.name, entry.path) == ("program", "double_kernel", str(HERE))
    problem = entry.problems['{"dtype":"fp32,fp32","key":{"n":100}}']
    (call,) = problem.calls
    assert problem.count == 3
    assert (call.tensors["x"].dtype, call.tensors["x"].shape, call.values) == ("float32", (100,), {"n": 100})
    assert call.grids == ((7,), (4,), (2,))
    assert len(file.read_text()) < 4000


def test_a_call_is_known_by_the_key_that_triton_makes_of_it():
    x = torch.randn(40)
    others.pick(x, torch.arange(40))
    (key,) = [each for each in others.pick_kernel.cache if each[0] == 40]
    assert key_of(others.pick_kernel, (x, torch.arange(40), x, 40), {"grid": (1,), "warmup": False}) == key


def test_records_of_several_processes_are_one(recorded, tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(next(recorded.iterdir()).read_text())
    (entry,) = record.read(tmp_path)
    assert [problem.count for problem in entry.problems.values()] == [6, 6]
    assert [len(problem.calls) for problem in entry.problems.values()] == [1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"tilebook_record": 2, "kernels": []}',
        '{"tilebook_record": 1, "kernels": [{}]}',
        '{"tilebook_record": 1, "kernels": [{"module": "a", "name": "b", "digest": "c", "path": "", "configs": [{}],'
        ' "problems": [{"key": "{}", "calls": [{"tensors": {"x": ["nope", [1], [1], ""]}, "values": {}, "grids": [[1]],'
        ' "configs": 1}], "count": 1, "ran": null, "failed": []}]}]}',
    ],
)
def test_a_file_that_is_no_record_is_refused_with_a_word(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(record.UsageError, match=r"a\.json is no record of kernels"):
        record.read(tmp_path)


def test_tensors_with_gaps_and_repeated_rows_are_made_as_they_lay():
    from tilebook.foreign.call import Tensor

    wide, repeated = torch.empty(3, 80)[:, :50], torch.empty(1, 50).expand(3, 50)
    for like in (wide, repeated, torch.empty(0, 4), torch.empty(())):
        made = Tensor("float32", tuple(like.shape), like.stride())
        (shape, stride), x = made.held, made.random("cpu", torch.Generator().manual_seed(0), {})
        assert (tuple(x.shape), x.stride(), x.clone().stride()) == (shape, stride, stride)
        assert x.as_strided(made.shape, made.stride).stride() == like.stride()
    assert Tensor("int64", (5,), (1,)).random("cpu", torch.Generator(), {"cumulative": 9})[[0, -1]].tolist() == [0, 9]


def test_record_runs_any_command_and_passes_on_its_options(tmp_path):
    command = ("-m", "tilebook.cli", "record", "--to", tmp_path / "records", "--", sys.executable, "-u")
    assert run(*command, HERE / "program.py").stdout.splitlines() == ["100 16 3", "70 16 6"]
    assert len(list((tmp_path / "records").iterdir())) == 1
