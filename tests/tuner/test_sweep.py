"""A sweep records every candidate, whatever becomes of it, and goes on where it was cut short."""

import json
import random
from concurrent.futures import Future

import pytest
from click.testing import CliRunner
from fakes import GPU, FakePool, FakeRunner
from toy import SPACE, Scaling, make_op

from tilebook.cli import main
from tilebook.errors import CompilerError
from tilebook.op import Config, Space, UsageError
from tilebook.registry import Failure, Status
from tilebook.tuner.process.runner import Attempt, Candidate
from tilebook.tuner.progress import Run
from tilebook.tuner.sweeps.sweep import read, record

PROBLEM = Scaling(64, 64)
FEASIBLE = SPACE.feasible(PROBLEM, GPU)
DEFAULT = SPACE.default(PROBLEM, GPU)


def cost(candidate: Candidate) -> float | Failure:
    if candidate.implementation == "torch":
        return 2.0
    return 1.0 + 0.01 * candidate.config.number("num_warps") + candidate.config.number("BLOCK") / 1e4


def sweep(path, runner=None, pool=None, op=None, **options):
    run = Run(1, True)
    record(op or make_op(), PROBLEM, GPU, path, pool or FakePool(), runner or FakeRunner(cost), run, **options)
    return run.done[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sweep.jsonl"


def test_a_whole_space_is_recorded_with_the_other_implementations(path):
    state = sweep(path)
    found = read(path)
    ours = [each for each in found.measured if each.candidate.implementation == "triton"]
    assert {each.candidate.config for each in ours} == set(FEASIBLE)
    assert len(ours) == len(FEASIBLE) == found.header["feasible"] == found.header["configs"]
    assert {each.candidate.implementation for each in found.measured} == {"triton", "torch"}
    assert found.header["whole"]
    assert found.header["default"] == dict(DEFAULT)
    assert found.device == GPU
    assert all(len(each.attempt.samples_ms) == 15 and each.run_s >= 0 for each in found.measured)
    assert all(each.compiled.binaries[0].registers == 64 for each in ours)
    assert state.tried == state.limit == len(FEASIBLE) + 1


@pytest.mark.parametrize("external", ["", "some-package"])
def test_the_space_of_another_implementation_is_recorded_on_request(path, external):
    op, pool = make_op(), FakePool()
    axes = {"TILE": (1, 2, 4)}
    space = Space(axes, lambda *_: None, lambda *_: Config(TILE=2))
    op.implementation("other", space=space, external=external)(op.tunable.function)
    runner = FakeRunner(lambda c: 1.0 + c.config.get("TILE", 4))
    state = sweep(path, runner, pool, op, implementation="other")
    found = read(path)
    assert found.implementation == found.header["implementation"] == "other"
    assert {each.candidate.config["TILE"] for each in found.ours} == {1, 2, 4}
    assert [each.compiled is None for each in found.ours] == [bool(external)] * 3
    assert len(pool.submitted) == (0 if external else 3)
    assert {each.candidate.implementation for each in found.measured} == {"other", "torch"}
    assert (state.default_ms, state.best) == (pytest.approx(3.0, rel=0.02), "other TILE=1")
    with pytest.raises(UsageError, match="differs"):
        sweep(path, op=op)
    with pytest.raises(UsageError, match="there are triton, other"):
        sweep(path, op=op, implementation="torch")


def test_a_sample_of_a_space_has_the_default_and_is_the_same_every_time(path, tmp_path):
    sweep(path, most=10)
    sweep(tmp_path / "again.jsonl", most=10)
    first, again = read(path), read(tmp_path / "again.jsonl")
    configs = {each.candidate.config for each in first.measured if each.compiled}
    assert len(configs) == 10
    assert DEFAULT in configs
    assert configs == {each.candidate.config for each in again.measured if each.compiled}
    assert not first.header["whole"]


def test_what_fails_is_a_line_with_its_reason(path):
    class Broken(FakePool):
        def submit(self, op, implementation, problem, config):
            if config["BLOCK"] != 32:
                return super().submit(op, implementation, problem, config)
            future: Future = Future()
            future.set_exception(CompilerError("Traceback\n  a frame\nKeyError: 'out of luck'"))
            return future

    def risky(candidate):
        return Failure.RUN_TIMEOUT if candidate.config.get("BLOCK") == 64 else cost(candidate)

    pool = Broken(broken=lambda c: "spills" if c.number("BLOCK") == 128 else None)
    sweep(path, FakeRunner(risky), pool)
    for block, failure, status in (
        (32, Failure.COMPILE_ERROR, Status.REJECTED),
        (64, Failure.RUN_TIMEOUT, Status.FAILED),
        (128, Failure.SPILLS, Status.REJECTED),
    ):
        found = [each for each in read(path).measured if each.candidate.config.get("BLOCK") == block]
        assert found
        assert {(each.attempt.failure, each.status) for each in found} == {(failure, status)}
        assert all(each.attempt.reason for each in found)


def test_only_what_is_five_times_slower_than_the_best_is_not_sampled(path):
    limits = []

    class Strict(FakeRunner):
        def attempt(self, candidate, most_ms):
            limits.append(most_ms)
            attempt = super().attempt(candidate, most_ms)
            if most_ms is not None and attempt.time_ms > most_ms:
                return Attempt(Failure.SLOW, "slow", attempt.time_ms)
            return attempt

    slow = lambda c: 4.0 if c.config.get("num_warps") == 16 else 9.0 if c.config.get("BLOCK") == 16 else 1.0  # noqa: E731
    sweep(path, Strict(slow, noise=0.0))
    for each in read(path).measured:
        dropped = each.candidate.config.get("BLOCK") == 16 and each.candidate.config["num_warps"] != 16
        if dropped and each.candidate.config != DEFAULT and each.attempt.failure:
            assert each.attempt.failure is Failure.SLOW
            assert each.attempt.time_ms == 9.0
            assert "9.0 times slower than the best" in each.attempt.reason
        else:
            assert each.attempt.failure is None
    assert set(limits) - {None} <= {slow_best * 5 for slow_best in (9.0, 4.0, 1.0)}


class _Killed(BaseException):
    pass


def test_an_interrupted_sweep_goes_on_with_what_is_left(path):
    class Mortal(FakeRunner):
        def attempt(self, candidate, most_ms):
            if len(self.attempted) == 12:
                raise _Killed
            return super().attempt(candidate, most_ms)

    with pytest.raises(_Killed):
        sweep(path, Mortal(cost))
    before = path.read_bytes()
    rest = FakeRunner(cost)
    sweep(path, rest)
    assert path.read_bytes().startswith(before)
    assert len(rest.attempted) == len(FEASIBLE) + 1 - 12
    assert len({each.candidate for each in read(path).measured}) == len(read(path).measured) == len(FEASIBLE) + 1
    idle = FakeRunner(cost)
    sweep(path, idle)
    assert idle.attempted == []


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_torn_last_line_is_dropped_and_measured_again(path, cut):
    sweep(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    runner = FakeRunner(cost)
    sweep(path, runner)
    lines = path.read_text().splitlines()
    assert len(lines) == len(FEASIBLE) + 2
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert len(runner.attempted) == 1


def test_a_torn_header_begins_anew(path):
    sweep(path)
    path.write_bytes(path.read_bytes()[:30])
    sweep(path)
    assert len(read(path).measured) == len(FEASIBLE) + 1


@pytest.mark.parametrize("options", [{"most": 9}, {"seed": 1}])
def test_a_sweep_of_something_else_is_refused_and_left_alone(path, options):
    sweep(path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="differs"):
        sweep(path, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello\n", b"hello", b'{"format":"tilebook-registry"}\n', b"[]\n", b"\xff\n"])
def test_any_other_file_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(UsageError):
        sweep(path)
    assert path.read_bytes() == content


def test_four_hundred_configs_stay_below_half_a_megabyte(path):
    random.seed(0)
    sweep(path, pool=FakePool(code=lambda c: f"{random.getrandbits(256):064x}"))
    lines = path.read_text().splitlines()
    assert 400 * max(map(len, lines[1:])) < 500_000


def test_without_a_gpu_a_sweep_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(main, ["sweep", "attention_fwd", "--shape", "B1,H2,S64,D64", "--out", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no GPU here" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
