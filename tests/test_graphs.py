"""Graphs that PyTorch's compiler is given: constant masks of attention are told apart from those that are not."""

import operator

import pytest
import torch
import torch.nn.functional as F
from programs.processes import python

import tilebook
from tilebook import graphs, shown

SDPA = F.scaled_dot_product_attention


class Seen:
    """A backend of `torch.compile` that runs graphs as they are once they are simplified, and keeps them."""

    def __init__(self):
        self.changed, self.graphs = [], []

    def __call__(self, module, example_inputs):
        self.changed.append(graphs.simplified(module))
        module.graph.lint()
        self.graphs.append(module.graph)
        return module.forward

    @property
    def calls(self):
        """What each call of attention is given beside q, k and v."""
        return [
            {name: value for name, value in node.kwargs.items() if name in ("attn_mask", "is_causal")}
            for graph in self.graphs
            for node in graph.nodes
            if node.target is graphs.scaled_dot_product_attention
        ]


class Methods(Seen):
    """The same of graphs whose operators are methods, as PyTorch 2.11 writes some."""

    def __call__(self, module, example_inputs):
        for node in module.graph.nodes:
            name = getattr(node.target, "__name__", "")
            of_tensors = node.args and isinstance(node.args[0], torch.fx.Node)
            if of_tensors and name != "getitem" and node.target is getattr(operator, name, None):
                node.op, node.target = "call_method", f"__{name.rstrip('_')}__"
        module.recompile()
        return super().__call__(module, example_inputs)


def compiled(function, *args, backend=Seen, **how):
    seen = backend()
    torch.compiler.reset()
    found = torch.compile(function, backend=seen, fullgraph=True, **how)(*args)
    torch.testing.assert_close(found, function(*args))
    return seen


def qkv(rows=12, columns=12):
    return torch.randn(2, 4, rows, 16), torch.randn(2, 4, columns, 16), torch.randn(2, 4, columns, 16)


def places(n):
    return torch.arange(n)


CAUSAL = {
    "booleans": lambda n: places(n) <= places(n)[:, None],
    "expanded": lambda n: (places(n)[None, :] <= places(n)[:, None])[None, None].expand(2, 1, n, n),
    "tril": lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
    "added": lambda n: torch.zeros(n, n).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")),
    "added, the least number": lambda n: torch.full((n, n), torch.finfo(torch.float32).min).triu(1),
    "packed positions": lambda n: (
        (places(n) <= places(n)[:, None])
        & ((torch.diff(places(n), prepend=places(n)[:1] - 1) != 1).cumsum(-1)[:, None] == 0)
    ),
}
WINDOWS = {
    "to the left": (lambda n: (places(n) <= places(n)[:, None]) & (places(n) > places(n)[:, None] - 4), (3, 0)),
    "to both sides": (lambda n: (places(n) - places(n)[:, None]).abs() <= 2, (2, 2)),
    "more to the right": (lambda n: places(n) - places(n)[:, None] <= 5, (-1, 5)),
    "of one": (lambda n: places(n) == places(n)[:, None], (0, 0)),
}
OTHERS = {
    "the other corner": lambda n: places(n) >= places(n)[:, None],
    "numbers": lambda n: -(places(n) - places(n)[:, None]).abs().float(),
    "one pair less": lambda n: (places(n) <= places(n)[:, None]) & (places(n)[:, None] * n + places(n) != n),
}


@pytest.mark.parametrize("backend", [Seen, Methods])
@pytest.mark.parametrize("mask", CAUSAL)
def test_a_constant_causal_mask_is_causal_attention(mask, backend):
    seen = compiled(lambda q, k, v: SDPA(q, k, v, attn_mask=CAUSAL[mask](12)), *qkv(), backend=backend)
    assert seen.changed == [1]
    assert seen.calls == [{"is_causal": True}]
    assert len(seen.graphs[0].nodes) == 5, "what the mask was made of is still there"


def test_a_mask_of_all_pairs_is_none():
    seen = compiled(lambda q, k, v: SDPA(q, k, v, torch.ones(9, 12, dtype=torch.bool)), *qkv(rows=9))
    assert seen.calls == [{"is_causal": False}]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_an_op_of_ours_where_that_is_faster(monkeypatch, window):
    mask, sides = WINDOWS[window]

    def attend(q, k, v):
        return SDPA(q, k, v, mask(12), scale=0.3)

    assert compiled(attend, *qkv()).changed == [0]  # the CPU has no kernel of ours
    monkeypatch.setattr(graphs, "_takes", lambda tensors, call, shown: call["scale"] == 0.3)
    seen = compiled(attend, *qkv())
    assert seen.changed == [1]
    assert not seen.calls
    (call,) = [node for node in seen.graphs[0].nodes if node.target is graphs._windowed()]
    assert call.args[6:9] == (0.3, *sides)
    assert len(seen.graphs[0].nodes) == 6, "what the mask was made of is still there"


