"""One of the processes of `test_sharding.py`, `python sharded.py RANK WORLD FILE`: says of each case what is wrong."""

import contextlib
import json
import sys

import torch
import torch.distributed as dist

import tilebook

for each in tilebook.__all__:  # ours before DTensor: it must be told of them later
    getattr(tilebook, each)

# ruff: noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from tilebook import dispatch
from tilebook.nn.linear import attend


def packed(q, k, v):
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    if isinstance(q, DTensor):
        ends = DTensor.from_local(ends, q.device_mesh, [R] * q.device_mesh.ndim)
    return tilebook.attention_varlen(q, k, v, ends, ends, max_seqlen_q=4, max_seqlen_k=4)


def losses(x):
    target = torch.tensor([1, 7, -100, 3])
    if isinstance(x, DTensor):
        target = DTensor.from_local(target, x.device_mesh, [R] * x.device_mesh.ndim)
    return tilebook.cross_entropy(x, target, reduction="none")


def layers(x, w1, b1, w2, b2):
    return tilebook.mlp(x, w1, b1, w2, b2)


def rotated(q, k, cos, sin):
    return torch.cat(tilebook.apply_rope(q, k, cos.detach(), sin.detach()), -1)


QKV, GROUPED = [(4, 8, 6, 16)] * 3, [(4, 8, 6, 16), *[(4, 2, 6, 16)] * 2]
ROTATED, ANGLES = [(4, 8, 6, 16)] * 2, (1, 6, 16)
GATED = [(4, 6, 8), (12, 8), (12, 8), (8, 12)]
LAYERS = [(4, 6, 8), (12, 8), (12,), (8, 12), (8,)]
R, B, H = Replicate(), Shard(0), Shard(1)


def window(*tensors, **how):
    return tilebook.attention(*tensors, causal=True, window=(2, 0), **how)


def biased(q, k, v, bias):
    return tilebook.attention(q, k, v, bias=bias)


def sloped(q, k, v, slopes):
    return tilebook.attention(q, k, v, alibi_slopes=slopes.abs().detach())


def with_lse(q, k, v):
    o, lse = tilebook.attention(q, k, v, causal=True, return_lse=True)
    return o * lse.detach()[..., None]


def decoded(q, k, v):
    return tilebook.attention_decode(q.detach(), k.detach(), v.detach(), window=3)


def summed(x, residual, weight):
    y, h = tilebook.add_rms_norm(x, residual, weight)
    return y * h


def featured(q, k, v):
    return tilebook.linear_attention(q, k, v, feature_map="performer")


def ordered(q, k, v):
    return tilebook.linear_attention(q, k, v, feature_map="performer", causal=True)


def padded(q, k, v, mask):
    return attend(q, k, v, mask.detach() > 1, feature_map="performer", causal=False, eps=1e-6)


