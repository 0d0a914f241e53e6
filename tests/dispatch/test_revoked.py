"""What a registry revokes never runs, wherever it would have come from."""

import dataclasses
import sqlite3

import pytest
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
    RUNNER_UP,
    SECOND,
    composed,
    revocation,
    verdict,
)

from tilebook.dispatch import Choice, Dispatch
from tilebook.registry import Registry

NEAR = OP.problem.parse("B4,H16,S3000,D64,causal,window128x0", "bf16")


def test_a_revoked_winner_gives_way_to_the_next_in_the_ranking(choose):
    choice = choose(verdict(evidence=RANKED), revocations=[revocation()])
    assert (choice.source, choice.config) == ("exact", RUNNER_UP)
    choice = choose(revocations=[revocation(RUNNER_UP)])
    assert (choice.source, choice.implementation.name) == ("exact", "torch")


def test_a_revoked_winner_is_not_served_to_its_neighbours_either(choose):
    assert choose(composed(), problem=NEAR).config == COMPOSED_OTHER
    choice = choose(problem=NEAR, revocations=[revocation(COMPOSED_OTHER)])
    assert (choice.source, choice.config) == ("default", OP.tunable.space.default(NEAR, GPU))


def test_a_revoked_default_gives_way_to_the_feasible_config_fewest_steps_away(choose):
    choice = choose(problem=COMPOSED, revocations=[revocation(COMPOSED_DEFAULT)])
    assert choice.source == "default"
    axes, value = OP.tunable.space.axes, OP.tunable.space.value
    steps = [
        abs(v.index(value(choice.config, axis)) - v.index(value(COMPOSED_DEFAULT, axis))) for axis, v in axes.items()
    ]
    assert sum(steps) == 1
    assert OP.tunable.space.reject(COMPOSED, choice.config, GPU) is None
    assert choose(problem=COMPOSED).config == choice.config


def test_our_own_kernel_is_had_beside_pytorchs_unless_it_is_revoked(choose):
    ranked = [{"implementation": "torch", "config": {}, "time_ms": 0.9}, *RANKED["candidates"][:2]]
    lost = verdict(implementation="torch", config={}, evidence={"candidates": ranked})
    near = OP.problem.parse("B4,H16,S2049,D64", "bf16")
    for problem, config in ((FUSED, OTHER), (near, OTHER)):
        choice = choose(lost, problem=problem)
        own = choose.here.own(choice)
        assert (choice.implementation.name, own.implementation, own.config) == ("torch", OP.tunable, config)
        assert choose.here.own(choice) is own
        assert choose.here.own(own) is own
    choice = choose(problem=FUSED, revocations=[revocation(), revocation(RUNNER_UP)])
    assert choose.here.own(choice).config == DEFAULT
    choice = choose(problem=FUSED, revocations=[revocation(each) for each in OP.tunable.space.defaults(FUSED, GPU)])
    assert choose.here.own(choice) is choice


@pytest.mark.parametrize("status", ["measured", "predicted"])
def test_a_config_verified_on_another_problem_is_the_first_to_stand_in_for_a_revoked_default(choose, status):
    space = OP.tunable.space
    far = OP.problem.parse("B4,H16,S2048,D64,softcap", "bf16")
    # The one most steps away, which nothing else would choose.
    config = [each for each in space.defaults(COMPOSED, GPU) if space.reject(far, each, GPU) is None][-1]
    won = verdict(problem=far, config=config, status=status)
    choice = choose(won, problem=COMPOSED, revocations=[revocation(COMPOSED_DEFAULT)])
    assert (choice.source, choice.config == config) == ("default", status == "measured")


def test_where_every_config_is_revoked_pytorch_runs(choose):
    choice = choose(verdict(evidence=RANKED), revocations=[revocation({}, implementation="triton")])
    assert (choice.source, choice.implementation.name) == ("exact", "torch")
    choice = choose(problem=COMPOSED)
    assert (choice.source, choice.implementation.name, choice.config) == ("fallback", "torch", None)


def test_another_implementation_can_be_revoked(choose, monkeypatch):
    cudnn = OP.implementations["cudnn"]
    monkeypatch.setitem(OP.implementations, "cudnn", dataclasses.replace(cudnn, available=lambda device: True))
    monkeypatch.setattr("tilebook.kernels.attention.native.cudnn_first", lambda arch: False)
    won = verdict(implementation="cudnn", config={}, evidence=RANKED)
    assert choose(won).implementation.name == "cudnn"
    assert choose(won, revocations=[revocation({}, "cudnn", arch="sm_80")]).implementation.name == "cudnn"
    assert choose(won, revocations=[revocation({}, "cudnn", arch="sm_90")]).config == OTHER


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


@pytest.mark.parametrize("changes", [{"kernel": OP.digest}, {"arch": "sm_90"}, {"triton": ">=3.6"}], ids=list)
def test_a_revocation_of_this_source_arch_and_triton_holds(choose, changes):
    assert choose(verdict(), revocations=[revocation(**changes)]).source == "fallback"


def test_part_of_a_config_revokes_every_config_that_has_it(choose):
    part = {"num_warps": OTHER["num_warps"]}
    choice = choose(verdict(evidence=RANKED), revocations=[revocation(part)])
    assert choice.config is None or choice.config["num_warps"] != OTHER["num_warps"]


def test_reload_picks_up_a_new_revocation(choose):
    assert choose(verdict()).config == OTHER
    with Registry.open(choose.path, write=True) as registry:
        registry.revoke(revocation())
    assert choose.again().config == OTHER, "what was read stays"
    choose.here.reload()
    assert choose.again().source == "fallback"


def test_a_winner_that_raises_is_not_replaced_by_what_is_revoked(choose, monkeypatch):
    choose(problem=COMPOSED, revocations=[revocation(COMPOSED_DEFAULT)])
    winner, ran = Choice(OP.tunable, COMPOSED_OTHER, "exact", COMPOSED, GPU, instead=choose.here._spare), []

    def run(choice, *args):
        ran.append(choice.config)
        if choice is winner:
            raise RuntimeError("no such instruction")
        return ()

    monkeypatch.setattr(Choice, "_run", run)
    with pytest.warns(RuntimeWarning, match="serves instead"):
        winner(*COMPOSED.inputs("meta", 0))
    assert ran[0] == COMPOSED_OTHER
    assert ran[1] not in (None, COMPOSED_DEFAULT, COMPOSED_OTHER)


def test_a_shipped_revocation_holds_against_the_users_own_verdict(choose, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped.db"
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", shipped)
    with Registry.open(shipped, write=True) as registry:
        registry.revoke(revocation(origin="shipped"))
    assert choose(verdict()).source == "fallback"


def test_a_damaged_revocation_warns(choose):
    choose(verdict(), revocations=[revocation()])
    with sqlite3.connect(choose.path) as database:
        database.execute("update revocation set reason = 'right'")
    choose.here = Dispatch()
    with pytest.warns(RuntimeWarning, match="what it revokes may run again"):
        choose.again(FUSED)
