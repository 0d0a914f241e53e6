"""Verdicts against the machine code of today's source: what is renewed, what is retired, what cannot be told here."""

import dataclasses
from concurrent.futures import Future

import pytest
from click.testing import CliRunner
from flat_verdict import flat_verdict

from tilebook import device as devices
from tilebook import op as ops
from tilebook import recheck as rechecking
from tilebook import registry as store
from tilebook.cli import main
from tilebook.tuner.process.compile import Binary, Compiled, CompilePool

OP = ops.get("rms_norm_fwd")
PROBLEM = OP.problem.parse("M64,N256", "bf16")
H200 = devices.find("H200")
CONFIGS = [dict(config) for config in OP.tunable.space.feasible(PROBLEM, H200)[:3]]
FIRST, SECOND, THIRD = CONFIGS
OLD = "0" * 64


def compiled(text):
    """What a candidate compiles to whose machine code is `text`."""
    return Compiled((Binary("kernel", text, 1, 0, 32, 0, 4, 1),))


class Pool:
    """Compiles without a compiler: each config to the code that a test says."""

    def __init__(self, codes):
        self.codes, self.asked = codes, []

    def __call__(self, device, workers):
        assert device == H200
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, op, implementation, problem_key, config):
        self.asked.append(dict(config))
        future = Future()
        future.set_result(compiled(self.codes[CONFIGS.index(dict(config))]))
        return future


def verdict(kernel=OLD, implementation="triton", codes=("a", "b", "c"), triton=None):
    """One whose finalists are the three configs with these codes, None for one that was kept without."""
    versions = {name: devices.environment()[name] for name in ("triton", "ptxas")}
    candidates = [
        {"implementation": "triton", "config": config, "time_ms": 1.0 + place}
        | ({} if code is None else {"code": compiled(code).fingerprint})
        for place, (config, code) in enumerate(zip(CONFIGS, codes, strict=True))
    ]
    candidates.append({"implementation": "removed_since", "config": {"BLOCK": 1}, "time_ms": 9.0})
    return flat_verdict(
        op="rms_norm_fwd",
        problem=PROBLEM.key,
        device=store.Device(H200.name, H200.arch, H200.sm_count),
        environment=store.Environment(versions | ({"triton": triton} if triton else {})),
        kernel=kernel,
        status=store.VerdictStatus.MEASURED,
        implementation=implementation,
        config=FIRST if implementation == "triton" else {},
        evidence={"candidates": candidates, "kernels": {"triton": kernel, "removed_since": OLD}},
    )


def check(given, codes, **options):
    pool = Pool(codes)
    (finding,) = rechecking.recheck([given], pool=pool, **options)
    return finding, pool.asked


def test_the_same_code_of_other_source_takes_the_digests_of_that_source():
    given = verdict()
    finding, _ = check(given, "abc")
    assert (finding.outcome, finding.changed) == ("renewed", ())
    assert rechecking.is_current(finding.after)
    assert not rechecking.is_current(given)
    assert finding.after.ranking() == given.ranking()
    assert [each.code for each in finding.after.finalists[:3]] == [compiled(c).fingerprint for c in "abc"]


@pytest.mark.parametrize("recorded", ["x", None], ids=["another code", "no code"])
def test_a_winner_that_cannot_be_shown_to_be_the_same_is_retired(recorded):
    finding, _ = check(verdict(codes=(recorded, "b", "c")), "abc")
    assert (finding.outcome, finding.after) == ("retired", None)
    assert [each.config for each in finding.changed] == [FIRST]


def test_finalists_with_other_code_leave_the_ranking_of_a_winner_with_the_same():
    finding, _ = check(verdict(), "axc")
    assert [each.config for each in finding.changed] == [SECOND]
    assert finding.outcome == "renewed"
    assert [config for name, config in finding.after.ranking() if name == "triton"] == [FIRST, THIRD]


