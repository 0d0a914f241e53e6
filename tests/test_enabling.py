"""Models as they are on tilebook: what is put in PyTorch's places, when, and that it comes out again."""

import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode

import tilebook
from tilebook import autoload, enabling

ROOT = Path(__file__).parents[1]
NAMES = ("scaled_dot_product_attention", "layer_norm", "rms_norm", "cross_entropy")
PYTORCHS = {name: getattr(F, name) for name in NAMES}


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    enabling._state.change(whole=False, blocks=-enabling._state.blocks)
    for name, function in PYTORCHS.items():
        setattr(F, name, function)


def there():
    return {name: getattr(F, name) for name in NAMES}


def program(text, **environment):
    """Runs a program in a process of its own; returns what it prints and what it complains of."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("TILEBOOK")}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env={**given, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


SEEN = """
import sys
import warnings
import torch
print(torch.nn.functional.layer_norm.__module__, "tilebook.enabling" in sys.modules)
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TILEBOOK": "off"}, "torch.nn.functional False"),
        ({"TILEBOOK": "1"}, "tilebook.enabling True"),
        ({"TILEBOOK": "1", "TILEBOOK_DISABLE": "1"}, "torch.nn.functional True"),
    ],
)
def test_the_environment_turns_it_on_at_the_end_of_import_torch(environment, expected):
    seen, complaints = program(SEEN, **environment)
    assert seen == expected
    assert "tilebook" not in complaints


def test_an_environment_that_asks_for_what_there_is_not_is_told_so():
    seen, complaints = program(SEEN, TILEBOOK="patched")
    assert seen == "torch.nn.functional False"
    assert "tilebook: not turned on: ValueError: TILEBOOK is 1 or patch, or 0, not 'patched'" in complaints


def test_who_asks_what_runs_is_told_that_it_is_on():
    _, complaints = program(SEEN, TILEBOOK="1", TILEBOOK_LOG="debug")
    assert "tilebook: on, in the places of scaled_dot_product_attention, layer_norm, rms_norm" in complaints


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "first",
    ["import tilebook; tilebook.patch", "import tilebook.op", "import tilebook.enabling", "import tilebook.cli"],
)
def test_a_program_that_imports_tilebook_before_torch_has_it_on(first):
    seen, complaints = program(f"{first}\n{SEEN}", TILEBOOK="1")
    assert seen == "tilebook.enabling True"
    assert "tilebook" not in complaints


def test_an_import_of_ours_that_fails_does_not_keep_it_off():
    broken = "sys.modules['tilebook.rotation'] = None\ntry:\n    import tilebook.patching\nexcept ImportError:"
    seen, complaints = program(f"import sys\n{broken}\n    print('failed')\n{SEEN}", TILEBOOK="1")
    assert seen == "failed\ntilebook.enabling True"
    assert "tilebook" not in complaints


def test_a_spec_that_cannot_be_watched_is_a_warning():
    text = """
import importlib.util, sys
from importlib.machinery import ModuleSpec
import tilebook
class Slotted(ModuleSpec):
    __slots__ = ("more",)
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "tilebook.enabling":
            sys.meta_path.remove(self)
            found = importlib.util.find_spec(name)
            spec = Slotted(name, found.loader, origin=found.origin)
            spec.has_location = True
            return spec
sys.meta_path.insert(0, Finder())
import tilebook.enabling, torch
print(torch.ones(1).item())
"""
    seen, complaints = program(text, TILEBOOK="1")
    assert seen == "1.0"
    assert "tilebook: not turned on: TypeError" in complaints


@pytest.mark.parametrize("asked", [None, "0"])
def test_what_is_not_asked_for_costs_nothing(monkeypatch, asked):
    monkeypatch.setenv("TILEBOOK", asked) if asked else monkeypatch.delenv("TILEBOOK", raising=False)
    autoload.load()
    took = []
    for _ in range(5):
        start = time.perf_counter()
        autoload.load()
        took.append(time.perf_counter() - start)
    assert min(took) < 1e-3
    assert there() == PYTORCHS


def test_whatever_goes_wrong_import_torch_goes_on(monkeypatch):
    monkeypatch.setenv("TILEBOOK", "1")
    monkeypatch.setitem(sys.modules, "tilebook.enabling", None)
    with pytest.warns(RuntimeWarning, match="not turned on"):
        autoload.load()
    monkeypatch.setitem(sys.modules, "torch.nn.attention", None)
    with pytest.warns(RuntimeWarning, match="not turned on"):
        autoload.load()


def test_it_is_on_from_enable_to_disable_however_often_each_is_called():
    for _ in range(2):
        tilebook.enable()
        assert there() == enabling._ours
        assert tilebook.status() == enabling.Status(True, NAMES, (), ())
    for _ in range(2):
        tilebook.disable()
        assert there() == PYTORCHS
        assert tilebook.status() == enabling.Status(False, (), (), ())


def test_blocks_nest_and_overlap_in_any_order():
    for order in itertools.permutations(range(3)):
        handles = [enabling.Handle() for _ in range(3)]
        for count, which in enumerate(order):
            assert there() == enabling._ours, count
            handles[which].remove()
            handles[which].remove()  # which says nothing new
        assert there() == PYTORCHS
    with tilebook.enabled():
        tilebook.enable()
        tilebook.disable()
        assert there() == enabling._ours
        with tilebook.enabled():
            pass
        assert there() == enabling._ours
    assert there() == PYTORCHS


