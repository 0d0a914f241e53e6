"""PyTorch's ops with recorded launches in their places: tracing, transforms, modes, threads."""

import threading

import pytest
import torch
from test_extension import OPS, PLANNED, ROWS, WIDTH, Machine, _near, _norm, _plain, _x
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def served(extension):
    yield from extension(Machine(), OPS)


def _never(x):
    raise AssertionError("a call that is not one of ordinary tensors was asked about")


@pytest.mark.parametrize("kind", ["fake", "meta", "compiled", "dispatching"])
def test_what_is_no_ordinary_tensor_is_not_asked_about(served, kind):
    from torch.testing._internal.two_tensor import TwoTensor

    served.answers = dict.fromkeys(OPS, _never)
    if kind == "fake":
        with FakeTensorMode():
            assert _norm(torch.empty(ROWS, WIDTH)).shape == (ROWS, WIDTH)
    elif kind == "meta":
        assert _norm(torch.empty(ROWS, WIDTH, device="meta")).is_meta
    elif kind == "compiled":
        torch.compiler.reset()
        x = _x().detach()
        compiled = torch.compile(_norm, backend="inductor")
        _near(compiled(x), _plain(served, lambda: _norm(x)))
    else:
        served.answers = {}
        x = TwoTensor(_x().detach(), _x().detach())
        _near(_norm(x).a, _norm(x.a))


def test_transforms_and_higher_derivatives_are_pytorchs(served):
    served.answers[OPS[0]] = PLANNED
    x, many = _x(), torch.randn(3, ROWS, WIDTH)
    _norm(x)

    def second():
        (dx,) = torch.autograd.grad(_norm(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    def found():
        return [
            second(),
            torch.vmap(_norm)(many),
            torch.func.grad(lambda x: _norm(x).pow(3).sum())(x.detach()),
            torch.func.jvp(_norm, (x.detach(),), (torch.ones_like(x),))[1],
            _norm(torch._neg_view(x)),
        ]

    for one, other in zip(found(), _plain(served, found), strict=True):
        _near(one, other)


def test_modes_of_autograd_change_nothing(served):
    served.answers[OPS[0]] = PLANNED
    x = _x().detach()
    right = _plain(served, lambda: _norm(x))
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                _near(_norm(x).clone(), right)
    with torch.autocast("cpu", torch.bfloat16):
        assert _norm(x).dtype == torch.float32


def test_threads_are_served_alike(served):
    served.answers[OPS[0]] = PLANNED
    xs = [_x().detach() for _ in range(4)]
    right = [_plain(served, lambda x=x: _norm(x)) for x in xs]
    wrong = []

    def work(mine):
        for turn in range(200):
            which = (mine + turn) % len(xs)
            if not torch.allclose(_norm(xs[which]), right[which], rtol=1e-5, atol=1e-5):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert served.launched >= 790


def test_deterministic_programs_are_another_kind(served):
    x = _x().detach()
    for on, warns in [(False, False), (True, False), (False, False), (True, True), (True, False), (True, True)]:
        torch.use_deterministic_algorithms(on, warn_only=warns)
        try:
            _norm(x)
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(served.asked) == 3
