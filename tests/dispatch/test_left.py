"""A call that is PyTorch's is known again only where nothing about it could make it another's."""

import pytest
import torch
from dispatch_samples import GPU, doubling
from torch.utils._python_dispatch import TorchDispatchMode

from tilebook import left
from tilebook.dispatch import Choice, Dispatch
from tilebook.left import Left, again, keep, known, unsettled
from tilebook.pace import Pace

ALWAYS, FORWARD, TRAINING = Left(True, True, False), Left(True, False, False), Left(False, True, False)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    made = Dispatch()
    monkeypatch.setattr(left, "_here", made)
    monkeypatch.setattr(left, "_capturing", lambda: False)
    return made


def tensor(grad=False):
    return torch.zeros(8, requires_grad=grad)


def recall(kind, *tensors):
    """As `left.recall`. `again` says yes where it does, from then on, and never where it does not."""
    near = kind, len(tensors)
    found = left.recall(kind, near, *tensors)
    assert again(near, *tensors) is found
    return found


def test_a_kind_is_known_only_after_it_was_kept(here):
    assert not recall("kind", tensor())
    keep("kind", ALWAYS)
    assert recall("kind", tensor(), torch.nn.Parameter(tensor()))
    assert not recall("other kind", tensor())
    here.reload()
    assert not recall("kind", tensor())


def test_calls_with_and_without_gradients_are_kept_apart():
    keep("forward", FORWARD)
    keep("training", TRAINING)
    for grad in (False, True):
        assert recall("forward", tensor(), tensor(grad)) is not grad
        assert recall("training", tensor(), tensor(grad)) is grad
    with torch.no_grad():
        assert recall("forward", tensor(True))
        assert not recall("training", tensor(True))


def test_what_the_host_bounds_is_not_left_to_pytorch_in_a_graph(monkeypatch):
    keep("always", ALWAYS)
    keep("bounded", ALWAYS._replace(bounded=True))
    assert recall("bounded", tensor())
    monkeypatch.setattr(left, "_capturing", lambda: True)
    assert recall("always", tensor())
    assert not recall("bounded", tensor())


def test_what_pytorchs_kernels_would_take_otherwise_is_looked_at_again(here):
    keep("kind", ALWAYS)

    class Subclass(torch.Tensor):
        pass

    assert not recall("kind", torch.zeros(9)[1:]), "not at a whole vector"
    assert not recall("kind", tensor(), torch.zeros(9)[1:])
    assert not recall("kind", tensor(), tensor().as_subclass(Subclass))
    with here.use("torch"):
        assert not recall("kind", tensor())
    inside = []
    torch.vmap(lambda x: inside.append(recall("kind", x)) or x)(torch.zeros(2, 8))
    assert inside == [False]


def test_tensors_on_two_gpus_are_looked_at_again(monkeypatch):
    keep("kind", ALWAYS)
    first, second = tensor(), tensor()
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 1 if x is second else 0)
    assert recall("kind", first, tensor())
    assert not left.recall("kind", "near", first, second)


def test_one_tensor_given_twice_is_recalled_by_its_kind():
    keep("kind", ALWAYS)
    x = tensor()
    assert left.recall("kind", "near", x, x)
    assert not again("near", x, x)
    assert left.recall("kind", "near", x, x)


def test_where_bits_are_to_repeat_every_call_is_looked_at():
    keep("kind", ALWAYS)
    torch.use_deterministic_algorithms(True)
    try:
        assert not recall("kind", tensor())
    finally:
        torch.use_deterministic_algorithms(False)


def test_where_hooks_may_change_what_is_saved_calls_that_save_are_looked_at():
    keep("kind", ALWAYS)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert not recall("kind", tensor(True))
        assert recall("kind", tensor())


def test_memory_of_kinds_is_bounded(here, monkeypatch):
    monkeypatch.setattr(left, "_MOST", 3)
    for kind in range(8):
        keep(kind, ALWAYS)
    assert len(here.left) <= 3
    assert recall(7, tensor())