def test_blocks_in_many_threads_leave_it_as_it_was():
    wrong = []

    def work():
        for _ in range(200):
            with tilebook.enabled():
                if there() != enabling._ours:
                    wrong.append(there())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert there() == PYTORCHS


@pytest.mark.skipif(not hasattr(nn.attention, "activate_flash_attention_impl"), reason="from PyTorch 2.11 on")
def test_pytorchs_register_of_flash_attention_turns_it_on_and_off():
    autoload.load()
    nn.attention.activate_flash_attention_impl("tilebook")
    assert there() == enabling._ours
    nn.attention.activate_flash_attention_impl("tilebook")
    assert there() == enabling._ours
    nn.attention.restore_flash_attention_impl()
    assert there() == PYTORCHS


def test_somebody_elses_function_keeps_its_place():
    def wrapped(*args, **kwargs):
        return PYTORCHS["layer_norm"](*args, **kwargs)

    F.layer_norm = wrapped
    tilebook.enable()
    assert F.layer_norm is wrapped
    assert tilebook.status() == enabling.Status(True, (NAMES[0], *NAMES[2:]), (), ("layer_norm",))
    F.rms_norm = wrapped  # around ours, as it may be
    tilebook.disable()
    assert F.rms_norm is wrapped
    assert PYTORCHS["scaled_dot_product_attention"] is F.scaled_dot_product_attention


def test_a_wrapper_that_calls_itself_by_pytorchs_name_keeps_its_place():
    F.layer_norm = functools.wraps(PYTORCHS["layer_norm"])(lambda *args, **kwargs: "wrapped")
    with tilebook.enabled():
        assert F.layer_norm(torch.ones(3), (3,)) == "wrapped"
        assert tilebook.status().others == ("layer_norm",)


@pytest.mark.long
def test_what_stood_there_when_ours_were_loaded_is_not_called_after_it_has_left():
    outcome = program(
        """
from unittest import mock
import torch
with mock.patch("torch.nn.functional.layer_norm"):
    import tilebook
    tilebook.enable()
tilebook.enable()
print(type(torch.nn.functional.layer_norm(torch.ones(3), (3,))).__name__)
tilebook.disable()
print(torch.nn.functional.layer_norm.__module__)
"""
    )
    assert outcome[0].split() == ["Tensor", "torch.nn.functional"]


def calls(x):
    """Of all functions, as programs write them."""
    q = x.expand(1, 2, *x.shape)
    return (
        F.cross_entropy(x, torch.tensor([1, 7, -100]), label_smoothing=0.1),
        F.layer_norm(x, (8,), x[0], eps=1e-3),
        F.rms_norm(x, normalized_shape=(8,), weight=x[0], eps=1e-3),
        F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3),
    )


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in there().values():
            return function.__name__
        return super().__torch_function__(function, types, args, kwargs)


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in there().values():
            seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


seen: list[str] = []


def test_what_overrides_pytorchs_functions_is_told_of_those_in_their_places():
    x = torch.randn(3, 8)
    right = calls(x)
    for _ in range(2):
        assert calls(x.as_subclass(Overriding)) == (NAMES[3], NAMES[1], NAMES[2], NAMES[0])
        seen.clear()
        with Watching():
            got = calls(x)
        assert seen == [NAMES[3], NAMES[1], NAMES[2], NAMES[0]]
        torch.testing.assert_close(got, right)
        tilebook.enable()


def test_pytorchs_biases_are_what_they_are_and_a_recorded_program_is_pytorchs():
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 9, 16)
    bias = causal_lower_right(5, 9)
    right = F.scaled_dot_product_attention(q, k, k, bias)
    with tilebook.enabled():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, bias), right)
        graph = torch.fx.symbolic_trace(record).graph
    assert {node.target for node in graph.nodes if node.op == "call_function"} == set(PYTORCHS.values())


def attend(q):
    return F.scaled_dot_product_attention(q, q, q)


def record(x, q):
    return F.layer_norm(x, (8,)), F.rms_norm(x, (8,)), attend(q), F.cross_entropy(x, x)


@pytest.mark.parametrize("on", [False, True])
def test_what_overrides_pytorchs_functions_does_so_in_a_compiled_program(on):
    (tilebook.enable if on else tilebook.disable)()
    torch._dynamo.reset()
    compiled = torch.compile(calls_one, backend="eager", fullgraph=True)
    assert compiled(torch.ones(3, 8).as_subclass(Zeroing)).tolist() == [0.0]


def calls_one(x):
    return F.layer_norm(x, (8,))


class Zeroing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (F.layer_norm, PYTORCHS["layer_norm"]):
            return torch.zeros(1)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.long
def test_what_is_compiled_has_pytorchs_functions_in_its_graph_however_early_ours_were_there():
    told, _ = program(
        """
import torch
import torch.nn.functional as F
def backend(graph, examples):
    print(*(node.target.__module__ for node in graph.graph.nodes if node.op == "call_function"))
    return graph
def program(x):
    q = F.rms_norm(F.layer_norm(x, (8,)), (8,))
    return F.scaled_dot_product_attention(q, q, q), F.cross_entropy(x[0, 0], torch.arange(3))
torch.compile(program, backend=backend, fullgraph=True)(torch.randn(1, 2, 3, 8))
""",
        TILEBOOK="1",
    )
    assert told
    assert "tilebook" not in told
