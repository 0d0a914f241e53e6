"""The backward pass in one launch of two kinds of programs: right wherever it says it can run."""

from dataclasses import replace

import pytest
import torch

from tilebook import device as devices
from tilebook.kernels.attention import backward_joint
from tilebook.kernels.attention.backward import attention_bwd
from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.forward import attention_fwd
from tilebook.replay import record
from tilebook.tuner.judge.verify import Case, truths, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")
PROBLEM = attention_bwd.problem
JOINT = attention_bwd.implementations["triton_joint"]

BLOCKS = "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"
CONFIGS = {
    "pointers": (64, 64, 64, 64, {"DESCRIPTORS": 0}),
    "descriptors": (64, 64, 64, 64, {"DESCRIPTORS": 2, "MAXNREG": 168}),
    "two kinds of tiles": (32, 128, 64, 128, {"DESCRIPTORS": 2}),
    "heads in turns": (128, 64, 128, 32, {"DESCRIPTORS": 0, "HEADS": 4}),
}
RAGGED = [
    ("B1,H2,S1,D64", "bf16"),
    ("B1,H2,S197,D64", "bf16"),
    ("B2,H2,S100,D16", "fp16"),
    ("B1,H2,S197,D64,causal", "fp16"),
    ("B1,H1,S100,Sk197,D64,causal", "bf16"),
    ("B1,H1,S197,Sk100,D32,causal", "bf16"),
    ("B1,H6,Hkv2,S70,D32", "bf16"),
    ("B1,H8,Hkv1,S40,Sk150,D64,causal", "fp16"),
    ("B1,H2,S100,D72,causal", "bf16"),
    ("B1,H2,Hkv1,S40,Sk70,D96", "fp16"),
    ("B1,H2,S70,Sk197,D32,causal,bottom_right", "bf16"),
    ("B1,H1,S197,Sk100,D64,causal,bottom_right", "bf16"),
    ("B1,H2,S197,D32,causal,window40x0", "bf16"),
    ("B1,H4,Hkv2,S100,Sk150,D32,bottom_right,window70x9", "fp16"),
    ("B1,H2,S100,D64,softcap", "bf16"),
    ("B2,H3,S70,Sk100,D32,alibi", "bf16"),
    ("B2,H2,S70,D32,maskbk", "bf16"),
    ("B2,H2,S40,Sk70,D64,maskqk", "fp16"),
    ("B1,H2,S70,D32,causal,window50x0,softcap,biasq,alibi", "bf16"),
]
ELSEWHERE = ["D256", "D64,dropout", "D64,dbiashqk", "D20"]


def _config(problem, name):
    *blocks, axes = CONFIGS[name]
    return JOINT.space.default(problem, H200).replace(**dict(zip(BLOCKS, blocks, strict=True)), **axes)


