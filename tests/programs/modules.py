"""Models of others with our function in PyTorch's place, and what modules that hold our functions go through."""

import contextlib
import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import tilebook
from programs.compare import assert_no_worse, some_calls
from programs.families import FAMILIES, SDPA, usual
from programs.transforms import blocks


@contextlib.contextmanager
def in_place():
    """`F.scaled_dot_product_attention` is ours."""
    F.scaled_dot_product_attention = tilebook.scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = SDPA


@pytest.fixture(autouse=True)
def _pytorchs_own_function_again():
    yield
    assert F.scaled_dot_product_attention is SDPA


CALLS = {
    "a width of 20": ((2, 4, 33, 20), (2, 4, 33, 20), (2, 4, 33, 20), {}),
    "values of another width": ((2, 4, 33, 32), (2, 4, 33, 32), (2, 4, 33, 48), {}),
    "no batch": ((33, 32), (33, 32), (33, 32), {}),
    "batches that broadcast": ((2, 4, 33, 32), (1, 4, 33, 32), (1, 4, 33, 32), {}),
    "causal": ((2, 4, 33, 32), (2, 4, 33, 32), (2, 4, 33, 32), {"is_causal": True}),
    "dropout of everything": ((2, 4, 33, 32), (2, 4, 33, 32), (2, 4, 33, 32), {"dropout_p": 1.0}),
    "grouped": ((2, 4, 33, 32), (2, 2, 33, 32), (2, 2, 33, 32), {"enable_gqa": True}),
    "nothing": ((2, 4, 0, 32), (2, 4, 0, 32), (2, 4, 0, 32), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", CALLS)
def test_in_pytorchs_place_it_does_not_call_itself(device, what, dtype):
    *shapes, options = CALLS[what]
    inputs = tuple(torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes)
    if device == "cuda" and options.get("dropout_p") == 1.0:
        pytest.skip("PyTorch's kernels make NaN of it, or refuse it")
    with in_place():
        assert_no_worse(
            lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), lambda *qkv: SDPA(*qkv, **options), inputs
        )
        assert_no_worse(
            lambda *qkv: tilebook.scaled_dot_product_attention(*qkv, **options),
            lambda *qkv: SDPA(*qkv, **options),
            inputs,
        )


def test_in_pytorchs_place_every_function_of_ours_still_works(device):
    with in_place():
        for name, family in FAMILIES.items():
            assert_no_worse(family.ours, family.plain, family.leaves(device), what=name)


def test_in_pytorchs_place_it_takes_a_bias_and_its_gradient(device):
    q, k, v, bias = FAMILIES["bias"].leaves(device)
    with in_place():
        assert_no_worse(F.scaled_dot_product_attention, SDPA, (q, k, v, bias))


def test_in_pytorchs_place_it_compiles(device):
    torch._dynamo.reset()
    with in_place():
        compiled = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend="aot_eager", fullgraph=True
        )
        assert_no_worse(compiled, SDPA, FAMILIES["drop_in"].leaves(device))


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_gives_the_same(device, need_weights):
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(64, 4, batch_first=True, device=device)
    x = torch.randn(2, 33, 64, device=device)
    padding = torch.zeros(2, 33, dtype=torch.bool, device=device)
    padding[1, 20:] = True
    causal = torch.nn.Transformer.generate_square_subsequent_mask(33, device=device)
    for mode in (module.train(), copy.deepcopy(module).eval()):
        for options in (
            {},
            {"attn_mask": causal, "is_causal": True},
            {"key_padding_mask": padding},
            {"attn_mask": causal.isinf()},
        ):
            right, _ = mode(x, x, x, need_weights=need_weights, **options)
            with in_place():
                for _ in range(some_calls([x])):
                    got, _ = mode(x, x, x, need_weights=need_weights, **options)
            torch.testing.assert_close(got, right, rtol=1e-2, atol=2e-3)


def test_a_transformer_encoder_trains_the_same(device):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True, device=device)
    _trains_the_same(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 33, 64), device)


