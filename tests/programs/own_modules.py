"""`tilebook.nn` beside `torch.nn`: one has the other's weights, and gives its numbers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import tilebook.nn as ours
from programs.compare import assert_no_worse, assert_same_outcome

WIDTH, HEADS, INNER, BATCH, ROWS = 32, 2, 48, 3, 11


def beside(name, *args, **kwargs):
    """Our module and PyTorch's, which has random weights, biases too, and gives its state dict to ours."""
    theirs, mine = getattr(nn, name)(*args, **kwargs), getattr(ours, name)(*args, **kwargs)
    torch.manual_seed(0)
    with torch.no_grad():
        for each in theirs.parameters():
            each.normal_(std=0.3)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    assert isinstance(mine, type(theirs))
    return mine, theirs


def called(module, arrange=lambda x: (x,), **options):
    """The module as a function of a tensor, of which `arrange` makes its arguments, and of its parameters."""
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        found = functional_call(module, dict(zip(names, parameters, strict=True)), arrange(x), options)
        return found[0] if isinstance(found, tuple) else found

    return function


def leaves(module, *shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(next(module.parameters()))
    return x.requires_grad_(), *module.parameters()


def test_an_encoders_layer_is_pytorchs(device):
    for options in (
        {"norm_first": True, "activation": "gelu", "batch_first": True},
        {"activation": "relu"},
        {"norm_first": True, "activation": nn.GELU("tanh"), "bias": False, "batch_first": True},
        {"activation": F.silu, "layer_norm_eps": 1e-3},
    ):
        for dtype in (torch.float32, torch.bfloat16):
            more = {"device": device, "dtype": dtype, **options}
            mine, theirs = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, 0.0, **more)
            for training in (True, False):
                mine.train(training), theirs.train(training)
                inputs = leaves(mine, BATCH, ROWS, WIDTH)
                assert_no_worse(called(mine), called(theirs), inputs, what=str(more), blur=4)


def test_an_encoder_takes_it_for_pytorchs_with_padding_and_without_gradients(device):
    mine, theirs = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, batch_first=True, device=device)
    x = torch.randn(BATCH, ROWS, WIDTH, device=device)
    padding = torch.arange(ROWS, device=device) >= torch.tensor([ROWS, 4, 7], device=device)[:, None]
    mine, theirs = (nn.TransformerEncoder(each, 2).eval() for each in (mine, theirs))
    assert type(mine.layers[1]) is ours.TransformerEncoderLayer
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            torch.testing.assert_close(mine(x, **options), theirs(x, **options), rtol=1e-4, atol=1e-4)


SPREAD = {
    "itself": lambda x: (x, x, x),
    "another": lambda x: (x[:, :9], x, x),
    "two others": lambda x: (x[:, :9], x, 2 * x),
}


