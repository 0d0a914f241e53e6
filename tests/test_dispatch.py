"""Dispatch serves exact, then near, then the default, and never stops a program."""

import sqlite3
import warnings

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook import op as ops
from tilebook.op import Config
from tilebook.registry import Device, Environment, Registry, Verdict, VerdictStatus

GPU = devices.find("H200")
OP = ops.get("attention_fwd")
PROBLEM = OP.problem.parse("B4,H16,S2048,D64", "bf16")
DEFAULT = OP.tunable.space.default(PROBLEM, GPU)
OTHER = next(c for c in OP.tunable.space.feasible(PROBLEM, GPU) if c != DEFAULT)


def verdict(problem=PROBLEM, config=OTHER, implementation="triton", **changes):
    fields = {
        "op": OP.name,
        "problem": problem.key,
        "device": Device(GPU.name, GPU.arch, GPU.sm_count),
        "environment": Environment({"triton": "3.6.0"}),
        "kernel": OP.digest,
        "status": VerdictStatus.MEASURED,
        "implementation": implementation,
        "config": dict(config),
        "time_ms": 1.0,
        "default_time_ms": 2.0,
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
    }
    return Verdict(**{**fields, **changes})


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Chooses as on an H200 whose only registry holds the given verdicts."""
    path = tmp_path / "registry.db"
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(path))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "none.db")
    monkeypatch.setattr(devices, "current", lambda index=0: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def chosen(*verdicts, problem=PROBLEM):
        dispatch.reload()
        with Registry.open(path, write=True) as registry:
            registry.merge((), verdicts)
        return dispatch.choose(OP, problem, torch.device("cuda", 0))

    chosen.path = path
    yield chosen
    dispatch.reload()


def test_exact_verdict_is_served_with_its_layer(choose):
    choice = choose(verdict())
    assert (choice.source, choice.layer, choice.config) == ("exact", "explicit", OTHER)


def test_nearest_verdict_serves_where_its_config_is_feasible(choose):
    choice = choose(
        verdict(),
        verdict(problem=OP.problem.parse("B4,H16,S64,D64", "bf16"), config=DEFAULT),
        problem=OP.problem.parse("B4,H16,S3000,D64", "bf16"),
    )
    assert (choice.source, choice.config) == ("nearest", OTHER)


@pytest.mark.parametrize("shape", ["B4,H16,S2048,D128", "B4,H16,S2048,D64,causal"])
def test_another_head_dimension_or_mask_is_never_near(choose, shape):
    assert choose(verdict(), problem=OP.problem.parse(shape, "bf16")).source == "default"


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "0" * 64},
        {"trusted": False, "origin": "imported"},
        {"device": Device("NVIDIA H100", "sm_90", 132)},
        {"device": Device("NVIDIA H200", "sm_90", 114)},
        {"config": {**DEFAULT, "BLOCK_M": 96}},
        {"config": {**DEFAULT, "ir": 1}},
        {"implementation": "unheard_of"},
    ],
    ids=["old kernel", "untrusted", "other GPU", "other SM count", "outside the space", "unknown axis", "unknown name"],
)
def test_what_must_not_be_served_is_not(choose, changes):
    assert choose(verdict(**changes)).source == "default"


def test_a_winner_that_is_not_here_gives_way_to_the_best_finalist(choose, monkeypatch):
    evidence = {"candidates": [{"implementation": "triton", "config": dict(OTHER), "time_ms": 1.2}]}
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    choice = choose(verdict(implementation="flash_attention_9", config=Config(), evidence=evidence))
    assert (choice.implementation.name, choice.config) == ("triton", OTHER)


def test_missing_explicit_registry_warns_once_and_serves_defaults(choose):
    dispatch.reload()
    with pytest.warns(RuntimeWarning, match="default configs"):
        assert dispatch.choose(OP, PROBLEM, torch.device("cuda", 0)).config == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose(OP, PROBLEM, torch.device("cuda", 0))


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 4096])
def test_broken_registry_warns_and_serves_defaults_and_stays_as_it_was(choose, content):
    choose.path.write_bytes(content)
    dispatch.reload()
    with pytest.warns(RuntimeWarning):
        assert dispatch.choose(OP, PROBLEM, torch.device("cuda", 0)).config == DEFAULT
    assert choose.path.read_bytes() == content


def test_registry_of_somebody_else_is_not_read(choose):
    with sqlite3.connect(choose.path) as database:
        database.execute("create table verdict (a, b)")
    dispatch.reload()
    with pytest.warns(RuntimeWarning):
        assert dispatch.choose(OP, PROBLEM, torch.device("cuda", 0)).source == "default"


def test_during_graph_capture_nothing_is_read(choose, monkeypatch):
    dispatch.reload()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dispatch, "Snapshot", None)
    assert dispatch.choose(OP, PROBLEM, torch.device("cuda", 0)).source == "default"


def test_on_the_cpu_pytorch_runs():
    q = torch.randn(1, 2, 8, 16)
    assert dispatch.find(OP, q, q, q, False, 0.25) is None
    assert torch.equal(tilebook.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_traces_pytorchs_own_code_without_a_break(training):
    q, w = torch.randn(1, 2, 8, 16, requires_grad=training), torch.randn(16)
    up, down = torch.randn(32, 16), torch.randn(16, 32)

    def model(q):
        x = tilebook.rms_norm(tilebook.attention(q, q, q, causal=True), w)
        return tilebook.mlp(x, up, up[:, 0], down, w)

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), model(q))


def test_a_choice_that_raises_is_replaced_after_one_warning(monkeypatch):
    args = OP.problem.parse("B1,H1,S32,D16", "bf16").inputs("cpu", 0)
    calls = []

    def broken(*inputs, config=None):
        calls.append(config)
        raise RuntimeError("no such instruction")

    key = dispatch._key(OP, args)
    implementation = ops.Implementation(OP, "broken", broken)
    dispatch._memo[key] = dispatch.Choice(implementation, None, "exact", OP.problem.of(*args))
    try:
        with pytest.warns(RuntimeWarning, match="no such instruction"):
            first = dispatch.run(OP, *args)
        second = dispatch.run(OP, *args)
    finally:
        dispatch.reload()
    assert torch.equal(first[0], second[0])
    assert len(calls) == 1


def test_a_call_that_follows_from_another_is_chosen_once(monkeypatch):
    args = OP.problem.parse("B1,H1,S32,D16", "bf16").inputs("cpu", 0)
    asked = []
    monkeypatch.setattr(
        dispatch, "_choice", lambda op, given, real=dispatch._choice: asked.append(op) or real(op, given)
    )
    try:
        first = dispatch.Choice(OP.implementations["torch"], None, "exact", PROBLEM)
        outputs = [first.follow(OP, (args[0],), *args) for _ in range(3)]
        assert len(asked) == 1
        spread = args[0].repeat(1, 1, 1, 2)[..., :16]  # the same values in other strides
        outputs.append(first.follow(OP, (spread,), spread, *args[1:]))
        assert len(asked) == 2
        with dispatch.use("torch"):
            outputs.append(first.follow(OP, (args[0],), *args))
    finally:
        dispatch.reload()
    assert all(torch.equal(each[0], outputs[0][0]) for each in outputs)


def test_a_choice_that_follows_and_raises_is_replaced_for_good():
    args = OP.problem.parse("B1,H1,S32,D16", "bf16").inputs("cpu", 0)
    calls = []

    def broken(*inputs, config=None):
        calls.append(config)
        raise RuntimeError("no such instruction")

    first = dispatch.Choice(OP.implementations["torch"], None, "exact", PROBLEM)
    implementation = ops.Implementation(OP, "broken", broken)
    dispatch._memo[dispatch._key(OP, args)] = dispatch.Choice(implementation, None, "exact", OP.problem.of(*args))
    try:
        with pytest.warns(RuntimeWarning, match="no such instruction"):
            first.follow(OP, (args[0],), *args)
        first.follow(OP, (args[0],), *args)
    finally:
        dispatch.reload()
    assert len(calls) == 1


def test_out_of_memory_is_the_callers_to_handle():
    args = OP.problem.parse("B1,H1,S32,D16", "bf16").inputs("cpu", 0)

    def hungry(*inputs, config=None):
        raise torch.OutOfMemoryError("too much")

    implementation = ops.Implementation(OP, "hungry", hungry)
    dispatch._memo[dispatch._key(OP, args)] = dispatch.Choice(implementation, None, "exact", OP.problem.of(*args))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            dispatch.run(OP, *args)
    finally:
        dispatch.reload()


def test_misses_are_counted_and_weighed_and_verdicts_are_not(choose):
    covered, missed = choose(verdict()), choose(problem=OP.problem.parse("B4,H16,S2048,D128", "bf16"))
    dispatch._memo[OP.name, 1], dispatch._memo[OP.name, 2] = covered, missed
    covered.calls, missed.calls = 5, 3
    (miss,) = dispatch.misses()
    assert (miss.problem, miss.calls) == (missed.problem.key, 3)
    assert miss.time_ms > 0


def test_memory_of_choices_is_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "_MOST_CHOICES", 3)
    try:
        for seq in range(1, 9):
            dispatch.run(OP, *OP.problem.parse(f"B1,H1,S{seq},D16", "bf16").inputs("cpu", 0))
        assert len(dispatch._memo) == 3
    finally:
        dispatch.reload()


def test_importing_tilebook_is_light():
    import subprocess
    import sys

    code = "import sys, tilebook; print([m for m in ('torch', 'triton', 'sqlalchemy', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
