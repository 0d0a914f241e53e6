"""Modules that are changed take what their classes take, and on a CPU they are what their classes are."""

import copy
import inspect
import pickle
from contextlib import nullcontext

import pytest
import rotating
import torch
import torch.nn.functional as F
from torch import nn

import tilebook
from tilebook import dispatch, patching, rotation


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(16)), 1e-6

    def forward(self, hidden_states):
        wide = hidden_states.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(16, 32), nn.Linear(32, 16), F.gelu
        self.drop = nn.Dropout(0.0)

    def forward(self, hidden_states):
        return self.fc2(self.drop(self.act(self.fc1(hidden_states))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act, self.drop, self.factor = nn.SiLU(), nn.ModuleList([nn.Dropout(0.0)]), 1.0

    def forward(self, hidden_states):
        return self.drop[0](self.down(self.act(self.gate(hidden_states)) * self.up(hidden_states)) * self.factor)


@pytest.mark.parametrize("kind", [RMSNorm, Mlp, Gated])
def test_arguments_may_be_named_as_the_class_names_them(kind):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(2, 3, 16)
    right = module(x)
    assert tilebook.patch(module).changed
    assert torch.equal(module(hidden_states=x), right)
    with dispatch.use("torch"):
        torch.testing.assert_close(module(hidden_states=x), right)
    for others in ({}, {"x": x}, {"eps": x}, {"activation": x}, {"module": x}):
        with pytest.raises(TypeError, match="forward"):
            module(**others)


class WideAtTheEnd(Gated):
    """As T5 has it, whose last layer transformers keeps in fp32 where a model is loaded in fp16."""

    def forward(self, hidden_states):
        inner = self.act(self.gate(hidden_states)) * self.up(hidden_states)
        return self.down(inner.to(self.down.weight.dtype))


class WideMlp(Mlp):
    def forward(self, hidden_states):
        return self.fc2(self.act(self.fc1(hidden_states)).to(self.fc2.weight.dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("kind", "last"), [(WideAtTheEnd, "down"), (WideMlp, "fc2")])
def test_layers_of_two_dtypes_are_the_modules_own(kind, last, before, autocast):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(2, 3, 16, dtype=torch.bfloat16)
    if not before:
        assert tilebook.patch(module).changed
    module.bfloat16().get_submodule(last).float()
    if before:
        assert tilebook.patch(module).changed
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        right = kind.forward(module, x)
        assert right.dtype == (torch.bfloat16 if autocast else torch.float32)
        for forced in (nullcontext(), dispatch.use("torch")):
            with forced:
                found = module(x)
            assert found.dtype == right.dtype
            torch.testing.assert_close(found, right, rtol=0, atol=0.02 if autocast else 0)


def drops(of):
    of.p = 1.0


LATER = {
    "another epsilon": (RMSNorm, lambda module: setattr(module, "eps", 3.0)),
    "another function": (Mlp, lambda module: setattr(module, "act", torch.relu)),
    "another module": (Gated, lambda module: setattr(module, "act", nn.ReLU())),
    "another number": (Gated, lambda module: setattr(module, "factor", 2.0)),
    "a module instead of a function": (Mlp, lambda module: (delattr(module, "act"), setattr(module, "act", nn.ReLU()))),
    "another forward": (Gated, lambda module: setattr(module.act, "forward", torch.relu)),
    "a hook": (Gated, lambda module: module.act.register_forward_hook(lambda *_: torch.zeros(2, 3, 24))),
    "dropout": (Mlp, lambda module: drops(module.drop)),
    "dropout within": (Gated, lambda module: drops(module.drop[0])),
    "another within": (Gated, lambda module: module.drop.__setitem__(0, nn.Tanh())),
}


@pytest.mark.parametrize("how", ["eager", "compiled", "copied", "stored"])
@pytest.mark.parametrize("what", LATER)
def test_what_is_changed_beside_the_weights_later_is_computed(what, how):
    torch.manual_seed(0)
    torch._dynamo.reset()
    kind, change = LATER[what]
    module, x = kind(), torch.randn(2, 3, 16)
    assert tilebook.patch(module).changed
    if how in ("copied", "stored"):
        module = copy.deepcopy(module) if how == "copied" else pickle.loads(pickle.dumps(module))
    calls = []
    with pytest.MonkeyPatch.context() as patch, dispatch.use("torch"):
        for name in ("rms_norm", "mlp", "swiglu"):
            patch.setattr(patching, name, lambda *_, **__: calls.append(1) or x)
        module(x)
        assert len(calls) == 1, "until then it is ours"
        change(module)
        right = kind.forward(module, x)
        called = torch.compile(module, backend="eager", fullgraph=what != "a hook") if how == "compiled" else module
        assert torch.equal(called(x), right)
        assert len(calls) == 1


@pytest.mark.parametrize("kind", [RMSNorm, Mlp, Gated, lambda: rotating.Attention(16)])
def test_whoever_asks_what_a_module_takes_is_told_what_its_class_takes(kind):
    module = kind()
    right = inspect.signature(module.forward)
    assert tilebook.patch(module).changed
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "forward" in each.__dict__
        assert inspect.signature(each.forward) == right


def test_a_language_models_last_layer_takes_what_a_linear_layer_takes():
    pytest.importorskip("transformers")
    from programs.hf_models import made

    model, x = made("llama", "AutoModelForCausalLM", "sdpa"), torch.randn(3, 64)
    right = model.lm_head(x)
    assert "lm_head" not in tilebook.patch(model, loss_head=True).left
    assert torch.equal(model.lm_head(input=x), right)


@pytest.mark.parametrize("named", [False, True])
def test_on_a_cpu_heads_are_rotated_by_the_files_own_function(named, monkeypatch):
    model, x, calls = rotating.Attention(16), torch.randn(2, 3, 16), []
    theirs = rotation._with_ours(rotating.Attention.forward, rotating.apply_rotary_pos_emb)
    monkeypatch.setitem(theirs.__globals__, "apply_rotary_pos_emb", lambda *args: calls.append(1) or args[:2])
    tilebook.patch(model)
    given = ((), {"x": x}) if named else ((x,), {})
    right = copy.copy(model)
    right.__dict__.pop("forward")
    assert torch.equal(model(*given[0], **given[1]), right(x))
    assert not calls
    with dispatch.use("torch"):
        model(*given[0], **given[1])
    assert calls
