"""`tilebook verify` on verdicts of other people's kernels: what passes is trusted and serves, what fails does not."""

import dataclasses
import json
import shutil

import others
import plain
import pytest
import torch
from click.testing import CliRunner
from fakes import ENVIRONMENT
from recorded import OneProcess, recording
from served import GPU, on_an_h200, stored, verdict

import tilebook
from tilebook.cli import main
from tilebook.foreign import serving
from tilebook.foreign.kernel import Kernel, autotuner, key_of
from tilebook.registry import Environment, Registry
from tilebook.tuner.audit.subjects import Bench

X, ROWS = torch.randn(100), torch.randn(64, 2)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "record"
    tilebook.give_space(plain.shift_kernel, {"BLOCK": (16, 32, 64), "num_warps": (2, 4)})
    with recording(folder) as made:
        others.columns(ROWS)
        others.columns(ROWS[:50])
        others.scaled(others.first_is_wrong, X)
        others.total(torch.randn(200))
        plain.shift(X)
    assert made.left_out == {}
    yield folder
    del plain.shift_kernel.run


@pytest.fixture
def registry(tmp_path, monkeypatch):
    on_an_h200(monkeypatch, tmp_path / "registry.db")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "shipped.db")
    here = Bench(GPU, ENVIRONMENT, lambda mode: OneProcess(0, mode, worker="interpreted_worker"))
    monkeypatch.setattr("tilebook.tuner.audit.run.bench", lambda index: here)
    return tmp_path / "registry.db"


def imported(tuner, args, *ranked, default=None):
    """A stranger's verdict that these configs won."""
    made = verdict(tuner, args, *ranked)
    finalists = [dataclasses.replace(each, default=n == default) for n, each in enumerate(made.finalists)]
    if default is not None:
        made = dataclasses.replace(made, default_time_ms=finalists[default].time_ms)
    return dataclasses.replace(made, finalists=tuple(finalists), origin="imported", trusted=False)


def verify(*arguments, command="verify", status=0):
    done = CliRunner().invoke(main, [command, *map(str, arguments), "--format", "json"], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


def found(told):
    return {row["op"].partition(":")[2]: row for row in told["verdicts"]}


def ranked(tuner, args, key=None):
    serving.reload()
    kernel = Kernel(tuner)
    chosen = serving.book().ranked(kernel, kernel.problem(key or key_of(tuner, args, {})), True)
    return [(config["BLOCK"], config.get("FAULT", 0)) for config in chosen]


def test_imports_are_verified_by_the_calls_that_were_recorded(record, registry):
    columns = others.columns_kernel, (ROWS, ROWS, 64, 2)
    wrong_first = others.first_is_wrong, (X, X, 100, 3.0)
    total = others.total_kernel, (torch.randn(200), torch.zeros(1), 200)
    pick = others.pick_kernel, (X, torch.arange(100), X, 100)
    shift = autotuner(plain.shift_kernel)
    key = shift.key({"x": X, "y": X, "BLOCK": 16, "num_warps": 2})
    stale = verdict(*total, total[0].configs[0], total[0].configs[2])
    stored(
        registry,
        imported(*columns, columns[0].configs[3], columns[0].configs[0]),  # its winner is wrong on ragged rows
        imported(*wrong_first, wrong_first[0].configs[3], wrong_first[0].configs[1], default=1),
        dataclasses.replace(stale, environment=Environment({**ENVIRONMENT, "triton": "3.5.0"})),
        imported(*pick, pick[0].configs[1]),  # nobody has recorded its calls, nor those of so many columns
        imported(columns[0], (ROWS, ROWS, 64, 3), columns[0].configs[1]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("served.key_of", lambda *call: key)
        stored(registry, imported(shift, (), shift.configs[-1]))
    assert ranked(*columns) == ranked(*wrong_first) == ranked(shift, (), key) == []

    told = verify("--kernels", record)
    rows = found(told)
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "columns_kernel": "quarantined", "first_is_wrong": "kept", "total_kernel": "demoted", "shift_kernel": "kept",
    }  # fmt: skip
    assert "max error" in rows["columns_kernel"]["reason"]
    assert told["cannot_serve"] == 2
    assert ranked(*columns) == []
    assert (16, 0) in ranked(*wrong_first)
    assert ranked(*wrong_first)[0] == ranked(*total)[0] == (64, 0)
    assert ranked(shift, (), key)[0] == (64, 0)
    with Registry.open(registry) as held:
        (revocation,) = held.revocations()
        environments = {each.op: each.environment.versions["triton"] for each in held.verdicts()}
    assert (revocation.op, revocation.config["FAULT"]) == ("others:columns_kernel", others.RAGGED)
    assert environments["others:total_kernel"] == ENVIRONMENT["triton"]
    assert found(verify("--kernels", record)) == {}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("command", ["verify", "audit"])
def test_the_users_own_records_are_known_without_being_named(command, record, registry, tmp_path):
    shutil.copytree(record, tmp_path / "data" / "tilebook" / "recorded")
    made = verdict(others.columns_kernel, (ROWS, ROWS, 64, 2), others.columns_kernel.configs[2])
    stored(registry, dataclasses.replace(made, environment=Environment({**ENVIRONMENT, "triton": "3.5.0"})))
    told = verify("--op", made.op, command=command)
    assert [row["outcome"] for row in told["verdicts"]] == ["kept"]
    assert told["cannot_serve"] == 0
