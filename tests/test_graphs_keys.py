"""Graphs whose masks are constant but for padding: ours take the padded keys and the limits instead."""

import operator

import pytest
import torch
from test_graphs import SDPA, Methods, Seen, places, qkv

from tilebook import graphs

N = 12
PADDING = torch.arange(N) < torch.tensor([[N], [7]])


def causal():
    return (places(N) <= places(N)[:, None])[None, None]


def window():
    return causal() & (places(N) > places(N)[:, None] - 4)


def gathered(p):
    return p[torch.arange(2)[:, None, None, None], places(N)[None, None, None, :]]


TAKEN = {
    "and": (lambda p: causal() & p[:, None, None], (-1, 0)),
    "the other way round": (lambda p: p[:, None, None] & causal(), (-1, 0)),
    "logical_and": (lambda p: torch.logical_and(causal(), p[:, None, None].bool()), (-1, 0)),
    "a method": (lambda p: causal().logical_and(p[:, None, None]).to(p.device), (-1, 0)),
    "of all heads": (lambda p: (causal() & p[:, None, None]).expand(2, 4, N, N), (-1, 0)),
    "numbers first": (lambda p: causal() & (p.long()[:, None, None] != 0), (-1, 0)),
    "a window": (lambda p: window() & p[:, None, None], (3, 0)),
    "as transformers has it": (
        lambda p: (torch.ones((), dtype=torch.bool) & causal() & gathered(p).to(p.device)).expand(2, -1, N, N),
        (-1, 0),
    ),
    "twice": (lambda p: causal() & p[:, None, None] & p.flip(0)[:, None, None].expand(2, 1, 1, N), (-1, 0)),
    "one for all": (lambda p: causal() & p[:1, None, None], (-1, 0)),
    "of two axes": (lambda p: causal() & p[:1], (-1, 0)),
    "of one axis": (lambda p: causal() & p[1], (-1, 0)),
}
LEFT = {
    "no limits": lambda p: p[:, None, None].expand(2, 1, N, N),
    "rows": lambda p: causal() & p[:, None, :, None],
    "either": lambda p: causal() | p[:, None, None],
    "not": lambda p: ~(causal() & p[:, None, None]),
    "numbers": lambda p: torch.where(causal() & p[:, None, None], 0.0, -1e4),
    "other limits": lambda p: (causal() & (places(N)[:, None] % 2 == 0)) & p[:, None, None],
}


def run(monkeypatch, mask, padding=PADDING, backend=Seen, ahead=False):
    monkeypatch.setattr(graphs, "_takes", lambda tensors, call, shown: ahead or shown.limits != (-1, -1))
    q, k, v = (x.requires_grad_() for x in qkv(N, N))

    def attend(q, k, v, p):
        return SDPA(q, k, v, attn_mask=mask(p))

    seen = backend()
    torch.compiler.reset()
    made = torch.compile(attend, backend=seen, fullgraph=True)
    for each in (padding, torch.ones_like(padding)):  # the second one is not compiled anew
        found, expected = made(q, k, v, each), attend(q, k, v, each)
        torch.testing.assert_close(found, expected)
        do = torch.randn_like(expected)
        for mine, right in zip(*(torch.autograd.grad(o, (q, k, v), do) for o in (found, expected)), strict=True):
            torch.testing.assert_close(mine, right)
    assert len(seen.changed) == 1
    return seen


@pytest.mark.parametrize("backend", [Seen, Methods])
@pytest.mark.parametrize("mask", TAKEN)
def test_padding_beside_limits_is_a_mask_of_keys(monkeypatch, mask, backend):
    made, limits = TAKEN[mask]
    seen = run(monkeypatch, made, backend=backend)
    assert seen.changed == [1]
    assert not seen.calls
    (call,) = [node for node in seen.graphs[0].nodes if node.target is graphs._windowed()]
    assert call.args[7:9] == limits
    assert call.args[3] is not None


@pytest.mark.parametrize("mask", LEFT)
def test_other_masks_of_inputs_stay(monkeypatch, mask):
    assert run(monkeypatch, LEFT[mask]).changed == [0]