def _normal(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _relative(x, truth):
    return ((x.float() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("text", "dtype"), RAGGED)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_right(name, text, dtype):
    problem = PROBLEM.parse(text, dtype)
    assert JOINT.supports(problem)
    verify(JOINT, _config(problem, name), [Case.make(attention_bwd, problem, DEVICE, 1)], repeats=0)


@pytest.mark.parametrize("text", ["B1,H2,S197,D64", "B1,H2,S100,D64,causal"])
def test_it_is_right_on_inputs_with_outliers(text):
    problem = PROBLEM.parse(text, "bf16")
    case = Case.make(attention_bwd, problem, DEVICE, 3, outliers=True)
    verify(JOINT, _config(problem, "two kinds of tiles"), [case], repeats=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_beyond_the_ends_of_tensors_do_not_leak(name):
    tensors = [_normal(1, 2, 90, 32, seed=seed) for seed in range(4)]
    for x in tensors:
        x[:, :, 50:60], x[:, :, 60:] = torch.nan, torch.inf
    q, k, v, do = (x[:, :, :50] for x in tensors)
    o, lse = attention_fwd.implementations["torch"](q, k, v, PLAIN, 0.2)
    inputs = do, q, k, v, o, lse, PLAIN, 0.2
    outputs = JOINT(*inputs, config=_config(PROBLEM.of(*inputs), name))
    for output, truth in zip(outputs, truths(attention_bwd, inputs), strict=True):
        assert _relative(output, truth) < 5e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_very_negative_log_sum_exp_does_not_poison_gradients(name):
    """exp(0 - lse) overflows for the columns past the end of a ragged sequence, where scores are 0."""
    q, k, v, do = (_normal(1, 1, 40, 32, seed=seed) for seed in range(4))
    q, k = q.abs() * 16, -k.abs() * 16
    o, lse = attention_fwd.implementations["torch"](q, k, v, PLAIN, 0.2)
    assert lse.max() < -150
    inputs = do, q, k, v, o, lse, PLAIN, 0.2
    for output in JOINT(*inputs, config=_config(PROBLEM.of(*inputs), name)):
        assert output.isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="compilers may add in another order where kernels differ")
def test_it_agrees_with_two_launches_bit_for_bit():
    problem = PROBLEM.parse("B1,H4,Hkv2,S100,Sk150,D32,causal", "bf16")
    joint = _config(problem, "pointers")
    apart = attention_bwd.tunable.space.default(problem, H200).replace(
        **{axis: joint[axis] for axis in BLOCKS}, DESCRIPTORS=0
    )
    inputs = problem.inputs(DEVICE, 0)
    assert all(map(torch.equal, JOINT(*inputs, config=joint), attention_bwd.tunable(*inputs, config=apart)))


@pytest.mark.parametrize("rest", ELSEWHERE)
def test_it_leaves_to_others_what_it_cannot_do(rest):
    assert not JOINT.supports(PROBLEM.parse(f"B1,H2,S100,{rest}", "bf16"))
    assert not JOINT.supports(PROBLEM.parse("B1,H2,S100,D64", "fp32"))


def test_calls_that_must_repeat_bit_for_bit_may_get_it_but_none_without_a_verdict():
    problem = PROBLEM.parse("B8,H16,S256,D128", "bf16")
    assert JOINT.can_run(replace(problem, deterministic=True), H200)
    assert not JOINT.proven(problem)
    assert attention_bwd.tunable.name == "triton"


def test_long_calls_do_not_get_it():
    assert JOINT.supports(PROBLEM.parse("B16,H12,S256,D64", "bf16"))
    assert not JOINT.supports(PROBLEM.parse("B16,H12,S1024,D64", "bf16"))


@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_default_config_is_feasible_on_every_gpu(gpu):
    space = JOINT.space
    for problem in [*PROBLEM.examples(), *(p for suite in PROBLEM.suites().values() for p in suite)]:
        if JOINT.supports(problem):
            config = space.default(problem, gpu)
            assert space.contains(config)
            assert space.reject(problem, config, gpu) is None, problem.label


@pytest.mark.parametrize("text", ["B32,H32,S512,D64,causal", "B8,H6,S196,D64", "B16,H12,S256,D64", "B8,H16,S2048,D128"])
def test_space_is_small_enough_to_be_tried_whole(text):
    assert 50 <= len(JOINT.space.feasible(PROBLEM.parse(text, "bf16"), H200)) <= 300


def test_capped_registers_let_every_program_of_a_small_call_run_at_once():
    """384 programs: two an SM are 264 on an H200, three are 396."""
    problem = PROBLEM.parse("B8,H6,S196,D64", "bf16")
    config = _config(problem, "descriptors").replace(num_warps=4, num_stages=2)
    assert JOINT.space.reject(problem, config, H200) is None
    assert "one more program" in JOINT.space.reject(problem, config.replace(MAXNREG=128), H200)
    fewer = PROBLEM.parse("B4,H6,S196,D64", "bf16")
    assert "place on an SM" in JOINT.space.reject(fewer, config, H200)


def test_work_is_seven_products():
    problem = PROBLEM.parse("B4,H8,S1024,D64", "bf16")
    cost = JOINT.space.work(problem, JOINT.space.default(problem, H200))
    assert cost.flops == pytest.approx(7 / 5 * problem.cost().flops)
    assert cost.bytes > problem.cost().bytes


class _Stands:
    """Stands for one of the kernels, compiled: notes its launches."""

    asm, function, packed_metadata = (), 7, "metadata"

    def __init__(self, kernel, starts):
        self.arg_names, self.starts = kernel.arg_names, starts

    def __getitem__(self, grid):
        return lambda *args, **meta: self

    def run(self, x, y, z, *rest):
        self.starts.append(x)


def test_its_launches_are_recorded_once_and_repeated_without_it(monkeypatch):
    class Driver:
        class active:  # noqa: N801
            get_current_device = staticmethod(lambda: -1)
            get_current_stream = staticmethod(lambda device: "stream")

    monkeypatch.setattr("triton.runtime.driver", Driver)
    starts = []
    for name in ("attention_bwd_delta", "attention_bwd_joint"):
        monkeypatch.setattr(backward_joint, name, _Stands(getattr(backward_joint, name), starts))
    problem = PROBLEM.parse("B1,H4,Hkv2,S100,Sk200,D64", "bf16")
    inputs = problem.inputs("cpu", 0)
    for name, (_, columns, rows, _, _) in CONFIGS.items():
        config = _config(problem, name)
        _, plan = record(lambda *args, c=config: JOINT(*args, config=c), inputs)
        assert plan is not None
        starts.clear()
        dq, dk, dv = plan(problem.inputs("cpu", 1))
        assert [x.shape for x in (dq, dk, dv)] == [x.shape for x in inputs[1:4]]
        assert starts == [4 * 2, 2 * -(-200 // columns) + 4 * -(-100 // rows)]
