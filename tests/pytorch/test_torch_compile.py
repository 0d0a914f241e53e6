"""A compiled or exported program has our op whole in its graph, for any lengths, and its gradients."""

import subprocess
import sys

import pytest
import torch
from op_samples import OPS, data, ends, ints, normal
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tilebook
from tilebook import dispatch


def self_attention(heads_kv=4, **how):
    def call(q, k):
        return tilebook.attention(q, k, k * 2, **how)

    return call, lambda n, make: (make(2, 4, n, 16), make(2, heads_kv, n, 16))


def biased(q, k, bias):
    return tilebook.attention(q, k, k * 2, bias=bias, causal=True)


def with_lse(q, k):
    o, lse = tilebook.attention(q, k, k * 2, return_lse=True)
    return o * 2 + lse[..., None].detach()


def packed(q, k, rows, columns):
    most = q.shape[0]
    return tilebook.attention_varlen(q, k, k * 2, rows, columns, max_seqlen_q=most, max_seqlen_k=most, causal=True)


def decoded(q, k, lengths):
    return tilebook.attention_decode(q, k, k * 2, seq_lens=lengths)


CALLS = {
    "attention": self_attention(),
    "attention, causal": self_attention(2, causal=True),
    "attention, window": self_attention(causal=True, window=(3, 0)),
    "attention, soft-cap": self_attention(softcap=2.0),
    "attention, bias": (biased, lambda n, make: (make(2, 4, n, 16), make(2, 4, n, 16), make(1, 4, n, n))),
    "attention, log-sum-exp": (with_lse, lambda n, make: (make(2, 4, n, 16), make(2, 4, n, 16))),
    "packed": (packed, lambda n, make: (make(n, 4, 16), make(n, 2, 16), ends(2, n), ends(2, n))),
    "decode": (decoded, lambda n, make: (data(2, 4, 2, 16), data(2, 2, n, 16), ints(2, n))),
}


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compare(found, call, args):
    """Results, and gradients where they are wanted."""
    y, expected = found(*args), call(*args)
    torch.testing.assert_close(y, expected)
    inputs = [x for x in args if x.requires_grad]
    if inputs:
        dy = torch.randn_like(y)
        for got, right in zip(
            torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
        ):
            torch.testing.assert_close(got, right)


def targets(counter):
    """What the compiled graphs call."""
    return [node.target for graph in counter.graphs for node in graph.graph.nodes]


HOW = [(normal, True), (normal, False), (data, True), (data, False)]
"""With gradients or without, of any length or of each: all four of one attention and of packs, two of the others."""


@pytest.mark.sampled(6)
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    ("name", "make", "dynamic"),
    [(name, *how) for name in CALLS for how in (HOW if name in ("attention", "packed") else HOW[::3])],
)
def test_compiled_calls_and_their_gradients_are_right(name, dynamic, make):
    call, args = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (6, 9):
        compare(compiled, call, args(n, make))


@pytest.mark.sampled(6)
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("name", "make"), [*[(name, normal) for name in CALLS], ("attention", data), ("packed", data)])
def test_twenty_lengths_are_one_compilation(name, make):
    call, args = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    compiled(*args(6, make))
    once = counter.frame_count  # dynamo may begin again before it is done
    for n in range(7, 26):
        compiled(*args(n, make))
    assert counter.frame_count == once
    assert any("tilebook" in str(target) for target in targets(counter))


@pytest.mark.parametrize("training", [False, True])
def test_what_is_compiled_for_the_cpu_is_pytorchs_own_code_without_a_break(training):
    q, w = normal(1, 2, 8, 16, grad=training), data(16)
    up, down = data(32, 16), data(16, 32)

    def model(q):
        x = tilebook.rms_norm(tilebook.attention(q, q, q, causal=True), w)
        return tilebook.mlp(x, up, up[:, 0], down, w)

    compare(torch.compile(model, backend="aot_eager", fullgraph=True), model, (q,))


def test_packed_sequences_are_one_op_in_a_graph_for_the_cpu():
    call, args = CALLS["packed"]
    compare(torch.compile(call, backend="aot_eager", fullgraph=True), call, args(9, normal))


