"""Masks of transformers whose structure is noted, on a GPU: plain SDPA's numbers, by our kernels, no line changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from programs.compare import assert_as_near
from programs.hf_models import made, step

import tilebook
from tilebook import dispatch, enabling, native
from tilebook.kernels.attention import structure

pytestmark = pytest.mark.gpu

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

SDPA = torch._C._nn.scaled_dot_product_attention
B, H, S, D = 8, 16, 2560, 64  # beyond what the pace of a program decides about


def ours(names):
    """Those of our own kernels."""
    return {name for name in names if name.startswith(("attention_fwd", "attention_bwd"))}


@pytest.fixture(autouse=True, params=["extension", "functions"])
def _on(request, monkeypatch):
    """PyTorch's function stays in its place, before the extension's eyes, or ours stands there."""
    if request.param == "extension" and not native.available():
        pytest.skip("the extension is not built: python -m tilebook.native")
    if request.param == "functions":
        monkeypatch.setattr(native, "available", lambda: False)
        monkeypatch.setattr(enabling._state, "begun", True)
    dispatch.reload()
    with tilebook.enabled():
        yield


def config(**more):
    found = transformers.AutoConfig.for_model("llama", num_attention_heads=2, hidden_size=128)
    found._attn_implementation = "sdpa"
    for key, value in more.items():
        setattr(found, key, value)
    return found


def _kept(right=True):
    lengths = torch.linspace(S // 4, S, B, device="cuda").long()[:, None]
    columns = torch.arange(S, device="cuda")
    return (columns < lengths if right else columns >= S - lengths).long()


def _packed():
    lengths = [S // 2, S // 8, S // 8, S // 4]
    return torch.cat([torch.arange(n, device="cuda") for n in lengths]).expand(B, S)


def masks():
    x = torch.empty(B, S, 1, device="cuda")
    causal, full = masking_utils.create_causal_mask, masking_utils.create_bidirectional_mask
    window = masking_utils.create_sliding_window_causal_mask
    return {
        "causal, padded right": lambda: causal(config(), x, _kept(), None),
        "causal, padded left": lambda: causal(config(), x, _kept(False), None),
        "padded": lambda: full(config(), x, _kept()),
        "window": lambda: window(config(sliding_window=256), x, None, None),
        "window, ones": lambda: window(config(sliding_window=256), x, torch.ones_like(_kept()), None),
        "window, padded": lambda: window(config(sliding_window=256), x, _kept(), None),
        "packed": lambda: causal(config(), x, None, None, position_ids=_packed()),
        "packed window": lambda: window(config(sliding_window=256), x, None, None, position_ids=_packed()),
    }


NAMES = (
    "causal, padded right", "causal, padded left", "padded", "window", "window, ones", "window, padded", "packed",
    "packed window",
)  # fmt: skip


def drawn(dtype=torch.bfloat16, heads=H):
    source = torch.Generator("cuda").manual_seed(0)
    shape = B, S, heads, D
    found = [torch.randn(shape, device="cuda", generator=source).to(dtype).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_() for x in found]


def gradients(tensors, mask, function, count):
    """The result and the gradients of q, k and v, of rows that see something."""
    o = function(*tensors, mask)
    o = o.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return [o, *torch.autograd.grad(o.float().square().sum() / count, tensors)]


def kernels(run):
    for _ in range(4):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_gradients_are_those_of_plain_sdpa(name):
    mask = masks()[name]()
    assert mask.shape == (B, 1, S, S)
    assert structure.notes.of(mask) is not None
    tensors, count = drawn(), float(B * S)
    mine = gradients(tensors, mask, F.scaled_dot_product_attention, count)
    bare = mask.clone()
    theirs = gradients(tensors, bare, SDPA, count)
    right = gradients([x.detach().float().requires_grad_() for x in tensors], bare, SDPA, count)
    assert_as_near(mine, theirs, right, name, blur=4.0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_ours(name, training):
    mask, tensors = masks()[name](), drawn()
    bare = mask.clone()

    def run(which=mask):
        with torch.set_grad_enabled(training):
            o = F.scaled_dot_product_attention(*tensors, which)
            if training:
                torch.autograd.grad(o, tensors, o.detach())

    found = kernels(run)
    if name != "padded":  # which is dispatch's to decide
        assert ours(found), found
        assert not any("cudnn" in each or "fmha" in each for each in found), found
    assert not ours(kernels(lambda: run(bare)))
    mask[:, :, 1:, 0] = True
    assert not ours(kernels(run))


def test_autocast_and_checkpointing_of_a_model(monkeypatch):
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 1024}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": S}
    model = made("llama", attention="sdpa", **sizes).cuda().train()
    ids = torch.randint(3, 99, (B, S), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    given, found = {"input_ids": ids, "attention_mask": _kept(), "use_cache": False}, {}
    for how in ("theirs", "ours", "again"):
        with monkeypatch.context() as patch, torch.autocast("cuda", torch.bfloat16):
            if how == "theirs":
                patch.setattr(structure.notes, "put", lambda *_: None)
            if how == "again":
                model.gradient_checkpointing_enable({"use_reentrant": False})
            found[how] = step(model, given)
    right = step(copy.deepcopy(model), given)
    for how in ("ours", "again"):
        assert_as_near(found[how], found["theirs"], right, how, blur=4.0)


@pytest.mark.parametrize("rows", [1, 7])
def test_small_calls_are_pytorchs(rows):
    """As when tokens are generated: the host bounds them."""
    x = torch.empty(2, rows, 1, device="cuda")
    keep = torch.ones(2, rows, device="cuda", dtype=torch.long)
    keep[1, 0] = 0
    mask = masking_utils.create_causal_mask(config(), x, keep, None)
    q, k, v = (torch.randn(2, 2, rows, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        assert not ours(kernels(lambda: F.scaled_dot_product_attention(q, k, v, mask)))


def test_a_graph_that_is_captured_reads_the_mask():
    mask, tensors = masks()["causal, padded right"](), [x.detach() for x in drawn(heads=2)]
    F.scaled_dot_product_attention(*tensors, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = F.scaled_dot_product_attention(*tensors, mask)
    graph.replay()
    seen = mask.any(-1, keepdim=True)
    right = SDPA(*tensors, mask.clone())
    torch.testing.assert_close(o.masked_fill(~seen, 0), right.masked_fill(~seen, 0))


def test_streams_do_not_share_what_is_found():
    mask, tensors = masks()["causal, padded right"](), [x.detach() for x in drawn()]
    right, other = F.scaled_dot_product_attention(*tensors, mask), torch.cuda.Stream()
    note = structure.notes.of(mask)
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        found = F.scaled_dot_product_attention(*tensors, mask)
    other.synchronize()
    assert len(note._found) == 2
    assert torch.equal(found, right)
