"""Hooks, checkpoints, streams, threads and what else comes between a forward pass and its backward pass."""

import contextlib
import functools
import threading

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from programs.compare import assert_as_near, cotangent, dense, doubled, fresh, some_calls, value_and_gradients
from programs.families import BLOCKS, FAMILIES, TRAINED, families
from programs.isolated import alone_on_a_gpu, each
from programs.layouts import laid_out


def expected(family, inputs):
    return value_and_gradients(family.plain, fresh(inputs)), value_and_gradients(family.plain, doubled(inputs))


def _same(x):
    return x


def _unaligned(x):
    """The same numbers one element further than an allocation begins."""
    if not x.is_floating_point() or not x.numel():
        return x
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


HOOKS = {
    "nothing": (_same, _same),
    "clones": (torch.clone, _same),
    "contiguous": (torch.Tensor.contiguous, _same),
    "on the CPU": (lambda x: (x.device, x.cpu()), lambda packed: packed[1].to(packed[0])),
    "unaligned views": (_unaligned, _same),
    "transposed": (lambda x: x.mT.contiguous() if x.ndim > 1 else x, lambda x: x.mT if x.ndim > 1 else x),
    "strided": (lambda x: torch.stack([x, x], -1), lambda x: x[..., 0]),
    "numpy": (
        lambda x: (x.device, x.dtype, x.detach().cpu().double().numpy()),
        lambda packed: torch.from_numpy(packed[2]).to(packed[0], packed[1]),
    ),
}


@alone_on_a_gpu
def test_saved_tensors_that_come_back_otherwise_give_the_same_gradients(device):
    def body(which):
        hook, name = which.split(": ")
        if device == "cpu" and name == "varlen":
            return  # PyTorch's kernel for the CPU misreads such strides
        family = FAMILIES[name]
        inputs = family.leaves(device)
        theirs, truth = expected(family, inputs)

        def step(function):
            with saved_tensors_hooks(*HOOKS[hook]):
                o = function(*(leaves := fresh(inputs)))
            gradients = torch.autograd.grad(o, leaves[: family.trained], cotangent(o))
            return [o.detach(), *gradients]

        # Some kernels of PyTorch's get these wrong; on a GPU they may end the process, and ours must be right alone.
        if device == "cpu" and hook in ("transposed", "strided"):
            try:
                assert_as_near(step(family.plain), theirs, truth)
            except (AssertionError, RuntimeError):
                return
        for call in range(some_calls(inputs)):
            assert_as_near(step(family.ours), theirs, truth, f"call {call + 1}")
        assert_as_near(value_and_gradients(family.ours, fresh(inputs)), theirs, truth, "after")

    each([f"{hook}: {name}" for hook in HOOKS for name in TRAINED], body)


@alone_on_a_gpu
def test_steps_with_and_without_saving_on_the_cpu_give_the_same_gradients(device):
    """Any mix, of inputs that are not contiguous: a plan of one kind of step must not serve the other."""

    def body(which):
        layout, name = which.split(": ")
        family = FAMILIES[name]
        inputs = tuple(laid_out(x, layout) for x in family.leaves(device))
        theirs, truth = (
            value_and_gradients(family.plain, dense(inputs)),
            value_and_gradients(family.plain, doubled(inputs)),
        )
        for mix in ("ppppssssp", "sssspppps", "pspspspsp") if device == "cuda" else ("psp",):
            for step, kind in enumerate(mix):
                leaves = fresh(inputs)
                with save_on_cpu(pin_memory=False) if kind == "s" else contextlib.nullcontext():
                    o = family.ours(*leaves)
                gradients = torch.autograd.grad(o, leaves[: family.trained], cotangent(o))
                assert_as_near([o.detach(), *gradients], theirs, truth, f"{mix} step {step}")

    layouts = "transposed", "every other element", "one for all", "cut out of a larger one"
    each([f"{layout}: {name}" for layout in layouts for name in TRAINED], body)


@families(*TRAINED)
def test_hooks_see_what_is_saved_and_it_is_not_more_than_pytorch_saves(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)

    def saved(function):
        found = {}

        def pack(x):
            found[x.data_ptr(), tuple(x.shape)] = x.numel() * x.itemsize
            return x

        with saved_tensors_hooks(pack, _same):
            o = function(*inputs)
        torch.autograd.grad(o, inputs[: family.trained], cotangent(o))
        return sum(found.values())

    most = saved(family.plain)
    for _ in range(some_calls(inputs)):
        assert 0 < saved(family.ours) <= 1.3 * most + 4096


