"""What serves: a verdict of its own, PyTorch's own kernel where it has one, else a near verdict or the default."""

import dataclasses
import sys

import pytest
import torch
from dispatch_samples import (
    COMPOSED,
    COMPOSED_DEFAULT,
    COMPOSED_OTHER,
    DEFAULT,
    FUSED,
    GPU,
    OP,
    OTHER,
    RANKED,
    SECOND,
    composed,
    doubling,
    verdict,
)

from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch import nearness, snapshot
from tilebook.kernels.attention.peers import flash4
from tilebook.op import Config
from tilebook.registry import Device, Environment

NEAR = OP.problem.parse("B4,H16,S3000,D64,causal,window128x0", "bf16")


def test_exact_verdict_is_served_with_its_layer(choose):
    choice = choose(verdict())
    assert (choice.source, choice.layer, choice.config) == ("exact", "explicit", OTHER)


def test_nearest_verdict_serves_where_its_config_is_feasible(choose):
    farther = OP.problem.parse("B4,H16,S200,D64,causal,window128x0", "bf16")
    choice = choose(composed(), composed(problem=farther, config=COMPOSED_DEFAULT), problem=NEAR)
    assert (choice.source, choice.config) == ("nearest", COMPOSED_OTHER)


def test_a_prediction_serves_what_pytorch_composes(choose):
    assert choose(composed(status="predicted"), problem=COMPOSED).config == COMPOSED_OTHER


def test_where_pytorch_has_a_kernel_a_neighbours_verdict_is_no_evidence(choose):
    choice = choose(verdict(), problem=OP.problem.parse("B4,H16,S2049,D64", "bf16"))
    assert (choice.source, choice.implementation.name, choice.native) == ("fallback", "torch", True)


def test_where_pytorch_has_a_kernel_nobody_looks_for_neighbours(choose, monkeypatch):
    looked = []
    monkeypatch.setattr(nearness, "by_distance", lambda *given: looked.append(given) or [])
    assert choose(verdict(), problem=OP.problem.parse("B4,H16,S2049,D64", "bf16")).source == "fallback"
    assert not looked
    choose(composed(), problem=NEAR)
    assert looked


def test_what_is_like_any_problem_is_like_itself():
    for op in map(ops.get, ops.ops()):
        posed = list({problem: None for suite in op.problem.suites().values() for problem in suite})[:60]
        alike = [a for a in posed if any(a.like(b) for b in posed)]
        assert all(a.like(a) for a in alike), op.name


def test_where_pytorch_has_a_kernel_a_prediction_is_no_evidence(choose):
    assert choose(verdict(status="predicted")).source == "fallback"


@pytest.mark.parametrize("name", ["inductor", "flex_attention"])
def test_a_program_does_not_wait_for_a_compiler_that_won(choose, monkeypatch, name):
    monkeypatch.setattr(OP, "implementations", dict(OP.implementations))
    OP.implementation(name)(doubling)
    ranked = [{"implementation": name, "config": {}, "time_ms": 1.0}, *RANKED["candidates"]]
    choice = choose(verdict(implementation=name, config={}, evidence={**RANKED, "candidates": ranked}))
    assert (choice.implementation.name, choice.source, choice.config) == ("triton", "exact", OTHER)


def test_where_pytorch_has_a_kernel_it_serves_without_a_verdict(choose):
    choice = choose()
    assert (choice.source, choice.native) == ("fallback", True)


def test_where_pytorch_has_a_kernel_a_verdict_that_cannot_be_used_leaves_it_to_pytorch(choose, monkeypatch):
    def broken(*_):
        raise KeyError("nobody thought of this")

    choose(verdict())
    monkeypatch.setattr(snapshot.Snapshot, "candidates", broken)
    with pytest.warns(RuntimeWarning, match="nobody thought of this"):
        assert choose.again().native
    with pytest.warns(RuntimeWarning, match="nobody thought of this"):
        assert choose.again(COMPOSED).config == COMPOSED_DEFAULT
    assert choose.again().native, "one warning is enough"


def test_a_verdict_from_before_an_axis_is_served_as_it_was_made(choose):
    before = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "HEADS": 1, "DESCRIPTORS": 1}
    assert OP.tunable.space.later
    assert choose(verdict(config=before)).config == Config(before)


@pytest.mark.parametrize(
    "shape", ["B4,H16,S2048,D128,causal,window128x0", "B4,H16,S2048,D64,window128x64", "B4,H16,S2048,D64,softcap"]
)
def test_another_head_dimension_or_form_is_never_near(choose, shape):
    assert choose(composed(), problem=OP.problem.parse(shape, "bf16")).source == "default"


