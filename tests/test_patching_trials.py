"""What is tried of a module, and what a changed one does where its class would do something else."""

import copy
import gc
import inspect
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilebook
from tilebook import dispatch


class Gate(nn.Module):
    def __init__(self, act=F.silu, drop=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down_proj, self.act, self.drop = nn.Linear(24, 16, bias=False), act, drop or nn.Identity()

    def forward(self, x):
        return self.down_proj(self.drop(self.act(self.gate_proj(x)) * self.up_proj(x)))


class Layers(nn.Module):
    def __init__(self, act=F.gelu, drop=0.0):
        super().__init__()
        self.up, self.down, self.act, self.drop = nn.Linear(16, 24), nn.Linear(24, 16), act, drop

    def forward(self, x):
        return F.dropout(self.down(self.act(self.up(x))), self.drop, self.training)


def changed(module):
    return list(tilebook.patch(module).changed.values())


def silu(x, limit):
    return F.silu(x.clamp(-limit, limit))


DROPS = [Gate(drop=nn.Dropout1d(0.5)), Gate(drop=nn.AlphaDropout(0.5)), Layers(drop=0.5)]


@pytest.mark.parametrize("module", DROPS)
def test_what_drops_in_training_is_left_in_eval_too(module):
    assert changed(copy.deepcopy(module).eval()) == changed(copy.deepcopy(module).train()) == []


class OwnRMSNorm(nn.Module):
    def __init__(self, axis=-1, noise=0.0, only=None):
        super().__init__()
        self.weight, self.eps, self.axis, self.noise = nn.Parameter(torch.rand(16)), 1e-6, axis, noise
        self.register_buffer("calls", torch.zeros(()))
        self.only = only

    def forward(self, x):
        if self.only is not None and self.training == self.only:
            x = x + self.noise
        if self.only is None and self.noise:
            self.calls += 1
        return self.weight * x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + self.eps)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("only", [False, True])
def test_a_norm_that_does_otherwise_in_training_or_in_eval_is_left_in_both(training, only):
    assert changed(OwnRMSNorm(noise=0.1, only=only).train(training)) == []
    assert changed(OwnRMSNorm().train(training)) == ["tilebook.rms_norm"]


class Tokens(Layers):
    def forward(self, x):
        y = super().forward(x)
        return y if x.ndim == 2 else y - y.mean(1, keepdim=True)


def test_what_mixes_tokens_of_a_batch_is_left():
    """Of a matrix alone nobody could tell."""
    assert changed(OwnRMSNorm(axis=1)) == []
    assert changed(Tokens()) == []


def test_what_counts_its_calls_is_left_and_not_counted_further():
    norm = OwnRMSNorm(noise=1.0)
    assert changed(norm) == []
    assert norm.calls == 0


@pytest.mark.parametrize("limit", [7.0, 10.0, 100.0])
def test_a_gate_that_clamps_is_left(limit):
    assert changed(Gate(lambda x: silu(x, limit))) == []


FORMS = [(Gate(F.gelu), "geglu"), (Gate(lambda x: F.gelu(x, approximate="tanh")), "geglu with tanh"),
         (Gate(), "swiglu"), (Layers(), "mlp with gelu")]  # fmt: skip


@pytest.mark.parametrize(("module", "what"), FORMS, ids=lambda each: each if isinstance(each, str) else "")
@pytest.mark.parametrize("around", ["nothing", "a default dtype", "autocast", "a default device"])
def test_a_programs_defaults_are_not_what_it_is_tried_in(module, what, around):
    module = copy.deepcopy(module)
    try:
        if around == "a default dtype":
            torch.set_default_dtype(torch.bfloat16)
        elif around == "a default device":
            torch.set_default_device("meta")
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"):
            assert changed(module) == [f"tilebook.{what}"]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("module", [Layers(drop=0.5).train(), Gate(drop=nn.AlphaDropout(0.5)).train(), Gate()])
def test_trying_draws_no_number_of_the_programs(module):
    torch.manual_seed(0)
    right = torch.rand(3)
    torch.manual_seed(0)
    tilebook.patch(copy.deepcopy(module))
    assert torch.equal(torch.rand(3), right)


@pytest.mark.parametrize("module", [Gate(), Layers()])
def test_a_replica_has_its_own_weights(module):
    module = copy.deepcopy(module)
    tilebook.patch(module)
    replica = module._replicate_for_data_parallel()
    for name, layer in module._modules.items():
        replica._modules[name] = copy.deepcopy(layer)
    with torch.no_grad():
        for each in replica._modules.values():
            for parameter in each.parameters():
                parameter.zero_()
    assert not replica(torch.randn(2, 16)).any()
    assert module(torch.randn(2, 16)).any()


def test_undoing_leaves_nothing():
    module = Gate()
    report = tilebook.patch(module)
    report.undo()
    assert not {"forward", "_replicate_for_data_parallel"} & set(module.__dict__)


class Watched(torch.Tensor):
    pass


def test_a_weight_that_has_become_another_kind_of_tensor_is_the_modules_own(monkeypatch):
    module = Gate()
    tilebook.patch(module)
    monkeypatch.setattr("tilebook.patching.swiglu", None)
    module.up_proj.weight = nn.Parameter(module.up_proj.weight.data.as_subclass(Watched))
    with dispatch.use("torch"):
        module(torch.randn(2, 16))


def test_who_listens_to_all_modules_hears_of_all():
    module, heard = Gate(), []
    tilebook.patch(module)
    handle = nn.modules.module.register_module_forward_hook(lambda each, *_: heard.append(type(each).__name__))
    try:
        with dispatch.use("torch"):
            module(torch.randn(2, 16))
    finally:
        handle.remove()
    assert heard.count("Linear") == 3


def test_gradients_of_two_leaves_are_two():
    with dispatch.use("torch"):
        x, residual = (torch.randn(2, 3, 16, requires_grad=True) for _ in range(2))
        for _ in range(2):
            y, h = tilebook.add_rms_norm(x, residual)
            (y.sum() + h.square().sum()).backward()
        one, other = (each.detach().requires_grad_() for each in (x, residual))
        for _ in range(2):
            h = one + other
            (F.rms_norm(h, (16,), None, 1e-6).sum() + h.square().sum()).backward()
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    for mine, right in ((x, one), (residual, other)):
        torch.testing.assert_close(mine.grad, right.grad)


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=64, vocab_size=99))


def test_a_model_with_another_head_says_what_it_takes():
    model = llama()
    right = inspect.signature(model.forward)
    tilebook.patch(model, loss_head=True)
    assert inspect.signature(model.forward) == right


def test_calls_of_other_threads_have_their_logits():
    model, wrong, ids = llama(), [], torch.arange(12)[None]
    tilebook.patch(model, loss_head=True)
    ended = threading.Event()

    def look():
        with torch.no_grad():
            while not ended.is_set():
                if model(input_ids=ids, labels=ids).logits is None:
                    wrong.append(1)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(30):
            if model(input_ids=ids, labels=ids).logits is not None:
                wrong.append(2)
    finally:
        ended.set()
        thread.join()
    assert not wrong


def test_a_model_that_is_gone_leaves_nothing_behind():
    pytest.importorskip("transformers")
    import transformers

    made = transformers.PreTrainedModel.post_init
    tilebook.enable(patch=True)
    try:
        model = llama()
        model(input_ids=torch.arange(5)[None])
        weights = [weakref.ref(each) for each in model.parameters()]
        del model
        gc.collect()
        assert not [each for each in weights if each() is not None]
    finally:
        tilebook.disable()
        transformers.PreTrainedModel.post_init = made
