"""Walks along a sequence that are too few for a GPU: no config that was measured with many heads is to serve few."""

import dataclasses
import itertools

import pytest

from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch.snapshot import Snapshot
from tilebook.occupancy import idle

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
def test_what_serves_many_heads_by_one_walk_is_refused_for_few(op):
    space, gpu, many = op.tunable.space, devices.find("H200"), problem(op, 16, 16, 32768, 64)
    config = space.default(many, gpu)
    config = config if config["WALK"] == 0 else config.replace(WALK=0)
    assert space.reject(many, config, gpu) is None
    assert "idle" in space.reject(problem(op, 1, 16, 32768, 64), config, gpu)
    assert space.reject(problem(op, 1, 16, 2048, 64), config, gpu) is None  # a walk of few steps


@named
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_default_leaves_a_gpu_idle(op, gpu):
    space = op.tunable.space
    for sizes in itertools.product((1, 8), (1, 4, 16), (64, 5000, 32768), (16, 64, 128, 256), ("bf16", "fp32")):
        posed = problem(op, *sizes)
        if op.tunable.can_run(posed, gpu):
            assert "idle" not in (space.reject(posed, space.default(posed, gpu), gpu) or "")


@pytest.mark.parametrize("label", ["B1,H16,S32768,D64,decay", "B1,H16,S32768,D128,decay", "B1,H4,S65536,D64"])
@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_verdicts_that_ship_on_many_heads_do_not_serve_few_by_one_walk(label, way):
    op, gpu = ops.get(f"linear_attention_{way}"), devices.find("H200")
    choice = Snapshot(gpu).choose(op, op.problem.parse(label, "bf16"))
    assert choice.implementation is op.tunable
    assert choice.config["WALK"] > 0
    many = Snapshot(gpu).choose(op, op.problem.parse("B8,H16,S8192,D64,decay", "bf16"))
    assert (many.source, many.config["WALK"]) == ("exact", 0)


def test_idle_is_less_than_a_fourth_of_the_multiprocessors_for_many_steps():
    gpu = devices.find("H200")
    assert [bool(idle(walks, 65, gpu)) for walks in (32, 33)] == [True, False]
    assert idle(1, 64, gpu) is None
