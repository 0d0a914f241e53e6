"""What calls are known by where the extension is: it tells apart what Python's keys tell apart, and no more."""

import itertools

import pytest
import torch

from tilebook import native
from tilebook.dispatch import memo


class Named(torch.Tensor):
    pass


BASE = torch.zeros(4, 8)
ROWS = [
    (BASE,),
    (BASE, None),
    (None, BASE),
    (BASE, 1e-6),
    (BASE, 1e-5),
    (BASE, "gelu", None),
    (BASE, BASE),
    (BASE.t(),),
    (BASE[:2],),
    (BASE[:, :4],),
    (BASE.view(32),),
    (BASE.view(4, 8, 1),),
    (BASE.view(1, 4, 8),),
    (BASE.double(),),
    (BASE.int(),),
    (BASE.view(32)[1:9],),
    (BASE.view(32)[4:12],),
    (torch.zeros(()),),
    (torch.zeros(4, 8, device="meta"),),
    (BASE.new_empty(0),),
    (4, 8, 8, 1),
    (),
    (BASE.as_subclass(Named), 1),
]


@pytest.fixture
def key(library, folder, monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(folder))
    extension = native._loaded()
    extension.keys(torch.nn.Parameter, memo.key)
    return extension.key


def test_it_tells_apart_what_pythons_keys_tell_apart(key):
    for one, other in itertools.product(ROWS, repeat=2):
        same = memo.key("op", one) == memo.key("op", other)
        assert (key("op", one) == key("op", other)) is same, (one, other)
        assert not same or hash(key("op", one)) == hash(key("op", other))
    assert key("op", ROWS[0]) != key("other op", ROWS[0])


def test_a_parameter_is_known_as_its_tensor(key):
    assert key("op", (torch.nn.Parameter(BASE),)) == key("op", (BASE,)) == key("op", [BASE])


def test_what_another_class_of_tensors_is_known_by_is_pythons_to_say(key):
    named = BASE.as_subclass(Named)
    assert key("op", (named, BASE, 1.0)) == memo.key("op", (named, BASE, 1.0))


def test_errors_are_pythons(key):
    for wrong in ((), ("op",), ("op", BASE), ("op", (), ())):
        with pytest.raises(TypeError):
            key(*wrong)
    with pytest.raises(RuntimeError):
        key("op", (torch.zeros(2, 2).to_sparse(),))


def test_nothing_is_kept_alive(key):
    import sys

    value = object()
    before = sys.getrefcount(value)
    made = [key("op", (BASE, value)) for _ in range(100)]
    assert sys.getrefcount(value) == before + 100
    del made
    assert sys.getrefcount(value) == before
