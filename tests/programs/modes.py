"""What a program has switched on around a call: autocast, no gradients, anomaly detection, defaults, determinism."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tilebook
from programs.compare import assert_as_near, cotangent, doubled, fresh, some_calls, value_and_gradients
from programs.families import FAMILIES, TRAINED, families

PRODUCTS = ["attention", "causal", "gqa", "drop_in", "drop_in_mask", "softcap", "varlen", "mlp"]
"""Families that autocast casts."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@families(*PRODUCTS, "rms_norm")
def test_autocast_gives_pytorchs_dtypes_and_numbers(device, family, dtype):
    family = FAMILIES[family]
    inputs = family.leaves(device, torch.float32)

    def under(function):
        def run(*inputs):
            with torch.autocast(device, dtype):
                return function(*inputs)

        return run

    truth = value_and_gradients(family.plain, doubled(inputs))
    theirs = value_and_gradients(under(family.plain), fresh(inputs))
    for _ in range(some_calls(inputs)):
        got = value_and_gradients(under(family.ours), fresh(inputs))
        assert [x.dtype for x in got[1:]] == [x.dtype for x in theirs[1:]]
        assert got[0].dtype == theirs[0].dtype or family.name == "rms_norm"  # documented: in the dtype of x
        for a, b, right in zip(got, theirs, truth, strict=True):
            size = right.abs().max().item()
            allowed = 2 * (b.double() - right).abs().max().item() + size * torch.finfo(dtype).eps
            assert (a.double() - right).abs().max().item() <= allowed


@families(*PRODUCTS)
def test_a_region_without_autocast_inside_one_with_it_is_without(device, family):
    family = FAMILIES[family]
    inputs = tuple(x.detach() for x in family.leaves(device, torch.float32))
    expected = family.plain(*inputs)
    with torch.autocast(device, torch.bfloat16):
        first = family.ours(*inputs)
        with torch.autocast(device, enabled=False):
            o = family.ours(*inputs)
        again = family.ours(*inputs)
        with torch.autocast(device, torch.float16):
            other = family.ours(*inputs)
    assert (first.dtype, o.dtype, again.dtype, other.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )
    torch.testing.assert_close(o, expected, rtol=1e-3, atol=1e-3)


@families("drop_in", "attention", "mlp")
def test_inputs_of_several_dtypes_under_autocast_are_cast_to_one(device, family):
    family = FAMILIES[family]
    first, *rest = (x.detach() for x in family.leaves(device, torch.float32))
    with torch.autocast(device, torch.bfloat16):
        for _ in range(3):
            o = family.ours(first.bfloat16(), *rest)
            assert o.dtype == torch.bfloat16
            torch.testing.assert_close(o, family.plain(first.bfloat16(), *rest), rtol=0.05, atol=0.05)


def test_weights_used_twice_under_one_autocast_accumulate_their_gradients(device):
    x, *weights = FAMILIES["mlp"].leaves(device, torch.float32)

    def step(function):
        own = [w.detach().requires_grad_() for w in weights]
        with torch.autocast(device, torch.bfloat16):
            y = function(function(x.detach(), *own), *own)
        y.float().square().sum().backward()
        return [w.grad for w in own]

    for _ in range(some_calls([x])):
        for got, right in zip(step(tilebook.mlp), step(FAMILIES["mlp"].plain), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, right, rtol=0.05, atol=0.03 * right.abs().max().item())


def test_doubles_and_custom_casts_under_autocast_are_what_pytorch_makes_of_them(device):
    q, k, v = (x.detach().double() for x in FAMILIES["drop_in"].leaves(device))
    with torch.autocast(device, torch.bfloat16):
        try:
            expected = FAMILIES["drop_in"].plain(q, k, v)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                FAMILIES["drop_in"].ours(q, k, v)
        else:
            o = FAMILIES["drop_in"].ours(q, k, v)
            assert o.dtype == expected.dtype
            torch.testing.assert_close(o, expected)


