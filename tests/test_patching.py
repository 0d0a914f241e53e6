"""Modules that compute what a function of ours does call it; what computes anything else is left, with the reason."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from patched_models import assert_changed_and_right
from torch import nn

import tilebook
from tilebook import patching


class LlamaRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width)), eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.float())).to(x.dtype)


class CentredRMSNorm(LlamaRMSNorm):
    """No RMSNorm, in spite of its name."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class HalfRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        half = x.shape[-1] // 2
        return torch.cat([super().forward(x)[..., :half], x[..., half:]], -1)


class SquaredRMSNorm(LlamaRMSNorm):
    """Which a weight of ones would not show."""

    def __init__(self, width):
        super().__init__(width)
        nn.init.ones_(self.weight)

    def forward(self, x):
        return super().forward(x) * self.weight


class OtherEpsilonRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return (
            super().forward(x)
            * (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        )


class ResidualRMSNorm(LlamaRMSNorm):
    def forward(self, x, residual):
        return super().forward(x + residual)


class Mlp(nn.Module):
    def __init__(self, width, inner, act=F.gelu, drop=0.0, bias=True, second=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner, bias=bias), nn.Linear(inner, second or width, bias=bias)
        self.act, self.drop = act, nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


def tanh(x):
    return F.gelu(x, approximate="tanh")


class Model(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def parts():
    return [LlamaRMSNorm(16), Mlp(16, 32), GemmaRMSNorm(16), Mlp(16, 32, tanh), Mlp(16, 32, F.relu)]


WHAT = {
    "parts.0": "tilebook.rms_norm",
    "parts.1": "tilebook.mlp with gelu",
    "parts.2": "tilebook.rms_norm of 1 + weight",
    "parts.3": "tilebook.mlp with gelu_tanh",
    "parts.4": "tilebook.mlp with relu",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_norms_and_mlps_are_changed_and_give_the_same_numbers(dtype, how):
    torch.manual_seed(0)
    assert_changed_and_right(Model(*parts()), WHAT, dtype, how)


LEFT = {
    "else than RMSNorm": [CentredRMSNorm(16), HalfRMSNorm(16), SquaredRMSNorm(16), OtherEpsilonRMSNorm(16)],
    "cannot be tried": [ResidualRMSNorm(16)],
    "drops with a probability of 0.1": [Mlp(16, 32, drop=0.1)],
    "no biases": [Mlp(16, 32, bias=False)],
    "else than two layers": [Mlp(16, 32, torch.tanh), Mlp(16, 32, F.silu)],
    "no ordinary parameter": [LlamaRMSNorm(16).to("meta"), Mlp(16, 32).to("meta")],
}


@pytest.mark.parametrize(
    ("module", "why"), [(each, why) for why, them in LEFT.items() for each in them], ids=lambda x: str(x)[:30]
)
def test_what_computes_anything_else_is_left_with_the_reason(module, why):
    report = tilebook.patch(Model(module))
    assert not report.changed
    assert why in report.left["parts.0"]


def test_layers_that_somebody_listens_to_are_left():
    listened = Mlp(16, 32)
    listened.fc1.register_forward_hook(lambda *_: None)
    assert "hooks" in tilebook.patch(Model(listened)).left["parts.0"]


def test_no_other_modules_are_spoken_of():
    sequence = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    others = nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4), sequence, nn.TransformerEncoderLayer(4, 2, 8)
    report = tilebook.patch(Model(*others, Mlp(4, 8, second=6)))
    assert (report.changed, report.left) == ({}, {})


def test_trying_leaves_no_trace():
    model, heard = Model(*parts()), []
    for each in model.modules():
        each.register_forward_hook(lambda *_: heard.append(1))
    model.parts[1].fc1._forward_hooks.clear()
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    tilebook.patch(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert not heard
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_is_changed_back_in_any_order():
    for order in itertools.permutations(range(3)):
        model = Model(*parts())
        reports = [tilebook.patch(model), tilebook.patch(model)]
        assert "changed already" in reports[1].left["parts.0"]
        with tilebook.enabled():
            reports.append(tilebook.patch(model.parts[0]))
            for which in order:
                reports[which].undo()
        assert not any("forward" in each.__dict__ for each in model.modules())
        again = tilebook.patch(model)
        for each in reports:
            each.undo()  # which have nothing to change back any more
        assert "forward" in model.parts[0].__dict__
        again.undo()


def test_what_is_put_into_a_changed_module_later_is_called():
    model, x = Model(Mlp(16, 32)), torch.randn(2, 16)
    tilebook.patch(model)
    heard = []
    handle = model.parts[0].fc1.register_forward_hook(lambda *_: heard.append(1))
    model(x)
    assert heard
    handle.remove()
    model.parts[0].fc2 = nn.Sequential(model.parts[0].fc2, nn.Tanh())
    assert model(x).abs().max() <= 1


def test_layers_that_give_nothing_yet_are_told_by_what_is_between_them():
    silent = Mlp(16, 32)
    nn.init.zeros_(silent.fc2.weight)
    assert tilebook.patch(Model(silent)).changed == {"parts.0": "tilebook.mlp with gelu"}


def test_another_dtype_than_the_weights_is_the_modules_own():
    model, x = Model(LlamaRMSNorm(16)), torch.randn(2, 16).bfloat16()
    right = model(x)
    with tilebook.patched(model):
        assert model(x).dtype == right.dtype == torch.float32
        assert torch.equal(model(x), right)


def test_changed_models_are_copied_and_stored():
    model, x = Model(*parts()), torch.randn(2, 16)
    tilebook.patch(model)
    right, file = model(x), io.BytesIO()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), right)
    nn.init.zeros_(twin.parts[0].weight)
    assert not torch.equal(twin(x), right), "the copy has the copy's parameters"
    torch.testing.assert_close(model(x), right)
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), right)