@pytest.mark.parametrize("change", [{}, {"long": False}, {"dropout_p": 0.1}, {"half": False}])
def test_a_window_stays_a_mask_where_the_host_takes_longer_or_kernels_do_not_serve(monkeypatch, change):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(graphs, "TRACED", (0, 0) if change.get("long", True) else (1 << 40, 1 << 40))
    q, k, v = (x.bfloat16() if change.get("half", True) else x for x in qkv())
    seen, given = Seen(), {"dropout_p": change.get("dropout_p", 0.0)}

    def looked_at(module, example_inputs):
        seen.changed.append(graphs.simplified(module))
        return lambda *args: (args[0],)

    torch.compiler.reset()
    torch.compile(lambda q, k, v: SDPA(q, k, v, WINDOWS["to both sides"][0](12), **given), backend=looked_at)(q, k, v)
    assert seen.changed == [int(not change)]


@pytest.mark.parametrize("mask", OTHERS)
def test_other_constants_stay(mask):
    seen = compiled(lambda q, k, v: SDPA(q, k, v, OTHERS[mask](12)), *qkv())
    assert seen.changed == [0]


@pytest.mark.parametrize("rows", [5, 12])
def test_where_lengths_differ_only_the_square_is_causal(rows):
    def attend(q, k, v):
        return SDPA(q, k, v, places(12) <= places(rows)[:, None])

    assert compiled(attend, *qkv(rows=rows)).changed == [int(rows == 12)]


@pytest.mark.parametrize("shape", [(1, 4, 12, 16), (2, 1, 12, 16), (4, 12, 16)], ids=str)
def test_a_mask_that_makes_the_result_larger_stays(shape):
    """Where PyTorch takes such a mask, the result without it would be another."""

    def attend(q, k, v):
        return SDPA(q, k, v, torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 4, 12, 12))

    def told_otherwise(module, example_inputs):
        for node in module.graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = torch.empty(shape, device="meta")
        changed.append(graphs.simplified(module))
        return module.forward

    changed = []
    torch.compiler.reset()
    torch.compile(attend, backend=told_otherwise)(*qkv())
    assert changed == [0]


def test_a_mask_that_is_an_input_or_made_of_one_stays():
    q, k, v = qkv()
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    padding = torch.ones(2, 12, dtype=torch.bool)
    assert compiled(lambda q, k, v, mask: SDPA(q, k, v, mask), q, k, v, causal).changed == [0]
    made = compiled(
        lambda q, k, v, p: SDPA(q, k, v, torch.ones(12, 12, dtype=torch.bool).tril() & p[:, None, None]),
        q,
        k,
        v,
        padding,
    )
    assert made.changed == [0]


def _by_its_own_name(mask):
    mask[3, 1] = False


def _by_a_method(mask):
    mask.logical_not_()
    mask.logical_not_()
    mask.fill_(True)


def _by_a_view(mask):
    mask.detach()[3].zero_()


def _by_an_operator(mask):
    operator.iand(mask, torch.ones(12, 12, dtype=torch.bool).triu(-3))


@pytest.mark.parametrize("write", [_by_its_own_name, _by_a_method, _by_a_view, _by_an_operator])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("backend", [Seen, Methods])
def test_a_mask_that_is_written_to_stays(write, late, backend):
    def attend(q, k, v):
        mask = torch.ones(12, 12, dtype=torch.bool).tril()
        if not late:
            write(mask)
        o = SDPA(q, k, v, mask)
        if late:
            write(mask)
            o = o + SDPA(q, k, v, mask)
        return o

    assert compiled(attend, *qkv(), backend=backend).changed == [0]


def test_random_masks_stay():
    seen = Seen()
    torch.compile(lambda q, k, v: SDPA(q, k, v, torch.rand(12, 12) < 2), backend=seen)(*qkv())
    assert seen.changed == [0]


def test_a_mask_is_known_within_what_is_checkpointed():
    def attend(q, k, v):
        mask = places(12) <= places(12)[:, None]
        return torch.utils.checkpoint.checkpoint(lambda *x: SDPA(*x, attn_mask=mask), q, k, v, use_reentrant=False)

    seen = Seen()
    torch.compiler.reset()
    q, k, v = (x.requires_grad_() for x in qkv())
    torch.testing.assert_close(torch.compile(attend, backend=seen)(q, k, v), attend(q, k, v))
    assert seen.changed == [1]


