"""Walks along a sequence that are too few for a GPU: what was measured with many heads does not serve few untried."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch.snapshot import Snapshot

FAMILIES = ("linear_attention", "channel_decay", "mlstm", "bidirectional_linear_attention")
WALKED = [ops.get(f"{name}_{way}") for name in FAMILIES for way in ("fwd", "bwd")]
GPUS = [devices.find(name) for name in ("H200", "A100", "MI300X")]
named = pytest.mark.parametrize("op", WALKED, ids=lambda op: op.name)


def problem(op, batch, heads, seq, width, dtype="bf16"):
    names = {each.name for each in dataclasses.fields(op.problem)}
    sizes = {"batch": batch, "heads": heads, "seq": seq, "head_dim": width, "dtype": dtype}
    sizes |= {name: n for name, n in (("value_dim", width), ("keys", seq)) if name in names}
    return dataclasses.replace(op.problem.examples()[0], **sizes)


@named
def test_what_serves_many_heads_by_one_walk_is_not_carried_to_few(op):
    space, gpu, many = op.tunable.space, devices.find("H200"), problem(op, 64, 16, 4096, 64)
    config = space.default(many, gpu)
    assert config["WALK"] == 0
    few, short = problem(op, 1, 16, 4096, 64), problem(op, 1, 16, 512, 64)
    found = [space.carries(each, config, gpu) for each in (many, few)]
    assert found == [True, False]
    assert space.carries(short, space.default(short, gpu), gpu)


@named
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_default_is_carried_to_its_own_problem(op, gpu):
    space = op.tunable.space
    for sizes in itertools.product((1, 8), (1, 16), (64, 5000, 32768), (16, 128, 256), ("bf16", "fp32")):
        posed = problem(op, *sizes)
        assert space.carries(posed, space.default(posed, gpu), gpu)


def test_outputs_that_the_delta_rule_leaves_to_another_kernel_are_so_by_size():
    op, gpu = ops.get("gated_delta_rule_fwd"), devices.find("H200")
    many, few = (op.problem.parse(f"{each},S8192,D64,decay,normalized", "bf16") for each in ("B16,H32", "B1,H8"))
    whole, apart = (op.tunable.space.default(each, gpu) for each in (many, few))
    assert (whole["APART"], apart["APART"]) == (0, 1)
    assert [op.tunable.space.carries(few, each, gpu) for each in (whole, apart)] == [False, True]


@pytest.mark.parametrize("label", ["B1,H16,S32768,D64,decay", "B1,H16,S32768,D128,decay", "B1,H4,S65536,D64"])
@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_verdicts_that_ship_on_many_heads_do_not_serve_few_by_one_walk(label, way):
    op, gpu = ops.get(f"linear_attention_{way}"), devices.find("H200")
    for choice in (Snapshot(gpu).choose(op, op.problem.parse(label, "bf16")), own(op, label, gpu)):
        assert choice.implementation is op.tunable
        assert choice.config["WALK"] > 0
    many = Snapshot(gpu).choose(op, op.problem.parse("B8,H16,S8192,D64,decay", "bf16"))
    assert (many.source, many.config["WALK"]) == ("exact", 0)


def own(op, label, gpu):
    return Snapshot(gpu).own(op, op.problem.parse(label, "bf16"))


@pytest.mark.parametrize("installed", [True, False], ids=["with fla", "without"])
def test_who_has_lost_on_a_near_problem_does_not_serve_before_our_default(monkeypatch, installed):
    """PyTorch's chunks take twenty times as long, and others' kernels tune themselves when they are first called."""
    op, gpu = ops.get("linear_attention_fwd"), devices.find("H200")
    feasible = [(op.implementations[name], None) for name in (("fla", "torch") if installed else ("torch",))]
    monkeypatch.setattr(Snapshot, "_feasible", lambda self, op, problem, verdict: iter(feasible))
    posed, snapshot = op.problem.parse("B1,H4,S65536,D64", "bf16"), Snapshot(gpu)
    assert snapshot.choose(op, posed).source == "default"
    won = SimpleNamespace(finalists=[SimpleNamespace(implementation="torch")])
    assert [each.name for each, _ in snapshot._carried(op, posed, won)] == ["torch"]
