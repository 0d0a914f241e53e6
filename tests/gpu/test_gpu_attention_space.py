"""What came later in attention's spaces, on a GPU: capped registers, a kernel's own descriptors."""

import threading

import pytest
import torch

from tilebook import device as devices
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.replay import record
from tilebook.tuner.judge.verify import Case, verify

pytestmark = pytest.mark.gpu

CASES = [
    (attention_fwd, "B2,H8,S1024,D64,causal", {"MAXNREG": 128}),
    (attention_bwd, "B2,H8,S1024,D64,causal", {"MAXNREG1": 168, "MAXNREG2": 168}),
    (attention_fwd, "B8,H6,S196,D64", {"DESCRIPTORS": 2}),
    (attention_fwd, "B2,H4,Hkv2,S453,Sk197,D128,causal", {"DESCRIPTORS": 2}),
]


def _config(op, problem, **axes):
    gpu = devices.current()
    if gpu.capability < 90:
        axes = {axis: 0 if axis == "DESCRIPTORS" else value for axis, value in axes.items()}
    if gpu.backend != "cuda":
        axes = {axis: value for axis, value in axes.items() if "MAXNREG" not in axis}
    return op.tunable.space.default(problem, gpu).replace(**axes)


@pytest.mark.parametrize(("op", "text", "axes"), CASES)
def test_it_is_right_and_repeats(op, text, axes):
    problem = op.problem.parse(text, "bf16")
    cases = [Case.make(op, each, "cuda", 1) for each in (problem, *problem.neighbours()[:2])]
    verify(op.tunable, _config(op, problem, **axes), cases, repeats=20)


@pytest.fixture
def made():
    """Inputs, the plan of a call whose kernel makes its descriptors, and the outputs to be expected."""
    if devices.current().capability < 90:
        pytest.skip("no tensor descriptors before sm_90")
    problem = attention_fwd.problem.parse("B8,H6,S196,D64", "bf16")
    config = _config(attention_fwd, problem, DESCRIPTORS=2)
    inputs = problem.inputs("cuda", 0)
    attention_fwd.tunable(*inputs, config=config)
    _, plan = record(lambda *args: attention_fwd.tunable(*args, config=config), inputs)
    assert plan is not None
    other = problem.inputs("cuda", 1)
    return other, plan, attention_fwd.tunable(*other, config=config.replace(DESCRIPTORS=0))


def _same(outputs, expected):
    torch.cuda.synchronize()
    for mine, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_recorded_calls_have_memory_of_their_own_on_any_stream_and_thread(made):
    inputs, plan, expected = made
    streams = [torch.cuda.Stream() for _ in range(4)]
    outputs = []
    torch.cuda.synchronize()
    for turn in range(200):
        with torch.cuda.stream(streams[turn % 4]):
            outputs.append(plan(inputs))
    thread = threading.Thread(target=lambda: outputs.append(plan(inputs)))
    thread.start()
    thread.join()
    for each in outputs:
        _same(each, expected)


def test_recorded_calls_can_be_captured_and_replayed(made):
    inputs, plan, expected = made
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [plan(inputs) for _ in range(3)]
    for _ in range(3):
        for o, lse in outputs:
            o.zero_(), lse.zero_()
        graph.replay()
        for each in outputs:
            _same(each, expected)
