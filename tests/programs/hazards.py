"""Bodies of programs that can cost a process its GPU: each runs in a process of its own."""

import pytest
import torch

import tilebook
from programs.compare import assert_as_near, assert_no_worse, cotangent, doubled, fresh, value_and_gradients
from programs.families import FAMILIES, TRAINED, WHOLE, plain_masked, rand
from programs.isolated import each
from tilebook import dispatch


def _alive(family, inputs):
    assert_no_worse(family.ours, family.plain, inputs, calls=2, what="a good call after it")


def tensors_on_the_cpu(before):
    """One tensor of each call on the CPU, first or after good calls: a ValueError, and the GPU lives."""

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves("cuda")
        for _ in range(before):
            value_and_gradients(family.ours, fresh(inputs))
        for i in range(len(inputs)):
            wrong = tuple(
                x.detach().cpu().requires_grad_(x.requires_grad) if i == j else x for j, x in enumerate(inputs)
            )
            refused = RuntimeError if family.drop_in else ValueError
            with pytest.raises(refused):
                family.ours(*wrong)
            torch.cuda.synchronize()
            with torch.no_grad(), pytest.raises(refused):
                family.ours(*wrong)
            torch.cuda.synchronize()
        _alive(family, inputs)

    each(FAMILIES, body)


def all_but_one_on_the_cpu():
    """The first tensor alone on the GPU, and the first alone on the CPU."""

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves("cuda")
        for _ in range(3):
            value_and_gradients(family.ours, fresh(inputs))
        mixed = (inputs[0], *(x.detach().cpu() for x in inputs[1:])), (inputs[0].detach().cpu(), *inputs[1:])
        for wrong in mixed:
            with pytest.raises((ValueError, RuntimeError)):
                family.ours(*wrong)
            torch.cuda.synchronize()
        _alive(family, inputs)

    each(FAMILIES, body)


def options_on_the_cpu():
    """Tensors that are options: lengths, tables, slopes, masks."""
    q, k, v = FAMILIES["decode"].leaves("cuda")
    lens = torch.tensor([150, 31], dtype=torch.int32, device="cuda")
    pages = torch.randn(2, 32, 16, 2, 64, device="cuda", dtype=q.dtype)
    table = torch.arange(26, dtype=torch.int32, device="cuda").view(2, 13)
    calls = {
        "seq_lens": lambda lens, table: tilebook.attention_decode(q, k, v, seq_lens=lens),
        "paged": lambda lens, table: tilebook.attention_decode(q, pages[0], pages[1], seq_lens=lens, block_table=table),
    }
    for name, call in calls.items():
        for _ in range(3):
            right = call(lens, table)
        for wrong in ((lens.cpu(), table), *([(lens, table.cpu())] if name == "paged" else [])):
            for _ in range(2):
                with pytest.raises(ValueError):  # noqa: PT011
                    call(*wrong)
                torch.cuda.synchronize()
        torch.testing.assert_close(call(lens, table), right)


def a_wrong_call_first():
    """A call that is refused, before a shape is ever served and after, does not change what serves the shape."""

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves("cuda")
        wrong = (*inputs[:-1], inputs[-1].detach().cpu())

        def refused():
            for _ in range(2):
                with pytest.raises((ValueError, RuntimeError)):
                    family.ours(*wrong)

        refused()
        first = kernels(family, inputs)
        refused()
        assert kernels(family, inputs) == first
        dispatch.reload()
        assert kernels(family, inputs) == first, "served otherwise than where nothing was refused before"
        _alive(family, inputs)

    each(["attention", "softcap", "mlp", "rms_norm", "drop_in", "decode"], body)


