"""A shape that no GPU of the catalogue has memory for is refused at once, wherever it is written."""

import dataclasses

import pytest
from click.testing import CliRunner

from tilebook import bounds
from tilebook import op as ops
from tilebook.cli import main
from tilebook.device import CATALOGUE
from tilebook.op import UsageError

HUGE = "B8,H16,S99999999999,D128"
OPS = sorted(ops.ops())


def _enlarged(name):
    """Each dimension of the op's first example, enlarged beyond all measure, where the shape then says so."""
    problem = ops.get(name).problem
    example = problem.examples()[0]
    for field in dataclasses.fields(problem):
        if "letter" in field.metadata:
            label = dataclasses.replace(example, **{field.name: 99_999_999_999}).label
            if "99999999999" in label:
                yield label, example.dtype


@pytest.mark.parametrize("name", OPS)
def test_no_dimension_of_any_op_may_be_beyond_all_memory(name):
    enlarged = list(_enlarged(name))
    assert enlarged
    for label, dtype in enlarged:
        with pytest.raises(UsageError):
            ops.get(name).problem.parse(label, dtype)


@pytest.mark.parametrize(
    "command",
    [["tune", "attention"], ["explain", "attention_fwd"], ["explain", "attention_bwd"], ["sweep", "attention_fwd"]],
    ids=" ".join,
)
def test_commands_refuse_it_in_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    gpu = [] if command[0] == "sweep" else ["--gpu", "H200"]
    done = CliRunner().invoke(main, [*command, "--shape", HUGE, *gpu])
    assert (done.exit_code, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert "needs 1.32e+07 GB at least, and AMD Instinct MI300X, the largest of the catalogue, has 192 GB" in said or (
        "_bwd" in command[1] and "GB at least" in said
    )


def test_what_the_largest_gpu_holds_is_no_reason_to_refuse():
    most = max(each.memory for each in CATALOGUE.values())
    problem = ops.get("rms_norm_fwd").problem
    rows = most // (2 * 2 * 1024)
    assert problem.parse(f"M{rows - 50_000},N1024", "bf16")
    with pytest.raises(UsageError, match="one call of"):
        problem.parse(f"M{rows + 50_000},N1024", "bf16")


def test_a_cache_counts_as_a_whole_where_a_window_reads_a_part_of_it():
    with pytest.raises(UsageError, match="one call of"):
        ops.get("attention_decode").problem.parse("B1,H1,S1,Sk9999999999,W256,D64", "bf16")


def test_packed_sequences_that_would_be_counted_for_hours_are_refused():
    problem = ops.get("attention_varlen_fwd").problem
    text = next(iter(problem.suites().values()))[0].label
    few = problem.parse(text, "bf16")
    many = dataclasses.replace(few, batch=bounds.MOST_SEQUENCES + 1)
    with pytest.raises(UsageError, match="packed sequences are more than 65536"):
        many.check()
    few.check()


def test_a_stranger_s_verdict_on_such_a_problem_is_not_looked_at_again():
    problem = ops.get("attention_fwd").problem
    with pytest.raises(UsageError, match="GB at least"):
        dataclasses.replace(problem.parse("B8,H16,S1024,D128", "bf16"), seq_q=99_999_999_999).demand_room()
