"""How PyTorch's ops of attention are ours: arguments, outputs, and which calls are not."""

import pytest
import torch
import torch.nn.functional as F

from tilebook.kernels.attention import standing
from tilebook.kernels.attention.standing import STANDINGS
from tilebook.native import plans

BY_NAME = {each.name.removeprefix("aten::_scaled_dot_product_"): each for each in STANDINGS}
BACKENDS = ("cudnn_attention", "flash_attention")


def _drawn(*shape, dtype=torch.bfloat16, transposed=True):
    made = torch.randn(*shape).to(dtype)
    return made.transpose(1, 2).contiguous().transpose(1, 2) if transposed else made


def _arguments(backend, shape=(2, 4, 24, 16), kv=None, causal=False, scale=None, dropout=0.0, bias=None, **drawn):
    """(forward's, backward's) as PyTorch's autograd gives them, with what it would have kept."""
    q = _drawn(*shape, **drawn)
    k, v = (_drawn(*(kv or shape), **drawn) for _ in range(2))
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]}
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    o = F.scaled_dot_product_attention(*wide, is_causal=causal, scale=scale, **grouped)
    seen = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in wide[1:]]
    scores = wide[0] @ seen[0].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    lse, do = scores.logsumexp(-1).detach(), _drawn(*shape, **drawn)
    truth = o, lse, torch.autograd.grad(o, wide, do.float())
    kept, seed = o.detach().to(q.dtype), torch.empty((), dtype=torch.int64)
    lengths = q.shape[2], k.shape[2]
    if backend == "cudnn_attention":
        forward = q, k, v, bias, True, dropout, causal, False, scale
        backward = do, q, k, v, kept, lse[..., None], seed, seed, bias, None, None, *lengths, dropout, causal, scale
    else:
        forward = q, k, v, dropout, causal, False, scale
        backward = do, q, k, v, kept, lse, None, None, *lengths, dropout, causal, seed, seed, scale
    return forward, backward, truth


CASES = {
    "full": {},
    "causal": {"causal": True},
    "grouped": {"kv": (2, 2, 24, 16)},
    "longer keys": {"kv": (2, 4, 40, 16)},
    "a scale": {"scale": 0.3, "causal": True},
    "heads first": {"transposed": False},
    "fp16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ours_is_the_op_it_stands_for(backend, case):
    forward, backward, (o, lse, grads) = _arguments(backend, **CASES[case])
    for args, name, wanted in ((forward, backend, (o, lse)), (backward, f"{backend}_backward", grads)):
        it = BY_NAME[name]
        posed, outputs = it.posed(args), it.outputs(args)
        found = it.op().reference(*posed)
        ours = [each for each in outputs if isinstance(each, plans.Ours)]
        for mine, right, output in zip(found, wanted, ours, strict=True):
            torch.testing.assert_close(mine.float().reshape(right.shape), right, rtol=0.02, atol=0.03)
            assert mine.numel() == torch.Size(output.shape).numel()
        for mine, theirs in zip(posed, it.places, strict=True):
            assert theirs is None or mine.data_ptr() == args[theirs].data_ptr()
        like = args[:1] if name == backend else args[1:4]
        for each, output in zip(like, ours, strict=False):
            assert output[:2] == (tuple(each.shape), torch.empty_like(each).stride())


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_those_of_pytorchs_schema(backend):
    forward, backward, _ = _arguments(backend)
    schema = getattr(torch.ops.aten, f"_scaled_dot_product_{backend}").default._schema
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in forward]
    for each, output in zip(
        getattr(torch.ops.aten, f"_scaled_dot_product_{backend}")(*meta[:-1], scale=meta[-1]),
        BY_NAME[backend].outputs(forward),
        strict=True,
    ):
        if isinstance(output, plans.Ours | plans.Empty):
            assert tuple(each.shape) == output.shape
            assert not isinstance(output, plans.Ours) or each.stride() == output.strides
            assert not isinstance(output, plans.Empty) or each.dtype == output.dtype
        else:
            assert each == output
    assert len(schema.returns) == len(BY_NAME[backend].outputs(forward))
    assert len(BY_NAME[f"{backend}_backward"].outputs(backward)) == 3


def test_statistics_that_nobody_wants_are_not_given():
    (q, k, v, bias, _, *rest), *_ = _arguments("cudnn_attention")
    assert BY_NAME["cudnn_attention"].outputs((q, k, v, bias, False, *rest))[1] is None


NOT_OURS = {
    "dropout": {"dropout": 0.1},
    "fp32": {"dtype": torch.float32},
    "no scale": {"scale": 0.0},
    "a negative scale": {"scale": -0.5},
}


@pytest.mark.parametrize("case", NOT_OURS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_ours_does_not_do_is_pytorchs(backend, case):
    forward, backward, _ = _arguments(backend, **NOT_OURS[case])
    assert BY_NAME[backend].posed(forward) is None
    assert BY_NAME[f"{backend}_backward"].posed(backward) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_causal_mask_of_another_shape_is_pytorchs(backend):
    for args, name in zip(_arguments(backend, kv=(2, 4, 40, 16)), (backend, f"{backend}_backward"), strict=False):
        schema = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default._schema
        place = [each.name for each in schema.arguments].index("is_causal")
        assert BY_NAME[name].posed(args) is not None
        assert BY_NAME[name].posed((*args[:place], True, *args[place + 1 :])) is None


def test_a_mask_a_debugged_call_and_no_rows_are_pytorchs():
    it, (args, backward, _) = BY_NAME["cudnn_attention"], _arguments("cudnn_attention")
    mask = torch.zeros(2, 4, 24, 24, dtype=torch.bfloat16)
    assert it.posed((*args[:3], mask, *args[4:])) is None
    assert it.posed((*args[:7], True, args[8])) is None
    assert it.posed((args[0][:, :, :0], *args[1:])) is None
    it = BY_NAME["cudnn_attention_backward"]
    assert it.posed((*backward[:8], mask, *backward[9:])) is None
    assert it.posed((*backward[:5], None, *backward[6:])) is None
    assert it.posed((backward[0].float(), *backward[1:])) is None


def test_gradients_that_are_expanded_are_copied():
    it, (_, args, _) = BY_NAME["flash_attention_backward"], _arguments("flash_attention")
    do = torch.ones((), dtype=torch.bfloat16).expand(args[0].shape)
    assert it.posed((do, *args[1:]))[0].stride(-1) == 1


@pytest.mark.parametrize(("arch", "own"), [("sm_90", "cudnn"), ("sm_80", "flash")])
def test_only_the_op_that_pytorch_runs_by_itself_is_served(monkeypatch, arch, own):
    class OnGpu:
        is_cuda = True

        def get_device(self):
            return 0

    monkeypatch.setattr(standing.devices, "current", lambda index: type("Gpu", (), {"arch": arch}))
    monkeypatch.setattr(standing, "cudnn_first", lambda arch: arch == "sm_90")
    assert standing._own(OnGpu(), True) is (own == "cudnn")
    assert standing._own(OnGpu(), False) is (own == "flash")


def test_long_calls_are_worth_asking_about_each_time():
    short, long = ((torch.empty(1, 1, 1, 1).expand(2, 4, n, 64),) * 3 for n in (512, 16384))
    for name, more in (("cudnn_attention", ()), ("cudnn_attention_backward", (None,))):
        assert not BY_NAME[name].long((*more, *short))
        assert BY_NAME[name].long((*more, *long))
