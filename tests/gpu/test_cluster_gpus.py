"""Two GPUs of one host through Ray: each has problems, what is measured is a measurement, one registry has it all."""

import os

import pytest
import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.registry import Registry
from tilebook.tuner.cluster.cluster import tune_cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs share the problems"),
]
SHAPES = ("M512,N1024", "M1024,N1024", "M2048,N1024", "M4096,N1024")


@pytest.fixture(scope="module")
def nodes():
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[client]'")
    from ray_nodes import ray_nodes

    with ray_nodes() as nodes:
        nodes.add("host", cpus=os.cpu_count() or 2, gpus=2)
        yield nodes


def test_two_gpus_of_one_host_share_the_problems_and_their_verdicts_are_measured(nodes, tmp_path):
    op = ops.get("rms_norm_fwd")
    problems = [(op, op.problem.parse(shape, "bf16")) for shape in SHAPES]
    path = tmp_path / "registry.db"
    (found,) = tune_cluster(problems, nodes.address, trials=6, registry=str(path))
    here = devices.current()
    assert found.gpu == here
    assert [state.error for state in found.states] == [""] * len(SHAPES)
    assert {state.where for state in found.states} == {f"GPU {number} of host, {here.name}" for number in (0, 1)}
    with Registry.open(path) as registry:
        verdicts = registry.verdicts()
    assert {verdict.problem for verdict in verdicts} == {problem.key for _, problem in problems}
    assert all(verdict.measured and verdict.time_ms for verdict in verdicts)
    assert {tuple(sorted(verdict.environment.versions.items())) for verdict in verdicts} == {
        tuple(sorted(devices.environment().items()))
    }


def test_what_ray_has_tuned_a_run_without_ray_takes_for_its_own(nodes, tmp_path):
    from tilebook.tuner.run import tune_problems

    op = ops.get("rms_norm_fwd")
    problems = [(op, op.problem.parse(SHAPES[0], "bf16"))]
    path = str(tmp_path / "registry.db")
    tune_cluster(problems, nodes.address, trials=4, registry=path)
    assert [state.skipped for state in tune_problems(problems, trials=4, registry=path).states] == [True]
