"""Attention's ops with recorded launches in their places, on the CPU: strides, tensor maps, numbers as outputs."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

NAME = "aten::_scaled_dot_product_cudnn_attention"
OPS = NAME, f"{NAME}_backward"
SHAPE, STRIDES = (2, 3, 5, 8), (120, 8, 24, 1)


def _at(address, shape, strides):
    count = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    found = torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)
    return found.as_strided(shape, strides)


class Machine:
    """Stands for the GPU: 'runs' attention of q, k and v that lie as STRIDES, q by a map of its address."""

    def __init__(self):
        self.launches, self.replaced = [], 0

    def replace(self, place, address):
        if self.replaced:
            return self.replaced
        ctypes.memmove(place, ctypes.byref(ctypes.c_uint64(address)), 8)
        return 0

    def launch(self, function, x, y, z, threads, _y, _z, shared, stream, parameters, extra):
        tensor_map = ctypes.string_at(parameters[0], 128)
        assert tensor_map[8:] == bytes(range(8, 128))
        assert parameters[0] % 64 == 0
        numbers = [ctypes.c_uint64.from_address(parameters[i]).value for i in range(5)]
        q, k, v, o = (_at(each, SHAPE, STRIDES) for each in numbers[:4])
        lse = _at(numbers[4], SHAPE[:3], (15, 5, 1))
        scores = q @ k.mT * SHAPE[-1] ** -0.5
        o.copy_(scores.softmax(-1) @ v)
        lse.copy_(scores.logsumexp(-1))
        self.launches.append(function)
        return 0


PLAN = (
    [(SHAPE, STRIDES, 6), ((*SHAPE[:3], 1), (15, 5, 1, 1), 6), ((), (), 4)],
    [(77, (3, 2, 1), 128, 64, [(0, bytes(range(128))), (1, 0), (2, 0), (9, 0), (10, 0)])],
    [(9, 0), (10, 0), (-1, 0), (-1, 0), (-2, 5), (-2, 7), (11, 0), (11, 0), (-1, 0)],
    [],
)


@pytest.fixture
def served(extension):
    yield from extension(Machine(), OPS)


def _drawn():
    return torch.randn(2, 5, 3, 8).transpose(1, 2)


def _computed(args):
    """What Python answers of a call before there is a plan."""
    q, k, v = args[:3]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seed = torch.empty((), dtype=torch.int64)
    lse = scores.logsumexp(-1, keepdim=True)
    return [scores.softmax(-1) @ v, lse, None, None, 5, 7, seed, seed, None], PLAN, "planned"


def _gradients(args):
    do, q, k, v, o, lse = args[:6]
    p = torch.exp(q @ k.mT * q.shape[-1] ** -0.5 - lse)
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return [ds @ k, ds.mT @ q, p.mT @ do], None, None


def _call(*tensors):
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*tensors, None, True)


def test_calls_are_launched_as_their_tensors_lie(served):
    served.answers[NAME] = _computed
    for turn in range(3):
        q, k, v = (_drawn() for _ in range(3))
        o, lse, *rest = _call(q, k, v)
        torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
        assert lse.shape == (2, 3, 5, 1)
        assert rest[:4] == [None, None, 5, 7]
        assert (rest[4].dtype, rest[5].shape, rest[6]) == (torch.int64, (), None)
        assert turn == 0 or o.stride() == STRIDES
        assert served.launched == turn
    assert len(served.asked) == 1


def test_gradients_are_of_the_op_behind_it(served):
    served.answers = {NAME: _computed, OPS[1]: _gradients}
    leaves = [_drawn().requires_grad_() for _ in range(3)]
    for _ in range(3):
        found = torch.autograd.grad(_call(*leaves)[0].square().sum(), leaves)
        wanted = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).square().sum(), leaves)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert served.launched == 2
    name, args = served.asked[-1]
    assert (name, args[11:13], args[6].dtype) == (OPS[1], (5, 7), torch.int64)


def test_of_one_row_nobody_is_asked(served):
    served.answers[NAME] = _computed
    row, keys = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 5, 8)
    for _ in range(2):
        with pytest.raises(NotImplementedError):  # PyTorch's own, which no CPU has
            _call(row, keys, keys)
    assert not served.asked
    served.extension.ask(True)  # as where a kernel is forced
    _call(row, keys, keys)
    assert [name for name, _ in served.asked] == [NAME]


def test_other_strides_are_another_kind(served):
    served.answers[NAME] = _computed
    _call(*[_drawn() for _ in range(3)])
    tensors = [torch.randn(SHAPE) for _ in range(3)]
    served.answers[NAME] = lambda args: (*_computed(args)[:1], None, None)
    o, *_ = _call(*tensors)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(*tensors), rtol=1e-4, atol=1e-5)
    assert (served.launched, len(served.asked)) == (0, 2)


def test_a_map_that_cannot_be_made_is_the_end_of_a_plan(served):
    served.answers[NAME] = _computed
    tensors = [_drawn() for _ in range(3)]
    _call(*tensors)
    served.machine.replaced = 1
    with pytest.raises(NotImplementedError):  # PyTorch's own, which no CPU has
        _call(*tensors)
    assert served.launched == 0
