"""Attention's backward with dq beside dk and dv in one launch, for calls whose two launches each leave SMs idle.

The design of `backward.py`, seven products and every sum in registers, but the kernels' programs are of one grid, as in
FlexAttention's backward: those by blocks of columns first, those by blocks of rows after them. A program of both kinds
of work one after the other, as in Triton's tutorial, would be half as many, twice as long: with B8 H6 S196 and blocks
of 64 there are 192 blocks of either kind, and 384 short programs spread more evenly over 132 SMs than 192 long ones.
Under GQA the two kinds are also of different number. What it costs: delta comes from a launch before, since dk and dv
can no longer wait for dq's programs to make it, and both kinds have the registers, warps and shared memory of the
hungrier one.
"""

from __future__ import annotations

import torch
import triton

from tilebook.device import Device
from tilebook.kernels.attention import backward, forward_space
from tilebook.kernels.attention.backward import needs
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.joint_kernels import attention_bwd_delta, attention_bwd_joint
from tilebook.kernels.attention.ops import attention_bwd
from tilebook.kernels.attention.problem import BackwardProblem
from tilebook.kernels.attention.scores import options
from tilebook.kernels.attention.tiles import addressable, asynchronous, capped, describable, like, pointless
from tilebook.launch import launch
from tilebook.op import Config, Cost, Space

MOST_FLOPS = 2e10
"""Calls of more than that fill a GPU launch by launch, and two kernels have each the registers that it needs alone."""

_BLOCKS = "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"


def supports(problem: BackwardProblem) -> bool:
    """Short calls in 16-bit dtypes, head dimensions up to 128 (wider ones spill), every form but dropout and dbias.

    Those two make more work for dq alone: a pass that finds delta first, and a matrix to write.
    """
    given = problem.dropout or problem.bias.startswith("dbias")
    usual = problem.dtype in ("bf16", "fp16") and problem.head_dim <= 128
    short = problem.cost().flops <= MOST_FLOPS
    return usual and short and not given and forward_space.supports(problem)


def _apart(config: Config) -> Config:
    """The config of two launches with the same blocks, warps and stages; by pointers, which the host need not make."""
    both = {f"{name}{half}": config[name] for name in ("num_warps", "num_stages") for half in "12"}
    return Config({name: config[name] for name in _BLOCKS} | both | {"HEADS": config["HEADS"], "DESCRIPTORS": 0})


def _programs(batch: int, heads: int, heads_kv: int, n_q: int, n_k: int, config: Config) -> int:
    """Blocks of columns of the key/value heads, and blocks of rows of the query heads."""
    columns, rows = triton.cdiv(n_k, config.number("BLOCK_N1")), triton.cdiv(n_q, config.number("BLOCK_M2"))
    return int(batch * (columns * heads_kv + rows * heads))


def _reject(problem: BackwardProblem, config: Config, device: Device) -> str | None:
    warps, stages, descriptors, cap = (
        config.number(axis) for axis in ("num_warps", "num_stages", "DESCRIPTORS", "MAXNREG")
    )
    reason = backward.SPACE.reject(problem, _apart(config), device)
    if reason:
        return reason
    if descriptors and device.capability < 90:
        return "tensor descriptors need sm_90 or later"
    tiles, shared = zip(*needs(problem, _apart(config), device), strict=True)
    if 2 * max(tiles) > 3 * min(tiles):
        return "one kind of programs would hold registers that it has no use for"
    deeper = _apart(config.replace(num_stages=2))
    if stages == 1 and asynchronous(device) and backward.SPACE.reject(problem, deeper, device) is None:
        return "there is room for a pipeline"
    if cap and not descriptors:
        return "addresses take what a cap would leave"
    if cap and cap != (168 if warps == 4 else 128):
        return "a cap makes room for one more program on an SM"
    sizes = problem.batch, problem.heads, problem.heads_kv, problem.seq_q, problem.seq_k
    return pointless(cap, max(tiles), warps, max(shared), _programs(*sizes, config), device)


def _default(problem: BackwardProblem, device: Device) -> Config:
    """That of two launches, as near as one comes to it, or the first smaller one that fits."""
    two = backward.SPACE.default(problem, device)
    warps, stages = ([two.number(f"{name}{half}") for half in "12"] for name in ("num_warps", "num_stages"))
    descriptors = forward_space.MADE_BY_KERNEL if two["DESCRIPTORS"] else 0
    rest = {"HEADS": two["HEADS"], "DESCRIPTORS": descriptors, "MAXNREG": 0}
    shapes = [
        (*(two.number(name) for name in _BLOCKS), max(warps), min(stages)),
        (32, 64, 64, 64, 8, 2),
        (32, 64, 64, 64, 8, 1),
        (32, 32, 32, 32, 4, 1),
    ]
    axes = *_BLOCKS, "num_warps", "num_stages"
    configs = [Config(dict(zip(axes, shape, strict=True)) | rest) for shape in shapes]
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: BackwardProblem, config: Config) -> Cost:
    """Seven products, as in two launches; do is read once more, for delta."""
    assert backward.SPACE.work is not None
    two = backward.SPACE.work(problem, _apart(config))
    return Cost(two.flops, two.bytes + problem.queries * problem.width * problem.torch_dtype.itemsize)


SPACE = Space(
    axes={
        "BLOCK_M1": (32, 64, 128),
        "BLOCK_N1": (32, 64, 128),
        "BLOCK_M2": (32, 64, 128),
        "BLOCK_N2": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "HEADS": (1, 4),
        "DESCRIPTORS": (0, forward_space.MADE_BY_KERNEL),
        "MAXNREG": (0, 168, 128),
    },
    reject=_reject,
    default=_default,
    work=_work,
)


@attention_bwd.implementation(
    "triton_joint",
    space=SPACE,
    supports=supports,
    proven=lambda problem: False,  # seldom faster than two launches: only a verdict makes it serve
)
def _triton_joint(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *extras: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    do, q, k, v, o = (addressable(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    dq, dk, dv, delta = like(q), like(k), like(v), torch.empty_like(lse)
    given = options(form, extras, q, k)
    optional = {name: value for name, value in given.items() if name not in ("seed", "dropout", "TF32")}

    launch(
        attention_bwd_delta,
        (triton.cdiv(n_q, 64) * batch * heads,),
        do,
        o,
        delta,
        *(step for x in (do, o) for step in x.stride()[:3]),
        heads,
        n_q,
        D=given["D"],
        WIDTH=given["WIDTH"],
        BLOCK_M=64,
        num_warps=4,
    )
    launch(
        attention_bwd_joint,
        (_programs(batch, heads, heads_kv, n_q, n_k, config),),
        q,
        k,
        v,
        do,
        lse,
        delta,
        dq,
        dk,
        dv,
        *(step for x in (q, k, v, do, dq, dk, dv) for step in x.stride()[:3]),
        batch * heads,
        heads,
        heads // heads_kv,
        n_q,
        n_k,
        scale,
        **optional,
        **{name: config[name] for name in _BLOCKS},
        HEADS=config["HEADS"],
        DESCRIPTORS=bool(config["DESCRIPTORS"]) and describable(do, q, k, v),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **capped(config.number("MAXNREG")),
    )
    return dq, dk, dv
