"""Packed sequences beyond what holds for every family: any lengths, no cross-talk, other configs, layouts, errors.

Without a GPU kernels run in Triton's interpreter. Where a test names no tolerance the rule is `Case.judge`'s: at most
twice PyTorch's error in the same dtype against the fp32 truth, in maximum and RMS, plus half a rounding step.
"""

import itertools

import pytest
import torch
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import tilebook
from tilebook import dispatch, source
from tilebook.kernels.attention.form import form
from tilebook.kernels.attention.triton import columns, forward
from tilebook.kernels.varlen import eager, ops
from tilebook.kernels.varlen.ops import attention_varlen_bwd, attention_varlen_fwd
from tilebook.kernels.varlen.problem import BackwardProblem, ForwardProblem
from tilebook.op import Config
from tilebook.tuner.judge.verify import Case, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"rtol": 2e-2, "atol": 1e-2}  # fp16 and bf16 results of a few dozen numbers of size 1
EXAMPLES = list(zip(ForwardProblem.examples(), BackwardProblem.examples(), strict=True))

FORWARD = Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2, HEADS=2, DESCRIPTORS=0)
BACKWARD = Config(
    BLOCK_M1=32, BLOCK_N1=32, num_warps1=4, num_stages1=2, BLOCK_M2=32, BLOCK_N2=64, num_warps2=4, num_stages2=1,
    HEADS=2, DESCRIPTORS=0,
)  # fmt: skip
CONFIGS = {
    "pointers": (FORWARD, BACKWARD),
    "descriptors": (FORWARD.replace(DESCRIPTORS=1), BACKWARD.replace(DESCRIPTORS=1)),
    "wide": (
        FORWARD.replace(BLOCK_M=128, BLOCK_N=64, HEADS=1),
        BACKWARD.replace(BLOCK_M1=64, BLOCK_N1=64, BLOCK_M2=64, BLOCK_N2=32, HEADS=1),
    ),
}
both_loads = pytest.mark.parametrize("configs", [CONFIGS["pointers"], CONFIGS["descriptors"]], ids=["pointers", "tma"])


def _tensors(*shapes, dtype=torch.bfloat16, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(DEVICE, dtype) for shape in shapes]


