"""What is answered of PyTorch's calls: whose they are, and the launches that repeat them."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

import tilebook
from tilebook import dispatch, enabling, native
from tilebook.kernels.norms.standing import STANDINGS
from tilebook.native import place, plans

BY_NAME = {each.name: each for each in STANDINGS}


def _arguments(name, shape=(3, 5, 24), dtype=torch.float32, weight=True, bias=True, needs=None):
    """Those of PyTorch's op, with what its forward pass keeps."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, width = drawn(*shape), shape[-1:]
    vectors = [drawn(*width) if there else None for there in ((weight, bias) if "layer" in name else (weight,))]
    if "layer" in name:
        forward = x, tuple(width), *vectors, 1e-5
        kept = torch.ops.aten.native_layer_norm(*forward)[1:]
    else:
        forward = x, tuple(width), *vectors, 1e-6
        kept = (torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6),)
    if not name.endswith("backward"):
        return forward
    mask = needs or (True, *(each is not None for each in vectors))
    return drawn(*shape), x, tuple(width), *(each.float() for each in kept), *vectors, mask


def _exact(name, args):
    """PyTorch's op in fp64."""
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    if name == "aten::_fused_rms_norm_backward":  # which no CPU has
        dy, x, shape, _, weight, _ = wide
        given = [each.requires_grad_() for each in (x, weight) if each is not None]
        found = torch.autograd.grad(torch.rms_norm(x, shape, weight, 1e-6), given, dy)
        return (*found, None)[:2]
    return getattr(torch.ops.aten, name.removeprefix("aten::"))(*wide)


@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (24,)])
@pytest.mark.parametrize("name", BY_NAME)
def test_ours_is_the_op_it_stands_for(name, shape, parameters):
    standing, args = BY_NAME[name], _arguments(name, shape, weight=parameters[0], bias=parameters[1])
    posed, outputs = standing.posed(args), standing.outputs(args)
    assert posed is not None
    found = iter(standing.op().reference(*posed))
    for wanted, output in zip(_exact(name, args), outputs, strict=True):
        if output is not None:
            assert (tuple(wanted.shape), wanted.stride()) == (output.shape, output.strides)
            torch.testing.assert_close(next(found).view(output.shape).double(), wanted, rtol=1e-4, atol=1e-4)
    assert next(found, None) is None
    for mine, theirs in zip(posed, standing.places, strict=True):  # what a launch is told stands where it is said to
        if theirs is not None and mine is not None:
            assert mine.data_ptr() == args[theirs].data_ptr()