@pytest.mark.parametrize("mask", ["no limits", "of all heads", "unexpanded"])
def test_padding_without_limits_is_ours_where_it_is_ahead(monkeypatch, mask):
    made = {
        **LEFT,
        "unexpanded": lambda p: p[:, None, None],
        "of all heads": lambda p: p[:, None, None].expand(2, 4, 1, N),
    }
    seen = run(monkeypatch, made[mask], ahead=True)
    assert seen.changed == [1]
    (call,) = [node for node in seen.graphs[0].nodes if node.target is graphs._windowed()]
    assert call.args[7:9] == (-1, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pytorchs", [False, True])
@pytest.mark.parametrize("mask", ["and", "no limits"])
def test_who_serves_padding_is_asked_while_the_program_is_compiled(monkeypatch, mask, pytorchs, dtype):
    asked = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(graphs, "TRACED", (0, 0))
    monkeypatch.setattr(graphs, "left", lambda *of: asked.append(of) or pytorchs)
    seen, (q, k, v) = [], (x.to(dtype) for x in qkv())
    made = TAKEN[mask][0] if mask in TAKEN else LEFT[mask]

    def looked_at(module, example_inputs):
        seen.append(graphs.simplified(module))
        return lambda *args: (args[0],)

    torch.compiler.reset()
    torch.compile(lambda q, k, v, p: SDPA(q, k, v, made(p)), backend=looked_at)(q, k, v, PADDING)
    served = dtype == torch.bfloat16 and (mask == "and" or not pytorchs)
    assert seen == [int(served)]
    if mask == "no limits" and dtype == torch.bfloat16:
        ((family, args, options, trained, _, bounded),) = asked
        assert (family, args[3], args[4:], options[1:3]) == (
            "attention",
            ((2, 1, 1, N), torch.bool),
            (None, None),
            (-1, -1),
        )
        assert trained
        assert not bounded
    else:
        assert not asked


def _whole(p):
    mask = causal() & p[:, None, None]
    mask[:, :, 3, 1] = False
    return mask


def _part(p):
    keys = p[:, None, None].clone()
    mask = causal() & keys
    keys.fill_(True)
    return mask


def _input_later(p):
    keys = p[:, None, None]
    mask = causal() & keys
    p.logical_not_()
    p.logical_not_()
    return mask


def _operator(p):
    return operator.iand(causal() & p[:, None, None], torch.ones(N, N, dtype=torch.bool).triu(-3))


@pytest.mark.parametrize("mask", [_whole, _part, _input_later, _operator])
@pytest.mark.parametrize("backend", [Seen, Methods])
def test_masks_that_are_written_to_stay(monkeypatch, mask, backend):
    assert run(monkeypatch, mask, PADDING.clone(), backend).changed == [0]


def test_where_our_kernels_do_not_serve_the_mask_stays(monkeypatch):
    seen = Seen()
    torch.compiler.reset()
    torch.compile(lambda q, k, v, p: SDPA(q, k, v, causal() & p[:, None, None]), backend=seen)(*qkv(), PADDING)
    assert seen.changed == [0]


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_checkpointed_is_given_the_keys(monkeypatch, layers):
    monkeypatch.setattr(graphs, "_takes", lambda tensors, call, shown: True)

    def attend(q, k, v, p):
        mask = causal() & p[:, None, None]
        for _ in range(layers):
            q = torch.utils.checkpoint.checkpoint(lambda *x: SDPA(*x, attn_mask=mask), q, k, v, use_reentrant=False)
        return q

    seen, leaves = Seen(), [x.requires_grad_() for x in qkv()]
    torch.compiler.reset()
    found, expected = torch.compile(attend, backend=seen, fullgraph=True)(*leaves, PADDING), attend(*leaves, PADDING)
    torch.testing.assert_close(found, expected)
    do = torch.randn_like(expected)
    for mine, right in zip(*(torch.autograd.grad(o, leaves, do) for o in (found, expected)), strict=True):
        torch.testing.assert_close(mine, right)
    assert seen.changed == [layers]


def test_what_is_checkpointed_and_writes_to_its_mask_is_left(monkeypatch):
    monkeypatch.setattr(graphs, "_takes", lambda tensors, call, shown: True)

    def layer(q, k, v, mask):
        mask = mask.view(2, 1, N, N)
        mask[:, :, 3, 1] = False
        return SDPA(q, k, v, attn_mask=mask)

    def attend(q, k, v, p):
        return torch.utils.checkpoint.checkpoint(layer, q, k, v, causal() & p[:, None, None], use_reentrant=False)

    seen, tensors = Seen(), qkv()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(attend, backend=seen)(*tensors, PADDING), attend(*tensors, PADDING))
    assert sum(seen.changed) == 0


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padded_models_of_transformers(monkeypatch, kind, checkpointed):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50, sliding_window=8, use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids, mask = torch.randint(50, (2, N)), PADDING.long()
    monkeypatch.setattr(graphs, "_takes", lambda tensors, call, shown: True)
    seen = Seen()
    torch.compiler.reset()
    found = torch.compile(model, backend=seen)(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask).logits)
    assert sum(seen.changed) == 2
