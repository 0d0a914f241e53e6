"""PyTorch's ops with recorded launches in their places, on the CPU: what launches is a function of this file."""

import ctypes
import os
import signal
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

OPS = ("aten::native_layer_norm", "aten::native_layer_norm_backward")
ROWS, WIDTH = 6, 8


def _at(address, *shape):
    count = torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).view(shape)


class Machine:
    """Stands for the GPU: 'runs' LayerNorm of (ROWS, WIDTH) without parameters, and counts."""

    def __init__(self):
        self.status, self.launches = 0, []

    def launch(self, function, x, y, z, threads, _y, _z, shared, stream, parameters, extra):
        if self.status:
            return self.status
        self.launches.append((function, (x, y, z), threads, shared))
        numbers = [ctypes.c_uint64.from_address(parameters[i]).value for i in range(5)]
        assert numbers[4] == 5
        given, out, mean, rstd = (_at(each, ROWS, n) for each, n in zip(numbers, (WIDTH, WIDTH, 1, 1), strict=False))
        mean.copy_(given.mean(-1, keepdim=True))
        rstd.copy_((given.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt())
        out.copy_((given - mean) * rstd)
        return 0


PLAN = (
    [((ROWS, WIDTH), (WIDTH, 1), 6), ((ROWS, 1), (1, 1), 6), ((ROWS, 1), (1, 1), 6)],
    [(77, (3, 2, 1), 128, 64, [(0, 0), (5, 0), (6, 0), (7, 0), (-1, 5)])],
    [(5, 0), (6, 0), (7, 0)],
    [],
)
LEFT = None, False, "left"
AGAIN = None, None, None
PLANNED = None, PLAN, "planned"


@pytest.fixture
def served(extension):
    yield from extension(Machine(), OPS)


def _x(*shape, dtype=torch.float32):
    return torch.randn(shape or (ROWS, WIDTH), dtype=dtype, requires_grad=True)


def _norm(x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * max(1.0, wanted.abs().max().item()))


def _plain(served, function):
    served.extension.stop()
    try:
        return function()
    finally:
        served.extension.start(served.answer)


def _step(x):
    y = _norm(x)
    (dx,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), x)
    return y, dx


def test_a_planned_call_is_launched_and_its_gradient_is_pytorchs(served):
    served.answers[OPS[0]] = PLANNED
    x = _x()
    for turn in range(3):  # the first call is PyTorch's: it was asked about
        for found, wanted in zip(_step(x), _plain(served, lambda: _step(x)), strict=True):
            _near(found, wanted)
        assert served.launched == turn
    assert served.machine.launches[0] == (77, (3, 2, 1), 128, 64)
    assert [name for name, _ in served.asked] == list(OPS)


def test_what_python_has_computed_is_taken(served):
    served.answers[OPS[0]] = lambda args: ([torch.ones(ROWS, WIDTH), torch.zeros(ROWS, 1), None], None, None)
    for _ in range(2):
        assert torch.equal(_norm(_x().detach()), torch.ones(ROWS, WIDTH))
    assert len(served.asked) == 2  # nothing was decided


