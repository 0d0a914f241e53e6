"""MLPs with a gate, and attention that rotates its heads, call functions of ours; what is anything else is left."""

import copy
import functools
import io
import itertools

import pytest
import rotating
import torch
import torch.nn.functional as F
from patched_models import assert_changed_and_right, step
from rotating import Attention, rotate_half
from torch import nn

import tilebook
from tilebook import dispatch, patching, rotation


def tanh(x):
    return F.gelu(x, approximate="tanh")


class Gated(nn.Module):
    def __init__(self, act=F.silu, bias=False, drop=0.0, out=16):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias)
        self.down_proj = nn.Linear(24, out, bias=bias)
        self.act_fn, self.drop = act, nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class UpFirst(nn.Module):
    """As T5 names and orders them."""

    def __init__(self, act=tanh):
        super().__init__()
        self.wi_1, self.wi_0, self.wo = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.act = act

    def forward(self, x):
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x))


class Packed(nn.Module):
    def __init__(self, act=F.silu, bias=False):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(16, 48, bias=bias), nn.Linear(24, 16, bias=bias)
        self.act = act

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.act(gate))


class Sparse(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(F.relu(self.gate_proj(x))) * self.up_proj(x))


class DropsInTraining(Gated):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.3, self.training)


class Lora(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class QueriesKeysValues(nn.Module):
    """Three layers, and nobody's MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)


class Model(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def parts():
    return [Gated(), Packed(F.gelu), UpFirst(), Gated(tanh, bias=True), Packed(bias=True), Attention(16)]


WHAT = {
    "parts.0": "tilebook.swiglu",
    "parts.1": "tilebook.geglu",
    "parts.2": "tilebook.geglu with tanh",
    "parts.3": "tilebook.geglu with tanh",
    "parts.4": "tilebook.swiglu",
    "parts.5": "attention with tilebook.apply_rope",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_modules_are_changed_and_give_the_same_numbers(dtype, how):
    torch.manual_seed(0)
    assert_changed_and_right(Model(*parts()), WHAT, dtype, how)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "apply_rope"])
def test_the_functions_are_called(name, monkeypatch):
    there = rotation if name == "apply_rope" else patching
    calls, ours = [], getattr(there, name)
    monkeypatch.setattr(there, name, lambda *args, **options: calls.append(1) or ours(*args, **options))
    rotation._with_ours.cache_clear()
    model = Model(*parts())
    with tilebook.patched(model):
        model(torch.randn(2, 3, 16))  # on a CPU it is the modules' own
        assert not calls
        with dispatch.use("torch"):
            model(torch.randn(2, 3, 16))
    assert len(calls) == {"swiglu": 2, "geglu": 3, "apply_rope": 1}[name]
    rotation._with_ours.cache_clear()


def with_lora():
    model = Gated()
    model.up_proj = Lora(16, 24)
    return model


def with_hook():
    model = Gated()
    model.down_proj.register_forward_hook(lambda *_: None)
    return model


def with_another_forward():
    model = Gated()
    model.gate_proj.forward = lambda x: F.linear(x, model.gate_proj.weight) + 1
    return model


LEFT = {
    "else than a gate of SiLU or GELU": [Gated(F.relu), Gated(torch.tanh), Sparse(), Packed(torch.sigmoid)],
    "drops with a probability of 0.1": [Gated(drop=0.1)],
    "no ordinary parameter": [Gated().to("meta")],
    "not PyTorch's own Linear": [with_lora()],
    "hooks": [with_hook(), with_another_forward()],
    "rotates heads otherwise": [rotating.Backwards(16)],
}


@pytest.mark.parametrize(
    ("module", "why"), [(each, why) for why, them in LEFT.items() for each in them], ids=lambda x: str(x)[:30]
)
def test_what_computes_anything_else_is_left_with_the_reason(module, why):
    report = tilebook.patch(Model(module))
    assert not report.changed
    assert why in report.left["parts.0"]


def test_what_drops_by_a_function_in_training_is_left_also_where_it_is_evaluated():
    assert "else than a gate" in tilebook.patch(Model(DropsInTraining().eval())).left["parts.0"]


def test_no_other_modules_are_spoken_of():
    report = tilebook.patch(Model(QueriesKeysValues(), UpFirst(torch.relu), nn.Linear(4, 4), Gated(out=10)))
    assert (list(report.changed), report.left) == (["parts.3"], {})


def test_what_is_put_into_a_changed_module_later_is_called():
    model, x, heard = Model(Gated(), Packed()), torch.randn(2, 16), []
    tilebook.patch(model)
    handle = model.parts[0].up_proj.register_forward_hook(lambda *_: heard.append(1))
    model(x)
    assert heard
    handle.remove()
    model.parts[1].down_proj = nn.Sequential(model.parts[1].down_proj, nn.Tanh())
    assert model(x).abs().max() <= 1
    layer = model.parts[0].gate_proj
    layer.forward = lambda x: torch.zeros(*x.shape[:-1], 24)
    assert not model.parts[0](x).any()


def test_a_model_is_changed_back_in_any_order_and_others_are_left_alone():
    other = Model(Attention(16))
    for order in itertools.permutations(range(2)):
        model = Model(*parts())
        reports = [tilebook.patch(model), tilebook.patch(model)]
        assert set(reports[1].left.values()) == {"its forward was changed already"}
        for which in order:
            reports[which].undo()
        assert not any("forward" in each.__dict__ for each in (*model.modules(), *other.modules()))
    assert rotating.apply_rotary_pos_emb is rotating.ORIGINAL


def test_changed_models_are_copied_and_stored():
    torch.manual_seed(0)
    model, x, file = Model(*parts()), torch.randn(2, 3, 16), io.BytesIO()
    tilebook.patch(model)
    right, twin = model(x), copy.deepcopy(model)
    torch.testing.assert_close(twin(x), right)
    nn.init.zeros_(twin.parts[0].gate_proj.weight)
    assert not torch.equal(twin(x), right), "the copy has the copy's parameters"
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), right)


def test_another_rotation_that_is_put_into_the_file_later_is_called(monkeypatch):
    model, x = Model(Attention(16)), torch.randn(2, 3, 16)
    tilebook.patch(model)
    right = model(x)
    monkeypatch.setattr(rotating, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * 0, k * 0))
    assert not torch.allclose(model(x), right)
    monkeypatch.undo()
    monkeypatch.setattr(rotating, "SCALE", 3.0)  # any other global is the file's own, as it is at the time
    torch.testing.assert_close(model(x), 3 * right)


def test_what_is_no_usual_rotation_is_the_files_own(monkeypatch):
    tried = rotation._with_ours(Attention.forward, rotating.apply_rotary_pos_emb)
    ours = tried.__globals__["apply_rotary_pos_emb"]
    monkeypatch.setattr(rotation, "apply_rope", None)
    q, cos = torch.randn(2, 3, 4, 8), torch.randn(1, 4, 8)
    right = q * cos[:, None] + rotate_half(q) * cos[:, None]
    assert ours(q.bfloat16(), q.bfloat16(), cos, cos)[0].dtype == torch.float32
    assert torch.equal(ours(q[0], q[0], cos, cos)[0][0], right[0])
    assert torch.equal(ours(q, q, cos, cos, unsqueeze_dim=1)[1], right)


def test_under_autocast_angles_in_fp32_make_no_wider_heads():
    torch.manual_seed(0)
    model, x = Model(Attention(16)), torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        right = step(model, x)
        with tilebook.patched(model):
            found = step(model, x)
    for mine, other in zip(found, right, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=0.02 * other.abs().max().item())


def decorated(function):
    """As transformers wraps a forward whose arguments have had other names."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        kwargs["x"] = kwargs.pop("x_as_it_was", kwargs.get("x"))
        return function(*args, **{name: each for name, each in kwargs.items() if each is not None})

    return wrapper


def test_a_forward_that_is_wrapped_is_changed_within(monkeypatch):
    model = Model(*parts())
    x = torch.randn(2, 3, 16)
    right = model(x)
    monkeypatch.setattr(Attention, "forward", decorated(decorated(Attention.forward)))
    called, ours = [], rotation.apply_rope
    monkeypatch.setattr(rotation, "apply_rope", lambda *args, **options: called.append(1) or ours(*args, **options))
    with tilebook.patched(model) as report:
        assert [what for what in report.changed.values() if "rope" in what]
        with dispatch.use("torch"):
            torch.testing.assert_close(model(x), right)
    assert called
    monkeypatch.setattr(Attention, "forward", functools.wraps(Attention.forward)(lambda *args: None))  # holds none
    assert not [what for what in tilebook.patch(Model(*parts())).changed.values() if "rope" in what]