NOT_OURS = {
    "two axes": partial(_arguments, "aten::native_layer_norm"),
    "fp64": partial(_arguments, "aten::native_layer_norm", dtype=torch.float64),
    "no rows": partial(_arguments, "aten::native_layer_norm", shape=(0, 24)),
    "a bias alone": partial(_arguments, "aten::native_layer_norm", weight=False),
    "no gradient of the weight": partial(_arguments, "aten::native_layer_norm_backward", needs=(True, False, True)),
    "no gradient of x": partial(_arguments, "aten::_fused_rms_norm_backward", needs=(False, True)),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_ours_does_not_do_is_pytorchs(name):
    args, op = NOT_OURS[name](), NOT_OURS[name].args[0]
    if name == "two axes":
        args = (args[0], (5, 24), None, None, 1e-5)
    assert BY_NAME[op].posed(args) is None


def test_vectors_of_another_dtype_and_no_eps_are_pytorchs():
    x, shape, weight, bias, eps = _arguments("aten::native_layer_norm")
    assert BY_NAME["aten::native_layer_norm"].posed((x, shape, weight.half(), bias, eps)) is None
    assert BY_NAME["aten::_fused_rms_norm"].posed((x, shape, weight, None)) is None


class Extension:
    __file__ = "/somewhere/0123456789abcdef/tilebook_served.so"

    def __init__(self):
        self.told, self.answer, self.calls = [], None, []

    def install(self, name, of_rows=False):
        self.told.append(name)

    def start(self, answer):
        self.answer = answer

    def notes(self, held, answer, bounds):
        pass

    def stop(self):
        self.told.append("stop")

    def ask(self, every):
        self.told.append(("ask", every))

    def clear(self):
        self.told.append("clear")

    def counted(self):
        found, self.calls = self.calls, []
        return found


@pytest.fixture
def serving(monkeypatch):
    made = native._Serving()
    made._extension = Extension()
    before = list(dispatch.here.watchers)
    monkeypatch.setattr(native, "_serving", made)
    monkeypatch.setattr(native, "resolve_anew", lambda names: None)  # some ops are of the library, which is not loaded
    made.serve(STANDINGS)
    yield made
    dispatch.here.watchers[:] = before


class Choice:
    """What dispatch would give: a choice whose plan is there after its second call."""

    open = probed = False

    def __init__(self, native=False, kept=True, plan="plan", broken=None):
        self.native, self.kept, self.calls, self.plan, self._plan, self.broken = native, kept, 0, None, plan, broken

    def __call__(self, *args):
        self.calls += 1
        if self.broken:
            raise self.broken
        self.plan = self._plan if self.calls > 1 else None
        return args[0].clone(), *(torch.zeros(args[0].shape[0]) for _ in range(2))


def _answer(serving, monkeypatch, choice, translated=("a plan",)):
    monkeypatch.setattr(dispatch, "lookup", lambda op, args: choice)
    monkeypatch.setattr(plans, "translated", lambda *args: translated[0])
    name = "aten::native_layer_norm"
    return serving._extension.answer(name, _arguments(name))


def test_the_plan_is_told_as_soon_as_there_is_one(serving, monkeypatch):
    choice = Choice()
    outputs, decision, token = _answer(serving, monkeypatch, choice)
    assert [tuple(each.shape) for each in outputs] == [(3, 5, 24), (3, 5, 1), (3, 5, 1)]
    assert (decision, token) == (None, choice)
    assert _answer(serving, monkeypatch, choice)[1] == "a plan"


def test_what_has_no_plan_after_a_few_calls_is_pytorchs(serving, monkeypatch):
    choice = Choice(plan=None)
    assert [_answer(serving, monkeypatch, choice)[1] for _ in range(4)] == [None, None, None, False]
    assert [_answer(serving, monkeypatch, Choice(), (None,))[1] for _ in range(2)] == [None, None]


@pytest.mark.parametrize(("kept", "decision"), [(True, False), (False, None)])
def test_what_dispatch_leaves_to_pytorch_is_left(serving, monkeypatch, kept, decision):
    choice = Choice(native=True, kept=kept)
    assert _answer(serving, monkeypatch, choice) == (None, decision, choice)
    assert choice.calls == 0


def test_what_may_not_serve_in_this_place_is_pytorchs(serving, monkeypatch):
    name = "aten::native_layer_norm"
    serving._standings[name] = replace(serving._standings[name], serves=lambda choice: False)
    choice = Choice()
    for probed in (False, True):
        choice.open = choice.probed = probed
        assert _answer(serving, monkeypatch, choice) == (None, None if probed else False, choice)
    assert choice.calls == 0


def test_programs_that_are_to_be_warned_are_pytorchs(serving, monkeypatch):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert _answer(serving, monkeypatch, Choice()) == (None, False, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert _answer(serving, monkeypatch, Choice())[0] is not None


def test_calls_that_are_probed_run_what_the_choice_says_and_nothing_is_decided(serving, monkeypatch):
    for pytorchs in (True, False):
        choice = Choice(native=pytorchs)
        choice.open = choice.probed = True
        for _ in range(6):
            outputs, decision, token = _answer(serving, monkeypatch, choice)
            assert [tuple(each.shape) for each in outputs] == [(3, 5, 24), (3, 5, 1), (3, 5, 1)]
            assert (decision, token) == (None, choice)


def test_a_call_that_is_captured_meanwhile_is_pytorchs_and_nothing_is_decided(serving, monkeypatch):
    choice = Choice(native=True)
    choice.open = True
    assert _answer(serving, monkeypatch, choice) == (None, None, choice)


def test_an_error_leaves_the_call_to_pytorch_with_one_warning(serving, monkeypatch):
    with pytest.warns(RuntimeWarning, match="PyTorch's: ValueError: broken"):
        found = [_answer(serving, monkeypatch, Choice(broken=ValueError("broken")))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found += [_answer(serving, monkeypatch, Choice(broken=ValueError("broken"))) for _ in range(4)]
        lost = _answer(serving, monkeypatch, Choice(broken=torch.OutOfMemoryError("full")))
    # It may have been a signal's handler that raised: only errors again and again decide.
    assert found == [(None, None, None)] * 4 + [(None, False, None)]
    assert lost == (None, None, None)


def test_what_dispatch_forgets_is_forgotten(serving):
    told = serving._extension.told
    assert told == list(BY_NAME)
    with dispatch.use("triton"):
        assert told[-2:] == [("ask", True), "clear"]
    assert told[-2:] == [("ask", False), "clear"]
    told.clear()
    dispatch.reload()
    assert told == [("ask", False), "clear"]
    serving.serve(STANDINGS)
    assert told == [("ask", False), "clear"]  # installed once


def test_calls_count_for_their_choices(serving):
    choice = Choice()
    serving._extension.calls = [(choice, 7), (None, 3)]
    dispatch.misses()
    assert choice.calls == 7


def test_ops_are_served_while_it_is_on(serving, monkeypatch):
    monkeypatch.setattr(serving, "extension", lambda: serving._extension)
    norms = torch.nn.functional.layer_norm, torch.nn.functional.rms_norm
    with tilebook.enabled():
        status = tilebook.status()
        assert set(BY_NAME) <= set(status.served)
        assert status.casts
        assert status.served[0] == "aten::_scaled_dot_product_cudnn_attention"
        assert status.replaced == ("cross_entropy",)
        assert (torch.nn.functional.layer_norm, torch.nn.functional.rms_norm) == norms
        assert serving._extension.told[-1] != "stop"
    assert tilebook.status() == enabling.Status(False, (), (), ())
    assert serving._extension.told[-1] == "stop"


# Building


def test_no_file_is_looked_at_once_it_is_loaded(serving, monkeypatch):
    """A program may turn it on and off for each of its steps."""
    monkeypatch.setenv("TILEBOOK_NATIVE", "/somewhere")
    monkeypatch.setattr(place.Path, "read_bytes", lambda self: pytest.fail(f"{self} is read"))
    monkeypatch.setattr(serving, "extension", lambda: serving._extension)
    for _ in range(2):
        with tilebook.enabled():
            assert tilebook.status().casts