def choice(native, backward=None, **changes):
    op = doubling(None)
    made = Choice(op.implementations["torch" if native else "triton"], None, "exact", op.problem("fp32", 8), GPU)
    made.backward = made if backward is None else backward
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_choice_of_pytorchs_is_left_with_gradients_only_if_they_are_pytorchs_too():
    theirs, ours = choice(True), choice(False)
    assert known(theirs, 100, (0, 0)) == ALWAYS._replace(choice=theirs)
    assert known(choice(True, ours), 100, (0, 0))[:3] == FORWARD[:3]
    assert known(ours, 100, (0, 0))[:3] == (False, False, False)


def test_what_the_host_bounds_is_pytorchs_whoever_won():
    ours = choice(False)
    assert known(ours, 5, (5, 9)) == Left(True, True, True, ours)
    assert known(ours, 9, (5, 9))[:3] == (False, True, True)
    assert known(ours, 200, (5, 9))[:3] == (False, False, False)
    assert known(choice(True, ours), 5, (5, 9))[:3] == (True, True, True)
    assert known(choice(True), 5, (5, 9))[:3] == ALWAYS[:3]


def test_of_larger_calls_with_gradients_the_program_decides(monkeypatch):
    found = known(choice(False), 80, (5, 9))
    assert (found.forward, found.bounded) == (False, True)
    assert isinstance(found.training, Pace)
    keep("kind", found)
    assert recall("kind", tensor(True)), "PyTorch serves first"
    assert not recall("kind", tensor())
    found.training._steps.ours = True
    assert not recall("kind", tensor(True))
    found.training._steps.ours = False
    monkeypatch.setattr(left, "_capturing", lambda: True)
    assert not recall("kind", tensor(True)), "a graph has ours"
    assert known(choice(True), 80, (5, 9))[:3] == ALWAYS[:3]
    assert known(choice(True, choice(False)), 80, (5, 9)).forward is True


def test_kernels_of_ours_run_their_first_calls_themselves():
    assert unsettled("new", choice(True, kept=True))
    assert not unsettled("new", choice(True, kept=False)), "made while a graph was captured"
    assert not unsettled("new", choice(True, kept=True, aligned=False))
    keep("old", known(choice(True), 0, (0, 0)))
    assert not unsettled("old", choice(True, kept=True))
    assert [unsettled("new", choice(False, kept=True, calls=calls)) for calls in range(4)] == [False, False, True, True]


def test_calls_that_are_known_again_count():
    asked = choice(True, calls=1)
    keep("kind", known(asked, 100, (0, 0)))
    left.recall("kind", "near", tensor())
    left.recall("kind", "near", torch.zeros(9)[1:])
    assert asked.calls == 2
    again("near", tensor())
    again("near", torch.zeros(9)[1:])
    again("near", torch.zeros(9))
    assert asked.calls == 3


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(8).double(),
        torch.zeros(16)[::2],
        torch.zeros(9),
        torch.zeros(8, device="meta"),
        torch.nn.Parameter(torch.zeros(8)),
        torch._neg_view(torch.zeros(8)),
        torch.zeros(1).expand(8),
        "no tensor",
        None,
    ],
    ids=str,
)
def test_only_tensors_like_those_before_are_the_same_again(other):
    keep("kind", ALWAYS)
    assert left.recall("kind", "near", tensor(), tensor())
    assert again("near", tensor(), tensor())
    assert not again("near", tensor(), other)
    assert not again("near", other, tensor())


def test_nothing_is_the_same_again_under_modes_and_transforms():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    keep("kind", ALWAYS)
    x = tensor()
    assert left.recall("kind", "near", x)
    found = []
    with Mode():
        found.append(again("near", x))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(again("near", x))
    torch.func.grad(lambda y: found.append(again("near", y) or again("near", x)) or y.sum())(x)
    assert found == [False, False, False]
    assert again("near", x)


def test_few_layouts_of_one_kind_of_call_are_compared(here):
    for n in range(8, 8 + 3 * left._MOST_LAYOUTS):
        keep(n, ALWAYS)
        assert left.recall(n, "near", torch.zeros(n))
    assert len(here.seen["near"]) == left._MOST_LAYOUTS


def test_without_pytorchs_guards_calls_are_recalled_by_their_kind(monkeypatch):
    monkeypatch.setattr(left, "_Guards", None)
    keep("kind", ALWAYS)
    assert left.recall("kind", "near", tensor())
    assert not again("near", tensor())