def kernels(family, inputs):
    """Names of the kernels that serve a call, after those that settle it."""
    with torch.no_grad():
        for _ in range(4):
            family.ours(*inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            family.ours(*inputs)
            torch.cuda.synchronize()
    return sorted({event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA})


def captured(family, inputs, warm):
    """One call in a CUDA graph, then replays over other numbers."""
    static = tuple(x.detach().clone() for x in inputs)
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(3):
                family.ours(*static)
        torch.cuda.current_stream().wait_stream(side)
    family.plain(*static)  # PyTorch's own libraries are ready
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o = family.ours(*static)
    for seed in (1, 2):
        other = tuple(x.detach() for x in family.leaves("cuda", seed=seed))
        for into, x in zip(static, other, strict=True):
            into.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert_as_near([o], [family.plain(*other)], [family.plain(*doubled(other))], f"replay {seed}")


def first_call_in_a_graph(name):
    """The very first call of the process is one that is being captured."""
    family = FAMILIES[name]
    inputs = family.leaves("cuda")
    captured(family, inputs, warm=False)
    captured(family, inputs, warm=True)
    _alive(family, inputs)


def first_call_of_a_kind_in_a_graph():
    """Each kind's first call of the process is captured; another kind was called before."""
    tilebook.rms_norm(torch.randn(5, 64, device="cuda"), torch.ones(64, device="cuda"))

    def body(name):
        family = FAMILIES[name]
        captured(family, family.leaves("cuda"), warm=False)

    each([name for name in FAMILIES if name != "rms_norm"], body)


def training_steps_in_a_graph(warm):
    """Forward and backward captured together."""

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves("cuda")
        leaves = fresh(inputs)
        right = family.plain(*inputs)  # PyTorch's own libraries are ready
        start = cotangent(right)
        torch.autograd.grad(right, inputs[: family.trained], start)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        if warm:
            with torch.cuda.stream(side):
                for _ in range(3):
                    torch.autograd.grad(family.ours(*leaves), leaves[: family.trained], start)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = family.ours(*leaves)
            gradients = torch.autograd.grad(o, leaves[: family.trained], start)
        for seed in (1, 2):
            other = family.leaves("cuda", seed=seed)
            with torch.no_grad():
                for into, x in zip(leaves, other, strict=True):
                    into.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            theirs = value_and_gradients(family.plain, fresh(other))
            truth = value_and_gradients(family.plain, doubled(other))
            assert_as_near([o.detach(), *gradients], theirs, truth, f"replay {seed}")

    each(TRAINED, body)


def graphed_callables():
    """`torch.cuda.make_graphed_callables` of functions and of a module."""
    from programs.transforms import blocks

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves("cuda")
        graphed = torch.cuda.make_graphed_callables(family.ours, fresh(inputs))
        assert_no_worse(graphed, family.plain, family.leaves("cuda", seed=3))

    each(["drop_in", "softcap", "varlen", "mlp", "rms_norm"], body)
    ours, plain = blocks("cuda")
    x = torch.randn(2, 24, 32, device="cuda")
    graphed = torch.cuda.make_graphed_callables(ours, (x.clone().requires_grad_(),))
    for _ in range(3):
        got, right = graphed(x.clone().requires_grad_()), plain(x)
        torch.testing.assert_close(got, right, rtol=1e-2, atol=5e-3)


def masks_of_few_numbers():
    """A mask of shape (5, 1) and others with a last axis of one, cut out of larger ones."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (rand(generator, (2, 4, 5, 64), "cuda", torch.bfloat16).requires_grad_() for _ in range(3))
    table = torch.randn(64, 9, device="cuda", dtype=torch.bfloat16)
    for mask in (
        table[:5, :1],
        table[1:6, 3:4],
        table[:1, :1],
        table[3:4, 1:6],
        (table > -0.3)[1:6, 3:4],
        table[0, 1:6],
    ):
        right = plain_masked(q, k, v, mask.expand(5, 5))
        for _ in range(4):
            if mask.ndim == 1:
                with pytest.raises(IndexError):  # as PyTorch's own raises
                    tilebook.scaled_dot_product_attention(q, k, v, mask)
            else:
                _right_and_trainable(tilebook.scaled_dot_product_attention(q, k, v, mask), right, (q, k, v))
            _right_and_trainable(tilebook.attention(q, k, v, attn_mask=mask), right, (q, k, v))
    torch.cuda.synchronize()


def _right_and_trainable(o, right, leaves):
    torch.testing.assert_close(o, right, rtol=0.03, atol=0.03)
    torch.autograd.grad(o.sum(), leaves)


def misaligned_after_aligned():
    """After plans for aligned tensors exist, the same shapes one element off, and back again."""

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves("cuda")
        for turn in range(4):
            moved = tuple(_moved(x) if turn % 2 else x for x in inputs)
            assert_no_worse(family.ours, family.plain, moved, what=f"turn {turn}")

    each(FAMILIES, body)


def _moved(x):
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x).detach().requires_grad_(x.requires_grad)


def an_expanded_cotangent_after_a_dense_one():
    """Gradients that arrive expanded, strided, unaligned, in turns with dense ones."""

    def body(name):
        family = FAMILIES[name]
        inputs = family.leaves("cuda")
        dense = torch.ones_like(family.plain(*inputs).detach())
        expanded = dense.flatten()[0].expand(dense.shape)
        starts = {
            "dense": dense,
            "expanded": expanded,
            "strided": torch.stack([expanded] * 2, -1)[..., 0],
            "unaligned": _moved(dense).detach(),
        }
        if dense.ndim > 1:
            starts["transposed"] = expanded.mT.contiguous().mT
        if name in (*WHOLE, "drop_in_mask"):
            # PyTorch's own backward pass by cuDNN loads whole vectors without looking, and the process loses its GPU.
            del starts["unaligned"]
            # Up to PyTorch 2.11 it takes one graph for gradients of any strides. Right are those laid out as the
            # output is, and those that are copied into its layout because their last axis is not dense.
            assert all(x.stride(-1) != 1 or x.stride() == dense.stride() for x in starts.values())

        def gradients(function, start):
            leaves = fresh(inputs)
            return torch.autograd.grad(function(*leaves), leaves[: family.trained], start)

        right = gradients(family.plain, starts["dense"])
        for _ in range(3):
            for kind, start in starts.items():
                for got, wanted in zip(gradients(family.ours, start), right, strict=True):
                    size = wanted.abs().max().item()
                    torch.testing.assert_close(
                        got, wanted, rtol=0.05, atol=0.05 * size + 0.01, msg=lambda t, k=kind: k + t
                    )

    each(TRAINED, body)


def out_of_memory():
    """A call that does not fit raises what PyTorch raises, and smaller ones are served again."""
    family = FAMILIES["attention"]
    inputs = family.leaves("cuda")
    _alive(family, inputs)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        huge = torch.empty(1, 1, 64, device="cuda", dtype=torch.bfloat16).expand(1, 1 << 25, 64)
        with pytest.raises(torch.OutOfMemoryError):
            tilebook.rms_norm(huge, torch.ones(64, device="cuda", dtype=torch.bfloat16))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    _alive(family, inputs)
    _alive(FAMILIES["rms_norm"], FAMILIES["rms_norm"].leaves("cuda"))
