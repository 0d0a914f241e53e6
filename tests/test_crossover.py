"""`tilebook bench crossover`, tried on the CPU."""

import json

import pytest
import torch
from click.testing import CliRunner

from tilebook.cli import main
from tilebook.report import crossover


def row(tokens, times, direction="forward"):
    return {"head_dim": 64, "tokens": tokens, "batch": 1, "direction": direction, "found": times}


def test_the_length_is_where_times_cross():
    assert crossover.crossing([(256, 0.5), (1024, 2.0)]) == pytest.approx(512)
    assert crossover.crossing([(1024, 2.0), (4096, 3.0), (256, 0.5)]) == pytest.approx(512)
    assert crossover.crossing([(256, 2.0), (1024, 0.5), (4096, 2.0)]) == pytest.approx(2048)  # the last time they do
    assert crossover.crossing([(256, 1.0), (1024, 2.0)]) == 256
    assert crossover.crossing([(256, 2.0), (1024, 0.9)]) is None
    assert crossover.crossing([]) is None


def test_lengths_at_which_one_of_both_could_not_run_say_nothing():
    rows = [
        row(256, {"exact": {"ms": 1.0}, "linear": {"ms": 2.0}, "gated": {"failed": "no"}}),
        row(1024, {"exact": {"ms": 4.0}, "linear": {"ms": 2.0}, "gated": {"failed": "no"}}),
        row(4096, {"exact": {"failed": "no"}, "linear": {"ms": 9.0}, "gated": {"failed": "no"}}),
    ]
    (found,) = crossover.crossovers(rows)
    assert found["tokens"] == {"linear": pytest.approx(512), "gated": None}
    assert "head dim 64, forward, linear: 512" in crossover.text(rows)
    assert "gated: not up to 4096" in crossover.text(rows)
    memory, time = crossover.panels(rows)[1], crossover.panels(rows)[0]
    assert (memory.lines, list(time.lines)) == ({}, ["exact", "linear"])


def test_a_length_at_which_nobody_can_run_is_told(monkeypatch):
    monkeypatch.setattr(crossover, "_once", lambda *_: 1 / 0)
    rows = list(crossover.measured([16], [8], 1, 4, "cpu", 2))
    assert all(each == {"failed": "ZeroDivisionError: division by zero"} for each in rows[0]["found"].values())
    assert "linear ZeroDivisionError: division by zero" in crossover.line(rows[1])


def test_each_contender_computes_what_it_is_named_for():
    q, k, v, g = (x.detach() for x in crossover._drawn(40, 8, 2, "cpu")[0])
    q, k, v = q.float(), k.float(), v.float()
    functions = crossover.contenders(5)
    assert list(functions) == ["exact", "window 5", "linear", "gated", "performer"]
    found = {name: function(q, k, v, g) for name, function in functions.items()}
    first = torch.arange(40)[:, None] - torch.arange(40)
    for name, seen in (("exact", first >= 0), ("window 5", (first >= 0) & (first < 5))):
        scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(found[name], scores.softmax(-1) @ v, rtol=1e-4, atol=1e-4)
    for n in range(2):  # and none sees what comes later
        other = functions[["linear", "gated"][n]](q[:, :, :7], k[:, :, :7], v[:, :, :7], g[:, :, :7])
        torch.testing.assert_close(other, found[["linear", "gated"][n]][:, :, :7], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["gated"], functions["gated"](q, k, v, 2 * g))


def test_the_command_measures_prints_and_writes(tmp_path):
    out = tmp_path / "there" / "crossover.json"
    small = ["--device", "cpu", "--head-dim", "16", "--heads", "1", "--window", "8", "--rounds", "2"]
    done = CliRunner().invoke(main, ["bench", "crossover", *small, "--lengths", "48,16", "--out", str(out)])
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert [(each["tokens"], each["direction"]) for each in document["results"]] == [
        (16, "forward"), (16, "with gradients"), (48, "forward"), (48, "with gradients")
    ]  # fmt: skip
    assert all(each["ms"] > 0 for found in document["results"] for each in found["found"].values())
    assert [each["direction"] for each in document["crossover"]] == ["forward", "with gradients"]
    assert "faster than exact attention" in done.stdout
    assert "B1,S48,D16 forward: exact" in done.stderr
    assert out.with_suffix(".png").exists()
    done = CliRunner().invoke(main, ["bench", "crossover", *small, "--lengths", "16,48", "--seconds", "0.000001"])
    assert "S48" not in done.stderr


@pytest.mark.parametrize("lengths", ["0", "16,", "a", "-3"])
def test_lengths_that_are_none_are_refused(lengths):
    done = CliRunner().invoke(main, ["bench", "crossover", "--lengths", lengths])
    assert done.exit_code == 2
    assert "256,1024,4096" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_it_says_so():
    done = CliRunner().invoke(main, ["bench", "crossover"])
    assert (done.exit_code, done.stderr) == (2, "tilebook: there is no GPU here; --device cpu tries the command\n")
