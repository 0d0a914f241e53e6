"""Linear attention in layers of transformers' encoders."""

import copy
import gc
import importlib
import pickle
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from summed_pairs import over_pairs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tilebook.nn import hybrid

transformers = pytest.importorskip("transformers")
hybrids = importlib.import_module("tilebook.nn.hybrid")  # whose name in the package is the function's

TINY = {
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
    "bert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64},
}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
SEEN = torch.arange(9) < torch.tensor([9, 5])[:, None]
PADDED = {"input_ids": IDS, "attention_mask": SEEN.long()}


def made(kind, attention="sdpa", **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=99, **TINY[kind], **options)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    return model.eval()


def layers_of(model):
    return [each for each in model.modules() if type(each).__name__.endswith("SelfAttention")]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "tilebook"])
@pytest.mark.parametrize("kind", TINY)
def test_layers_compute_the_sum_over_pairs_and_change_back(kind, attention, monkeypatch):
    import tilebook

    tilebook.register_transformers()
    model = made(kind, attention)
    state, before = copy.deepcopy(model.state_dict()), model(**PADDED).logits
    met = []
    report = hybrid(model, exact_every=2, feature_map="performer")
    assert [name[-1] for name in report.changed.values()] == ["r", "r"]
    assert len(report.left) == 1
    assert model.config._attn_implementation == attention
    names = ("q_lin", "k_lin", "v_lin") if kind == "distilbert" else ("query", "key", "value")
    layer = layers_of(model)[2]
    layer.register_forward_hook(lambda module, args, kwargs, out: met.append((args[0], out[0])), with_kwargs=True)
    for given, hidden in ((PADDED, ~SEEN), ({"input_ids": IDS}, None)):
        model(**given)
        x, found = met[-1]
        q, k, v = (getattr(layer, name)(x).unflatten(-1, (2, -1)).transpose(1, 2).double() for name in names)
        right = over_pairs(q, k, v, hidden, "performer").transpose(1, 2).flatten(-2).float()
        if kind == "distilbert":
            right = layer.out_lin(right)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**PADDED).logits, before)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(**PADDED).logits, model(**PADDED).logits)
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    report.undo()
    assert torch.equal(model(**PADDED).logits, before)
    assert layer.config is model.config


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_that_hides_more_than_keys_is_refused(attention):
    model = made("distilbert", attention)
    hybrid(model, [1])
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    if attention == "eager":
        mask = torch.zeros(2, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    with pytest.raises(ValueError, match="masks of padding only"):
        model(input_ids=IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="masks of padding only"):
        layers_of(model)[1](torch.zeros(2, 9, 32), torch.ones(2, 2, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="no weights of pairs"):
        model(input_ids=IDS, output_attentions=True)


def test_a_mask_that_was_changed_is_looked_at_again():
    model = made("distilbert")
    hybrid(model)
    layer, x, mask = layers_of(model)[0], torch.randn(2, 9, 32), SEEN[:, None, None].repeat(1, 1, 9, 1)
    first = layer(x, mask)[0]
    mask[..., 1] = False
    assert not torch.allclose(layer(x, mask)[0], first)
    mask[:, :, 3, 2] = False
    with pytest.raises(ValueError, match="masks of padding only"):
        layer(x, mask)


def by_make_fx(function, x, mask):
    return make_fx(function)(x, mask)


def by_jit(function, x, mask):
    return torch.jit.trace(function, (x, mask), check_trace=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [by_make_fx, by_jit])
def test_what_is_known_of_a_mask_is_no_constant_of_a_trace(trace):
    model = made("distilbert").requires_grad_(False)
    hybrid(model)
    layer, x, mask = layers_of(model)[0], torch.randn(2, 9, 32), SEEN[:, None, None].repeat(1, 1, 9, 1)
    function = lambda x, mask: layer(x, mask)[0]  # noqa: E731
    function(x, mask)
    traced, other = trace(function, x, mask), mask.flip(0)
    torch.testing.assert_close(traced(x, other), function(x, other))


def test_what_is_known_of_a_mask_is_not_a_transforms_nor_of_inference(monkeypatch):
    from tilebook import dispatch

    model = made("distilbert")
    hybrid(model)
    layer, mask = layers_of(model)[0], SEEN[:, None, None].repeat(1, 1, 9, 1)
    x = torch.randn(2, 9, 32, requires_grad=True)
    torch.func.grad(lambda x: layer(x, mask)[0].sum())(x.detach())
    with torch.inference_mode():
        layer(x, mask)
    monkeypatch.setattr(hybrids, "_captured", lambda mask: True)
    layer(x, mask)
    assert hybrids._HOW not in vars(mask)
    monkeypatch.undo()
    with dispatch.use("triton") if not torch.cuda.is_available() else nullcontext():
        layer(x, mask)[0].sum().backward()
    assert hybrids._HOW in vars(mask)


def test_masks_without_numbers_are_taken_and_one_of_all_sequences():
    model = made("distilbert")
    hybrid(model)
    layer, x, mask = layers_of(model)[0], torch.randn(2, 9, 32), SEEN[1:, None, None].repeat(1, 1, 9, 1)
    torch.testing.assert_close(layer(x, mask)[0], layer(x, mask.repeat(2, 1, 1, 1))[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x), mode.from_tensor(mask))[0].shape == x.shape
    assert copy.deepcopy(layer).to("meta")(x.to("meta"), mask.to("meta"))[0].shape == x.shape


@pytest.mark.long
def test_a_pickled_model_runs_where_nobody_has_made_a_hybrid(tmp_path):
    model = made("distilbert")
    hybrid(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(**PADDED).logits, tmp_path / "logits.pt")
    program = (
        "import sys, torch\n"
        "model, right = (torch.load(each, weights_only=False) for each in sys.argv[1:])\n"
        f"found = model(torch.tensor({IDS.tolist()}), torch.tensor({SEEN.long().tolist()})).logits\n"
        "torch.testing.assert_close(found, right)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_decoder_is_refused_and_left_as_it_is():
    model = made("bert", is_decoder=True)
    with pytest.raises(ValueError, match="which are not causal"):
        hybrid(model)
    assert layers_of(model)[0].config is model.config
    with pytest.raises(ValueError, match="which are not causal"):
        hybrid(made("distilbert"), causal=True)


def test_a_hybrid_trains_and_compiles_to_one_graph():
    torch._dynamo.reset()
    model = made("distilbert")
    hybrid(model, [0])
    block, x = model.distilbert.transformer.layer[0], torch.randn(2, 9, 32, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    mask = SEEN[:, None, None].repeat(1, 1, 9, 1)
    torch.testing.assert_close(compiled(x, attention_mask=mask), block(x, attention_mask=mask), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="masks of padding only"):
        compiled(x, attention_mask=mask.tril())
    model.train()(**PADDED, labels=torch.tensor([0, 1])).loss.backward()
    assert all(each.grad is not None for each in model.parameters())


class Elsewhere:
    """A mask on a GPU, of which it becomes known later whether its rows are the same."""

    is_cuda, is_meta, device = True, False, None

    def __init__(self, same):
        self.same, self.known = same, []

    def __eq__(self, other):
        return self

    def __getitem__(self, which):
        return self

    def all(self):
        return self

    def to(self, device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        return self

    def __bool__(self):
        self.known.append(True)
        return self.same


class Event:
    passed = False

    def record(self, stream):
        pass

    def query(self):
        return self.passed

    def synchronize(self):
        pass


def test_only_the_first_mask_of_a_program_on_a_gpu_is_waited_for(monkeypatch):
    for name, value in (("Event", Event), ("current_stream", lambda device: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    rows, first, masks = hybrids._Rows(), Elsewhere(True), [Elsewhere(True) for _ in range(30)]
    rows.check(first)
    assert first.known
    for mask in masks:
        rows.check(mask)
        assert not mask.known
    assert [bool(mask.known) for mask in masks] == [True] * (30 - hybrids._PENDING) + [False] * hybrids._PENDING
    wrong = Elsewhere(False)
    rows.check(wrong)
    monkeypatch.setattr(Event, "passed", True)
    with pytest.raises(ValueError, match="masks of padding only"):
        rows.check(Elsewhere(True))
    rows.check(Elsewhere(True))
    with pytest.raises(ValueError, match="masks of padding only"):
        hybrids._Rows().check(wrong)
    assert pickle.loads(pickle.dumps(rows))._first


@pytest.mark.parametrize(
    "make", [lambda seen: seen, lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)]
)
def test_layers_ask_a_mask_once_and_it_goes_when_the_program_lets_it_go(make):
    mask = make(torch.rand(2, 1, 1, 5).gt(0.5).repeat(1, 1, 5, 1))
    rows = hybrids._Rows()
    first, gone = hybrids._padding(mask, rows), weakref.ref(mask)
    assert hybrids._padding(mask, rows) is first
    mask.copy_(mask.clone())
    assert hybrids._padding(mask, rows) is not first
    gc.disable()
    try:
        del mask
        assert gone() is None
    finally:
        gc.enable()