def test_a_winner_of_another_package_stands_whatever_our_code_is():
    finding, _ = check(verdict(implementation="torch"), "xyz")
    assert finding.outcome == "renewed"
    assert [name for name, _ in finding.after.ranking()] == ["torch", "removed_since"]


def test_code_that_does_not_compile_any_more_is_another(monkeypatch):
    pool = Pool("abc")
    monkeypatch.setattr(pool, "submit", lambda *args: _done(Compiled((), 0.0, "compile_error", "no")))
    (finding,) = rechecking.recheck([verdict()], pool=pool)
    assert finding.outcome == "retired"


def _done(result):
    future = Future()
    future.set_result(result)
    return future


def test_what_has_the_source_of_today_is_compiled_only_on_demand():
    given = verdict(kernel=OP.digest)
    assert check(given, "abc") == (rechecking.Finding(given, "current"), [])
    finding, asked = check(given, "abc", everything=True)
    assert (finding.outcome, asked) == ("current", CONFIGS)
    finding, _ = check(given, "xbc", everything=True)
    assert finding.outcome == "retired"


def test_code_of_another_triton_is_not_compared():
    finding, asked = check(verdict(triton="1.0.0"), "abc")
    assert (finding.outcome, asked) == ("skipped", [])
    assert "1.0.0" in finding.reason


def test_a_candidate_that_several_verdicts_name_is_compiled_once():
    pool = Pool("abc")
    given = verdict()
    list(rechecking.recheck([given, dataclasses.replace(given, kernel="1" * 64)], pool=pool))
    assert pool.asked == CONFIGS


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A registry's path, and a way to say what the command's compilers make of its verdicts."""

    def compiling(codes):
        monkeypatch.setattr(
            rechecking.recheck, "__kwdefaults__", rechecking.recheck.__kwdefaults__ | {"pool": Pool(codes)}
        )

    return tmp_path / "registry.db", compiling


def run(*arguments):
    return CliRunner().invoke(main, ["recheck", *map(str, arguments)])


def test_the_command_renews_what_has_the_same_code_and_changes_nothing_when_it_checks(target):
    path, compiling = target
    with store.Registry.open(path, write=True) as registry:
        registry.record(verdict=verdict())
    compiling("abc")
    result = run("--registry", path, "--check")
    assert result.exit_code == 1, result.output
    with store.Registry.open(path) as registry:
        assert [each.kernel for each in registry.verdicts()] == [OLD]
    result = run("--registry", path)
    assert result.exit_code == 0, result.output
    assert "renewed: rms_norm_fwd" in result.output
    with store.Registry.open(path) as registry:
        assert OP.digest in [each.kernel for each in registry.verdicts()]


def test_the_command_lists_what_is_to_be_measured_and_fails(target):
    path, compiling = target
    with store.Registry.open(path, write=True) as registry:
        registry.record(verdict=verdict())
    compiling("xbc")
    result = run("--registry", path)
    assert result.exit_code == 1
    assert "retired: rms_norm_fwd" in result.output
    assert "to be measured: triton" in result.output


def test_a_package_takes_the_digests_of_today_and_keeps_no_others(target, monkeypatch):
    path, compiling = target
    with store.Registry.open(path.with_name("source.db"), write=True) as registry:
        registry.record(verdict=verdict())
        store.ship(registry, path)
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", path)
    compiling("abc")
    assert run().exit_code == 0
    with store.Registry.open(path) as registry:
        assert [(each.kernel, each.origin) for each in registry.verdicts()] == [(OP.digest, "shipped")]


@pytest.mark.usefixtures("forked")
def test_what_compilers_make_of_one_source_is_one_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with CompilePool(H200, workers=1) as pool:
        code = pool.submit("rms_norm_fwd", "triton", PROBLEM.key, FIRST).result().fingerprint
    given = verdict(kernel=OLD)
    finalists = (store.Finalist("triton", FIRST, 1.0, code=code),)
    (finding,) = rechecking.recheck([dataclasses.replace(given, finalists=finalists)], workers=1)
    assert finding.outcome == "renewed"
