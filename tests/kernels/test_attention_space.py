"""Axes of attention's spaces that came after verdicts had been made: what they do, and when they are tried."""

import random

import pytest
import torch

from tilebook import device as devices
from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.problem import written_window
from tilebook.kernels.attention.triton.args import MADE, POINTERS, Tile
from tilebook.launch import intercepted
from tilebook.tuner.judge.verify import Case, verify
from tilebook.tuner.process.compile import CompilePool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")
FORWARD, BACKWARD = attention_fwd.problem, attention_bwd.problem


def options(op, problem, config):
    """The launch options and constexprs of each kernel that a config starts."""
    started = []
    with intercepted(lambda kernel, grid, args, meta: started.append(meta)):
        op.tunable(*problem.inputs("meta", 0), config=config)
    return started


def loads(*inputs, config):
    """How a call's forward kernel loads its tiles."""
    started = []
    with intercepted(lambda kernel, grid, args, meta: started.append(args)):
        attention_fwd.tunable(*inputs, config=config)
    return next(each.DESCRIPTORS.value for each in started[0] if isinstance(each, Tile))


def test_pairs_are_those_that_are_seen():
    generator = random.Random(0)
    for _ in range(300):
        n_q, n_k = generator.randint(1, 40), generator.randint(1, 40)
        left, right = generator.randint(-1, 50), generator.randint(-1, 50)
        corner = generator.choice(["top_left", "bottom_right"])
        window = written_window(left, right)
        kind = {"window": window} if window else {"causal": right == 0}
        problem = FORWARD(1, 1, 1, n_q, n_k, 16, diagonal=corner if window else "top_left", **kind)
        before, after = problem.limits
        if before is None and after == 0:
            continue  # counted as an area
        rows, columns = torch.arange(n_q)[:, None], torch.arange(n_k)
        seen = torch.ones(n_q, n_k, dtype=torch.bool)
        if before is not None:
            seen &= columns >= rows - before
        if after is not None:
            seen &= columns <= rows + after
        assert problem.pairs == seen.sum(), (n_q, n_k, left, right)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("op", [attention_fwd, attention_bwd], ids=lambda op: op.name)
@pytest.mark.parametrize("gpu", ["A100", "H200", "B200", "MI300X"])
@pytest.mark.parametrize("text", ["B8,H6,S196,D64", "B4,H16,S2048,D64", "B4,H16,S2048,D128,causal"])
def test_the_later_axes_leave_spaces_small(op, gpu, text):
    space = op.tunable.space
    feasible = space.feasible(op.problem.parse(text, "bf16"), devices.find(gpu))
    before = [config for config in feasible if not config.keys() & space.later.keys()]
    assert 0 < len(before) <= len(feasible) < 3 * len(before), (len(before), len(feasible))


def test_a_cap_on_registers_reaches_the_kernel_it_is_for():
    problem = FORWARD.parse("B4,H16,S2048,D64", "bf16")
    config = attention_fwd.tunable.space.default(problem, H200)
    assert "maxnreg" not in options(attention_fwd, problem, config)[0]
    assert options(attention_fwd, problem, config.replace(MAXNREG=128))[0]["maxnreg"] == 128
    problem = BACKWARD.parse("B4,H16,S2048,D64", "bf16")
    config = attention_bwd.tunable.space.default(problem, H200).replace(MAXNREG1=168)
    dq, dkdv = options(attention_bwd, problem, config)
    assert "maxnreg" not in dq
    assert dkdv["maxnreg"] == 168


@pytest.mark.parametrize(
    ("text", "values", "gpu", "reason"),
    [
        ("S2048,D64", (128, 128, 8, 2, 128), "H200", ""),
        ("S2048,D64", (128, 128, 8, 2, 168), "H200", "no other"),
        ("S2048,D64", (128, 128, 8, 4, 128), "H200", "shared"),
        ("S2048,D64", (64, 32, 4, 2, 128), "H200", "fewer"),
        ("S2048,D128", (64, 128, 4, 1, 128), "H200", "too few"),
        ("S2048,D64", (64, 32, 4, 2, 168), "MI300X", "NVIDIA"),
        ("S64,Sk16384,D64", (64, 64, 4, 1, 128), "H200", "its place"),
    ],
)
def test_caps_on_registers_that_cannot_matter_say_why(text, values, gpu, reason):
    problem = FORWARD.parse(f"B4,H16,{text}", "bf16")
    space, device = attention_fwd.tunable.space, devices.find(gpu)
    axes = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "MAXNREG"
    config = space.default(problem, device).replace(**dict(zip(axes, values, strict=True)))
    assert space.reject(problem, config.replace(MAXNREG=0), device) is None
    said = space.reject(problem, config, device)
    assert reason in said if reason else said is None, said