@pytest.mark.parametrize("reentrant", [False, True])
@families(*TRAINED)
def test_checkpointed_calls_give_the_same_gradients(device, family, reentrant):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    theirs, truth = expected(family, inputs)
    for _ in range(some_calls(inputs)):
        found = value_and_gradients_backward(lambda *x: checkpoint(family.ours, *x, use_reentrant=reentrant), inputs)
        assert_as_near(found, theirs, truth)


def value_and_gradients_backward(function, inputs):
    """By `backward()`, which reentrant checkpoints ask for."""
    leaves = fresh(inputs)
    o = function(*leaves)
    o.backward(cotangent(o))
    return [o.detach(), *(x.grad for x in leaves if x.requires_grad)]


@families(*TRAINED)
def test_selective_checkpoints_give_the_same_gradients(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    theirs, truth = expected(family, inputs)
    dear = ("mm", "attention", "tilebook", "norm")

    def decide(ctx, op, *args, **kwargs):
        saved = any(name in str(op) for name in dear)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*inputs):
        contexts = functools.partial(create_selective_checkpoint_contexts, decide)
        return checkpoint(family.ours, *inputs, use_reentrant=False, context_fn=contexts)

    for _ in range(some_calls(inputs)):
        assert_as_near(value_and_gradients(checkpointed, fresh(inputs)), theirs, truth)


def test_dropout_in_a_checkpoint_drops_the_same_again(device):
    import tilebook

    inputs = FAMILIES["attention"].leaves(device)
    for reentrant in (False, True):
        torch.manual_seed(1)
        found = value_and_gradients_backward(
            lambda *x: checkpoint(lambda *y: tilebook.attention(*y, dropout_p=0.4), *x, use_reentrant=reentrant),  # noqa: B023
            inputs,
        )
        torch.manual_seed(1)
        plain = value_and_gradients_backward(lambda *x: tilebook.attention(*x, dropout_p=0.4), inputs)
        for got, right in zip(found, plain, strict=True):
            torch.testing.assert_close(got, right)


@families(*TRAINED)
def test_tensor_hooks_change_gradients_as_in_pytorch(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)

    def run(function, inputs):
        seen = []
        o = function(*(x * 1 if x.requires_grad else x for x in inputs))
        o.register_hook(lambda g: g * 2)
        inputs[0].register_hook(lambda g: seen.append(g.shape))
        o.retain_grad()
        o.backward(cotangent(o))
        assert seen == [inputs[0].shape]
        return [o.grad, *(x.grad for x in inputs[: family.trained])]

    truth, theirs = run(family.plain, doubled(inputs)), run(family.plain, fresh(inputs))
    for _ in range(some_calls(inputs)):
        assert_as_near(run(family.ours, fresh(inputs)), theirs, truth)


def _with_module_hooks(module, x):
    fired, gradients = [], []
    handles = [
        module.register_forward_pre_hook(lambda m, args: fired.append("before")),
        module.register_forward_hook(lambda m, args, out: fired.append("after")),
        module.register_full_backward_pre_hook(lambda m, g: fired.append("back")),
        module.register_full_backward_hook(lambda m, g_in, g_out: gradients.append(g_in[0])),
    ]
    module(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    return fired, gradients[0]


def test_module_hooks_fire_as_in_pytorch(device):
    from programs.transforms import blocks

    ours, plain = blocks(device)
    x = torch.randn(2, 24, 32, device=device)
    for _ in range(some_calls([x])):
        gradients = []
        for module in (ours, plain):
            fired, gradient = _with_module_hooks(module, x.clone().requires_grad_())
            assert fired == ["before", "after", "back"]
            gradients.append(gradient)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=2e-2)


