"""Every op of every family on the GPU that is here: right over its examples, with the default and other configs."""

import random
from dataclasses import replace

import pytest
import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.assembler import unverified
from tilebook.tuner.judge.verify import Case, Error, verify

pytestmark = pytest.mark.gpu

EXAMPLES = [(op.name, problem) for op in ops.ops().values() for problem in op.problem.examples()]


@pytest.mark.parametrize(("name", "problem"), EXAMPLES, ids=lambda v: v if isinstance(v, str) else v.label)
def test_default_and_random_configs_are_right(name, problem):
    op = ops.get(name)
    gpu, case = devices.current(), Case.make(op, problem, "cuda", 0)
    # Long chunks round more; a tuner refuses those that do so by too much.
    wider = replace(case, allowed=tuple(Error(2 * each.max, 2 * each.rms) for each in case.allowed))
    for each in op.tunables:
        if each is not op.tunable and not each.can_run(problem, gpu):
            continue
        feasible = each.space.feasible(problem, gpu)
        configs = [each.space.default(problem, gpu), *random.Random(name).sample(feasible, min(3, len(feasible)))]
        for config in configs:
            try:
                with unverified():
                    verify(each, config, [case if config is configs[0] else wider])
            except Exception as broken:
                if type(broken).__name__ != "OutOfResources" or config == configs[0]:
                    raise AssertionError(f"{each.name} {config}: {broken}") from broken


@pytest.mark.parametrize(("name", "problem"), EXAMPLES, ids=lambda v: v if isinstance(v, str) else v.label)
def test_other_implementations_are_right(name, problem):
    op, gpu = ops.get(name), devices.current()
    case = Case.make(op, problem, "cuda", 0)
    for implementation in op.implementations.values():
        if implementation.space is None and implementation.can_run(problem, gpu):
            verify(implementation, None, [case])


def _error(x, truth):
    return (x.float() - truth).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("heads", "heads_kv", "seq_q", "seq_k", "width"),
    [
        *((4, 4, s, s, 64) for s in (1, 17, 100, 197, 1000)),
        *((16, 2, s, s, 128) for s in (1, 17, 100, 197, 1000)),
        (4, 4, 100, 1000, 64),
        (4, 4, 1000, 100, 64),
        (8, 1, 197, 333, 32),
    ],
)
def test_attention_errs_at_most_twice_as_much_as_pytorch(dtype, scale, causal, heads, heads_kv, seq_q, seq_k, width):
    import tilebook

    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(2, heads, seq_q, width), (2, heads_kv, seq_k, width), (2, heads_kv, seq_k, width)]
    inputs = [torch.randn(s, device="cuda", dtype=dtype, generator=generator).requires_grad_() for s in shapes]
    do = torch.randn(shapes[0], device="cuda", dtype=dtype, generator=generator)

    def with_gradients(function, *tensors):
        o = function(*tensors)
        return (o, *torch.autograd.grad(o, tensors, do.to(o.dtype)))

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=heads != heads_kv
        )

    def exact(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return sdpa(q, k, v)

    truth = with_gradients(exact, *(x.detach().float().requires_grad_() for x in inputs))
    theirs = with_gradients(sdpa, *inputs)
    ours = with_gradients(lambda q, k, v: tilebook.attention(q, k, v, causal=causal, scale=scale), *inputs)
    for name, right, plain, got in zip(("o", "dq", "dk", "dv"), truth, theirs, ours, strict=True):
        floor = torch.finfo(dtype).eps / 2 * right.abs().max().item()
        assert _error(got, right) <= 2 * _error(plain, right) + floor, name


def test_attention_saves_memory_linear_in_the_sequence():
    import tilebook

    def kept(seq):
        q, k, v = (torch.randn(1, 4, seq, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tilebook.attention(q, k, v).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert kept(8192) <= 2.2 * kept(4096)
