"""The registry that comes with the package."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import tilebook.registry
from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.dispatch import Snapshot
from tilebook.dispatch.snapshot import COMPILED
from tilebook.registry import Layers
from tilebook.registry.layers import SHIPPED

VERDICTS = [verdict for _, verdict in Layers([("shipped", str(SHIPPED))]).verdicts()]


@pytest.mark.parametrize("name", sorted({verdict.op for verdict in VERDICTS}))
def test_every_verdict_is_of_the_kernels_as_they_are(name):
    """`tilebook recheck` renews those whose machine code a change has left as it was; the others are measured anew."""
    op = ops.get(name)
    for verdict in (each for each in VERDICTS if each.op == name):
        assert (verdict.origin, verdict.kernel) == ("shipped", op.digest)
        for each in {op.implementations[each] for each, _ in verdict.ranking() if each in op.implementations}:
            assert each.external or each.digest in ("", verdict.source_of(each.name)), each.name


def test_what_won_is_what_serves_where_it_was_measured_unless_pytorchs_own_is_as_fast(monkeypatch):
    gpu = devices.find("H200")
    snapshot = Snapshot(gpu)
    for verdict in VERDICTS:
        op = ops.get(verdict.op)
        problem = op.problem.from_key(verdict.problem)
        here = [name for name, _ in verdict.ranking() if name in op.implementations]  # some were removed since
        ready = [name for name in here if name not in COMPILED]  # no program waits for a compiler
        names = [name for name in ready if op.implementations[name].can_run(problem, gpu)]
        monkeypatch.setattr(devices, "environment", lambda known=verdict.environment.versions: known)
        choice = snapshot.choose(op, problem)
        assert choice.source == "exact", problem.label
        ms = {each.implementation: each.time_ms for each in reversed(verdict.finalists)}
        native = [ms[name] for name in names if op.native(name, problem, gpu)]
        if op.fused(problem) and native and min(native) < 1.02 * ms[names[0]]:
            assert op.native(choice.implementation.name, problem, gpu), problem.label
        else:
            assert choice.implementation.name == names[0], problem.label


@pytest.mark.parametrize(
    "file", sorted(Path(tilebook.registry.__file__).parents[1].glob("shipped/*/*.jsonl")), ids=lambda file: file.stem
)
def test_what_ships_is_imported_like_any_export(file, tmp_path):
    result = CliRunner().invoke(main, ["import", str(file), "--registry", str(tmp_path / "new.db")])
    assert "skipped" not in result.output
    assert f"{len(file.read_text().splitlines()) - 1} verdicts imported" in result.output