# What is called, shapes, placements, the placement of the result
CASES = {
    "whole": (window, QKV, [R] * 3, R),
    "batch": (window, QKV, [B] * 3, B),
    "heads": (window, QKV, [H] * 3, H),
    "grouped heads": (window, GROUPED, [H] * 3, H),
    "bias whole, batch": (biased, [*QKV, (1, 8, 6, 6)], [B, B, B, R], B),
    "bias by heads": (biased, [*QKV, (1, 8, 6, 6)], [H] * 4, H),
    "slopes, batch": (sloped, [*QKV, (8,)], [B, B, B, R], B),
    "slopes by heads": (sloped, [*QKV, (8,)], [H, H, H, B], H),
    "slopes by batch": (sloped, [*QKV, (4, 8)], [B] * 4, B),
    "statistics by heads": (with_lse, QKV, [H] * 3, H),
    "packed, by heads": (packed, [(6, 8, 16), *[(6, 2, 16)] * 2], [H] * 3, H),
    "decoding by heads": (decoded, [(4, 8, 1, 16), *[(4, 2, 6, 16)] * 2], [H] * 3, H),
    "decoding by batch": (decoded, [(4, 8, 1, 16), *[(4, 2, 6, 16)] * 2], [B] * 3, B),
    "layers by rows": (layers, LAYERS, [B, R, R, R, R], B),
    "layers whole": (layers, LAYERS, [R] * 5, R),
    "gated layers by rows": (tilebook.swiglu, GATED, [B, R, R, R], B),
    "gate by rows": (tilebook.glu, [(4, 6, 8)] * 2, [B, B], B),
    "gate by columns": (tilebook.glu, [(4, 6, 8)] * 2, [Shard(2)] * 2, Shard(2)),
    "gate for both by rows": (tilebook.glu, [(4, 6, 8)], [B], B),
    "rotation by heads": (rotated, [*ROTATED, ANGLES, ANGLES], [H, H, R, R], H),
    "rotation by batch": (rotated, [*ROTATED, ANGLES, ANGLES], [B, B, R, R], B),
    "rotation by batch, with its angles": (rotated, [*ROTATED, (4, 6, 16), (4, 6, 16)], [B] * 4, B),
    "features by heads": (featured, QKV, [H] * 3, H),
    "features in order, by heads": (ordered, QKV, [H] * 3, H),
    "features by batch, padded": (padded, [*QKV, (4, 6)], [B] * 4, B),
    "norm by rows": (tilebook.rms_norm, [(4, 6, 8), (8,)], [B, R], B),
    "layer norm by rows": (tilebook.layer_norm, [(4, 6, 8), (8,), (8,)], [B, R, R], B),
    "norm of a sum by rows": (summed, [(4, 6, 8), (4, 6, 8), (8,)], [B, B, R], B),
    "losses by rows": (losses, [(4, 8)], [B], B),
}

if torch.__version__ < "2.12":  # which cannot multiply what is sharded by heads by a matrix
    del CASES["features in order, by heads"]


# Where somebody has to send something first.
SENT = {
    "batch of queries": (window, QKV, [B, R, R], B),
    "heads that cannot be halved": (window, [(2, 3, 6, 16)] * 3, [H] * 3, None),
    "fewer key heads than processes": (window, [(2, 4, 6, 16), *[(2, 1, 6, 16)] * 2], [H, R, R], None),
    "columns": (window, QKV, [R, Shard(2), Shard(2)], R),
}


def check(mesh, function, shapes, placements, placed, silent):
    torch.manual_seed(0)
    whole = [torch.randn(shape, requires_grad=True) for shape in shapes]
    others = [R] * (mesh.ndim - 1)
    parts = [distribute_tensor(x, mesh, [*others, p]) for x, p in zip(whole, placements, strict=True)]
    expected = function(*whole)
    dy = torch.randn_like(expected)
    sent = CommDebugMode()
    with sent if silent else contextlib.nullcontext():
        y = function(*parts)
    if placed is not None and y.placements != (*others, placed):
        raise AssertionError(f"the result lies as {y.placements}")
    if silent and sent.get_total_counts():
        raise AssertionError(f"sent {dict(sent.get_comm_counts())}")
    torch.testing.assert_close(y.full_tensor(), expected)
    if not expected.requires_grad:
        return
    found = torch.autograd.grad(y, parts, distribute_tensor(dy, mesh, y.placements), allow_unused=True)
    for got, right in zip(found, torch.autograd.grad(expected, whole, dy, allow_unused=True), strict=True):
        if right is not None:
            torch.testing.assert_close(got.full_tensor(), right)


def compiled(*tensors):
    return torch.compile(window, backend="aot_eager", fullgraph=True)(*tensors)


def cases(mesh, plane):
    """Compiled first, before a call of any kind has told DTensor of our ops."""
    yield "compiled", mesh, (compiled, QKV, [B] * 3, B), False
    for name, case in CASES.items():
        yield name, mesh, case, True
    yield "heads of a plane", plane, CASES["heads"], True
    for name, case in SENT.items():
        yield name, mesh, case, False


def main(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh, plane = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world))
    for name, *case, silent in cases(mesh, plane):
        try:
            with dispatch.use("torch"):
                check(case[0], *case[1], silent)
        except Exception as error:  # the other process waits for this one in the next case
            print(json.dumps([name, f"{type(error).__name__}: {error}"]), flush=True)
        else:
            print(json.dumps([name, ""]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