@pytest.mark.usefixtures("forced")
def test_layers_and_norms_are_left_to_the_compiler():
    w, up, down = normal(16), normal(32, 16), normal(16, 32)

    def model(x):
        return tilebook.mlp(tilebook.rms_norm(x, w), up, up[:, 0], down, w)

    counter = CompileCounterWithBackend("aot_eager")
    compare(torch.compile(model, backend=counter, fullgraph=True), model, (normal(5, 16),))
    assert torch.nn.functional.linear in targets(counter)
    assert not any("tilebook" in str(target) for target in targets(counter))


@pytest.mark.usefixtures("forced")
def test_a_compiled_call_draws_new_dropout_each_time():
    q = data(1, 2, 32, 16)
    compiled = torch.compile(lambda q: tilebook.attention(q, q, q, dropout_p=0.5), backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(q), compiled(q))


@pytest.mark.usefixtures("forced")
def test_what_is_wrong_with_a_call_is_said_while_it_is_compiled():
    compiled = torch.compile(lambda q, k: tilebook.attention(q, k, k), backend="aot_eager")
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="same batch size"):
        compiled(data(2, 4, 8, 16), data(3, 4, 8, 16))


@pytest.mark.usefixtures("forced")
def test_compiled_autograd_runs_the_backward_op():
    call, args = CALLS["attention, causal"]
    q, k = args(8, normal)
    expected = torch.autograd.grad(call(q, k).square().sum(), (q, k))
    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
        call(q, k).square().sum().backward()
    assert OPS.attention_bwd.default in targets(counter)
    for got, right in zip((q.grad, k.grad), expected, strict=True):
        torch.testing.assert_close(got, right)


# Export


class Model(torch.nn.Module):
    def forward(self, q, rows):
        o = tilebook.attention(q, q, q, causal=True, window=(3, 0))
        flat = o.transpose(1, 2).flatten(0, 1)
        most = flat.shape[0]
        return tilebook.attention_varlen(flat, flat, flat, rows, rows, max_seqlen_q=most, max_seqlen_k=most)


@pytest.mark.long
@pytest.mark.usefixtures("forced")
def test_an_exported_program_runs_in_another_process(tmp_path):
    args = data(2, 4, 6, 16), ends(2, 12)
    program = torch.export.export(Model(), args, dynamic_shapes=({2: torch.export.Dim.DYNAMIC}, {}))
    assert {OPS.attention_fwd.default, OPS.attention_varlen_fwd.default} <= {n.target for n in program.graph.nodes}
    other = data(2, 4, 9, 16), ends(2, 18)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((other, Model()(*other)), tmp_path / "call.pt")
    code = f"""
import torch, tilebook
tilebook.attention, tilebook.attention_varlen  # a program needs its ops
args, expected = torch.load({str(tmp_path / "call.pt")!r})
torch.testing.assert_close(torch.export.load({str(tmp_path / "program.pt2")!r}).module()(*args), expected)
print("right")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr


# Checkpoints


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("saved", [True, False])
def test_a_selective_checkpoint_sees_the_op(saved):
    seen = []

    def policy(ctx, op, *args, **kwargs):
        if op is OPS.attention_fwd.default:
            seen.append(op)
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    ran = []
    call, args = CALLS["attention, causal"]
    q, k = args(8, normal)
    expected = torch.autograd.grad(call(q, k).square().sum(), (q, k))
    real = dispatch.here.lookup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "lookup", lambda op, *rest: ran.append(op.name) or real(op, *rest))
        y = checkpoint(call, q, k, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
        found = torch.autograd.grad(y.square().sum(), (q, k))
    assert seen
    assert ran.count("attention_fwd") == (1 if saved else 2)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "decode"])
def test_checkpoints_are_right(name, reentrant):
    call, args = CALLS[name]
    given = args(7, normal)
    inputs = [x for x in given if x.requires_grad]
    expected = torch.autograd.grad(call(*given).square().sum(), inputs)
    checkpoint(call, *given, use_reentrant=reentrant).square().sum().backward()
    for x, right in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, right)