@pytest.mark.parametrize("half", [True, False])
def test_copies_of_shared_keys_are_not_made_where_kernels_share_them(monkeypatch, half):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    dtype = torch.bfloat16 if half else torch.float32
    q, k, v = (torch.randn(2, heads, 12, 16, dtype=dtype) for heads in (6, 2, 2))

    def repeated(x):
        return x[:, :, None, :, :].expand(2, 2, 3, 12, 16).reshape(2, 6, 12, 16)

    seen = compiled(lambda q, k, v: SDPA(q, repeated(k), repeated(v), places(12) <= places(12)[:, None]), q, k, v)
    (call,) = [node for node in seen.graphs[0].nodes if node.target is graphs.scaled_dot_product_attention]
    assert call.kwargs["enable_gqa"] == half
    assert [tuple(x.meta["example_value"].shape)[1] for x in call.args] == ([6, 2, 2] if half else [6, 6, 6])


def test_copies_stay_where_what_was_copied_is_written_to(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    q, k, v = (torch.randn(2, heads, 12, 16).bfloat16() for heads in (6, 2, 2))

    def attend(q, k, v):
        k = k * 1
        copies = k[:, :, None, :, :].expand(2, 2, 3, 12, 16).reshape(2, 6, 12, 16)
        k.zero_()
        values = v[:, :, None, :, :].expand(2, 2, 3, 12, 16).reshape(2, 6, 12, 16)
        return SDPA(q, copies, values, places(12) <= places(12)[:, None])

    seen = compiled(attend, q, k, v)
    (call,) = [node for node in seen.graphs[0].nodes if node.target is graphs.scaled_dot_product_attention]
    assert call.kwargs["is_causal"]
    assert not call.kwargs["enable_gqa"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_mask_that_layers_share_is_computed_once(monkeypatch, checkpointed):
    found, plain = [], shown.numbers
    for module in (graphs, shown):
        monkeypatch.setattr(module, "numbers", lambda node, given: found.append(node) or plain(node, given))

    def attend(q, k, v):
        mask = places(12) <= places(12)[:, None]
        for _ in range(3):
            if checkpointed:
                q = torch.utils.checkpoint.checkpoint(lambda *x: SDPA(*x, attn_mask=mask), q, k, v, use_reentrant=False)
            else:
                q = SDPA(q, k, v, mask)
        return q

    assert compiled(attend, *(x.requires_grad_() for x in qkv())).changed == [3]
    assert len(found) - len([node for node in found if node.op == "placeholder"]) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_models_of_transformers_without_padding_attend_causally(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "sliding_window": 8}
    config = transformers.AutoConfig.for_model(kind, **(sizes if kind != "gpt2" else {"n_embd": 32, "n_layer": 2}))
    config.use_cache, config.vocab_size = False, 50
    if kind == "gpt2":
        config.n_head = 4
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(50, (2, 8 if kind != "mistral" else 12))

    def run(**more):
        seen = Seen()
        torch.compiler.reset()
        found = torch.compile(model, backend=seen)(input_ids=ids, **more).logits
        torch.testing.assert_close(found, model(input_ids=ids, **more).logits)
        return sum(seen.changed)

    assert run() == (0 if kind == "mistral" else 2)  # whose window is narrower
    assert run(attention_mask=torch.ones_like(ids)) == 0  # which may be another in the next call


def test_inductor_is_given_simplified_graphs_while_it_is_on(monkeypatch):
    import torch._inductor.compile_fx as compiler

    theirs, found = compiler.compile_fx, []
    monkeypatch.setattr(graphs, "simplified", lambda module: found.append(module) or 0)
    monkeypatch.setattr(compiler, "compile_fx", lambda module, inputs, **_: module.forward)
    there = compiler.compile_fx

    def step():
        torch.compiler.reset()
        torch.compile(lambda x: x + 1)(torch.ones(3))

    with tilebook.enabled():
        with tilebook.enabled():
            step()
        step()
    assert len(found) == 2
    assert compiler.compile_fx is there
    step()
    assert len(found) == 2
    assert theirs is not there


def test_a_graph_that_cannot_be_looked_through_is_compiled_as_it_is(monkeypatch):
    import torch._inductor.compile_fx as compiler

    def broken(module):
        raise RuntimeError("of ours")

    monkeypatch.setattr(graphs, "simplified", broken)
    monkeypatch.setattr(compiler, "compile_fx", lambda module, inputs, **_: module.forward)
    torch.compiler.reset()
    with tilebook.enabled():
        torch.testing.assert_close(torch.compile(lambda x: x + 1)(torch.ones(3)), torch.full((3,), 2.0))


def test_turning_it_on_does_not_import_the_compiler():
    names = "torch._inductor.compile_fx", "tilebook.graphs"
    text = f"import sys, tilebook; tilebook.enable(); print([name for name in {names} if name in sys.modules])"
    assert python(text).split() == ["[]"]