def _ends(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def _run(configs, do, q, k, v, cu_q, cu_k, form, scale):
    """o, lse, dq, dk and dv by our kernels."""
    rest = cu_q, cu_k, len(q), len(k), form, scale
    o, lse = attention_varlen_fwd.tunable(q, k, v, *rest, config=configs[0])
    return o, lse, *attention_varlen_bwd.tunable(do, q, k, v, o, lse, *rest, config=configs[1])


def _exact(q, k, v, lengths_q, lengths_k, form, scale):
    """The definition, a sequence at a time in fp64; differentiable."""
    group = q.shape[1] // k.shape[1]
    parts, statistics = [], []
    for q_b, k_b, v_b in zip(*(x.split(n) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True):
        n_q, n_k = len(q_b), len(k_b)
        s = torch.einsum("ihd,jhd->hij", q_b, k_b.repeat_interleave(group, 1)) * scale
        s = form.softcap * torch.tanh(s / form.softcap) if form.softcap else s
        column = torch.arange(n_k, device=q.device) - (n_k - n_q if form.bottom_right else 0)
        distance = column - torch.arange(n_q, device=q.device)[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if form.left >= 0:
            seen &= distance >= -form.left
        if form.right >= 0:
            seen &= distance <= form.right
        statistics.append(s.detach().masked_fill(~seen, -torch.inf).logsumexp(-1))
        p = torch.softmax(s.masked_fill(~seen, -1e30), -1) * seen  # a row that sees nothing is 0
        parts.append(torch.einsum("hij,jhd->ihd", p, v_b.repeat_interleave(group, 1)))
    return torch.cat(parts), torch.cat(statistics, -1)


def _with_gradients(do, q, k, v, *rest):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o, lse = _exact(q, k, v, *rest)
    return o.detach(), lse, *torch.autograd.grad(o, (q, k, v), do.double())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("problems", EXAMPLES[1::3], ids=lambda pair: pair[0].label)
def test_packs_with_empty_sequences_are_right_with_other_configs(problems, configs):
    """With a seed other than 0 a sequence has no queries, another no keys, and rows lie behind the last one."""
    for op, problem, config in zip((attention_varlen_fwd, attention_varlen_bwd), problems, configs, strict=True):
        wide = problem.even.exact  # such products read their operands through registers
        verify(op.tunable, config.replace(DESCRIPTORS=0) if wide else config, [Case.make(op, problem, DEVICE, 1)], 0)


FORMS = [
    form(),
    form(right=0, bottom_right=True),
    form(right=0),
    form(left=9, right=0, bottom_right=True),
    form(left=20, right=5),
    form(left=3, bottom_right=True, softcap=1.5),
]


@settings(max_examples=examples(8), deadline=None, derandomize=True)
@given(data=st.data())
def test_kernels_and_reference_agree_with_the_definition_for_any_lengths(data):
    draw = data.draw
    count = draw(st.integers(1, 5))
    lengths_q, lengths_k = (draw(st.lists(st.integers(0, 45), min_size=count, max_size=count)) for _ in range(2))
    lengths_q, lengths_k = ([*lengths, draw(st.integers(0, 3)) + 1] for lengths in (lengths_q, lengths_k))
    heads_kv, group, width = draw(st.integers(1, 2)), draw(st.integers(1, 2)), 8 * draw(st.integers(2, 5))
    asked, scale = draw(st.sampled_from(FORMS)), draw(st.sampled_from([0.1, 0.3]))
    configs = draw(st.sampled_from(list(CONFIGS.values())))
    query, key = (sum(lengths_q), heads_kv * group, width), (sum(lengths_k), heads_kv, width)
    do, q, k, v = _tensors(query, query, key, key, dtype=torch.float16)
    cu_q, cu_k = _ends(lengths_q), _ends(lengths_k)
    expected = _with_gradients(do, q, k, v, lengths_q, lengths_k, asked, scale)
    rest = cu_q, cu_k, 64, 64, asked, scale
    o, lse = attention_varlen_fwd.reference(q, k, v, *rest)
    reference = o, lse, *attention_varlen_bwd.reference(do, q, k, v, o, lse, *rest)
    for found in (reference, _run(configs, do, q, k, v, cu_q, cu_k, asked, scale)):
        for name, got, right in zip(("o", "lse", "dq", "dk", "dv"), found, expected, strict=True):
            torch.testing.assert_close(got.double(), right, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.sampled(4)
@both_loads
@pytest.mark.parametrize("asked", FORMS[:4], ids=["full", "causal", "top left", "window"])
def test_nothing_of_a_neighbour_enters_a_sequence(asked, configs):
    """NaN or infinity in all other sequences and behind the last one change no bit of a sequence."""
    lengths_q, lengths_k = [33, 40, 1, 70], [40, 33, 65, 20]
    query, key = (150, 2, 32), (165, 1, 32)
    clean = _tensors(query, query, key, key)
    cu_q, cu_k = _ends(lengths_q), _ends(lengths_k)
    expected = _run(configs, *clean, cu_q, cu_k, asked, 0.2)
    assert all(x[: cu_k[-1] if x.shape == key else cu_q[-1]].isfinite().all() for x in (expected[0], *expected[2:]))
    for b, bad in ((1, torch.nan), (3, torch.inf)):
        rows, columns = (slice(*ends[b : b + 2].tolist()) for ends in (cu_q, cu_k))
        dirty = [torch.full_like(x, bad) for x in clean]
        for x, whole, part in zip(dirty, clean, (rows, rows, columns, columns), strict=True):
            x[part] = whole[part]
        found = _run(configs, *dirty, cu_q, cu_k, asked, 0.2)
        assert torch.equal(found[1][:, rows], expected[1][:, rows])
        results = zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True)
        for (got, right), part in zip(results, (rows, rows, columns, columns), strict=True):
            assert torch.equal(got[part], right[part])


@both_loads
def test_rows_without_keys_and_rows_behind_the_last_sequence_are_zero(configs):
    lengths_q, lengths_k = [20, 5, 0, 40], [30, 0, 7, 40]
    do, q, k, v = _tensors((90, 2, 16), (90, 2, 16), (100, 2, 16), (100, 2, 16))
    for x in (do, q):
        x[65:] = torch.nan
    for x in (k, v):
        x[77:] = torch.inf
    o, lse, dq, dk, dv = _run(configs, do, q, k, v, _ends(lengths_q), _ends(lengths_k), form(), 0.2)
    for part in (slice(20, 25), slice(65, 90)):  # no keys; no sequence
        assert (o[part] == 0).all()
        assert (dq[part] == 0).all()
        assert (lse[:, part] == -torch.inf).all()
    for part in (slice(30, 37), slice(77, 100)):  # no queries; no sequence
        assert (dk[part] == 0).all()
        assert (dv[part] == 0).all()
    assert lse[:, :20].isfinite().all()
    assert (dk[:30] != 0).any()


@pytest.mark.sampled(2)
@both_loads
def test_more_sequences_than_a_program_looks_at_together(configs):
    """And every length around the size of a block."""
    lengths = [1, 0, 2, 3] * 35 + [31, 32, 33, 63, 64, 65]
    total = sum(lengths)
    do, q, k, v = _tensors(*[(total, 1, 16)] * 4, dtype=torch.float16)
    found = _run(configs, do, q, k, v, _ends(lengths), _ends(lengths), FORMS[1], 0.25)
    for got, right in zip(found, _with_gradients(do, q, k, v, lengths, lengths, FORMS[1], 0.25), strict=True):
        torch.testing.assert_close(got.double(), right, **TOLERANCE)


def test_lengths_out_of_range_are_held_to_what_the_tensors_have():
    do, q, k, v = _tensors(*[(70, 2, 16)] * 4)
    wild = torch.tensor([-5, 30, 1000, 2000], dtype=torch.int32, device=DEVICE)
    held = torch.tensor([0, 30, 70, 70], dtype=torch.int32, device=DEVICE)
    for configs in CONFIGS.values():
        found, expected = (_run(configs, do, q, k, v, ends, ends, FORMS[1], 0.2) for ends in (wild, held))
        assert all(torch.equal(got, right) for got, right in zip(found, expected, strict=True))


@both_loads
def test_any_strides_will_do(configs):
    """q, k and v cut from one tensor, as a projection makes them; a gradient and cu_seqlens with gaps."""
    lengths = [17, 40, 8]
    (packed,), (wide,) = _tensors((65, 3, 2, 32)), _tensors((65, 2, 2, 32), seed=1)
    q, k, v, do = *packed.unbind(1), wide[:, 0]
    ends = torch.stack([_ends(lengths), _ends([0, 0, 0])], 1)[:, 0]
    found = _run(configs, do, q, k, v, ends, ends, FORMS[1], 0.2)
    dense = [x.contiguous() for x in (do, q, k, v, ends, ends)]
    for got, right in zip(found, _run(configs, *dense, FORMS[1], 0.2), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("causal", [False, True, "bottom_right", "top_left"])
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_the_public_function_and_its_gradients(implementation, causal):
    lengths_q, lengths_k = [20, 0, 33, 7], [33, 5, 20, 0]
    do, q, k, v = _tensors((60, 4, 32), (60, 4, 32), (58, 2, 32), (58, 2, 32))
    asked = form(right=0 if causal else -1, bottom_right=causal != "top_left")
    expected = _with_gradients(do, q, k, v, lengths_q, lengths_k, asked, 32**-0.5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with dispatch.use(implementation):
        o, lse = tilebook.attention_varlen(
            *leaves,
            _ends(lengths_q),
            _ends(lengths_k),
            max_seqlen_q=33,
            max_seqlen_k=33,
            causal=causal,
            return_lse=True,
        )
        o.backward(do)
    assert (o.dtype, lse.dtype, lse.requires_grad) == (torch.bfloat16, torch.float32, False)
    for got, right in zip((o, lse, *(x.grad for x in leaves)), expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=2e-2, atol=4e-2)


def test_statistics_of_a_sequence_reach_pytorch_in_one_piece():
    """Its FlashAttention-2 reads the log-sum-exp by address, as if there were no strides."""
    do, q, k, v, o = _tensors(*[(12, 3, 16)] * 5)
    lse, ends, seen = torch.arange(36.0, device=DEVICE).view(3, 12), _ends([5, 0, 7]), []

    def attend(do, q, k, v, o, lse, form, scale):
        seen.append(lse.as_strided(lse.shape, torch.empty(lse.shape).stride()).clone())
        return q, k, v

    eager.backward(attend, do, q, k, v, o, lse, ends, ends, form(), 1.0)
    assert [x.tolist() for x in seen] == [lse[None, :, :5].tolist(), lse[None, :, 5:].tolist()]


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_options_reach_the_kernels(implementation):
    lengths = [30, 41]
    q, k, v = _tensors(*[(71, 2, 16)] * 3)
    asked = form(left=7, right=2, bottom_right=True, softcap=2.0)
    ends = _ends(lengths)
    with dispatch.use(implementation):
        o = tilebook.attention_varlen(
            q, k, v, ends, ends, max_seqlen_q=41, max_seqlen_k=41, window=(7, 2), softcap=2.0, scale=0.5
        )
    expected, _ = _exact(*(x.double() for x in (q, k, v)), lengths, lengths, asked, 0.5)
    torch.testing.assert_close(o.double(), expected, rtol=2e-2, atol=4e-2)


def test_a_gradient_without_strides_is_taken():
    q, k, v = (x.requires_grad_() for x in _tensors(*[(40, 2, 32)] * 3))
    with dispatch.use("triton"):
        o = tilebook.attention_varlen(q, k, v, _ends([15, 25]), _ends([15, 25]), max_seqlen_q=25, max_seqlen_k=25)
        o.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize(
    ("total_q", "total_k", "lengths_q", "lengths_k", "width", "dtype"),
    [
        (5, 5, [2, 3], [2, 3], 20, torch.bfloat16),
        (5, 5, [2, 3], [2, 3], 32, torch.float64),
        (0, 5, [0, 0], [2, 3], 32, torch.bfloat16),
        (5, 0, [2, 3], [0, 0], 32, torch.bfloat16),
        (5, 5, [], [], 32, torch.bfloat16),
    ],
    ids=["odd head dimension", "fp64", "no queries", "no keys", "no sequences"],
)
def test_what_our_kernels_do_not_serve_goes_to_pytorch(total_q, total_k, lengths_q, lengths_k, width, dtype):
    q, k, v = (x.requires_grad_() for x in _tensors((total_q, 2, width), *[(total_k, 2, width)] * 2, dtype=dtype))
    with dispatch.use("triton"):
        o, lse = tilebook.attention_varlen(
            q, k, v, _ends(lengths_q), _ends(lengths_k), max_seqlen_q=3, max_seqlen_k=3, return_lse=True
        )
        o.sum().backward()
    if lengths_q:
        expected, _ = _exact(*(x.detach().double() for x in (q, k, v)), lengths_q, lengths_k, form(), width**-0.5)
    else:
        expected = torch.zeros_like(o).double()
    torch.testing.assert_close(o.double(), expected, **TOLERANCE)
    assert (o.dtype, lse.shape) == (dtype, (2, total_q))
    assert all(x.grad.shape == x.shape for x in (q, k, v))


def _call(shapes=((5, 4, 32), (5, 2, 32), (5, 2, 32)), ends=(0, 2, 5), ends_k=None, dtype=torch.bfloat16, **options):
    q, k, v = _tensors(*shapes, dtype=dtype)
    cu_q, cu_k = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (ends, ends_k or ends))
    return tilebook.attention_varlen(q, k, v, cu_q, cu_k, **{"max_seqlen_q": 3, "max_seqlen_k": 3, **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shapes": [(5, 32)] * 3}, r"shape \(tokens, heads, head dimension\)"),
        ({"shapes": [(5, 4, 32), (5, 2, 32), (4, 2, 32)]}, "k and v must have the same shape"),
        ({"shapes": [(5, 4, 32), (5, 2, 16), (5, 2, 16)]}, "same head dimension"),
        ({"shapes": [(5, 4, 32), (5, 3, 32), (5, 3, 32)]}, "heads of q must be a multiple"),
        ({"ends_k": (0, 5)}, r"both have shape \(B \+ 1,\)"),
        ({"ends": ()}, r"both have shape \(B \+ 1,\)"),
        ({"max_seqlen_q": -1}, "max_seqlen_q must be an int and not negative"),
        ({"max_seqlen_k": 2.0}, "max_seqlen_k must be an int"),
        ({"causal": "left"}, "causal must be a bool, 'bottom_right' or 'top_left'"),
        ({"window": (-2, 0)}, "window must be two numbers"),
        ({"softcap": -1.0}, "softcap must not be negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_a_value_error(options, text):
    with pytest.raises(ValueError, match=text):
        _call(**options)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU lengths are not read")
@pytest.mark.parametrize("ends", [(1, 2, 5), (0, 3, 2), (0, 2, 6)])
def test_lengths_on_the_cpu_are_checked(ends):
    with pytest.raises(ValueError, match="must rise from 0 to at most 5"):
        _call(ends=ends)


def test_dtypes_and_devices_that_do_not_go_together_are_value_errors():
    q, k, v = _tensors(*[(5, 2, 32)] * 3)
    ends, lengths = _ends([2, 3]), {"max_seqlen_q": 3, "max_seqlen_k": 3}
    with pytest.raises(ValueError, match=r"one dtype; got torch.bfloat16, torch.float16"):
        tilebook.attention_varlen(q, k.half(), v, ends, ends, **lengths)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be int32, not torch.int64"):
        tilebook.attention_varlen(q, k, v, ends, ends.long(), **lengths)
    with pytest.raises(ValueError, match=r"one device; got .*meta"):
        tilebook.attention_varlen(q, k, v.to("meta"), ends, ends, **lengths)


def test_attention_inner_loops_are_part_of_the_digest(monkeypatch):
    """A verdict must not outlive a change of the code that it was measured with."""
    loops = (ops._triton_fwd, forward, "attend"), (ops._triton_bwd, columns, "column_step")
    for implementation, module, loop in loops:
        before = source.digest(implementation.function)
        monkeypatch.setattr(module, loop, module.store_tile)
        assert source.digest(implementation.function) != before
