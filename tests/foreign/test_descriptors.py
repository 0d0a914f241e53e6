"""Tensor descriptors as arguments: recorded, made anew, verified, compiled for other GPUs, served by their dtypes."""

import json

import described
import pytest
import torch
import triton
from click.testing import CliRunner
from others import DAMAGE, OUTSIDE, RAGGED, SILENT
from recorded import recording, tune
from served import on_an_h200, stored, verdict
from triton.runtime._allocation import _allocator
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook.cli import main
from tilebook.foreign import record
from tilebook.foreign.call import Call, Descriptor, Tensor
from tilebook.foreign.kernel import Kernel
from tilebook.foreign.offered import offered
from tilebook.foreign.serving import Served
from tilebook.launch import _scratch
from tilebook.registry import Registry

pytestmark = pytest.mark.usefixtures("forked_here")

OP = "described:triple_kernel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The record of a program, its registry once it was tuned."""
    folder = tmp_path_factory.mktemp("descriptors")
    with recording(folder / "record") as made:
        x = torch.randn(70, 32)
        assert torch.equal(described.triple(x), 3 * x)
        described.triple(x.half())
        described.made_inside(x)
    assert made.left_out == {}
    return folder


def test_a_record_says_what_a_descriptor_is_like_and_calls_are_known_by_its_dtype(folder):
    entry = next(each for each in record.read(folder / "record") if each.name == "triple_kernel")
    assert list(entry.problems) == [f'{{"dtype":"{name},{name}","key":{{"rows":70}}}}' for name in ("fp32", "fp16")]
    (call,) = entry.problems['{"dtype":"fp16,fp16","key":{"rows":70}}'].calls
    assert call.tensors["x"] == Tensor("float16", (70, 32), (32, 1))
    assert call.descriptors["y"] == Descriptor((70, 32), (32, 1), (16, 16))
    assert call.grids[:3] == ((5, 2), (3, 2), (2, 2))
    assert Call.of(json.loads(json.dumps(call.content()))) == call


def test_faults_behind_descriptors_are_refused_and_the_right_configs_win(folder):
    states = tune(folder / "record", folder / "registry.db")
    assert [state.error for state in states] == [""] * 3
    with Registry.open(folder / "registry.db") as registry:
        trials, verdicts = registry.trials(), registry.verdicts()
    assert all(each.config.get("FAULT", 0) == 0 for each in verdicts)
    assert {each.config["BLOCK"] for each in verdicts} == {64, 32}
    refused = {t.config["FAULT"]: t.reason for t in trials if t.op == OP and t.failure == "wrong_answer"}
    assert set(refused) == set(described.FAULTS)
    assert "max error" in refused[SILENT]
    assert "max error" in refused[RAGGED]
    assert "outside its tensors" in refused[OUTSIDE]
    assert "changed its input" in refused[DAMAGE]


@pytest.mark.long
@pytest.mark.parametrize("gpu", ["A100", "B200", "MI300X"])
def test_kernels_on_descriptors_compile_for_gpus_that_are_not_here(gpu, folder, tmp_path):
    command = ["tune", "--recorded", folder / "record", "--gpu", gpu, "--registry", tmp_path / "registry.db"]
    command += ["--trials", 1, "--workers", 1, "--format", "json"]
    done = CliRunner().invoke(main, list(map(str, command)), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert [row["status"] for row in json.loads(done.stdout)] == ["predicted"] * 3


def test_each_dtype_of_a_descriptor_has_its_own_verdict(tmp_path, monkeypatch):
    on_an_h200(monkeypatch, tmp_path / "registry.db")
    tuner, configs = described.triple_kernel, described.triple_kernel.configs
    chosen = {torch.float32: configs[1], torch.float16: configs[2]}
    samples = {dtype: torch.randn(70, 32).to(dtype) for dtype in chosen}
    args = {
        dtype: (*(TensorDescriptor(x, [70, 32], [32, 1], [16, 16]) for _ in range(2)), 70)
        for dtype, x in samples.items()
    }
    stored(tmp_path / "registry.db", *(verdict(tuner, args[dtype], each) for dtype, each in chosen.items()))
    monkeypatch.setattr(tuner, "cache", Served(tuner, {}))
    for dtype, config in chosen.items():
        assert torch.equal(described.triple(samples[dtype]), 3 * samples[dtype])
        assert tuner.best_config is config


def test_a_reference_gets_a_descriptors_tensor(folder, monkeypatch):
    monkeypatch.setattr(described.triple_kernel, "reference", lambda x: 3 * x, raising=False)
    with offered(folder / "record") as offer:
        op, problem = next(each for each in offer.problems if each[0].name == OP)
        op.answers.learn(problem, "cpu")
        answers = op.answers(problem, "cpu", 0)
        assert torch.equal(answers.outputs[0], (3 * answers.inputs[0].float()).to(answers.outputs[0].dtype))


def test_a_descriptor_that_reaches_beyond_its_tensor_is_left_out(tmp_path):
    made = record.Recording(tmp_path)
    x = torch.empty(8, 16)
    wide, other = (TensorDescriptor(x, [rows, 16], [16, 1], [1, 16]) for rows in (9, 8))
    made.note(described.triple_kernel, (wide, other, 8), {"grid": (1, 1), "warmup": False})
    assert made.left_out == {"ValueError: the descriptor x reaches beyond its tensor": 1}


@pytest.mark.parametrize("wrong", [[[8], [16, 1], [1, 16]], [[8, -1], [16, 1], [1, 16]], [[8, 8], [16, 1], [1, "a"]]])
def test_a_strangers_descriptor_is_refused(wrong, folder):
    (file,) = (folder / "record").glob("*.json")
    content = json.loads(file.read_text())["kernels"][0]["problems"][0]["calls"][0]
    content["descriptors"]["x"] = [*wrong, "zero", False]
    with pytest.raises(ValueError, match="not a tensor descriptor"):
        Call.of(content)


def test_a_list_that_is_another_where_there_is_no_gpu_keeps_the_hook_that_all_share():
    config = Kernel(described.triple_kernel).configs
    unseen = next(iter(config)).replace(BLOCK=128)
    assert Kernel(described.triple_kernel).made(unseen).pre_hook is described.blocks


def test_a_kernel_that_makes_descriptors_is_given_memory_and_the_programs_allocator_stays(folder, monkeypatch):
    triton.set_allocator(mine := object())
    jit, found = described.made_inside_kernel.fn, []
    run = jit.run
    monkeypatch.setattr(jit, "run", lambda *args, **meta: (found.append(_allocator.get()), run(*args, **meta)))
    with offered(folder / "record") as offer:
        op, problem = next(each for each in offer.problems if each[0].name == "described:made_inside_kernel")
        op.answers.learn(problem, "cpu")
    assert set(found) == {_scratch}
    assert _allocator.get() is mine
