"""Records that are nowhere, empty, or a stranger's: each is a line that says what to do."""

import json
import os
import subprocess
import sys
import time

import others
import pytest
import torch
from recorded import recording

from tilebook.foreign import record
from tilebook.foreign.kernel import Kernel, Unfit, imported

pytestmark = pytest.mark.usefixtures("forked_here")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What a record of one kernel holds."""
    folder = tmp_path_factory.mktemp("records")
    with recording(folder):
        others.scaled(others.scale_kernel, torch.randn(40))
    return next(folder.iterdir()).read_text()


def tune(*arguments):
    command = [sys.executable, "-m", "tilebook", "tune", "--gpu", "H200", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"key": "x"}, "not canonical JSON"),
        ({"key": "{}"}, "no problem of a kernel"),
        ({"count": float("inf")}, "infinity"),
        ({"calls": [{"tensors": {}, "values": {}, "grids": [[1]], "configs": 10**12}]}, "1000000000000 configs"),
    ],
)
def test_a_strangers_record_is_refused_with_a_word(change, why, content, tmp_path):
    made = json.loads(content)
    made["kernels"][0]["problems"][0] |= change
    (tmp_path / "a.json").write_text(json.dumps(made))
    with pytest.raises(record.UsageError, match=rf"a\.json is no record of kernels: .*{why}"):
        record.read(tmp_path / "a.json")


@pytest.mark.parametrize("where", ["configs", "ran", "failed"])
def test_a_strangers_config_is_refused_with_a_word(where, content, tmp_path):
    made = json.loads(content)
    (kernel,) = made["kernels"]
    (listed, *_), (found,) = kernel["configs"], kernel["problems"]
    wrong = {**listed, "BLOCK": [16]}
    if where == "configs":
        kernel["configs"][0] = wrong
    else:
        found[where] = wrong if where == "ran" else [wrong]
    (tmp_path / "a.json").write_text(json.dumps(made))
    with pytest.raises(record.UsageError, match=r"a\.json is no record of kernels: "):
        record.read(tmp_path)


def test_a_count_of_any_size_has_a_weight(content, tmp_path):
    made = json.loads(content)
    made["kernels"][0]["problems"][0]["count"] = 10**400
    (tmp_path / "a.json").write_text(json.dumps(made))
    (entry,) = record.read(tmp_path)
    assert all(each.weight > 0 for each in entry.problems.values())


@pytest.mark.parametrize("value", ["\x1b[2J", "a\nb", "\ud800", 2**64, "x" * 2000])
def test_a_key_that_no_record_may_hold_is_left_out_alone(value):
    kernel = Kernel(others.scale_kernel)
    with pytest.raises(Unfit, match="cannot be written down"):
        kernel.problem([value])
    assert record.problem(kernel.problem(["a b"]))


def test_of_a_kernel_whose_configs_have_changed_the_last_record_counts(content, tmp_path):
    for name, blocks, age in (("new.json", (16, 32), 10), ("old.json", (16, 64), 20)):
        made = json.loads(content)
        (kernel,) = made["kernels"]
        kernel["configs"] = [{"BLOCK": block, "FAULT": 0, "num_stages": 3, "num_warps": 4} for block in blocks]
        for call in kernel["problems"][0]["calls"]:
            call["grids"], call["configs"] = [[1], [1]], 2
        (tmp_path / name).write_text(json.dumps(made))
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (entry,) = record.read(tmp_path)
    assert [each["BLOCK"] for each in entry.configs] == [16, 32]


def test_what_is_nowhere_is_to_be_recorded_first(tmp_path):
    for place in (tmp_path / "none.json", tmp_path):
        with pytest.raises(
            record.UsageError, match=r"no recorded kernels in .*: run your program with TILEBOOK_TRITON"
        ):
            record.read(place)


def test_a_record_with_nothing_in_it_says_why(tmp_path):
    made = record.Recording(tmp_path)
    made.left_out["__main__:double is in no module that can be imported"] = 3
    made.write()
    with pytest.raises(record.UsageError, match=r"no recorded kernels in .*: __main__:double is in no module"):
        record.read(tmp_path)


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    made = record.Recording(tmp_path / "file" / "folder")
    made.left_out["a reason"] = 1
    with pytest.warns(RuntimeWarning, match="what kernels were called with is not recorded: NotADirectoryError"):
        made.write()


@pytest.mark.long
def test_a_kernel_that_has_changed_is_told_without_a_traceback(content, tmp_path):
    made = json.loads(content)
    made["kernels"][0] |= {"module": "nowhere"}
    (tmp_path / "a.json").write_text(json.dumps(made))
    found = tune("--recorded", tmp_path)
    assert found.returncode == 2
    left_out, none = found.stderr.splitlines()
    assert left_out.startswith("tilebook: left out: nowhere:scale_kernel cannot be imported: ModuleNotFoundError")
    assert none == "tilebook: none of the recorded kernels can be tuned"


@pytest.mark.parametrize(
    "rule", [{"normal": "x"}, {"uniform": [1]}, {"below": [1]}, {"cumulative": -3}, {"values": "abc"}, {"step": {}}]
)
def test_a_rule_of_nonsense_is_refused_before_a_tune(rule, tmp_path):
    (tmp_path / "rules.json").write_text(json.dumps({"others:*": {"x": rule}}))
    with pytest.raises(record.UsageError, match=r"rule others:\* x: "):
        record.rules(tmp_path / "rules.json")


def test_rules_without_a_record_are_refused(tmp_path):
    (tmp_path / "rules.json").write_text("{}")
    found = tune("--rules", tmp_path / "rules.json")
    assert (found.returncode, found.stderr) == (2, "tilebook: --rules goes with --recorded\n")


def test_a_program_that_ends_where_it_is_imported_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "ends_at_import.py").write_text("raise SystemExit(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(record.UsageError, match="ends_at_import:kernel cannot be imported: SystemExit: 2"):
        imported("ends_at_import", "kernel")


def test_calls_that_differ_in_the_kind_of_a_number_or_in_which_tensors_are_one_are_recorded(tmp_path):
    x, y = torch.randn(2, 100)
    with recording(tmp_path):
        for factor in (3.0, 4.5, 1.0, 0.0, -1.0):  # the second is of the first's kind, the last are too many
            others.scaled(others.scale_kernel, x, factor)
        grid = lambda meta: (100 // meta["BLOCK"] + 1,)  # noqa: E731
        others.scale_kernel[grid](y, y, 100, 3.0)
    (entry,) = record.read(tmp_path)
    (problem,) = entry.problems.values()
    told = [(call.values["factor"], call.aliases) for call in problem.calls]
    assert told == [(3.0, ()), (1.0, ()), (0.0, ()), (3.0, (("y", "x"),))]
    again = record.Recorded.of(problem.content())
    assert [call.content() for call in again.calls] == [call.content() for call in problem.calls]


def test_a_key_has_so_many_calls_of_other_shapes_and_no_more(tmp_path):
    with recording(tmp_path):
        for rows in range(40, 50):
            others.columns(torch.randn(rows, 2))
    (entry,) = record.read(tmp_path)
    (problem,) = entry.problems.values()
    assert [call.values["rows"] for call in problem.calls] == [40, 41, 42, 43]


def test_what_is_no_file_of_a_folder_is_passed_over(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    assert len(record.read(tmp_path)) == 1
    with pytest.raises(record.UsageError, match="no recorded kernels"):
        record.read(tmp_path / "pipe.json")


_FORKS = """
import os, sys, torch, others
x = torch.randn(40)
others.scaled(others.scale_kernel, x)
if not os.fork():
    for _ in range(3):
        others.scaled(others.scale_kernel, x)
    others.scaled(others.scale_kernel, x[:20])
    sys.exit()
if not os.fork():
    sys.exit()
os.wait(), os.wait()
others.scaled(others.scale_kernel, x)
"""


def test_processes_that_are_forked_off_have_records_of_their_own(tmp_path):
    (tmp_path / "forks.py").write_text(_FORKS)
    folders = os.pathsep.join(each for each in sys.path if each)
    variables = {"PYTHONPATH": folders, "TRITON_INTERPRET": "1", "TILEBOOK_TRITON": f"record:{tmp_path / 'records'}"}
    command = [sys.executable, "forks.py"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (entry,) = record.read(tmp_path / "records")
    counts = {json.loads(key)["key"]["n"]: problem.count for key, problem in entry.problems.items()}
    assert counts == {40: 5, 20: 1}
    assert len(list((tmp_path / "records").iterdir())) == 2
