"""Dispatch serves exact, then near, then the default, and never stops a program."""

import dataclasses
import sqlite3
import sys
import warnings

import pytest
import torch
from flat_verdict import flat_verdict

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook import op as ops
from tilebook.kernels.attention import flash4
from tilebook.kernels.attention.form import PLAIN
from tilebook.op import Config
from tilebook.registry import Device, Environment, Registry, Revocation, VerdictStatus

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
    return flat_verdict(**{**fields, **changes})


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Chooses as on an H200 whose only registry holds the given verdicts."""
    path = tmp_path / "registry.db"
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(path))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "none.db")
    monkeypatch.setattr(devices, "current", lambda index=0: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def chosen(*verdicts, problem=PROBLEM, revocations=()):
        dispatch.reload()
        with Registry.open(path, write=True) as registry:
            registry.merge((), verdicts, revocations)
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


def test_a_verdict_from_before_an_axis_is_served_as_it_was_made(choose):
    before = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "HEADS": 1, "DESCRIPTORS": 1}
    assert OP.tunable.space.later
    assert choose(verdict(config=before)).config == Config(before)


def test_a_config_that_is_asked_for_may_name_an_axis_as_it_was_before():
    q, k, v = (torch.zeros(1, 1, 8, 16) for _ in range(3))
    with dispatch.use("triton", Config({**OTHER, **OP.tunable.space.later})):
        assert dispatch.find(OP, q, k, v, PLAIN, 1.0).config == OTHER


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


@pytest.mark.parametrize("name", ["flash_attention_4", "flash_attention_9"])
def test_a_winner_that_is_not_here_gives_way_to_the_best_finalist(choose, monkeypatch, name):
    evidence = {"candidates": [{"implementation": "triton", "config": dict(OTHER), "time_ms": 1.2}]}
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(flash4, "_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # whoever imports it fails
    choice = choose(verdict(implementation=name, config=Config(), evidence=evidence))
    assert (choice.implementation.name, choice.config) == ("triton", OTHER)


def test_a_winner_that_is_installed_is_chosen_before_it_is_imported(choose, monkeypatch):
    monkeypatch.setattr(flash4, "_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    choice = choose(verdict(implementation="flash_attention_4", config=Config()))
    assert (choice.implementation.name, choice.source) == ("flash_attention_4", "exact")
    assert choice.config == flash4.FORWARD_SPACE.default(PROBLEM, GPU)


def revocation(config=OTHER, implementation="triton", **changes):
    return Revocation(**{"op": OP.name, "reason": "wrong", **changes}, implementation=implementation, config=config)


RUNNER_UP = next(c for c in OP.tunable.space.feasible(PROBLEM, GPU) if c not in (DEFAULT, OTHER))
RANKED = {
    "candidates": [
        {"implementation": "triton", "config": dict(OTHER), "time_ms": 1.0},
        {"implementation": "triton", "config": dict(RUNNER_UP), "time_ms": 1.1},
        {"implementation": "torch", "config": {}, "time_ms": 1.2},
    ]
}


def test_a_revoked_winner_gives_way_to_the_next_in_the_ranking(choose):
    choice = choose(verdict(evidence=RANKED), revocations=[revocation()])
    assert (choice.source, choice.config) == ("exact", RUNNER_UP)
    choice = choose(revocations=[revocation(RUNNER_UP)])
    assert (choice.source, choice.implementation.name) == ("exact", "torch")


def test_a_revoked_winner_is_not_served_to_its_neighbours_either(choose):
    near = OP.problem.parse("B4,H16,S3000,D64", "bf16")
    assert choose(verdict(), problem=near).config == OTHER
    choice = choose(verdict(), problem=near, revocations=[revocation()])
    assert (choice.source, choice.config) == ("default", DEFAULT)


def test_a_revoked_default_gives_way_to_the_feasible_config_fewest_steps_away(choose):
    choice = choose(revocations=[revocation(DEFAULT)])
    assert choice.source == "default"
    axes, value = OP.tunable.space.axes, OP.tunable.space.value
    steps = [abs(v.index(value(choice.config, axis)) - v.index(value(DEFAULT, axis))) for axis, v in axes.items()]
    assert sum(steps) == 1
    assert OP.tunable.space.reject(PROBLEM, choice.config, GPU) is None
    assert choose().config == choice.config


@pytest.mark.parametrize("status", ["measured", "predicted"])
def test_a_config_verified_on_another_problem_is_the_first_to_stand_in_for_a_revoked_default(choose, status):
    far = OP.problem.parse("B4,H16,S2048,D64,causal", "bf16")
    choice = choose(verdict(problem=far, status=status), revocations=[revocation(DEFAULT)])
    assert (choice.source, choice.config == OTHER) == ("default", status == "measured")


def test_where_every_config_is_revoked_pytorch_runs(choose):
    choice = choose(verdict(evidence=RANKED), revocations=[revocation({}, implementation="triton")])
    assert (choice.source, choice.implementation.name) == ("exact", "torch")
    choice = choose(problem=OP.problem.parse("B4,H16,S2048,D64,causal", "bf16"))
    assert (choice.source, choice.implementation.name, choice.config) == ("fallback", "torch", None)


def test_another_implementation_can_be_revoked(choose, monkeypatch):
    cudnn = OP.implementations["cudnn"]
    monkeypatch.setitem(OP.implementations, "cudnn", dataclasses.replace(cudnn, available=lambda device: True))
    won = verdict(implementation="cudnn", config={}, evidence=RANKED)
    assert choose(won).implementation.name == "cudnn"
    assert choose(won, revocations=[revocation({}, "cudnn", arch="sm_80")]).implementation.name == "cudnn"
    assert choose(won, revocations=[revocation({}, "cudnn", arch="sm_90")]).config == OTHER


def _second(q, k, v, form, scale, *extras, config):
    return q, q


def _second_as_it_was(q, k, v, form, scale, *extras, config):
    return q, k


SECOND = Config(TILE=2)


@pytest.fixture
def second(monkeypatch):
    """Another implementation with a space, for the time of a test; returns a verdict that it won, ours next."""
    monkeypatch.setattr(OP, "implementations", dict(OP.implementations))
    space = ops.Space({"TILE": (1, 2)}, lambda *_: None, lambda *_: Config(TILE=1))
    made = OP.implementation("second", space=space)(_second)

    def won(**evidence):
        kernels = {"triton": OP.digest, "second": made.digest}
        return verdict(implementation="second", config=SECOND, evidence={"kernels": kernels, **RANKED, **evidence})

    won.made, won.before = made, dataclasses.replace(made, function=_second_as_it_was)
    return won


def test_another_implementation_with_a_space_serves_what_it_won(choose, second):
    choice = choose(second())
    assert (choice.source, choice.implementation, choice.config) == ("exact", second.made, SECOND)
    near = choose(problem=OP.problem.parse("B4,H16,S3000,D64", "bf16"))
    assert (near.source, near.config) == ("nearest", SECOND)
    far = choose(problem=OP.problem.parse("B4,H16,S2048,D128", "bf16"))
    assert (far.source, far.implementation) == ("default", OP.tunable)


@pytest.mark.parametrize("kernels", [{"second": "0" * 64}, {}, {"third": "0" * 64}], ids=str)
def test_where_its_source_changed_or_is_not_told_the_next_candidate_serves(choose, second, kernels):
    choice = choose(second(kernels=kernels))
    assert (choice.source, choice.implementation.name, choice.config) == ("exact", "triton", OTHER)


def test_a_change_of_its_source_does_not_retire_the_verdict(choose, second):
    before = second(kernels={"second": second.before.digest})
    assert choose(before).config == OTHER
    assert OP.digest == before.kernel


def test_an_external_one_serves_whatever_its_version(choose, second, monkeypatch):
    external = dataclasses.replace(second.made, external="some-package")
    monkeypatch.setitem(OP.implementations, "second", external)
    choice = choose(second(kernels={"second": "some-package 4.0"}))
    assert (choice.implementation, choice.config) == (external, SECOND)


def test_an_external_one_that_won_before_it_had_a_space_runs_as_it_did(choose, second, monkeypatch):
    monkeypatch.setitem(OP.implementations, "second", dataclasses.replace(second.made, external="some-package"))
    choice = choose(verdict(implementation="second", config={}, evidence=RANKED))
    assert (choice.source, choice.implementation.name, choice.config) == ("exact", "second", Config(TILE=1))


def test_a_revocation_of_another_implementation_names_its_own_source(choose, second):
    assert choose(second(), revocations=[revocation(SECOND, "second", kernel=OP.digest)]).config == SECOND
    assert choose(second(), revocations=[revocation(SECOND, "second", kernel=second.made.digest)]).config == OTHER


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "0" * 64},
        {"arch": "sm_100"},
        {"triton": "<3.6"},
        {"op": "attention_bwd"},
        {"trusted": False, "origin": "imported"},
    ],
    ids=str,
)
def test_a_revocation_that_does_not_bear_on_this_changes_nothing(choose, changes):
    assert choose(verdict(), revocations=[revocation(**changes)]).config == OTHER


@pytest.mark.parametrize("changes", [{"kernel": OP.digest}, {"arch": "sm_90"}, {"triton": ">=3.6"}], ids=str)
def test_a_revocation_of_this_source_arch_and_triton_holds(choose, changes):
    assert choose(verdict(), revocations=[revocation(**changes)]).config == DEFAULT


def test_part_of_a_config_revokes_every_config_that_has_it(choose):
    part = {"num_warps": OTHER["num_warps"]}
    choice = choose(verdict(evidence=RANKED), revocations=[revocation(part)])
    assert choice.config is None or choice.config["num_warps"] != OTHER["num_warps"]


def test_reload_picks_up_a_new_revocation(choose):
    assert choose(verdict()).config == OTHER
    with Registry.open(choose.path, write=True) as registry:
        registry.revoke(revocation())
    assert dispatch.choose(OP, PROBLEM, torch.device("cuda", 0)).config == OTHER, "what was read stays"
    dispatch.reload()
    assert dispatch.choose(OP, PROBLEM, torch.device("cuda", 0)).config == DEFAULT


def test_a_winner_that_raises_is_not_replaced_by_what_is_revoked(choose, monkeypatch):
    choose(revocations=[revocation(DEFAULT)])
    winner, ran = dispatch.Choice(OP.tunable, OTHER, "exact", PROBLEM, GPU), []

    def run(choice, *args):
        ran.append(choice.config)
        if choice is winner:
            raise RuntimeError("no such instruction")
        return ()

    monkeypatch.setattr(dispatch.Choice, "_run", run)
    with pytest.warns(RuntimeWarning, match="serves instead"):
        winner(*PROBLEM.inputs("meta", 0))
    assert ran[0] == OTHER
    assert ran[1] not in (None, DEFAULT, OTHER)


def test_a_shipped_revocation_holds_against_the_users_own_verdict(choose, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped.db"
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", shipped)
    with Registry.open(shipped, write=True) as registry:
        registry.revoke(revocation(origin="shipped"))
    assert choose(verdict()).config == DEFAULT


def test_a_damaged_revocation_warns(choose):
    choose(verdict(), revocations=[revocation()])
    with sqlite3.connect(choose.path) as database:
        database.execute("update revocation set reason = 'right'")
    dispatch.reload()
    with pytest.warns(RuntimeWarning, match="what it revokes may run again"):
        dispatch.choose(OP, PROBLEM, torch.device("cuda", 0))


def test_what_is_not_proven_is_served_only_where_a_verdict_covers_it(choose):
    padded = OP.problem.parse("B4,H16,S2048,D80", "bf16")
    assert not OP.tunable.proven(padded)
    assert choose(problem=padded).source == "fallback"
    assert choose(verdict(problem=padded), problem=padded).source == "exact"
    assert choose(problem=OP.problem.parse("B4,H16,S3000,D80", "bf16")).source == "nearest"


def test_what_pytorch_would_compose_is_served_without_a_verdict(choose):
    assert choose(problem=OP.problem.parse("B4,H16,S2048,D80,window128x0", "bf16")).source == "default"


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
    assert dispatch.choose(OP, PROBLEM, torch.device("cuda", 0)).source == "fallback"


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
