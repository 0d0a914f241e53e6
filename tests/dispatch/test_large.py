"""Of a registry that holds much on an op, what bears on a problem is read alone, and the same serves."""

import itertools
import random
import sqlite3
import warnings

import pytest
import torch
from dispatch_samples import (
    COMPOSED,
    COMPOSED_DEFAULT,
    COMPOSED_OTHER,
    GPU,
    OP,
    composed,
    config_after,
    revocation,
    verdict,
)

from tilebook import op as ops
from tilebook.dispatch import Dispatch, Snapshot
from tilebook.registry import Registry, serving, sqlitefile
from tilebook.registry.near import place_of

PROBLEM = OP.problem
NEAR = PROBLEM.parse("B4,H16,S3000,D64,causal,window128x0", "bf16")


def problems(dice, many):
    """Some that PyTorch composes and some that it has a kernel for."""

    def one():
        heads, seq = dice.choice([4, 8, 12, 16]), dice.choice([1 << dice.randrange(6, 14), dice.randrange(1, 9000)])
        shape = f"B{dice.choice([1, 2, 4, 8, 64])},H{heads},S{seq},D{dice.choice([64, 128])},causal"
        return PROBLEM.parse(shape + dice.choice([",window128x0", ",window128x0", ""]), "bf16")

    return sorted({one() for _ in range(many)}, key=lambda each: each.key)


def told(choice):
    return (
        choice.source,
        choice.implementation.name,
        choice.config,
        choice.layer,
        choice.verdict and choice.verdict.problem,
    )


@pytest.fixture
def large(monkeypatch):
    """Every layer that holds more than two verdicts on an op is large."""
    monkeypatch.setattr(serving, "WHOLE", 2)


def test_what_serves_is_the_same_however_much_there_is(gpu, monkeypatch, tmp_path):
    dice = random.Random(1)
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "shipped.db")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for place, many in ((gpu, 120), (tmp_path / "tilebook" / "registry.db", 60), (tmp_path / "shipped.db", 8)):
        with Registry.open(place, write=True) as registry:
            for each in problems(dice, many):
                config = OP.tunable.space.default(each, GPU)
                status, trusted = dice.choice(["measured", "predicted"]), dice.random() < 0.8
                registry.record(verdict=verdict(problem=each, config=config, status=status, trusted=trusted))
    asked = problems(dice, 150)
    answers = []
    for whole in (1_000, 20):
        monkeypatch.setattr(serving, "WHOLE", whole)
        here = Dispatch()
        answers.append([told(here.choose(OP, each, torch.device("cuda", 0))) for each in asked])
        assert here._snapshots[0]._table.large(OP.name) is (whole == 20)
    for each, one, other in zip(asked, *answers, strict=True):
        assert one == other, each
    assert {source for source, *_ in answers[0]} >= {"exact", "nearest", "fallback"}


def test_all_that_may_serve_comes_in_the_same_order_however_much_there_is(gpu, monkeypatch, tmp_path):
    dice = random.Random(2)
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "shipped.db")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for place in (gpu, tmp_path / "tilebook" / "registry.db", tmp_path / "shipped.db"):
        with Registry.open(place, write=True) as registry:
            made = [each for each in problems(dice, 70) if not OP.fused(each)]
            registry.merge(
                verdicts=[verdict(problem=each, config=OP.tunable.space.default(each, GPU)) for each in made]
            )
    asked = [each for each in problems(dice, 80) if not OP.fused(each)]
    answers = []
    for whole in (1_000, 20):
        monkeypatch.setattr(serving, "WHOLE", whole)
        here = Snapshot(GPU)
        answers.append([list(map(told, itertools.islice(here.candidates(OP, each), 8))) for each in asked])
        assert here._table.large(OP.name) is (whole == 20)
    for each, one, other in zip(asked, *answers, strict=True):
        assert one == other, each
    assert {found[0][0] for found in answers[0]} == {"exact", "nearest"}


def others(many):
    """Verdicts far from everything."""
    return [composed(problem=PROBLEM.parse(f"B1,H1,S{n + 1},D256,causal,window1x0", "bf16")) for n in range(many)]


def test_an_exact_and_a_near_verdict_are_found_among_many(choose, large):
    choice = choose(composed(), *others(4), problem=COMPOSED)
    assert (choice.source, choice.config) == ("exact", COMPOSED_OTHER)
    assert choose.again(NEAR).source == "nearest"


def test_where_the_nearest_is_revoked_the_next_serves(choose, large):
    nearest = composed(problem=NEAR, config=COMPOSED_DEFAULT)
    asked = PROBLEM.parse("B4,H16,S3100,D64,causal,window128x0", "bf16")
    choice = choose(nearest, composed(), *others(4), problem=asked, revocations=[revocation(COMPOSED_DEFAULT)])
    assert (choice.source, choice.config) == ("nearest", COMPOSED_OTHER)


def test_where_the_verdict_itself_is_revoked_the_nearest_serves(choose, large):
    config = config_after(COMPOSED, COMPOSED_DEFAULT, COMPOSED_OTHER)
    nearest = composed(problem=NEAR, config=config)
    choice = choose(composed(), nearest, *others(4), revocations=[revocation(COMPOSED_OTHER)], problem=COMPOSED)
    assert (choice.source, choice.config) == ("nearest", config)