DIFFERENT = {
    "another shape": lambda: (_x(ROWS + 1, WIDTH), 1e-5),
    "another width": lambda: (_x(ROWS, WIDTH + 1), 1e-5),
    "another dtype": lambda: (_x(dtype=torch.float64), 1e-5),
    "more axes": lambda: (_x(2, 3, WIDTH), 1e-5),
    "another eps": lambda: (_x(), 1e-6),
    "other strides": lambda: (_x(WIDTH, ROWS).t(), 1e-5),
    "another alignment": lambda: (torch.randn(ROWS * WIDTH + 1)[1:].view(ROWS, WIDTH), 1e-5),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_launch_depends_on_tells_calls_apart(served, name):
    served.answers[OPS[0]] = PLANNED
    _norm(_x())
    x, eps = DIFFERENT[name]()
    served.answers[OPS[0]] = LEFT
    _near(_norm(x, eps), _plain(served, lambda: _norm(x, eps)))
    assert len(served.asked) == 2
    assert served.launched == 0


def test_parameters_are_part_of_it_too(served):
    x, weight = _x(), torch.randn(WIDTH)
    for _ in range(2):
        F.layer_norm(x, (WIDTH,))
        F.layer_norm(x, (WIDTH,), weight)
        F.layer_norm(x, (WIDTH,), weight, weight)
    assert [[each is None for each in args[2:4]] for _, args in served.asked] == [
        [True, True], [False, True], [False, False],
    ]  # fmt: skip


def test_a_tensor_that_is_to_be_made_contiguous_is(served):
    served.answers[OPS[0]] = None, (*PLAN[:3], [0]), None
    x = torch.randn(WIDTH, ROWS).t()
    _norm(x)
    _near(_norm(x), _plain(served, lambda: _norm(x)))
    assert served.launched == 1


def test_a_launch_that_fails_is_pytorchs_from_then_on(served):
    served.answers[OPS[0]] = PLANNED
    x = _x()
    _norm(x)
    served.machine.status = 700
    _near(_norm(x), _plain(served, lambda: _norm(x)))
    served.machine.status = 0
    _near(_norm(x), _plain(served, lambda: _norm(x)))
    assert served.launched == 0
    assert len(served.asked) == 1


def _raises(args):
    raise RuntimeError("no answer")


def _launch(*parameters):
    return [(77, (1, 1, 1), 32, 0, list(parameters))]


def _spoilt(**changes):
    names = "made", "launches", "outputs", "copied"
    return None, tuple({**dict(zip(names, PLAN, strict=True)), **changes}.values()), None


SPOILT = {
    "an exception": _raises,
    "no answer": 5,
    "no such tensor": _spoilt(launches=_launch((9, 0))),
    "no such address of a map": _spoilt(launches=_launch((-1, bytes(128)))),
    "a short map": _spoilt(launches=_launch((0, bytes(64)))),
    "too many maps": _spoilt(launches=_launch(*[(0, bytes(128))] * 9)),
    "no bytes": _spoilt(launches=_launch((0, "1"))),
    "an argument as an output": _spoilt(outputs=[(0, 0), *PLAN[2][1:]]),
    "no such output": _spoilt(outputs=[(-3, 0), *PLAN[2][1:]]),
    "no list": _spoilt(launches=None),
    "no dimension": _spoilt(made=[(("six",), (1,), 6)]),
    "too many tensors": _spoilt(made=PLAN[0] * 20),
    "too many parameters": _spoilt(launches=_launch(*[(0, 0)] * 199)),
    "no such argument": _spoilt(copied=[5]),
}


@pytest.mark.parametrize("status", [2, 201, 900])
def test_a_launch_that_may_work_another_time_is_tried_again(served, status):
    served.answers[OPS[0]] = PLANNED
    x = _x()
    _norm(x)
    served.machine.status = status
    _near(_norm(x), _plain(served, lambda: _norm(x)))
    served.machine.status = 0
    _norm(x)
    assert served.launched == 1


def test_where_there_is_no_memory_for_it_the_call_is_pytorchs(served):
    huge = (1 << 50,)
    served.answers[OPS[0]] = None, ([*PLAN[0], (huge, (1,), 6)], *PLAN[1:]), None
    x = _x()
    for _ in range(3):
        _near(_norm(x), _plain(served, lambda: _norm(x)))
    assert (served.launched, len(served.asked)) == (0, 1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_is_not_kept_from_it(served, kind):
    def ends(args):
        raise kind

    served.answers[OPS[0]] = ends
    x = _x()
    with pytest.raises(kind):
        _norm(x)
    served.answers[OPS[0]] = PLANNED
    for _ in range(2):
        _norm(x)
    assert served.launched == 1


def test_an_answer_that_was_under_way_when_all_was_forgotten_is_not_kept(served):
    def forgotten(args):
        served.extension.clear()
        return PLANNED

    served.answers[OPS[0]] = forgotten
    x = _x()
    for _ in range(3):
        _norm(x)
    assert (served.launched, len(served.asked)) == (0, 3)


def test_a_token_is_held_once_for_all_kinds(served):
    token = object()
    served.answers[OPS[0]] = None, False, token
    before = sys.getrefcount(token)
    for rows in range(1, 40):
        _norm(_x(rows, WIDTH).detach())
    assert sys.getrefcount(token) <= before + 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_is_pytorchs_and_never_waits(served):
    served.answers[OPS[0]] = PLANNED
    x = _x().detach()
    right, going = _plain(served, lambda: _norm(x)), threading.Event()

    def work():
        while not going.is_set():
            _norm(x)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for each in threads:
        each.start()
    try:
        for _ in range(30):
            child = os.fork()
            if not child:
                signal.alarm(20)
                served.extension.clear()
                os._exit(0 if torch.allclose(_norm(x), right, atol=1e-5) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        going.set()
        for each in threads:
            each.join()


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_spoilt_answer_is_pytorchs_call(served, name):
    served.answers[OPS[0]] = SPOILT[name]
    x = _x()
    for _ in range(2):
        _near(_norm(x), _plain(served, lambda: _norm(x)))
    assert served.launched == 0


def test_calls_on_the_way_to_an_answer_are_pytorchs(served):
    served.answers[OPS[0]] = lambda args: (_norm(args[0]), *LEFT)[1:]
    x = _x()
    _near(_norm(x), _plain(served, lambda: _norm(x)))
    assert len(served.asked) == 1


def test_every_call_is_asked_about_while_it_is_told_so(served):
    served.answers[OPS[0]] = PLANNED
    x = _x().detach()
    served.extension.ask(True)
    for _ in range(3):
        _norm(x)
    assert (len(served.asked), served.launched) == (3, 0)
    served.extension.ask(False)
    for _ in range(3):
        _norm(x)
    assert (len(served.asked), served.launched) == (4, 2)


def test_calls_are_counted_for_each_token(served):
    served.answers[OPS[0]] = PLANNED
    x, other = _x().detach(), _x(3, 4).detach()
    for _ in range(4):
        _norm(x)
    served.answers[OPS[0]] = LEFT
    for _ in range(3):
        _norm(other)
    assert sorted(served.extension.counted()) == [("left", 2), ("planned", 3)]
    assert sorted(served.extension.counted()) == [("left", 0), ("planned", 0)]
    served.extension.clear()
    assert served.extension.counted() == []


def test_it_ends_with_stop(served):
    served.answers[OPS[0]] = PLANNED
    x = _x()
    _norm(x)
    served.extension.stop()
    _norm(x)
    assert served.launched == 0


def test_what_no_plan_needs_is_let_go_when_all_is_forgotten(served):
    left, planned = object(), object()
    before = sys.getrefcount(left), sys.getrefcount(planned)
    served.answers[OPS[0]] = None, False, left
    _norm(_x(3, WIDTH).detach())
    served.answers[OPS[0]] = None, PLAN, planned
    _norm(_x().detach())
    served.answers.clear()
    served.extension.clear()
    assert sys.getrefcount(left) <= before[0]
    assert sys.getrefcount(planned) > before[1]


def test_what_is_let_go_may_have_all_forgotten_again(served):
    ended = []

    class Token:
        def __del__(self):
            served.extension.clear()  # as a program's own objects may, whatever they do when they end
            ended.append(self)

    served.answers[OPS[0]] = lambda args: (None, False, Token())
    for width in range(2, 42):
        _norm(_x(ROWS, width))
    served.extension.clear()
    assert len(ended) == 40