@families(*TRAINED)
def test_an_input_changed_in_place_before_backward_raises_as_in_pytorch(device, family):
    family = FAMILIES[family]
    for i in range(family.trained):

        def step(function, i=i):
            inputs = family.leaves(device)
            used = tuple(x.clone() if j < family.trained else x for j, x in enumerate(inputs))
            o = function(*used)
            with torch.no_grad():
                used[i].mul_(2)
            return torch.autograd.grad(o, inputs[: family.trained], cotangent(o))

        try:
            step(family.plain)
        except RuntimeError:
            if family.name == "bias" and device == "cuda":
                continue  # a copy of the bias was taken, so that nothing is wrong
            for _ in range(some_calls(family.leaves(device))):
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    step(family.ours)


@families(*TRAINED)
def test_an_output_changed_in_place_has_the_right_gradient_or_raises(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)

    def step(function, inputs):
        o = function(*inputs)
        o.mul_(3)
        return [o.detach(), *torch.autograd.grad(o, inputs[: family.trained], cotangent(o))]

    truth = value_and_gradients(lambda *x: family.plain(*x) * 3, doubled(inputs))
    try:
        theirs, refused = step(family.plain, fresh(inputs)), False
    except RuntimeError:
        theirs, refused = value_and_gradients(lambda *x: family.plain(*x) * 3, fresh(inputs)), True
    for _ in range(some_calls(inputs)):
        try:
            found = step(family.ours, fresh(inputs))
        except RuntimeError:
            assert refused or family.name not in BLOCKS
            continue
        assert_as_near(found, theirs, truth, blur=3)


@families(*TRAINED)
def test_a_graph_used_twice_gives_its_gradients_twice_and_one_freed_raises(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    theirs, truth = expected(family, inputs)
    for _ in range(some_calls(inputs)):
        leaves = fresh(inputs)
        o = family.ours(*leaves)
        for keep in (True, True, False):
            gradients = torch.autograd.grad(o, leaves[: family.trained], cotangent(o), retain_graph=keep)
            assert_as_near([o.detach(), *gradients], theirs, truth)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(o, leaves[: family.trained], cotangent(o))


@families(*TRAINED)
def test_gradients_accumulate_over_calls(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)

    def run(function, inputs):
        for _ in range(3):
            o = function(*inputs)
            o.backward(cotangent(o))
        return [x.grad for x in inputs[: family.trained]]

    truth, theirs = run(family.plain, doubled(inputs)), run(family.plain, fresh(inputs))
    assert_as_near(run(family.ours, fresh(inputs)), theirs, truth, blur=3)


@families()
def test_threads_side_by_side_give_each_its_own_numbers(device, family):
    family = FAMILIES[family]
    inputs = [family.leaves(device, seed=i) for i in range(6)]
    wanted = [expected(family, each) if family.trained else None for each in inputs]
    failures, start = [], threading.Barrier(len(inputs))

    def work(i):
        try:
            start.wait()
            for _ in range(5 if device == "cuda" else 2):
                found = value_and_gradients(family.ours, fresh(inputs[i]))
                if wanted[i]:
                    assert_as_near(found, *wanted[i])
                else:
                    torch.testing.assert_close(found[0], family.plain(*inputs[i]), rtol=0.05, atol=0.05)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_a_backward_pass_in_another_thread_gives_the_same_gradients(device):
    for name in TRAINED:
        family = FAMILIES[name]
        inputs = family.leaves(device)
        theirs, truth = expected(family, inputs)
        for _ in range(some_calls(inputs)):
            leaves = fresh(inputs)
            o = family.ours(*leaves)
            thread = threading.Thread(target=o.backward, args=(cotangent(o),))
            thread.start()
            thread.join()
            assert_as_near([o.detach(), *(x.grad for x in leaves[: family.trained])], theirs, truth, name)


def test_the_log_sum_exp_takes_no_part_in_gradients(device):
    import tilebook

    q, k, v = FAMILIES["attention"].leaves(device)
    for options in ({}, {"causal": True}, {"softcap": 5.0}):
        for _ in range(some_calls([q])):
            o, lse = tilebook.attention(q, k, v, return_lse=True, **options)
            assert not lse.requires_grad
            assert lse.dtype == torch.float32
            both = torch.autograd.grad(o.float().sum() + lse.sum(), (q, k, v))
            alone = torch.autograd.grad(tilebook.attention(q, k, v, **options).float().sum(), (q, k, v))
            for got, right in zip(both, alone, strict=True):
                torch.testing.assert_close(got, right, rtol=0.02, atol=0.02)