def decoding(choose, shape, *shapes):
    """The label of the verdict that serves decoding of a shape where there are verdicts on others, and two far away."""
    op = ops.get("attention_decode")

    def posed(text):
        return op.problem.parse(text, "bf16")

    problems = [posed(each) for each in (*shapes, "B1,H1,S1,Sk64,D256", "B1,H1,S2,Sk64,D256")]
    configs = [op.tunable.space.default(each, GPU) for each in problems]
    made = [
        verdict(op=op.name, kernel=op.digest, problem=each, config=config)
        for each, config in zip(problems, configs, strict=True)
    ]
    served = choose(*made, problem=posed(shape), op=op).verdict
    return served and op.problem.from_key(served.problem).label


def test_a_cache_that_is_longer_is_as_near_as_it_is_among_few(choose, large):
    """Without a window its length and the window's are one dimension."""
    longer, wider = "B4,H16,S1,Sk512,D128,capped", "B64,H16,S1,Sk4096,D128,capped"
    assert decoding(choose, "B4,H16,S1,Sk4096,D128,capped", longer, wider) == longer


def test_a_cache_serves_one_that_is_32_times_as_long(choose, large):
    shorter = "B4,H16,S1,Sk512,D128,capped"
    assert decoding(choose, "B4,H16,S1,Sk16384,D128,capped", shorter) == shorter


@pytest.mark.parametrize("name", ops.ops())
def test_no_distance_is_less_than_a_search_for_the_nearest_takes_it_to_be(name):
    kind = ops.get(name).problem
    known = [*kind.examples(), *(each for suite in kind.suites().values() for each in suite)]
    for one, other in itertools.combinations(random.Random(3).sample(known, min(len(known), 60)), 2):
        mine, theirs = place_of(one.key), place_of(other.key)
        if mine.form == theirs.form:
            apart = zip(mine.names, mine.point, theirs.point, strict=True)
            least = sum((0.5 if name in kind.HALVED else 1.0) * abs(here - there) for name, here, there in apart)
            assert least <= one.distance(other) + 1e-9


def test_what_is_no_place_hides_nothing_that_has_one(choose, large):
    choose(composed(problem=NEAR), *others(4))
    asked = PROBLEM.parse("B4,H16,S3100,D64,causal,window128x0", "bf16")
    for spot in ("", "5", "-1", "1_0", "zz", "f~", "FF" * 14, "0" * 27, "0" * 27 + "x", "0" * 60, "f" * 60):
        with sqlite3.connect(choose.path) as database:
            database.execute("DELETE FROM verdict WHERE id > 5")
            database.execute("DELETE FROM position WHERE verdict_id > 5")
            rows = "SELECT 100 + s.verdict_id, s.device_id, s.kernel_id, s.form, ? FROM position AS s"
            near = "JOIN verdict AS v ON v.id = s.verdict_id JOIN problem AS p ON p.id = v.problem_id WHERE p.key = ?"
            database.execute(f"INSERT INTO position {rows} {near}", [spot, NEAR.key])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Snapshot(GPU).choose(OP, asked).source == "nearest", spot


def test_what_is_not_trusted_serves_nobody_and_is_in_nobodys_way(choose, large):
    claim = composed(trusted=False, origin="imported", config=COMPOSED_DEFAULT)
    nearest = composed(problem=NEAR)
    assert choose(claim, nearest, *others(4), problem=COMPOSED).config == COMPOSED_OTHER


def test_another_kernels_verdicts_serve_nobody(choose, large):
    assert choose(composed(kernel="0" * 64), *others(4), problem=COMPOSED).source == "default"


def test_a_config_verified_elsewhere_stands_in_for_a_revoked_default(choose, large):
    space = OP.tunable.space
    far = PROBLEM.parse("B4,H16,S2048,D64,softcap", "bf16")
    config = [each for each in space.defaults(COMPOSED, GPU) if space.reject(far, each, GPU) is None][-1]
    stand_in = verdict(problem=far, config=config)
    choice = choose(stand_in, *others(4), problem=COMPOSED, revocations=[revocation(COMPOSED_DEFAULT)])
    assert choice.source == "default"
    assert choice.config in (config, COMPOSED_OTHER)


def test_a_damaged_verdict_is_warned_of_when_it_is_met(choose, large):
    choose(composed(), *others(4))
    with sqlite3.connect(choose.path) as database:
        database.execute("UPDATE verdict SET served = 'x' WHERE id = 1")
    snapshot = Snapshot(GPU)
    with pytest.warns(RuntimeWarning, match="left out 1 damaged row"):
        assert snapshot.choose(OP, COMPOSED).source == "default"


def test_a_lock_costs_one_problem_its_verdict_and_is_waited_for_once(choose, large, monkeypatch):
    choose(composed(), *others(4))
    waited = []
    begin = sqlitefile.begin
    monkeypatch.setattr(sqlitefile, "begin", lambda on, wait_s=0.0: waited.append(wait_s) or begin(on, wait_s))
    monkeypatch.setattr(serving, "READER_WAIT_S", 0.01)
    choose.here = Dispatch()
    choose.again(COMPOSED)
    writer = sqlite3.connect(choose.path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.warns(RuntimeWarning, match="locked"):
        assert choose.again(NEAR).source == "default"
    waited.clear()
    choose.again(PROBLEM.parse("B4,H16,S3300,D64,causal,window128x0", "bf16"))
    assert set(waited) == {0.0}
    writer.execute("ROLLBACK")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.again(NEAR).source == "nearest"
        waited.clear()
        writer.execute("BEGIN EXCLUSIVE")
        choose.again(PROBLEM.parse("B4,H16,S3600,D64,causal,window128x0", "bf16"))
        assert waited.count(0.01) == 1
