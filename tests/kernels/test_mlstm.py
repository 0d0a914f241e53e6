"""mLSTM on the kernels of linear attention: against its formula by pairs of tokens, in fp64."""

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import dispatch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_pairs(q, k, v, input_gate, forget_gate, memory=None, n=None, m=None, *, scale, eps=0.0):
    """xLSTM's parallel form: D_ij = log i_j + Σ_{j<t≤i} log f_t, m_i = max_j D_ij, and a state as one token more."""
    wide = torch.promote_types(q.dtype, torch.float32)
    c = F.logsigmoid(forget_gate.to(wide)).cumsum(-1)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    d = (c[..., :, None] - c[..., None, :] + input_gate.to(wide)[..., None, :]).masked_fill(~seen, -torch.inf)
    top = d.amax(-1)
    first = c + (0.0 if m is None else m.to(wide)[..., None])
    top = torch.maximum(top, first)
    weights = ((q @ k.mT).to(wide) * scale * (d - top[..., None]).exp()).to(q.dtype)
    o, total = (weights @ v).to(wide), weights.to(wide).sum(-1)
    if memory is not None:
        kept = (first - top).exp() * scale
        o = o + (q.to(wide) @ memory.to(wide)) * kept[..., None]
        total = total + (q.to(wide) * n.to(wide)[..., None, :]).sum(-1) * kept
    return (o / (torch.maximum(total.abs(), (-top).exp()) + eps)[..., None]).to(v.dtype)


def token_by_token(q, k, v, input_gate, forget_gate, memory, n, m, *, scale):
    """xLSTM's recurrent form: (o, state)."""
    outputs = []
    for t in range(q.shape[2]):
        log_f, log_i = F.logsigmoid(forget_gate[..., t]), input_gate[..., t]
        top = torch.maximum(log_f + m, log_i)
        kept, written = (log_f + m - top).exp()[..., None], (log_i - top).exp()[..., None]
        key = k[:, :, t] * written
        memory, n, m = memory * kept[..., None] + key[..., None] * v[:, :, t, None], n * kept + key, top
        query = q[:, :, t] * scale
        divisor = torch.maximum((query * n).sum(-1).abs(), (-m).exp())
        outputs.append((query[..., None, :] @ memory)[..., 0, :] / divisor[..., None])
    return torch.stack(outputs, 2), (memory, n, m)


