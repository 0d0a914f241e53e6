"""Compiled programs run PyTorch's functions, and ops of ours where those were measured to be ahead of its compiler."""

import pytest
import torch
import torch.nn.functional as F
from flat_verdict import flat_verdict
from torch._subclasses.fake_tensor import FakeTensorMode

import tilebook
from tilebook import device as devices
from tilebook import dispatch, traced
from tilebook import op as ops
from tilebook.kernels.attention.entry import ATTENTION
from tilebook.kernels.attention.form import CAUSAL
from tilebook.registry import Device, Environment, Registry, VerdictStatus

GPU = devices.find("H200")
CUDA = torch.device("cuda", 0)
NAMES = ("rms_norm_fwd", "rms_norm_bwd")
LABEL = "M4096,N4096"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Makes the registry of an H200: op → milliseconds of Inductor's code beside 1.0 of ours, or of ours alone."""
    path = tmp_path / "registry.db"
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(path))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "none.db")
    monkeypatch.setattr(devices, "current", lambda index=0: GPU)
    monkeypatch.setattr(traced, "_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def made(theirs, label=LABEL):
        with Registry.open(path, write=True) as registry:
            registry.merge((), [_verdict(name, ms, label) for name, ms in theirs.items()], ())
        dispatch.reload()

    yield made
    dispatch.reload()


def _verdict(name, theirs, label=LABEL):
    op = ops.get(name)
    problem = op.problem.parse(label, "bf16")
    config = dict(op.tunable.space.default(problem, GPU))
    listed = [{"implementation": "triton", "config": config, "time_ms": 1.0}]
    if theirs is not None:
        listed.append({"implementation": "inductor", "config": {}, "time_ms": theirs})
    return flat_verdict(
        op=name, problem=problem.key, device=Device(GPU.name, GPU.arch, GPU.sm_count),
        environment=Environment({"triton": "3.6.0"}), kernel=op.digest, status=VerdictStatus.MEASURED,
        implementation="triton", config=config, time_ms=1.0, default_time_ms=2.0, speedup=2.0, speedup_low=1.9,
        speedup_high=2.1, evidence={"candidates": listed},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [(1.3, 1.3, True), (1.3, 1.01, False), (1.3, None, False), (0.9, 1.3, False), (1.04, 1.3, False)],
)
def test_ours_is_ahead_where_each_op_was_measured_to_beat_the_compilers_code(measured, forward, backward, expected):
    measured({"rms_norm_fwd": forward, "rms_norm_bwd": backward})
    call = traced.described(torch.empty(4, 1024, 4096, dtype=torch.bfloat16), torch.empty(4096), 1e-6)
    assert traced.ahead("norms", NAMES, call, CUDA) == expected
    assert traced.ahead("norms", NAMES[:1], call, CUDA) == (forward > 1.1)


@pytest.mark.parametrize("shape", [(4096, 4095), (64, 4096)])
def test_a_verdict_of_another_problem_is_no_evidence(measured, shape):
    measured({"rms_norm_fwd": 1.3})
    call = traced.described(torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape[-1]), 1e-6)
    assert not traced.ahead("norms", NAMES[:1], call, CUDA)


@pytest.fixture
def attention_measured(measured, tmp_path):
    """Makes the registry of an H200 in which ours are ahead, by op and label."""

    def made(*verdicts):
        with Registry.open(tmp_path / "registry.db", write=True) as registry:
            registry.merge((), [_verdict(name, None, label) for name, label in verdicts], ())
        dispatch.reload()

    return made


LONG, SHORT = "B4,H16,S2048,D128,causal", "B8,H6,S196,D64,causal"
QKV = {LONG: [(4, 16, 2048, 128)] * 3, SHORT: [(8, 6, 196, 64)] * 3}


def _attend(**options):
    return lambda q, k, v: tilebook.attention(q, k, v, causal=True, **options)


def _ours(graph):
    return any("tilebook.attention_fwd" in each for each in graph)


@pytest.mark.parametrize(("label", "ours"), [(LONG, True), (SHORT, False)])
def test_compiled_attention_is_ours_where_a_verdict_has_it_ahead_and_the_gpu_has_more_to_do_than_the_host(
    attention_measured, label, ours
):
    attention_measured(("attention_fwd", label))
    (graph,) = _graph_of(_attend(), *QKV[label])
    assert _ours(graph) == ours
    assert any("scaled_dot_product_attention" in each for each in graph) != ours


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_compiled_attention_is_pytorchs_function_where_no_verdict_has_ours_ahead(attention_measured, options):
    attention_measured(("attention_fwd", "B4,H16,S2048,D64,causal"))
    (graph,) = _graph_of(_attend(**options), *QKV[LONG])
    assert not _ours(graph)