def test_a_report_is_read_at_a_glance():
    text = str(tilebook.patch(Model(*parts(), *parts(), Mlp(16, 32, drop=0.5))))
    assert "tilebook.rms_norm: 2, parts.0 …" in text
    assert "drops with a probability of 0.5: 1, parts.10 …" in text
    assert "gelu: 1, the model itself …" in str(tilebook.patch(Mlp(4, 8)))


TRANSFORMERS = {
    "llama": ({"num_key_value_heads": 2}, "tilebook.rms_norm", 5),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 16}, "tilebook.rms_norm of 1 + weight", 9),
    "t5": ({"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}, "tilebook.rms_norm", 12),
    "distilbert": ({"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "dropout": 0.0},
                   "tilebook.mlp with gelu", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers_are_changed(name):
    transformers = pytest.importorskip("transformers")
    more, what, count = TRANSFORMERS[name]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.AutoConfig.for_model(name, **sizes, vocab_size=99, **more)
    model = transformers.AutoModel.from_config(config).eval()
    given = {"input_ids": torch.arange(24).view(2, 12) + 3}
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"]
    right = model(**given)[0]
    with tilebook.patched(model) as report:
        assert list(report.changed.values()).count(what) == count, str(report)
        torch.testing.assert_close(model(**given)[0], right, rtol=1e-4, atol=1e-4)


def test_every_activation_of_the_mlp_is_tried():
    assert set(patching.ACTIVATIONS) == {"gelu", "gelu_tanh", "relu"}


def test_a_report_of_nothing_says_whose_the_model_is():
    text = str(tilebook.patch(nn.TransformerEncoderLayer(8, 2)))
    assert text.startswith("changed: nothing, as nothing here is written out; PyTorch's own norms")
    assert text.endswith("\nleft: nothing")
    some = str(patching.Report({}, {"norm": "computes something else than RMSNorm"}))
    assert some == "changed: nothing\nleft:\n  computes something else than RMSNorm: 1, norm …"


@pytest.mark.parametrize("given", ["gpt2", nn.TransformerEncoderLayer, None])
def test_what_is_no_model_is_refused(given):
    with pytest.raises(TypeError, match=r"patch takes a model, a torch\.nn\.Module, not "):
        tilebook.patch(given)