UNSERVABLE = pytest.mark.parametrize(
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


@UNSERVABLE
def test_what_must_not_be_served_is_not(choose, changes):
    assert choose(verdict(**changes)).source == "fallback"


@UNSERVABLE
def test_what_must_not_be_served_is_not_near_either(choose, changes):
    choice = choose(composed(**changes), problem=NEAR)
    assert (choice.source, choice.config) == ("default", OP.tunable.space.default(NEAR, GPU))


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
    assert choice.config == flash4.FORWARD_SPACE.default(FUSED, GPU)


# In another environment


def measured(times, environment, problem=FUSED):
    """A verdict whose finalists took these milliseconds, the first of them the winner."""
    configs = {"triton": dict(OTHER if problem is FUSED else COMPOSED_OTHER)}
    listed = [{"implementation": each, "config": configs.get(each, {}), "time_ms": ms} for each, ms in times.items()]
    winner = next(iter(times))
    return verdict(
        problem=problem,
        config=configs.get(winner, {}),
        implementation=winner,
        environment=Environment({"triton": "3.6.0", **environment}),
        evidence={"candidates": listed},
    )


@pytest.fixture
def now(monkeypatch):
    monkeypatch.setattr(devices, "environment", lambda: {"torch": "2.13.0", "cudnn": "92000", "cuda": "13.0"})


@pytest.mark.parametrize("elsewhere", [{"torch": "2.12.0"}, {"cudnn": "91002"}, {"cuda": "12.9"}], ids=str)
def test_a_thin_margin_over_pytorch_does_not_outlive_its_environment(choose, now, elsewhere):
    assert choose(measured({"triton": 1.0, "torch": 1.049}, elsewhere)).native
    assert choose(measured({"triton": 1.0, "torch": 1.06}, elsewhere)).config == OTHER


@pytest.mark.parametrize("same", [{"torch": "2.13.0", "cudnn": "92000", "cuda": "13.0"}, {}, {"driver": "1"}], ids=str)
def test_a_thin_margin_holds_in_its_own_environment(choose, now, same):
    assert choose(measured({"triton": 1.0, "torch": 1.025}, same)).config == OTHER


def test_a_tie_is_pytorchs(choose, now, monkeypatch):
    assert choose(measured({"triton": 1.0, "torch": 1.01}, {})).native
    monkeypatch.setattr(flash4, "_installed", lambda: False)
    tied = {"flash_attention_4": 0.5, "triton": 1.0, "torch": 1.003}
    assert choose(measured(tied, {})).native


def test_a_thin_margin_over_what_pytorch_does_not_run_holds_anywhere(choose, now):
    assert choose(measured({"triton": 1.0, "mem_efficient": 1.01, "torch": 2.0}, {"torch": "2.12.0"})).source == "exact"


def test_a_thin_margin_over_what_pytorch_composes_holds_anywhere(choose, now):
    won = measured({"triton": 1.0, "torch": 1.01}, {"torch": "2.12.0"}, COMPOSED)
    assert choose(won, problem=COMPOSED).source == "exact"


def test_a_margin_is_that_of_the_finalist_that_serves(choose, now, monkeypatch):
    monkeypatch.setattr(flash4, "_installed", lambda: False)
    times = {"flash_attention_4": 0.5, "triton": 1.0, "torch": 1.02}
    assert choose(measured(times, {"torch": "2.12.0"})).native
    assert choose(measured({**times, "torch": 1.1}, {"torch": "2.12.0"})).config == OTHER


# What PyTorch runs by itself


def test_a_winner_that_pytorch_runs_by_itself_is_left_to_pytorch(choose, monkeypatch):
    cudnn = OP.implementations["cudnn"]
    monkeypatch.setitem(OP.implementations, "cudnn", dataclasses.replace(cudnn, available=lambda device: True))
    won = verdict(implementation="cudnn", config={}, evidence=RANKED)
    for prefers in (True, False):
        monkeypatch.setattr("tilebook.kernels.attention.native.cudnn_first", lambda arch, prefers=prefers: prefers)
        choice = choose(won)
        assert (choice.implementation.name, choice.native) == ("cudnn", prefers)
    assert choose(verdict(implementation="torch", config={})).native
    assert not choose(verdict()).native


def test_what_is_forced_is_never_left_to_pytorch(here):
    op = doubling(None)
    with here.use("torch"):
        assert not here.lookup(op, (torch.ones(2),)).native
    assert here.lookup(op, (torch.ones(2),)).native


# Other implementations with spaces of their own


def test_another_implementation_with_a_space_serves_what_it_won(choose, second):
    choice = choose(second())
    assert (choice.source, choice.implementation, choice.config) == ("exact", second.made, SECOND)
    near = choose(second(COMPOSED), problem=NEAR)
    assert (near.source, near.config) == ("nearest", SECOND)
    far = choose(problem=OP.problem.parse("B4,H16,S2048,D128,causal,window128x0", "bf16"))
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


# What is not proven


def test_what_is_not_proven_is_served_only_where_a_verdict_covers_it(choose):
    # A window keeps PyTorch's kernel from serving, and the default was never seen right with it in fp32.
    windowed, near = (OP.problem.parse(f"B4,H16,S{s},D80,window128x0", "fp32") for s in (2048, 3000))
    assert not OP.tunable.proven(windowed)
    assert choose(problem=windowed).source == "fallback"
    assert choose(verdict(problem=windowed), problem=windowed).source == "exact"
    assert choose(problem=near).source == "nearest"


def test_what_pytorch_would_compose_is_served_without_a_verdict(choose):
    assert choose(problem=OP.problem.parse("B4,H16,S2048,D80,window128x0", "bf16")).source == "default"
