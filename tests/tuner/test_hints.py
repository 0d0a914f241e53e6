"""Other systems' files of configs are read within limits, and what they say is tried first."""

import json
import os
import sqlite3
from pathlib import Path

import pytest
from fakes import FakeRunner, tune

from tilebook import op as ops
from tilebook.errors import UsageError
from tilebook.op import Config, Space
from tilebook.tuner import hints

AXES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
    "FAST": (False, True),
}
DEFAULT = Config(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=2, FAST=False)
SPACE = Space(AXES, lambda *_: None, lambda *_: DEFAULT, lambda *_: None)


class Kernel:
    name = "pack.age:matmul_kernel"


def option(warps=8, stages=3, **kwargs):
    return {
        "kwargs": kwargs,
        "num_warps": warps,
        "num_stages": stages,
        "num_ctas": 1,
        "maxnreg": None,
        "pre_hook": None,
    }


TRITON = {
    "key": [4096, "torch.float16"],
    "configs_timings": [
        [option(BLOCK_SIZE_M=32, BLOCK_SIZE_N=32), [0.3, 0.2, 0.4]],
        [option(BLOCK_SIZE_M=64, BLOCK_SIZE_N=64), [0.1, 0.1, 0.1]],
        [option(BLOCK_SIZE_M=128, BLOCK_SIZE_N=64), [float("inf")] * 3],
    ],
}
FLA = {
    "kernel_name": "matmul_kernel", "triton_version": "3.6.0",
    "autotune_entries": {"ab": {"autotune_key": [64], "config": option(BM=64, BN=64)}, "cd": 3},
    "default_config": option(BM=64, BN=64),
}  # fmt: skip
DEJAVU = {
    "signature": "x",
    "cache": {"('64',)": "BLOCK_SIZE_M: 64, BLOCK_N: 64, num_warps: 8, num_stages: 3, maxnreg: None"},
}
MOE = {
    "triton_version": "3.6.0",
    "1": {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "GROUP_SIZE_M": 8, "num_warps": 8, "num_stages": 3},
    "4096": {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "GROUP_SIZE_M": 1, "num_warps": 8, "num_stages": 3},
}
WANTED = Config(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=3, FAST=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("matmul_kernel.autotune.json", TRITON),
        ("matmul_kernel.json", FLA),
        ("kernel/gpu/cache.json", DEJAVU),
        ("E=8,N=14336,device_name=NVIDIA_H200.json", MOE),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_file_chose_is_tried(tmp_path, name, content, whole):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    assert hints.read(tmp_path if whole else path).of(Kernel, SPACE, DEFAULT) == [WANTED]


def test_rows_of_a_database_are_hints(tmp_path):
    path = tmp_path / "attn_fwd.sqlite3"
    database = sqlite3.connect(path)
    database.execute(
        'CREATE TABLE "FLASH$attn_fwd" (id INTEGER, gpu TEXT, "inputs$CAUSAL" INTEGER, "tuned_kernel$BLOCK_M" INTEGER,'
        ' "tuned_kernel$BLOCK_N" INTEGER, "compiler_options$num_warps" INTEGER, "compiler_options$num_stages" INTEGER)'
    )
    rows = [(n, "gfx942", 1, *tiles) for n, tiles in enumerate([(64, 64, 8, 3), (32, 32, 4, 2), (64, 64, 8, 3)])]
    database.executemany(f'INSERT INTO "FLASH$attn_fwd" VALUES ({", ".join("?" * 7)})', rows)
    database.commit()
    found = hints.read(path).of(Kernel, SPACE, DEFAULT)
    assert found == [WANTED, DEFAULT.replace(BLOCK_M=32)]  # the commonest first


def test_another_kernels_file_and_options_alone_say_nothing(tmp_path):
    (tmp_path / "other_kernel.autotune.json").write_text(json.dumps(TRITON))
    (tmp_path / "H200.json").write_text(json.dumps({"1": {"num_warps": 8, "waves_per_eu": 2}}))
    assert hints.read(tmp_path).of(Kernel, SPACE, DEFAULT) == []


def test_values_that_an_axis_lacks_are_its_nearest(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"1": {"BLOCK_SIZE_M": 256, "block_n": 40, "num_warps": 1, "FAST": True}})
    )
    (found,) = hints.read(tmp_path).of(Kernel, SPACE, DEFAULT)
    assert found == Config(BLOCK_M=128, BLOCK_N=32, num_warps=4, num_stages=2, FAST=True)
    assert SPACE.contains(found)


