"""The backward pass that adds dq up in memory: right wherever it says it can run, and never where bits must repeat."""

from dataclasses import replace

import pytest
import torch

from tilebook import device as devices
from tilebook.kernels.attention import backward_reduce
from tilebook.kernels.attention.backward import attention_bwd
from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.forward import attention_fwd
from tilebook.replay import record
from tilebook.tuner.judge.verify import Case, truths, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")
PROBLEM = attention_bwd.problem
REDUCE = attention_bwd.implementations["triton_reduce"]

CONFIGS = {
    "pointers": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "DESCRIPTORS": 0},
    "descriptors": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "DESCRIPTORS": 1},
    "rows in turns": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "TURNED": 1, "DESCRIPTORS": 1, "MAXNREG": 168},
    "heads in turns": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "HEADS": 4, "DESCRIPTORS": 0},
}
RAGGED = [
    ("B1,H2,S1,D64", "bf16"),
    ("B1,H2,S197,D64", "bf16"),
    ("B2,H2,S100,D16", "fp16"),
    ("B1,H2,S197,D64,causal", "fp16"),
    ("B1,H1,S100,Sk197,D64,causal", "bf16"),
    ("B1,H1,S197,Sk100,D32,causal", "bf16"),
    ("B1,H6,Hkv2,S70,D32", "bf16"),
    ("B1,H4,Hkv1,S40,Sk150,D128,causal", "fp16"),
    ("B1,H2,S100,D72,causal", "bf16"),
    ("B1,H2,Hkv1,S40,Sk70,D96", "fp16"),
    ("B1,H2,S70,Sk197,D32,causal,bottom_right", "bf16"),
    ("B1,H1,S197,Sk100,D64,causal,bottom_right", "bf16"),
    ("B1,H2,S197,D32,causal,window40x0", "bf16"),
    ("B1,H4,Hkv2,S100,Sk150,D32,bottom_right,window70x9", "fp16"),
]
ELSEWHERE = ["D256", "D64,softcap", "D64,alibi", "D64,dropout", "D64,maskbk", "D64,biashqk", "D64,dbiashqk"]


def _config(problem, **axes):
    return REDUCE.space.default(problem, H200).replace(**axes)