def masks():
    """By name, for 9 rows and 11 keys."""
    source = torch.Generator().manual_seed(2)
    hidden = torch.rand(9, ROWS, generator=source) < 0.3
    each = torch.rand(BATCH * HEADS, 9, ROWS, generator=source) < 0.3
    padding = torch.arange(ROWS) >= torch.tensor([ROWS, 4, 7])[:, None]
    hidden[:, 0] = each[..., 0] = False
    causal = torch.ones(9, ROWS, dtype=torch.bool).triu(1)
    bias, numbers = torch.randn(9, ROWS, generator=source), torch.randn(BATCH, ROWS, generator=source)
    return {
        "none": {},
        "booleans": {"attn_mask": hidden},
        "numbers": {"attn_mask": bias},
        "booleans of every head": {"attn_mask": each},
        "numbers of every head": {"attn_mask": bias + each},
        "padding": {"key_padding_mask": padding},
        "padding by numbers": {"key_padding_mask": numbers},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "both, every head": {"attn_mask": each, "key_padding_mask": padding},
        "both by numbers": {"attn_mask": bias, "key_padding_mask": numbers},
        "two kinds": {"attn_mask": bias, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("what", masks())
def test_attention_under_a_mask_is_pytorchs(device, what):
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in masks()[what].items()}
    for batch_first in (True, False):
        mine, theirs = beside("MultiheadAttention", WIDTH, HEADS, batch_first=batch_first, device=device)

        def arrange(x, batch_first=batch_first):
            q, kv = x[:, :9], x
            return (q, kv, kv) if batch_first else (q.transpose(0, 1), *[kv.transpose(0, 1)] * 2)

        run, theirs = (called(each, arrange, need_weights=False, **options) for each in (mine, theirs))
        assert_no_worse(run, theirs, leaves(mine, BATCH, ROWS, WIDTH), blur=2)


@pytest.mark.parametrize("spread", SPREAD)
def test_attention_to_any_keys_is_pytorchs(device, spread):
    for options in ({}, {"bias": False}, {"bias": False, "dtype": torch.bfloat16}):
        mine, theirs = beside("MultiheadAttention", WIDTH, HEADS, batch_first=True, device=device, **options)
        run, plain = (called(each, SPREAD[spread], need_weights=False) for each in (mine, theirs))
        assert_no_worse(run, plain, leaves(mine, BATCH, ROWS, WIDTH), blur=4)


@pytest.mark.parametrize(
    ("made", "given", "options"),
    [
        ({}, "itself", {"need_weights": True}),
        ({}, "itself", {"need_weights": True, "average_attn_weights": False}),
        ({"kdim": WIDTH, "vdim": 16}, "narrow values", {}),
        ({"add_bias_kv": True}, "itself", {}),
        ({"add_zero_attn": True}, "itself", {}),
        ({}, "no batch", {}),
        ({}, "itself", {"is_causal": True}),
        ({}, "itself", {"attn_mask": torch.zeros(3, 4)}),
        ({}, "itself", {"attn_mask": torch.zeros(ROWS, ROWS, dtype=torch.int32)}),
        ({}, "itself", {"key_padding_mask": torch.zeros(BATCH, 5, dtype=torch.bool)}),
        ({}, "too wide", {}),
    ],
    ids=str,
)
def test_what_is_pytorchs_to_serve_or_to_refuse_is_left_to_it(device, made, given, options):
    spread = SPREAD | {
        "narrow values": lambda x: (x, x, x[..., :16]),
        "no batch": lambda x: (x[0], x[0], x[0]),
        "too wide": lambda x: (x, x.repeat(1, 1, 2), x),
    }
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    mine, theirs = beside("MultiheadAttention", WIDTH, HEADS, batch_first=True, device=device, **made)
    run, plain = (called(each, spread[given], **({"need_weights": False} | options)) for each in (mine, theirs))
    assert_same_outcome(run, plain, leaves(mine, BATCH, ROWS, WIDTH))
    if options.get("need_weights"):
        x = torch.randn(BATCH, ROWS, WIDTH, device=device)
        torch.testing.assert_close(mine(x, x, x, **options)[1], theirs(x, x, x, **options)[1])


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("LayerNorm", [WIDTH], {}),
        ("LayerNorm", [WIDTH], {"bias": False, "eps": 1e-3}),
        ("LayerNorm", [[ROWS, WIDTH]], {}),
        ("RMSNorm", [WIDTH], {}),
        ("RMSNorm", [WIDTH], {"eps": 1e-3}),
        ("RMSNorm", [[ROWS, WIDTH]], {"eps": 1e-3}),
        ("Linear", [WIDTH, INNER], {}),
    ],
    ids=str,
)
def test_norms_and_linear_layers_are_pytorchs(device, name, args, options):
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = beside(name, *args, **options, device=device, dtype=dtype)
        assert_no_worse(called(mine), called(theirs), leaves(mine, BATCH, ROWS, WIDTH), blur=2)
        assert repr(mine) == repr(theirs)


def test_dropout_drops_what_pytorchs_drops(device):
    """But of rows, where the batch comes first: PyTorch's lie in another order in memory there."""
    x = torch.randn(BATCH, ROWS, WIDTH, device=device)
    attention = beside("MultiheadAttention", WIDTH, HEADS, 0.5, batch_first=True, device=device)
    layers = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, 0.5, norm_first=True, device=device)
    for calls in (
        [lambda each=each: each(x, x, x, need_weights=False)[0] for each in attention],
        [lambda each=each: each(x) for each in layers],
    ):
        found = []
        for call in calls:
            torch.manual_seed(3)
            found.append(call())
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_first_weights_are_pytorchs(device):
    found = []
    for module in (nn, ours):
        torch.manual_seed(5)
        found.append(module.TransformerEncoderLayer(WIDTH, HEADS, INNER, device=device).state_dict())
    assert list(found[0]) == list(found[1])
    assert all(map(torch.equal, found[0].values(), found[1].values()))


def gated(module):
    """SwiGLU in PyTorch's functions."""
    return lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_an_mlp_is_a_sequence_of_pytorchs(device, name):
    between = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}[name]
    for dtype in (torch.float32, torch.bfloat16):
        made = {"device": device, "dtype": dtype}
        for out, options in ((WIDTH, {}), (WIDTH, {"bias": False}), (8, {"out_features": 8})):
            mine = ours.MLP(WIDTH, INNER, activation=name, **options, **made)
            bias = options.get("bias", True)
            plain = nn.Sequential(
                nn.Linear(WIDTH, INNER, bias, **made), copy.deepcopy(between), nn.Linear(INNER, out, bias, **made)
            )
            mine.load_state_dict(plain.state_dict(), strict=True)
            assert_no_worse(called(mine), called(plain), leaves(mine, BATCH, ROWS, WIDTH), blur=2)