@pytest.mark.parametrize("options", [{"window": (64, 0)}, {"return_lse": True}, {"deterministic": True}])
def test_compiled_attention_that_pytorch_has_no_kernel_for_is_ours(attention_measured, options):
    attention_measured()
    function = _attend(**options)
    (graph,) = _graph_of(
        lambda q, k, v: function(q, k, v)[0] if "return_lse" in options else function(q, k, v), *QKV[SHORT]
    )
    assert _ours(graph)


def test_compiled_attention_of_any_length_is_the_op_which_looks_when_it_runs(attention_measured):
    attention_measured(("attention_fwd", LONG))
    (graph,) = _graph_of(_attend(), *QKV[LONG], dynamic=True)
    assert _ours(graph)


def test_attention_whose_gradients_alone_are_ours_is_pytorchs_where_it_is_not_trained(attention_measured):
    attention_measured(("attention_bwd", LONG))
    tensors = *(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in QKV[LONG]), None, None, None
    call, options = traced.described(*tensors), ATTENTION.pack((CAUSAL, 0.1))
    assert traced.left("attention", call, options, False, CUDA, False)
    assert not traced.left("attention", call, options, True, CUDA, False)
    assert traced.left("attention", call, options, True, CUDA, True)


def _graph_of(function, *tensors, dynamic=None):
    """The functions that a compiled program calls, as Dynamo traced it in one graph."""
    found = []

    def backend(graph, examples):
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    with FakeTensorMode():
        made = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in tensors]
        y = compiled(*made)
        again = compiled(*made[:-1], made[-1])
    assert y.shape == again.shape == tensors[0]
    return found


@pytest.mark.parametrize(("theirs", "ours"), [(1.3, True), (0.9, False), (None, False)])
def test_a_compiled_program_has_the_op_where_ours_is_ahead_and_else_pytorchs_function(measured, theirs, ours):
    measured({"rms_norm_fwd": theirs})
    (graph,) = _graph_of(tilebook.rms_norm, (4, 1024, 4096), (4096,))
    assert any("tilebook.rms_norm_fwd" in each for each in graph) == ours
    assert any("rms_norm" in each and "tilebook" not in each for each in graph) != ours


@pytest.mark.parametrize("function", ["tilebook", "torch.nn.functional"])
@pytest.mark.parametrize(("theirs", "ours"), [(1.3, True), (0.9, False), (None, False)])
def test_a_compiled_loss_has_the_op_where_ours_is_ahead_and_else_pytorchs_function(measured, function, theirs, ours):
    measured({"cross_entropy_fwd": theirs}, "M4096,V32000")

    def loss(x, target):
        called = tilebook.cross_entropy if function == "tilebook" else F.cross_entropy
        return called(x, target, reduction="none")

    found = []

    def backend(graph, examples):
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    with tilebook.enabled(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4096, 32000, device="cuda", dtype=torch.bfloat16)
        y = torch.compile(loss, backend=backend, fullgraph=True)(x, torch.empty(4096, device="cuda").long())
    assert (y.shape, y.dtype) == ((4096,), torch.bfloat16)
    (graph,) = found
    assert any("tilebook.cross_entropy_fwd" in each for each in graph) == ours
    assert any("cross_entropy_loss" in each for each in graph) != ours


def test_a_graph_for_all_sizes_has_pytorchs_function(measured):
    measured({"rms_norm_fwd": 1.3})
    (graph,) = _graph_of(tilebook.rms_norm, (4, 1024, 4096), (4096,), dynamic=True)
    assert not any("tilebook" in each for each in graph)


def test_a_compiled_mlp_asks_for_its_forward_ops_and_for_all_four_where_it_is_trained(monkeypatch):
    asked = []

    def ahead(family, names, args, device):
        asked.append((family, names, args[0]))
        return True

    ahead._dynamo_marked_constant = True
    monkeypatch.setattr("tilebook.kernels.mlp.ahead", ahead)
    monkeypatch.setattr(dispatch.here, "forced", ("torch", None))  # so that the CPU counts as a GPU
    tensors = [torch.randn(size) for size in ((2, 5, 8), (12, 8), (12,), (8, 12), (8,))]
    torch._dynamo.reset()
    compiled = torch.compile(tilebook.mlp, backend="aot_eager", fullgraph=True)
    expected = tilebook.kernels.mlp.plain(tensors, ("gelu",))
    torch.testing.assert_close(compiled(*tensors), expected)
    compiled(*[each.requires_grad_() for each in tensors]).sum().backward()
    assert tensors[1].grad is not None
    forward, trained = asked
    assert forward == ("mlp", ("mlp_up_fwd", "mlp_down_fwd"), ((2, 5, 8), torch.float32))
    assert trained[1] == ("mlp_up_fwd", "mlp_down_fwd", "mlp_act_bwd", "mlp_grads_bwd")