@families()
def test_inference_mode_and_no_grad_give_the_same_numbers_without_gradients(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    expected = family.ours(*inputs).detach()
    for _ in range(some_calls(inputs)):
        with torch.no_grad():
            o = family.ours(*inputs)
        assert not o.requires_grad
        assert torch.equal(o, expected) or torch.allclose(o.float(), expected.float(), atol=0.02, rtol=0.02)
        with torch.inference_mode():
            o = family.ours(*inputs)
        assert o.is_inference()
        assert torch.allclose(o.float(), expected.float(), atol=0.02, rtol=0.02)


@families()
def test_tensors_made_in_inference_mode_are_served_there_and_outside(device, family):
    family = FAMILIES[family]
    with torch.inference_mode():
        inputs = tuple(x.detach().clone() for x in family.leaves(device))
        for _ in range(some_calls(inputs)):
            inside = family.ours(*inputs)
    expected = family.plain(*inputs)
    for _ in range(some_calls(inputs)):
        outside = family.ours(*inputs)
        torch.testing.assert_close(outside, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(inside.clone(), expected, rtol=0.05, atol=0.05)


@families(*TRAINED)
def test_a_tensor_of_inference_mode_beside_one_that_is_trained_is_refused_or_right(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    with torch.inference_mode():
        second = inputs[1].detach().clone()

    def step(function):
        o = function(inputs[0], second, *inputs[2:])
        return torch.autograd.grad(o.float().sum(), inputs[0])

    (right,) = torch.autograd.grad(family.plain(*inputs).float().sum(), inputs[0])
    try:
        (got,) = step(family.ours)
    except RuntimeError as refused:
        assert "nference" in str(refused)  # noqa: PT017
    else:
        torch.testing.assert_close(got, right, rtol=0.05, atol=0.05 * right.abs().max().item())


@families(*TRAINED)
def test_anomaly_detection_changes_nothing_and_finds_nan(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    truth = value_and_gradients(family.plain, doubled(inputs))
    theirs = value_and_gradients(family.plain, fresh(inputs))
    with torch.autograd.detect_anomaly(check_nan=True):
        for _ in range(some_calls(inputs)):
            assert_as_near(value_and_gradients(family.ours, fresh(inputs)), theirs, truth)
        o = family.ours(*fresh(inputs))
        with pytest.raises(RuntimeError, match="nan"):
            o.backward(torch.full_like(o, float("nan")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@families()
def test_the_default_dtype_decides_nothing(device, family, dtype):
    family = FAMILIES[family]
    inputs = family.leaves(device, torch.float32)
    expected = value_and_gradients(family.ours, fresh(inputs))
    with default_dtype(dtype):
        for _ in range(some_calls(inputs)):
            found = value_and_gradients(family.ours, fresh(inputs))
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5 * right.abs().max().item())


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"causal": "bottom_right"}, {"window": (9, 3)}], ids=str)
def test_dropout_under_another_default_dtype_drops_the_same(device, options):
    q, k, v = FAMILIES["attention"].leaves(device, torch.float32)

    def call():
        torch.manual_seed(3)
        o = tilebook.attention(q, k, v, dropout_p=0.3, **options)
        return o.detach(), *torch.autograd.grad(o, (q, k, v), cotangent(o))

    expected = call()
    with default_dtype(torch.bfloat16):
        found = call()
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5 * right.abs().max().item())


@pytest.mark.parametrize("default", ["cpu", "meta", "device"])
@families()
def test_the_default_device_decides_nothing(device, family, default):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    truth = value_and_gradients(family.plain, doubled(inputs))
    theirs = value_and_gradients(family.plain, fresh(inputs))
    starts = cotangent(theirs[0])
    with torch.device(device if default == "device" else default):
        for _ in range(some_calls(inputs)):
            leaves = fresh(inputs)
            o = family.ours(*leaves)
            gradients = torch.autograd.grad(o, leaves[: family.trained], starts) if family.trained else ()
            assert_as_near([o.detach(), *gradients], theirs, truth)


@pytest.mark.parametrize("default", ["meta", "device"])
@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.5}, {"softcap": 5.0, "dropout_p": 0.5}, {"return_lse": True}], ids=str
)
def test_the_default_device_decides_nothing_of_an_option(device, options, default):
    q, k, v = FAMILIES["attention"].leaves(device)
    with torch.device(device if default == "device" else default):
        o = tilebook.attention(q, k, v, **options)
        o = o[0] if options.get("return_lse") else o
        assert o.device == q.device
        o.sum().backward()
    assert q.grad.device == q.device


@contextlib.contextmanager
def deterministic(warn_only=False):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@families(*TRAINED)
def test_deterministic_algorithms_repeat_their_bits_or_say_so(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)
    with deterministic():
        try:
            first = value_and_gradients(family.ours, fresh(inputs))
        except RuntimeError as refused:
            assert "determinis" in str(refused)  # noqa: PT017
            return
        for _ in range(some_calls(inputs)):
            again = value_and_gradients(family.ours, fresh(inputs))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_deterministic_algorithms_that_only_warn_do_not_raise(device, recwarn):
    with deterministic(warn_only=True):
        for name in TRAINED:
            family = FAMILIES[name]
            value_and_gradients(family.ours, family.leaves(device))
    assert not [w for w in recwarn if "tilebook" in str(w.message)]


@families("attention", "causal", "gqa", "drop_in", "drop_in_mask", "mlp")
def test_the_flop_counter_counts_what_it_counts_of_pytorch(device, family):
    family = FAMILIES[family]
    inputs = family.leaves(device)

    def counted(function):
        with FlopCounterMode(display=False) as forward:
            o = function(*inputs)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(o, inputs[: family.trained], cotangent(o))
        return forward.get_total_flops(), backward.get_total_flops()

    try:
        expected = counted(family.plain)
    except AssertionError:
        pytest.skip("PyTorch's own formula does not take this call")
    family.ours(*inputs)  # a counter knows the ops that there are when it is made
    for _ in range(some_calls(inputs)):
        assert counted(family.ours) == expected


@families()
def test_the_profiler_names_the_call(device, family):
    family = FAMILIES[family]
    inputs = tuple(x.detach() for x in family.leaves(device))
    for _ in range(some_calls(inputs)):
        family.ours(*inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        family.ours(*inputs)
    names = " ".join(event.key for event in profile.key_averages())
    usual = {
        "cross_entropy": "log_softmax",
        "linear_cross_entropy": "mm",
        "mlp": "linear",
        "rms_norm": "norm",
        "layer_norm": "norm",
        "glu": "mul",
        "swiglu": "linear",
        "rope": "mul",
    }
    usual = usual.get(family.name, "attention")
    assert "tilebook" in names or usual in names or device == "cpu", names


def test_a_profile_with_shapes_stacks_and_memory_is_made(device):
    family = FAMILIES["drop_in"]
    inputs = family.leaves(device)
    with torch.profiler.profile(record_shapes=True, profile_memory=True, with_stack=True, with_flops=True) as profile:
        for _ in range(4):
            value_and_gradients(family.ours, fresh(inputs))
    assert len(profile.key_averages()) > 0