def _normal(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _relative(x, truth):
    return ((x.float() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("text", "dtype"), RAGGED)
@pytest.mark.parametrize("axes", CONFIGS.values(), ids=CONFIGS)
def test_it_is_right(axes, text, dtype):
    problem = PROBLEM.parse(text, dtype)
    assert REDUCE.supports(problem)
    verify(REDUCE, _config(problem, **axes), [Case.make(attention_bwd, problem, DEVICE, 1)], repeats=0)


@pytest.mark.parametrize("text", ["B1,H2,S197,D64", "B1,H2,S100,D64,causal"])
def test_it_is_right_on_inputs_with_outliers(text):
    problem = PROBLEM.parse(text, "bf16")
    case = Case.make(attention_bwd, problem, DEVICE, 3, outliers=True)
    verify(REDUCE, _config(problem, **CONFIGS["descriptors"]), [case], repeats=0)


@pytest.mark.parametrize("axes", CONFIGS.values(), ids=CONFIGS)
def test_numbers_beyond_the_ends_of_tensors_do_not_leak(axes):
    tensors = [_normal(1, 2, 90, 32, seed=seed) for seed in range(4)]
    for x in tensors:
        x[:, :, 50:60], x[:, :, 60:] = torch.nan, torch.inf
    q, k, v, do = (x[:, :, :50] for x in tensors)
    o, lse = attention_fwd.implementations["torch"](q, k, v, PLAIN, 0.2)
    inputs = do, q, k, v, o, lse, PLAIN, 0.2
    outputs = REDUCE(*inputs, config=_config(PROBLEM.of(*inputs), **axes))
    for output, truth in zip(outputs, truths(attention_bwd, inputs), strict=True):
        assert _relative(output, truth) < 5e-3


@pytest.mark.parametrize("axes", CONFIGS.values(), ids=CONFIGS)
def test_very_negative_log_sum_exp_does_not_poison_gradients(axes):
    """exp(0 - lse) overflows for the columns past the end of a ragged sequence, where scores are 0."""
    q, k, v, do = (_normal(1, 1, 40, 32, seed=seed) for seed in range(4))
    q, k = q.abs() * 16, -k.abs() * 16
    o, lse = attention_fwd.implementations["torch"](q, k, v, PLAIN, 0.2)
    assert lse.max() < -150
    inputs = do, q, k, v, o, lse, PLAIN, 0.2
    for output in REDUCE(*inputs, config=_config(PROBLEM.of(*inputs), **axes)):
        assert output.isfinite().all()


@pytest.mark.parametrize("rest", ELSEWHERE)
def test_it_leaves_to_others_what_it_cannot_do(rest):
    assert not REDUCE.supports(PROBLEM.parse(f"B1,H2,S100,{rest}", "bf16"))
    assert not REDUCE.supports(PROBLEM.parse("B1,H2,S100,D64", "fp32"))


def test_calls_that_must_repeat_bit_for_bit_do_not_get_it():
    problem = PROBLEM.parse("B8,H16,S2048,D128", "bf16")
    assert REDUCE.can_run(problem, H200)
    assert not REDUCE.can_run(replace(problem, deterministic=True), H200)
    assert attention_bwd.tunable.name == "triton"


@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_default_config_is_feasible_on_every_gpu(gpu):
    space = REDUCE.space
    for problem in [*PROBLEM.examples(), *(p for suite in PROBLEM.suites().values() for p in suite)]:
        if REDUCE.supports(problem):
            config = space.default(problem, gpu)
            assert space.contains(config)
            assert space.reject(problem, config, gpu) is None, problem.label


@pytest.mark.parametrize("columns", [64, 128])
def test_what_ran_wrong_on_hopper_is_rejected_there_alone(columns):
    problem = PROBLEM.parse("B2,H8,S4096,D64,causal", "bf16")
    wrong = REDUCE.space.default(problem, H200).replace(
        BLOCK_M=32, BLOCK_N=columns, num_warps=8, num_stages=1, DESCRIPTORS=0
    )
    assert "ptxas" in REDUCE.space.reject(problem, wrong, H200)
    assert REDUCE.space.reject(problem, wrong.replace(num_stages=2), H200) is None
    assert REDUCE.space.reject(problem, wrong.replace(BLOCK_M=64), H200) is None
    assert REDUCE.space.reject(problem, wrong, devices.find("A100")) is None
    padded = PROBLEM.parse("B2,H8,S4096,D72,causal", "bf16")  # its loads are not pipelined, whatever the stages
    assert "ptxas" in REDUCE.space.reject(padded, wrong.replace(num_stages=2), H200)
    assert REDUCE.space.reject(padded, wrong.replace(num_stages=2, BLOCK_M=64), H200) is None


class _Stands:
    """Stands for one of the kernels, compiled: notes its launches."""

    asm, function, packed_metadata = (), 7, "metadata"

    def __init__(self, kernel, starts):
        self.arg_names, self.starts = kernel.arg_names, starts

    def __getitem__(self, grid):
        return lambda *args, **meta: self

    def run(self, x, y, z, *rest):
        self.starts.append((x, len(rest)))


def test_its_launches_are_recorded_once_and_repeated_without_it(monkeypatch):
    class Driver:
        class active:  # noqa: N801
            get_current_device = staticmethod(lambda: -1)
            get_current_stream = staticmethod(lambda device: "stream")

    monkeypatch.setattr("triton.runtime.driver", Driver)
    starts = []
    for name in ("attention_bwd_prepare", "attention_bwd_reduce", "attention_bwd_finish"):
        monkeypatch.setattr(backward_reduce, name, _Stands(getattr(backward_reduce, name), starts))
    problem = PROBLEM.parse("B1,H2,S100,Sk200,D64", "bf16")
    inputs = problem.inputs("cpu", 0)
    for axes in CONFIGS.values():
        config = _config(problem, **axes)
        _, plan = record(lambda *args, c=config: REDUCE(*args, config=c), inputs)
        assert plan is not None
        starts.clear()
        dq, dk, dv = plan(problem.inputs("cpu", 1))
        assert [x.shape for x in (dq, dk, dv)] == [x.shape for x in inputs[1:4]]
        rows, columns = -(-100 // axes["BLOCK_M"]), -(-200 // axes["BLOCK_N"])
        assert [grid for grid, _ in starts] == [2 * rows, 2 * columns, 2 * rows]
