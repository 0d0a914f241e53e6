"""How PyTorch's op of packed sequences is ours: arguments, outputs, which calls are not, and when ours serve at all."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tilebook import dispatch
from tilebook import op as ops
from tilebook.kernels.varlen.standing import STANDINGS
from tilebook.native import plans

FORWARD, BACKWARD = STANDINGS
OP = ops.get("attention_varlen_fwd")
LENGTHS = 5, 0, 12, 7


def _asked(forward, backward):
    """Are they ours?"""
    return [FORWARD.posed(forward) is not None, BACKWARD.posed(backward) is not None]


def _ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _arguments(lengths=LENGTHS, lengths_k=None, heads=(4, 2), causal=False, scale=None, window=(-1, -1), strided=False):
    """(forward's, backward's) as `varlen_attn` gives them, with what it would have kept, and the truth in fp32."""
    lengths_k = lengths_k or lengths
    sizes = [(sum(n), h, 16) for n, h in ((lengths, heads[0]), (lengths_k, heads[1]), (lengths_k, heads[1]))]
    q, k, v = (torch.randn(n, 2 * h, d)[:, ::2] if strided else torch.randn(n, h, d) for n, h, d in sizes)
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    outputs, statistics = [], []
    for rows, keys, values in zip(wide[0].split(lengths), *(x.split(lengths_k) for x in wide[1:]), strict=True):
        n, m = len(rows), len(keys)
        past = torch.arange(m) - torch.arange(n)[:, None] - (m - n)  # how far right of the diagonal
        left, right = window[0], 0 if causal else window[1]
        seen = torch.ones(n, m, dtype=torch.bool)
        seen &= (past <= right) if right >= 0 else seen
        seen &= (past >= -left) if left >= 0 else seen
        keys, values = (x.repeat_interleave(heads[0] // heads[1], 1).transpose(0, 1) for x in (keys, values))
        scores = rows.transpose(0, 1) @ keys.mT * (16**-0.5 if scale is None else scale)
        scores = scores.masked_fill(~seen, -torch.inf)
        statistics.append(scores.logsumexp(-1))
        outputs.append((F.softmax(scores, -1).nan_to_num() @ values).transpose(0, 1))
    o, lse = torch.cat(outputs), torch.cat(statistics, 1).detach()
    do = torch.randn_like(q)
    truth = o.detach(), lse, torch.autograd.grad(o, wide, do.float())
    ends, longest = (_ends(lengths), _ends(lengths_k)), (max(lengths), max(lengths_k))
    forward = q, k, v, *ends, *longest, 0.0, causal, False, scale, *window, None, None
    seed = torch.empty(2, dtype=torch.uint64)
    backward = do, q, k, v, o.detach().to(q.dtype), lse, *ends, *longest, 0.0, causal, seed, seed, scale, *window
    return forward, backward, truth


CASES = {
    "full": {},
    "causal": {"causal": True, "window": (-1, 0)},
    "a window": {"window": (3, 0)},
    "both sides": {"window": (2, 4)},
    "longer keys": {"lengths_k": (9, 4, 12, 20), "causal": True},
    "a scale": {"scale": 0.3},
    "as many heads": {"heads": (3, 3)},
    "strided": {"strided": True, "causal": True},
}


@pytest.mark.parametrize("case", CASES)
def test_ours_is_the_op_it_stands_for(case):
    forward, backward, (o, lse, grads) = _arguments(**CASES[case])
    for it, args, wanted in ((FORWARD, forward, (o, lse)), (BACKWARD, backward, grads)):
        posed, outputs = it.posed(args), it.outputs(args)
        found = it.op().reference(*posed)
        made = [each for each in outputs if isinstance(each, plans.Ours)]
        for mine, right, output in zip(found, wanted, made, strict=True):
            torch.testing.assert_close(mine.float(), right, rtol=0.02, atol=0.05)
            assert tuple(mine.shape) == output.shape
        assert len(it.places) == len(posed)
        for mine, theirs in zip(posed, it.places, strict=True):
            assert theirs is None or mine.shape == args[theirs].shape
            assert theirs is None or case == "strided" or mine.data_ptr() == args[theirs].data_ptr()


def test_outputs_are_those_of_pytorchs_schema():
    forward, backward, _ = _arguments()
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in forward]
    names = "scale", "window_size_left", "window_size_right", "seqused_k", "alibi_slopes"
    there = torch.ops.aten._flash_attention_forward(*meta[:10], **dict(zip(names, meta[10:], strict=True)))
    for each, output in zip(there, FORWARD.outputs(forward), strict=True):
        assert tuple(each.shape) == output.shape
        assert not isinstance(output, plans.Ours) or each.stride() == output.strides
        assert not isinstance(output, plans.Empty) or each.dtype == output.dtype
    schema = torch.ops.aten._flash_attention_forward.default._schema
    told = [each.name for each in schema.arguments][:13]
    assert told == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask", "scale", "window_size_left", "window_size_right",
    ]  # fmt: skip
    schema = torch.ops.aten._flash_attention_backward.default._schema
    assert [each.name for each in schema.arguments] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
        "dropout_p", "is_causal", "rng_state", "unused", "scale", "window_size_left", "window_size_right",
    ]  # fmt: skip
    assert len(BACKWARD.outputs(backward)) == len(schema.returns) == 3


def test_what_ours_does_not_do_is_pytorchs():
    forward, backward, _ = _arguments()
    assert _asked(forward, backward) == [True, True]

    def but(args, **places):
        args = list(args)
        for place, value in places.items():
            args[int(place[1:])] = value
        return tuple(args)

    dense = torch.randn(2, 8, 4, 16, dtype=torch.bfloat16)
    slopes, none = torch.ones(4), torch.empty(0, 4, 16, dtype=torch.bfloat16)
    for place, value in (
        (7, 0.1), (9, True), (13, forward[3]), (14, slopes), (10, 0.0), (10, -1.0), (3, forward[3].long()),
        (3, forward[3][:-1]), (0, forward[0].float()), (0, none), (0, torch.randn(24, 3, 16).to(torch.bfloat16)),
        (1, forward[1][:-1]),
    ):  # fmt: skip
        assert FORWARD.posed(but(forward, **{f"p{place}": value})) is None, place
    assert (
        FORWARD.posed((dense, dense, dense, None, None, 8, 8, *forward[7:])) is None
    )  # as PyTorch's own SDPA calls it
    assert BACKWARD.posed((dense, dense, dense, dense, dense, dense, None, None, 8, 8, *backward[10:])) is None
    for place, value in ((10, 0.1), (5, backward[5].half()), (5, backward[5].mT), (0, backward[0].float())):
        assert BACKWARD.posed(but(backward, **{f"p{place}": value})) is None, place
    torch.use_deterministic_algorithms(True)
    try:
        assert _asked(forward, backward) == [False, False]
    finally:
        torch.use_deterministic_algorithms(False)


def test_who_has_put_another_kernel_there_gets_it(monkeypatch):
    for name, served in (("FA4", False), ("tilebook", True), (None, True)):
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda name=name: name, raising=False)
        assert _asked(*_arguments()[:2]) == [served] * 2


def _choice(ours_ms, theirs_ms, native=False):
    finalists = [SimpleNamespace(implementation="triton", time_ms=ours_ms, config={})]
    if theirs_ms:
        finalists.append(SimpleNamespace(implementation="flash_attention_2", time_ms=theirs_ms, config={}))
    verdict = SimpleNamespace(measured=True, finalists=finalists) if ours_ms else None
    ours = SimpleNamespace(name="triton", op=OP)
    return SimpleNamespace(native=native, verdict=verdict, implementation=ours, source="exact")


def _near(text, of="B32,H16,T16384,S2048,D64"):
    """A choice for a problem by the verdict on another."""
    found = _choice(1.0, 1.5)
    found.source, found.problem = "nearest", OP.problem.parse(text, "bf16")
    found.verdict.problem = OP.problem.parse(of, "bf16").key
    return found


FASTER, SLOWER, UNKNOWN = _choice(1.0, 1.5), _choice(1.0, 0.9), _choice(None, None)


@pytest.mark.parametrize(
    ("forward", "backward", "served"),
    [
        (FASTER, FASTER, True),
        (SLOWER, FASTER, False),
        (FASTER, SLOWER, False),
        (UNKNOWN, UNKNOWN, False),
        (_choice(1.0, None), FASTER, False),
        (_choice(1.0, 1.5, native=True), FASTER, False),
        (_near("B16,H16,T12000,S2048,D64"), FASTER, True),
        (_near("B64,H16,T65536,S4096,D64"), FASTER, True),
        (_near("B4,H16,T1024,S512,D64"), FASTER, False),
    ],
)
def test_ours_serve_where_they_were_measured_as_faster_both_ways(monkeypatch, forward, backward, served):
    monkeypatch.setattr(dispatch, "backward_of", lambda choice: backward)
    assert FORWARD.serves(forward) is served
    assert BACKWARD.serves(backward) is (backward is FASTER)


def test_packs_that_are_asked_for_by_name_run_ours(monkeypatch):
    monkeypatch.setattr(dispatch, "backward_of", lambda choice: UNKNOWN)
    assert not FORWARD.serves(UNKNOWN)
    with dispatch.use("triton"):
        assert FORWARD.serves(UNKNOWN)
        assert BACKWARD.serves(UNKNOWN)
        assert not BACKWARD.serves(_choice(None, None, native=True))


def test_calls_as_long_as_attentions_are_worth_asking_about_each_time():
    for lengths, long in (([512] * 16, False), ([65536], True)):
        q = torch.empty(1, 1, 1).expand(sum(lengths), 4, 64)
        assert FORWARD.long((q, q, q, _ends(lengths), None)) is long
        assert BACKWARD.long((q, q, q, q, q, q, _ends(lengths))) is long
