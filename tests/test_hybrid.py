"""`tilebook.nn.LinearAttention`, and models with linear attention in some of their layers."""

import copy
import pickle

import pytest
import torch
from summed_pairs import over_pairs
from torch import nn

import tilebook.nn as ours
from tilebook import dispatch

WIDTH, HEADS, BATCH, ROWS = 32, 2, 3, 11
PADDING = torch.arange(ROWS) >= torch.tensor([ROWS, 4, 7])[:, None]
CAUSAL = torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)


def drawn(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape or (BATCH, ROWS, WIDTH), generator=torch.Generator().manual_seed(seed)).to(dtype)


def written_out(module, query, key, value, hidden=None, causal=False):
    """The same with the module's projections. The batch comes first."""
    parts = zip((query, key, value), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    q, k, v = ((x @ w.T + b).unflatten(-1, (HEADS, -1)).transpose(1, 2) for x, w, b in parts)
    o = over_pairs(q, k, v, hidden, module.feature_map, causal or module.causal, module.eps)
    return module.out_proj(o.transpose(1, 2).flatten(-2))


def made(dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = ours.LinearAttention(WIDTH, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for each in module.parameters():
            each.normal_(std=0.3)
    return module


@pytest.mark.parametrize("feature_map", ["elu+1", "relu", "softmax", "performer", torch.exp])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [None, PADDING])
def test_numbers_and_gradients_are_those_of_the_sum_over_pairs(feature_map, causal, hidden):
    for batch_first in (True, False):
        module = made(feature_map=feature_map, causal=causal, batch_first=batch_first)
        x = drawn().requires_grad_()
        given = x if batch_first else x.transpose(0, 1)
        o, weights = module(given, given, given, hidden)
        o = o if batch_first else o.transpose(0, 1)
        right = written_out(module, x, x, x, hidden)
        assert weights is None
        inputs = x, *module.parameters()
        grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (o, right)]
        for mine, other in zip((o, *grads[0]), (right, *grads[1]), strict=True):
            near = {"rtol": 1e-4, "atol": 1e-4} if feature_map == "performer" else {}  # its exponents are of fp32
            torch.testing.assert_close(mine, other, **near)


def test_other_keys_than_queries_and_a_causal_call_are_taken():
    module, x, y = made(batch_first=True), drawn(), drawn(BATCH, 5, WIDTH, seed=2)
    torch.testing.assert_close(module(y, x, 2 * x, PADDING)[0], written_out(module, y, x, 2 * x, PADDING))
    for options in ({"attn_mask": CAUSAL}, {}):
        o = module(x, x, x, PADDING, is_causal=True, **options)[0]
        torch.testing.assert_close(o, written_out(module, x, x, x, PADDING, causal=True))


def test_numbers_of_a_key_padding_mask_multiply_weights_by_their_exponentials():
    module, x = made(batch_first=True), drawn()
    once = torch.zeros(BATCH, ROWS, dtype=torch.float64)
    once[:, 2], once[:, 3] = torch.log(torch.tensor(2.0)), -torch.inf
    twice = torch.cat((x[:, :4], x[:, 2:3], x[:, 4:]), 1)
    hidden = (torch.arange(ROWS + 1) == 3).expand(BATCH, -1)
    torch.testing.assert_close(module(x, x, x, once)[0], module(x, twice, twice, hidden)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("feature_map", ["elu+1", "performer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_hidden_keys_hold_is_nothing_to_anybody(feature_map, dtype):
    module, x = made(dtype, feature_map=feature_map, batch_first=True), 0.3 * drawn(dtype=dtype)
    spoilt = x.masked_fill(PADDING[..., None], torch.nan)
    wide = copy.deepcopy(module).double()
    for hidden in (PADDING, torch.ones_like(PADDING)):
        o = module(x, spoilt, spoilt, hidden)[0]
        right = written_out(wide, *[x.double()] * 3, hidden)
        steps = 64 if dtype == torch.float32 else 4
        assert (o - right).abs().max() < steps * torch.finfo(dtype).eps * right.abs().max()
    assert torch.equal(o, module.out_proj.bias.expand_as(o))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
def test_our_kernels_serve_causal_calls():
    module, x = made(torch.float32, causal=True, batch_first=True), drawn(dtype=torch.float32).requires_grad_()
    with dispatch.use("triton"):
        o = module(x, x, x, PADDING)[0]
        grads = torch.autograd.grad(o.square().sum(), (x, *module.parameters()))
    right = written_out(module, x, x, x, PADDING)
    others = torch.autograd.grad(right.square().sum(), (x, *module.parameters()))
    for mine, other in zip((o, *grads), (right, *others), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_state_dicts_are_those_of_pytorchs_class():
    theirs, module = nn.MultiheadAttention(WIDTH, HEADS), ours.LinearAttention(WIDTH, HEADS)
    module.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(module.state_dict(), strict=True)
    assert isinstance(module, nn.MultiheadAttention)
    torch.manual_seed(4)
    first = nn.MultiheadAttention(WIDTH, HEADS).in_proj_weight
    torch.manual_seed(4)
    assert torch.equal(first, ours.LinearAttention(WIDTH, HEADS).in_proj_weight)
    for each in (theirs, module):
        torch.manual_seed(4)
        each._reset_parameters()
    assert torch.equal(theirs.in_proj_weight, module.in_proj_weight)
    x = drawn(dtype=torch.float32)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("feature_map", ["elu+1", "performer"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 5, 5), (2, 0, 0), (2, 0, 5), (2, 5, 0), (2, 1, 1)])
def test_nothing_and_one_row_are_taken(feature_map, causal, batch, rows, keys):
    if causal and rows != keys:
        pytest.skip("causal calls have as many keys as queries")
    module, x = made(feature_map=feature_map, causal=causal, batch_first=True), drawn(batch, rows, WIDTH)
    y, hidden = drawn(batch, keys, WIDTH), torch.zeros(batch, keys, dtype=torch.bool)
    for padding in (None, hidden):
        o = module(x, y, y, padding)[0]
        assert o.shape == x.shape
        if rows == 5 and batch:
            assert torch.equal(o, module.out_proj.bias.expand_as(o))
        if rows == 1:
            torch.testing.assert_close(o, written_out(module, x, y, y))


def test_dropout_is_of_outputs_and_in_training_alone():
    module, x = made(dropout=1.0, batch_first=True), drawn()
    assert torch.equal(module(x, x, x)[0], module.out_proj.bias.expand_as(x))
    torch.testing.assert_close(module.eval()(x, x, x)[0], written_out(module, x, x, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"need_weights": True}, "no weights of pairs"),
        ({"attn_mask": CAUSAL}, "takes no attn_mask but a causal one"),
        ({"attn_mask": torch.zeros(ROWS, ROWS)}, "takes no attn_mask but a causal one"),
        ({"key_padding_mask": torch.zeros(BATCH, ROWS).int()}, "booleans or floats"),
        ({"key_padding_mask": PADDING[:, :5]}, r"not \(3, 5\)"),
        ({"query": drawn(ROWS, WIDTH)}, "three axes"),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    module, x = made(batch_first=True), drawn()
    with pytest.raises(ValueError, match=message):
        module(**({"query": x, "key": x, "value": x} | options))


@pytest.mark.parametrize("options", [{"kdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_parameters_that_it_has_no_use_for_are_refused(options):
    with pytest.raises(ValueError, match="add_zero_attn"):
        ours.LinearAttention(WIDTH, HEADS, **options)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with pytest.raises(ValueError, match="add_zero_attn"):
        ours.hybrid(module)
    assert type(module) is nn.MultiheadAttention


def encoder(cls, **options):
    torch.manual_seed(0)
    layer = cls(WIDTH, HEADS, 48, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 3)


def by_hand(layer, x, hidden):
    """A layer of an encoder with the norm behind."""
    x = layer.norm1(x + written_out(layer.self_attn, x, x, x, hidden))
    return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, ours.TransformerEncoderLayer])
def test_an_encoder_is_turned_into_a_hybrid_and_back(cls):
    model, x = encoder(cls).eval(), drawn(dtype=torch.float32)
    state, held = copy.deepcopy(model.state_dict()), [id(each) for each in model.parameters()]
    with torch.no_grad():
        before = model(x, src_key_padding_mask=PADDING)
        report = ours.hybrid(model, exact_every=2)
        assert report.changed == dict.fromkeys(
            ["layers.0.self_attn", "layers.2.self_attn"], "tilebook.linear_attention with elu+1"
        )
        assert report.left == {"layers.1.self_attn": "stays exact"}
        for hidden in (None, PADDING):
            mine = model(x, src_key_padding_mask=hidden)  # in evaluation, where PyTorch has ops of a whole layer
            right = by_hand(model.layers[0], x, hidden)
            right = by_hand(model.layers[2], model.layers[1](right, src_key_padding_mask=hidden), hidden)
            seen = slice(None) if hidden is None else ~hidden
            torch.testing.assert_close(mine[seen], right[seen], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model.train()(x, src_key_padding_mask=hidden)[seen], mine[seen])
            model.eval()
        torch.testing.assert_close(model(x, mask=CAUSAL)[:, 0], model(x[:, :1])[:, 0])
        assert list(model.state_dict()) == list(state)
        assert [id(each) for each in model.parameters()] == held
        again = ours.hybrid(model, [0, -2])
        assert list(again.changed) == ["layers.1.self_attn"]
        assert again.left["layers.0.self_attn"] == "linear already"
        again.undo(), report.undo(), report.undo()
        assert torch.equal(model(x, src_key_padding_mask=PADDING), before)
    assert {type(each.self_attn) for each in model.layers} == {type(cls(8, 1).self_attn)}
    assert model.use_nested_tensor
    assert "feature_map" not in vars(model.layers[0].self_attn)


def test_layers_are_named_by_numbers_that_there_are():
    model = encoder(nn.TransformerEncoderLayer)
    for layers, exact_every in (([3], None), ([0], 2), (None, 0)):
        with pytest.raises(ValueError, match=r"3 layers of attention|exact_every must"):
            ours.hybrid(model, layers, exact_every=exact_every)
    with pytest.raises(ValueError, match="no layer of Linear"):
        ours.hybrid(nn.Linear(2, 2))
    assert list(ours.hybrid(model, feature_map="relu", eps=0.1).changed) == [f"layers.{n}.self_attn" for n in range(3)]
    assert (model.layers[1].self_attn.feature_map, model.layers[1].self_attn.eps) == ("relu", 0.1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, ours.TransformerEncoderLayer])
def test_a_converted_layer_compiles_to_one_graph(cls):
    torch._dynamo.reset()
    layer, x = encoder(cls).layers[0], drawn(dtype=torch.float32).requires_grad_()
    ours.hybrid(layer, feature_map="performer")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for options in ({}, {"src_key_padding_mask": PADDING}):
        torch.testing.assert_close(compiled(x, **options), layer(x, **options), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("wrong", ["perf", "", 3])
def test_a_feature_map_that_is_none_is_refused_when_a_module_is_made_and_changes_nothing(wrong):
    with pytest.raises(ValueError, match=r"feature_map must be 'elu.1', 'relu', 'softmax', 'performer', None or a fun"):
        ours.LinearAttention(32, 2, feature_map=wrong)
    model = nn.TransformerEncoderLayer(32, 2, 64)
    with pytest.raises(ValueError, match="feature_map must be"):
        ours.hybrid(model, feature_map=wrong)
    assert type(model.self_attn) is nn.MultiheadAttention
    for right in ("elu+1", "performer", None, torch.relu):
        assert ours.LinearAttention(32, 2, feature_map=right).feature_map is right