def _trains_the_same(model, x, device, call=lambda model, x: model(x), steps=3):
    """Loss after loss and then every weight, by PyTorch's function and by ours in its place."""
    plain = copy.deepcopy(model).to(device)
    ours = copy.deepcopy(model).to(device)
    x = x.to(device)

    def train(model):
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
        for _ in range(steps):
            loss = call(model, x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    right = train(plain)
    with in_place():
        got = train(ours)
    assert got == pytest.approx(right, rel=2e-2)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def _tiny(name):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 99, "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **small,
        )
        return transformers.LlamaForCausalLM(config)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **small)
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **small
    )
    config.attention_probs_dropout_prob = config.hidden_dropout_prob = 0.0
    return transformers.BertForMaskedLM(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_transformers_model_trains_the_same(device, name):
    model = _tiny(name)
    tokens = torch.randint(0, 99, (2, 40), generator=torch.Generator().manual_seed(1))
    _trains_the_same(model, tokens, device, lambda model, x: model(x).logits)
    mask = torch.ones_like(tokens)
    mask[1, 25:] = 0
    _trains_the_same(model, tokens, device, lambda model, x: model(x, attention_mask=mask.to(x.device)).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_transformers_model_generates_the_same(device, name):
    model = _tiny(name).to(device).eval()
    tokens = torch.randint(0, 99, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    right = model.generate(tokens, **options)
    with in_place():
        got = model.generate(tokens, **options)
    assert torch.equal(got, right)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_transformers_trains(device, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    data = [{"input_ids": torch.arange(20) % 7, "labels": torch.arange(20) % 7} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    with in_place():
        result = transformers.Trainer(model=_tiny("llama"), args=arguments, train_dataset=data).train()
    assert 0 < result.training_loss < 10


@pytest.mark.filterwarnings("ignore")
def test_a_vision_transformer_of_timm_trains_the_same(device):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7, pretrained=False)
    _trains_the_same(model, torch.randn(2, 3, 64, 64), device)


class _Flux(torch.nn.Module):
    """A diffusion transformer of two blocks on an image of 4 × 4 and a text of 6 tokens."""

    def __init__(self):
        super().__init__()
        diffusers = pytest.importorskip("diffusers")
        self.model = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip

    def forward(self, x):
        made = x.new_ones
        return self.model(
            hidden_states=x, encoder_hidden_states=made(len(x), 6, 32), pooled_projections=made(len(x), 32),
            timestep=made(len(x)), img_ids=made(16, 3), txt_ids=made(6, 3), return_dict=False,
        )[0]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", [None, "native"])
def test_a_diffusion_transformer_of_diffusers_trains_the_same(device, backend):
    torch.manual_seed(0)
    model = _Flux()
    if backend is not None:
        model.model.set_attention_backend(backend)
    _trains_the_same(model, torch.randn(2, 16, 4), device)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_trains_a_module_that_calls_us(device):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    ours, plain = blocks(device)
    losses = []
    for module in (ours, plain):
        module, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
        x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(4)).to(accelerator.device)
        for _ in range(4):
            loss = module(x).float().square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_a_module_that_calls_us(device, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.block, _ = blocks("cpu")
            self.losses = []

        def training_step(self, batch, _):
            loss = self.block(batch).float().square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_steps=6, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    torch.manual_seed(0)
    module = Lit()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(2, 24, 32).repeat(6, 1, 1), batch_size=2))
    assert module.losses[-1] < module.losses[0]


def test_a_module_trained_with_our_functions_learns_what_pytorchs_learns(device):
    ours, plain = blocks(device, torch.float32)
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(4)).to(device)
    losses = []
    for module in (ours, plain):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            loss = (module(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)


def test_modules_that_hold_our_functions_are_copied_and_pickled(device):
    ours, plain = blocks(device)
    x = torch.randn(2, 24, 32, device=device)
    right = plain(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for each in (
        copy.copy(ours),
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        torch.testing.assert_close(each(x), right, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["attention", "scaled_dot_product_attention", "attention_varlen", "attention_decode",
                                  "mlp", "rms_norm"])  # fmt: skip
def test_our_functions_are_functions_like_any(device, name):
    function = getattr(tilebook, name)
    assert function.__name__ == name
    assert callable(function)
    assert inspect.getdoc(function)
    assert len(inspect.signature(function).parameters) >= 2
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.deepcopy(function) is function
    assert hash(function) == hash(getattr(tilebook, name))
    assert functools.partial(function).func is function
    assert functools.wraps(function)(lambda: None).__name__ == name


def test_the_drop_in_has_pytorchs_parameters(device):
    names = list(inspect.signature(tilebook.scaled_dot_product_attention).parameters)
    assert names == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    ]  # fmt: skip
    q, k, v = (x.detach() for x in FAMILIES["drop_in"].leaves(device))
    o = tilebook.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=None, enable_gqa=False
    )
    torch.testing.assert_close(o, SDPA(q, k, v, is_causal=True), rtol=0.02, atol=0.02)
    assert o.dtype == usual(device)


def test_nested_tensors_give_what_pytorch_gives(device):
    parts = [torch.randn(n, 4, 32, device=device, dtype=usual(device)) for n in (5, 17, 9)]
    q, k, v = (
        torch.nested.nested_tensor([s * x for x in parts], layout=torch.jagged).transpose(1, 2) for s in (1, 0.5, 2)
    )
    try:
        right = SDPA(q, k, v)
    except Exception as refused:
        with pytest.raises(type(refused)):
            tilebook.scaled_dot_product_attention(q, k, v)
        return
    for _ in range(3):
        got = tilebook.scaled_dot_product_attention(q, k, v)
        for a, b in zip(got.transpose(1, 2).unbind(), right.transpose(1, 2).unbind(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