def test_a_part_of_an_mlp_is_a_sequence(device):
    mlp, x = ours.MLP(WIDTH, INNER, device=device), torch.randn(BATCH, ROWS, WIDTH, device=device)
    assert type(mlp[:2]) is nn.Sequential
    assert torch.equal(mlp[:2](x), F.gelu(mlp[0](x)))
    assert mlp[-1] is mlp[2]


def test_a_gated_mlp_is_what_its_formula_says(device):
    for dtype in (torch.float32, torch.bfloat16):
        for recompute in (False, True):
            mine = ours.SwiGLU(WIDTH, INNER, recompute=recompute, device=device, dtype=dtype)
            assert list(mine.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
            assert_no_worse(called(mine), gated(mine), leaves(mine, BATCH, ROWS, WIDTH), blur=2)


MADE = {
    "TransformerEncoderLayer": lambda **made: ours.TransformerEncoderLayer(
        WIDTH, HEADS, INNER, 0.0, "gelu", norm_first=True, batch_first=True, **made
    ),
    "post-norm": lambda **made: ours.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, **made),
    "MLP": lambda **made: ours.MLP(WIDTH, INNER, **made),
    "SwiGLU": lambda **made: ours.SwiGLU(WIDTH, INNER, **made),
    "LayerNorm": lambda **made: ours.LayerNorm(WIDTH, **made),
    "RMSNorm": lambda **made: ours.RMSNorm(WIDTH, **made),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", MADE)
def test_a_compiled_module_is_one_graph(device, name):
    torch._dynamo.reset()
    module = MADE[name](device=device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    inputs = leaves(module, BATCH, ROWS, WIDTH)
    for x in (inputs[0], torch.randn(BATCH, 5, WIDTH, device=device)):
        for training in (True, False):
            module.train(training)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
    compiled(inputs[0]).sum().backward()
    assert all(each.grad is not None for each in inputs)


@pytest.mark.parametrize("name", MADE)
def test_a_module_travels(device, name):
    module = MADE[name](device=device).eval()
    x = torch.randn(BATCH, ROWS, WIDTH, device=device)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert [type(each) for each in other.modules()] == [type(each) for each in module.modules()]
    assert module.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_an_encoders_layer_is_pytorchs(device, dtype):
    for norm_first in (True, False):
        more = {"norm_first": norm_first, "batch_first": True, "device": device}
        mine, theirs = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, 0.0, **more)
        x = torch.randn(BATCH, ROWS, WIDTH, device=device)
        truth = theirs(x)
        with torch.autocast(device, dtype):
            found, plain = mine(x), theirs(x)
        assert found.dtype == plain.dtype
        assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-3


def test_hooks_on_inner_modules_are_called(device):
    module, heard = MADE["TransformerEncoderLayer"](device=device), []
    for name in ("norm1", "norm2", "linear1", "linear2", "self_attn"):
        getattr(module, name).register_forward_hook(lambda *_, name=name: heard.append(name))
    mlp, gate = MADE["MLP"](device=device), MADE["SwiGLU"](device=device)
    mlp[0].register_forward_hook(lambda *_: heard.append("mlp"))
    gate.up_proj.register_forward_hook(lambda *_: heard.append("gate"))
    x = torch.randn(BATCH, ROWS, WIDTH, device=device)
    for each in (module, mlp, gate):
        each(x)
    assert heard == ["norm1", "self_attn", "norm2", "linear1", "linear2", "mlp", "gate"]


def test_what_stands_in_the_place_of_a_dropout_between_an_mlps_layers_is_called(device):
    mine, theirs = beside("TransformerEncoderLayer", WIDTH, HEADS, INNER, 0.0, batch_first=True, device=device)
    x = torch.randn(BATCH, ROWS, WIDTH, device=device)
    listened, heard = copy.deepcopy(mine), []
    listened.dropout.register_forward_hook(lambda *_: heard.append("dropout"))
    listened(x)
    assert heard == ["dropout"]
    for between in (nn.Identity(), nn.Hardtanh()):
        mine.dropout = theirs.dropout = between
        for training in (True, False):
            torch.testing.assert_close(mine.train(training)(x), theirs.train(training)(x), rtol=1e-4, atol=1e-4)
