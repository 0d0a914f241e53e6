"""Graphs whose sizes are not known yet: masks that are causal whatever the sizes are, and those that are not."""

import pytest
import torch
from test_graphs import CAUSAL, SDPA, Methods, Seen, places

from tilebook import graphs, sizes

SIZES = 12, 40, 23

STAY = {
    "a window": lambda n: (places(n) <= places(n)[:, None]) & (places(n) > places(n)[:, None] - 100),
    "a narrow window": lambda n: (places(n) <= places(n)[:, None]) & (places(n) > places(n)[:, None] - 4),
    "a window by a method": lambda n: places(n).le(places(n)[:, None]) & places(n).gt(places(n)[:, None].sub(100)),
    "chunks": lambda n: (places(n) <= places(n)[:, None]) & (places(n) // 100 == places(n)[:, None] // 100),
    "up to a place": lambda n: (places(n) <= places(n)[:, None]) & (places(n) < 100),
    "a band of tril": lambda n: torch.ones(n, n, dtype=torch.bool).tril().triu(-100),
    "added": lambda n: torch.zeros(n, n).masked_fill(places(n) > places(n)[:, None], -1e30),
    "half": lambda n: (places(n) <= places(n)[:, None]) & (places(n)[:, None] * 2 < places(n) + n * 9),
    "every other": lambda n: (places(n) <= places(n)[:, None]) & (places(n) % 2 == 0),
}


def run(mask, backend=Seen, given=lambda n: (), sizes=SIZES):
    def attend(q, k, v, *more):
        return SDPA(q, k, v, attn_mask=mask(q.shape[-2], *more))

    seen = backend()
    torch.compiler.reset()
    made = torch.compile(attend, backend=seen, fullgraph=True, dynamic=True)
    for n in sizes:
        tensors = [torch.randn(2, 4, n, 16, requires_grad=True) for _ in range(3)]
        found, expected = made(*tensors, *given(n)), attend(*tensors, *given(n))
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(o, tensors, torch.ones_like(o)) for o in (found, expected))
        for mine, right in zip(*grads, strict=True):
            torch.testing.assert_close(mine, right)
    assert len(seen.changed) == 1, "it was compiled anew"
    return seen


@pytest.mark.parametrize("backend", [Seen, Methods])
@pytest.mark.parametrize("mask", [name for name in CAUSAL if name != "added, the least number"])
def test_a_mask_that_is_causal_for_all_sizes(mask, backend):
    seen = run(CAUSAL[mask], backend)
    numbers = mask == "added"  # whose -inf is a large number
    assert seen.changed == [0 if numbers else 1]
    assert numbers or seen.calls == [{"is_causal": True}]


@pytest.mark.parametrize("mask", STAY)
def test_a_mask_that_may_be_another_for_other_sizes_stays(mask):
    assert run(STAY[mask]).changed == [0]


def test_more_rows_than_columns_are_other_symbols():
    def attend(q, k, v):
        return SDPA(q, k, v, attn_mask=places(k.shape[-2]) <= places(q.shape[-2])[:, None])

    seen = Seen()
    torch.compiler.reset()
    made = torch.compile(attend, backend=seen, dynamic=True)
    for n_q, n_k in ((12, 17), (9, 40)):
        q, k, v = (torch.randn(2, 4, n, 16) for n in (n_q, n_k, n_k))
        torch.testing.assert_close(made(q, k, v), attend(q, k, v))
    assert seen.changed == [0]


@pytest.mark.parametrize("batch", [2, 300])
def test_padding_of_any_length_is_a_mask_of_keys(monkeypatch, batch):
    """A batch of 300 is a number that is written into the graph."""
    monkeypatch.setattr(graphs, "_takes", lambda tensors, of, call, shown: True)

    def mask(q, k, v, p):
        n = q.shape[-2]
        rows = torch.arange(batch)[:, None, None, None]
        keys = p[rows, places(n)[None, None, None]]
        return SDPA(q, k, v, (places(n) <= places(n)[:, None])[None, None] & keys)

    seen = Seen()
    torch.compiler.reset()
    made = torch.compile(mask, backend=seen, fullgraph=True)
    for n in (12, 40, 23):
        tensors = [torch.randn(batch, 2, n, 16) for _ in range(3)]
        padding = places(n) < torch.randint(1, n + 1, (batch, 1))
        torch.testing.assert_close(made(*tensors, padding), mask(*tensors, padding))
    assert seen.changed == [1, 1]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_lengths_of_different_inputs_are_taken_for_the_same(monkeypatch, heads):
    """Keys and values of two inputs have lengths of two symbols."""
    monkeypatch.setattr(graphs, "_half", lambda q, of: True)
    monkeypatch.setattr(graphs, "TRACED", (0.0, 0.0))

    def attend(q, k, v, padding):
        limits = places(q.shape[-2]) <= places(q.shape[-2])[:, None]
        copies = heads[0] // heads[1]
        if copies > 1:
            shape = k.shape[0], heads[0], -1, 16
            k, v = (x[:, :, None].expand(-1, -1, copies, -1, -1).reshape(shape) for x in (k, v))
        return SDPA(q, k, v, limits & padding[:, None, None])

    seen = Seen()
    torch.compiler.reset()
    made = torch.compile(attend, backend=seen, fullgraph=True)
    for n in (12, 40, 23):
        tensors = [torch.randn(2, each, n, 16) for each in (heads[0], heads[1], heads[1])]
        padding = places(n) < torch.tensor([[n], [5]])
        torch.testing.assert_close(made(*tensors, padding), attend(*tensors, padding))
    assert seen.changed == [1, 1]
    q, k, v = tensors
    for function in (attend, made):
        with pytest.raises((RuntimeError, ValueError)):
            function(q, k, v[:, :, 1:], padding)


@pytest.mark.parametrize(
    ("kind", "padded", "checkpointed"),
    [("llama", False, True), ("llama", True, False), ("llama", True, True), ("mistral", True, False)],
)
def test_models_of_transformers_for_any_length(monkeypatch, kind, padded, checkpointed):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        sliding_window=4096, vocab_size=50, use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    monkeypatch.setattr(graphs, "_takes", lambda tensors, of, call, shown: True)
    seen = Seen()
    torch.compiler.reset()
    made = torch.compile(model, backend=seen)
    for n in SIZES:
        ids = torch.randint(50, (2, n))
        more = {"attention_mask": (places(n) < torch.tensor([[n], [7]])).long()} if padded else {}
        torch.testing.assert_close(made(input_ids=ids, **more).logits, model(input_ids=ids, **more).logits)
    # A window that is wider than a sequence is nothing, while the length is known.
    assert seen.changed[0] == 1
    assert seen.changed[-1] == (0 if kind == "mistral" else 1)


def test_sizes_of_other_symbols_are_unknown():
    graph = torch.fx.Graph()
    assert sizes.trials(graph) == [sizes.Trial({}, {})]
    with pytest.raises(sizes.Unknown):
        sizes.Trial({}, {}).of(__import__("sympy").Symbol("s0"))