@pytest.mark.parametrize(
    "text",
    [
        "", "[1]", "{", "[" * 100_000, '{"1": "x"}', "\xff", '{"cache": {"a": 7}}',
        '{"configs_timings": [[3, 4], 5, [{"kwargs": {"BLOCK_M": 64}}, []]]}',
        '{"configs_timings": [["BLOCK_M: 64", [1e999]]]}', '{"1": {"BLOCK_M": "64", "num_warps": 1e3}}',
        f'{{"configs_timings": [[{{"kwargs": {{"BLOCK_M": 64}}}}, [1{"0" * 400}, 1{"0" * 400}]]]}}',
        json.dumps({"1": {f"BLOCK_{n}": 1 for n in range(65)}}),
        '{"1": {"BLOCK_M": 99999999999999999999999}}', '{"autotune_entries": {"a": {"config": null}}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.json", "a.sqlite3"])
def test_what_is_no_config_is_passed_over(tmp_path, text, name):
    (tmp_path / name).write_text(text, encoding="latin-1")
    (tmp_path / "b.json").write_text(json.dumps(MOE))
    assert hints.read(tmp_path).of(Kernel, SPACE, DEFAULT) == [WANTED]
    with pytest.raises(UsageError, match="no configs of kernels in it"):
        hints.read(tmp_path / name)


def test_only_ordinary_files_of_a_bearable_size_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hints, "_MOST_BYTES", 4000)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    (tmp_path / "long.json").write_text(json.dumps(MOE) + " " * 5000)
    (tmp_path / "good.json").write_text(json.dumps(MOE))
    found = hints.read(tmp_path)
    assert len(found.found) == 2
    assert [line.split(": ")[1:] for line in found.left_out] == [["ValueError", "larger than 0 MiB"]]
    with pytest.raises(UsageError, match="no such file or folder"):
        hints.read(tmp_path / "none")


def test_what_a_file_is_called_or_says_cannot_paint_the_terminal(tmp_path):
    (tmp_path / "\x1b[31m\n.json").write_text("{")
    database = sqlite3.connect(tmp_path / "a.sqlite3")
    database.execute("CREATE TABLE t (a)")
    database.execute("PRAGMA writable_schema = ON")
    database.execute("UPDATE sqlite_schema SET name = ?, sql = 'CREATE TABLE t (a'", ["\x1b[31m\nred"])
    database.commit()
    (tmp_path / "b.json").write_text(json.dumps(MOE))
    assert [line.isprintable() for line in hints.read(tmp_path).left_out] == [True, True]


@pytest.mark.parametrize(("limit", "left"), [("_MOST_FILES", 3), ("_MOST_FOUND", 3), ("_MOST_S", 5)])
def test_there_are_limits_for_all_files_together(limit, left, tmp_path, monkeypatch):
    monkeypatch.setattr(hints, limit, -1.0 if limit == "_MOST_S" else 2)
    for name in range(5):
        (tmp_path / f"{name}.json").write_text(json.dumps({"1": {"BLOCK_M": name}, "2": {"BLOCK_M": name + 64}}))
    if limit == "_MOST_FOUND":
        (tmp_path / "0.json").write_text("{")
    if limit == "_MOST_S":
        with pytest.raises(UsageError, match=f"{left} files: what is before them is enough"):
            hints.read(tmp_path)
        return
    found = hints.read(tmp_path)
    assert found.left_out[-1] == f"{left} files: what is before them is enough"
    assert len(found.found) <= 4


def test_a_file_that_goes_away_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "b.json").write_text(json.dumps(MOE))
    monkeypatch.setattr(os, "walk", lambda place: [(str(place), [], ["a.json", "b.json"])])
    assert [line.split(": ")[1] for line in hints.read(tmp_path).left_out] == ["FileNotFoundError"]


def test_our_own_kernels_take_hints_of_tiles(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(MOE))
    forward = ops.get("attention_fwd").tunable
    problem = forward.op.problem.parse("B1,H2,S512,D64", "bf16")
    from tilebook import device as devices

    default = forward.space.default(problem, devices.find("H200"))
    (found,) = hints.read(Path(tmp_path)).of(forward.op, forward.space, default)
    assert (found["BLOCK_M"], found["BLOCK_N"], found["num_warps"]) == (64, 64, 8)
    assert forward.space.contains(found)


def test_a_tune_tries_them_after_the_default(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"1": {"BLOCK": 128, "num_warps": 8}}))
    _, registry = tune(tmp_path / "registry.db", FakeRunner(lambda c: 1.0), hints=hints.read(tmp_path / "a.json"))
    ours = [dict(each.config) for each in registry.trials() if each.implementation == "triton"]
    assert ours[0] == {"BLOCK": 16, "num_warps": 1, "num_stages": 1}
    assert ours[1] == {"BLOCK": 128, "num_warps": 8, "num_stages": 1}