def drawn(n, *, dtype=torch.float32, gates=3.0, state=False, width=16, columns=16, seed=0):
    """q, k, v, gates before their functions, and a state."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, x, generator=source).to(dtype) for x in (width, width, columns))
    i, f = (gates * torch.randn(1, 1, n, generator=source).clamp(-1, 1) for _ in range(2))
    found = [q, k, v, i, f + gates / 2]
    if state:
        found += [torch.randn(1, 1, *shape, generator=source) for shape in ((width, columns), (width,), ())]
    return [x.requires_grad_() for x in found]


def exact(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def memorized(*tensors, scale):
    """o of the public function."""
    state = tensors[5:] or None
    return tilebook.mlstm(*tensors[:5], initial_state=state, scale=scale)


def results(function, tensors, *, dtype=None):
    """o and the gradients of all but m, of which none is right: it changes nothing."""
    o = function(*tensors, scale=0.25)
    above = torch.sin(0.7 * torch.arange(o.numel(), dtype=torch.float64)).view(o.shape).to(dtype or o.dtype)
    return [o, *torch.autograd.grad(o, tensors[:7], above.to(o.dtype))]


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_near(found, right, steps=2e-5):
    for mine, exactly in zip(found, right, strict=True):
        size = exactly.abs().max().item() if exactly.numel() else 0.0
        torch.testing.assert_close(mine.double(), exactly.double(), rtol=0, atol=steps * size + 1e-7)


@pytest.mark.parametrize("gates", [0.5, 3.0, 30.0])
@pytest.mark.parametrize(("n", "state"), [(1, False), (70, True), (131, False)])
def test_in_pytorch_it_is_the_formula_with_all_its_gradients(n, state, gates):
    tensors = exact(drawn(n, gates=gates, state=state))
    assert_near(results(memorized, tensors), results(by_pairs, tensors), 1e-9)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gates", "state"), [(3.0, True), (30.0, False)])
def test_errors_are_at_most_twice_those_of_the_formula_in_the_same_dtype(gates, state, dtype):
    tensors = drawn(34, dtype=dtype, gates=gates, state=state, seed=3)
    with torch.no_grad():  # no divisor is a difference of large numbers
        for x in (*tensors[:2], *tensors[6:7]):
            x.abs_()
    right = results(by_pairs, exact(tensors), dtype=dtype)
    with dispatch.use("triton"):
        found = results(memorized, tensors)
    steps = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    above = torch.sin(0.7 * torch.arange(right[0].numel())).view(right[0].shape)
    sets = [[*each[:4], torch.stack(each[4:6]), *each[6:]] for each in (found, results(by_pairs, tensors), right)]
    for at, (mine, other, exactly) in enumerate(zip(*sets, strict=True)):
        # Those of gates are what tokens say otherwise than all together, which is a rounded number.
        size = max(rms(exactly), rms((right[0] * above).sum(-1)) if at == 4 else 0)
        assert rms(mine - exactly) <= 2 * rms(other - exactly) + steps * size + 1e-9, at


def test_a_sequence_in_two_calls_and_by_steps_is_the_sequence():
    tensors = exact(drawn(30, gates=5.0, state=True))
    rows, state = tensors[:5], tensors[5:]
    right, last = token_by_token(*rows, *state, scale=0.25)
    first, middle = tilebook.mlstm(*(x[:, :, :11] for x in rows), initial_state=state, scale=0.25, return_state=True)
    second, end = tilebook.mlstm(*(x[:, :, 11:] for x in rows), initial_state=middle, scale=0.25, return_state=True)
    both = torch.cat((first, second), 2)
    assert_near((both, *end), (right, *last), 1e-12)
    above = torch.randn_like(right)
    wanted = [*rows, *state[:2]]
    assert_near(torch.autograd.grad(both, wanted, above), torch.autograd.grad(right, wanted, above), 1e-11)
    at, outputs = tuple(x.detach() for x in state), []
    for t in range(30):
        o, at = tilebook.mlstm_step(*(x[:, :, t].detach() for x in rows), at, scale=0.25)
        outputs.append(o)
    assert_near((torch.stack(outputs, 2), *at), (right, *last), 1e-12)


def test_sigmoid_gates_have_no_normalizer():
    q, k, v, i, f, h, _, _ = exact(drawn(40, state=True))
    o, last = tilebook.mlstm(q, k, v, i, f, gate="sigmoid", scale=0.5, initial_state=h, return_state=True)
    right = tilebook.gated_linear_attention(
        q, k * i.sigmoid()[..., None], v, F.logsigmoid(f), scale=0.5, initial_state=h, return_state=True
    )
    assert_near((o, last), right, 1e-12)
    at = h
    for t in range(40):
        one, at = tilebook.mlstm_step(*(x[:, :, t] for x in (q, k, v, i, f)), at, gate="sigmoid", scale=0.5)
        assert_near((one,), (o[:, :, t],), 1e-12)
    assert_near((at,), (last,), 1e-12)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_a_pack_is_its_sequences(gate):
    lengths = [5, 0, 1, 20, 1, 0]
    tensors = exact(drawn(sum(lengths), gates=10.0))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    whole = tilebook.mlstm(*tensors, gate=gate, cu_seqlens=ends)
    parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
    apart = torch.cat([tilebook.mlstm(*part, gate=gate) for part in parts if part[0].shape[2]], 2)
    above = torch.randn_like(whole)
    grads = [torch.autograd.grad(o, tensors, above) for o in (whole, apart)]
    assert_near((whole, *grads[0]), (apart, *grads[1]), 1e-10)
    for more in (
        {"return_state": True},
        {"initial_state": tuple(torch.zeros(1, 1, *x) for x in ((16, 16), (16,), ()))},
    ):
        with pytest.raises(ValueError, match="cu_seqlens goes with neither"):
            tilebook.mlstm(*tensors, cu_seqlens=ends, **more)


def test_gates_of_infinity_write_nothing_and_forget_all():
    q, k, v, i, f = drawn(20)
    with torch.no_grad():
        i[..., 3:9] = -torch.inf
        f[..., 9] = -torch.inf
    found = results(memorized, [q, k, v, i, f])
    assert all(x.isfinite().all() for x in found)
    assert_near(
        found[:1], (torch.cat((found[0][:, :, :9], results(memorized, [x[:, :, 9:] for x in (q, k, v, i, f)])[0]), 2),)
    )


def test_sums_of_fp16_do_not_pass_its_end():
    """Forty thousand tokens that all say the same: their mean does too."""
    n = 40_000
    q = k = v = torch.full((1, 1, n, 1), 2.0, dtype=torch.float16)
    o = tilebook.mlstm(q, k, v, torch.zeros(1, 1, n), torch.full((1, 1, n), 40.0))
    torch.testing.assert_close(o[:, :, -1].float(), torch.full((1, 1, 1), 2.0), rtol=2e-3, atol=0)


def test_nothing_at_all_gives_nothing_and_keeps_the_state():
    state = [torch.randn(2, 2, *x) for x in ((8, 8), (8,), ())]
    q, gate = torch.randn(2, 2, 0, 8), torch.randn(2, 2, 0)
    o, last = tilebook.mlstm(q, q, q, gate, gate, initial_state=state, return_state=True)
    assert o.shape == q.shape
    assert_near(last, state, 0)


def test_it_autocasts():
    tensors = drawn(20)
    with torch.autocast("cpu", torch.bfloat16):
        o = tilebook.mlstm(*tensors)
        grads = torch.autograd.grad(o.sum(), tensors)
    assert o.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 8)}, ValueError, "expected q and k"),
        ({"input_gate": torch.zeros(1, 2, 4)}, ValueError, r"input_gate must be floating point of shape \(1, 2, 5\)"),
        ({"forget_gate": torch.zeros(1, 2, 5).int()}, ValueError, "forget_gate must be floating point"),
        ({"forget_gate": None}, ValueError, "expected a tensor, not NoneType"),
        ({"gate": "relu"}, ValueError, "gate must be exp or sigmoid, not 'relu'"),
        ({"initial_state": torch.zeros(1, 2, 8, 8)}, ValueError, "a state of exp gates has the shapes"),
        (
            {"gate": "sigmoid", "initial_state": [torch.zeros(1, 2, 8, 8)] * 3},
            ValueError,
            "a state of sigmoid gates has the shapes",
        ),
        ({"eps": torch.ones((), requires_grad=True)}, TypeError, "eps must be a number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named(change, error, message):
    gates = dict.fromkeys(("input_gate", "forget_gate"), torch.zeros(1, 2, 5))
    arguments = {**dict.fromkeys("qkv", torch.zeros(1, 2, 5, 8)), **gates}
    with pytest.raises(error, match=message):
        tilebook.mlstm(**arguments | change)
