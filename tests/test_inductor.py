"""PyTorch's compiler as an implementation. Here its tracer runs, and once Inductor itself, for the CPU."""

import shutil

import pytest
import torch

from tilebook import device as devices
from tilebook import dispatch, inductor
from tilebook import op as ops
from tilebook.dispatch.choice import Choice
from tilebook.errors import TilebookError
from tilebook.tuner.judge.verify import Case, verify

OPS = [each for each in ops.ops().values() if inductor.NAME in each.implementations]
NAMES = {
    *("layer_norm_fwd", "layer_norm_bwd", "rms_norm_fwd", "rms_norm_bwd"),
    *("cross_entropy_fwd", "cross_entropy_bwd"),
    *("mlp_up_fwd", "mlp_down_fwd", "mlp_act_bwd", "mlp_grads_bwd"),
    *("glu_fwd", "glu_bwd", "rope_fwd", "rope_bwd"),
    "linear_attention_fwd",
    *("add_layer_norm_fwd", "add_layer_norm_bwd", "add_rms_norm_fwd", "add_rms_norm_bwd"),
}


@pytest.fixture
def traced(monkeypatch):
    """Graphs are run by PyTorch's own operators, as Inductor would take seconds for each."""
    monkeypatch.setattr(inductor, "_how", lambda: {"fullgraph": True, "dynamic": False, "backend": "eager"})


def test_families_that_a_compiler_fuses_have_it():
    assert {each.name for each in OPS} == NAMES


@pytest.mark.sampled(6)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_it_computes_what_the_op_does_in_one_graph(op, traced):
    for problem in op.problem.examples()[::3]:
        verify(op.implementations[inductor.NAME], None, [Case.make(op, problem, "cpu", 0)])


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++ for the CPU")
def test_inductor_itself_takes_the_formulas(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    op = ops.get("rms_norm_bwd")
    problem = op.problem.parse("M16,N96", "bf16")
    verify(op.implementations[inductor.NAME], None, [Case.make(op, problem, "cpu", 0)])


def test_each_kind_of_call_is_compiled_once(traced, monkeypatch):
    seen = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: seen.append(args[0]) or compile_(*args, **options))
    call = inductor.compiled(lambda factor, x, eps: (factor * x + eps,), 2.0)
    x = torch.randn(4, 6)
    for args in ((x, 1.0), (x.clone(), 1.0), (x, 2.0), (x.t(), 1.0), (x[:2], 1.0), (x.double(), 1.0), (x, 1.0)):
        assert torch.equal(call(*args)[0], 2.0 * args[0] + args[1])
    assert len(seen) == 5
    assert len({each.__code__ for each in seen}) == 5
    monkeypatch.setattr(inductor, "MOST_CALLS", 5)
    with pytest.raises(TilebookError, match="5 kinds"):
        call(x[:3], 1.0)


def test_it_is_for_calls_that_outlast_the_host_on_nvidias_gpus():
    mlp, norm = ops.get("mlp_up_fwd"), ops.get("layer_norm_fwd")
    large = ((mlp, "M4096,H4096,I14336"), (norm, "M8192,N4096"))
    small = ((mlp, "M16,H768,I3072"), (norm, "M64,N1024"))
    for cases, served in ((large, True), (small, False)):
        for op, text in cases:
            implementation, problem = op.implementations[inductor.NAME], op.problem.parse(text, "bf16")
            assert implementation.can_run(problem, devices.find("H200")) is served
            assert not implementation.can_run(problem, devices.find("MI300X"))


def test_while_a_graph_is_captured_it_does_not_compile(traced, monkeypatch):
    op = ops.get("rms_norm_fwd")
    problem = op.problem.parse("M8,N16", "fp32")
    given = problem.inputs("cpu", 0)
    choice = Choice(op.implementations[inductor.NAME], None, "exact", problem)
    monkeypatch.setattr(dispatch.choice, "_capturing", lambda tensor: True)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    right = op.implementations["torch"](*given)
    assert all(torch.equal(mine, other) for mine, other in zip(choice(*given), right, strict=True))


def test_it_leaves_no_compiling_processes_behind():
    assert inductor._how()["options"] == {"compile_threads": 1}
    torch.compile(lambda x: x, **inductor._how())  # which looks at the names and types of options