@pytest.mark.long
@pytest.mark.parametrize("op", [attention_fwd, attention_bwd], ids=lambda op: op.name)
def test_capped_kernels_compile_and_use_no_more_registers(op):
    problem = op.problem.parse("B4,H16,S2048,D64", "bf16")
    space = op.tunable.space
    capped = [c for c in space.feasible(problem, H200) if any(axis.startswith("MAXNREG") for axis in c)]
    with CompilePool(H200, workers=1) as pool:
        for config in random.Random(0).sample(capped, 2):
            compiled = pool.submit(op.name, "triton", problem.key, config).result()
            assert compiled.failure in (None, "spills"), compiled
            caps = [int(config.get(axis, 255)) for axis in sorted(space.later, reverse=True) if "MAXNREG" in axis]
            assert all(b.registers <= cap for b, cap in zip(compiled.binaries, caps, strict=True)), compiled


def test_a_capped_kernel_is_right():
    problem = FORWARD.parse("B1,H2,S197,D64,causal", "bf16")
    config = attention_fwd.tunable.space.default(problem, H200).replace(MAXNREG=128)
    verify(attention_fwd.tunable, config, [Case.make(attention_fwd, problem, DEVICE, 1)], repeats=0)


def _compiles(problem, config, gpu):
    assert attention_fwd.tunable.space.reject(problem, config, gpu) is None
    with CompilePool(gpu, workers=1) as pool:
        compiled = pool.submit("attention_fwd", "triton", problem.key, config).result()
    assert compiled.failure is None, compiled


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("B2,H2,S100,D64", "bf16"),
        ("B1,H2,S197,D64,causal", "fp16"),
        ("B1,H4,Hkv2,S40,Sk70,D40", "bf16"),
        ("B2,H4,Hkv2,S70,Sk190,D32,causal,bottom_right", "bf16"),
        ("B1,H2,S100,D32,softcap,alibi", "bf16"),
    ],
)
def test_descriptors_made_by_the_kernel_are_right(text, dtype):
    problem = FORWARD.parse(text, dtype)
    config = attention_fwd.tunable.space.default(problem, H200).replace(DESCRIPTORS=2)
    assert loads(*problem.inputs("meta", 0), config=config) == MADE.value
    verify(attention_fwd.tunable, config, [Case.make(attention_fwd, problem, DEVICE, 1)], repeats=0)


def test_tensors_that_no_descriptor_can_address_go_by_pointers():
    q, k, v = (torch.empty(1, 2, 20, 36, device="meta", dtype=torch.float16)[..., :32] for _ in range(3))
    config = attention_fwd.tunable.space.default(FORWARD.of(q, k, v, PLAIN, 1.0), H200).replace(DESCRIPTORS=2)
    assert loads(q, k, v, PLAIN, 1.0, config=config) == POINTERS.value


@pytest.mark.parametrize(
    ("text", "gpu", "reason"),
    [
        ("B8,H6,S196,D64", "H200", ""),
        ("B4,H16,S2048,D64", "H200", "the host has the time"),
        ("B8,H6,S196,D64", "A100", "sm_90"),
        ("B8,H6,S196,D64", "MI300X", "sm_90"),
    ],
)
def test_kernels_make_descriptors_only_where_the_host_has_no_time_to(text, gpu, reason):
    problem, device, space = FORWARD.parse(text, "bf16"), devices.find(gpu), attention_fwd.tunable.space
    said = space.reject(problem, space.default(problem, device).replace(DESCRIPTORS=2), device)
    assert reason in said if reason else said is None, said


@pytest.mark.long
@pytest.mark.parametrize("name", ["H200", "B200"])
def test_kernels_that_make_descriptors_compile(name):
    gpu, problem = devices.find(name), FORWARD.parse("B8,H6,S196,D64", "bf16")
    config = attention_fwd.tunable.space.default(problem, gpu).replace(DESCRIPTORS=2)
    _compiles(problem, config, gpu)
