"""Tuning on a Ray cluster: several nodes on this machine, whose cores stand for GPUs, or whose GPUs are a formula."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from cluster_host import DEADLY, ToyHost
from ray_nodes import ray_nodes
from test_session import BEST
from toy import Scaling, make_op

from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.errors import RegistryError
from tilebook.op import Config
from tilebook.registry import Registry
from tilebook.report.live import view
from tilebook.tuner.cluster import cluster as clusters
from tilebook.tuner.process.processes import marked
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.run import Outcome, tune_problems

PATIENCE_S = 120.0
"""For what must come; a test that waits so long has failed."""

SHAPES = {"mlp_up_fwd": "M64,H32,I64", "mlp_down_fwd": "M64,H32,I64", "rms_norm_fwd": "M64,N64"}
"""None is another's neighbour, so that none is searched from the winner of one that was tuned before."""

TOYS = [Scaling(64 << n, 64) for n in range(6)]


@pytest.fixture(scope="module")
def _cluster():
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[client]'")
    if torch.cuda.is_available():
        pytest.skip("hosts would tune on the GPU of this machine")
    with ray_nodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(_cluster):
    yield _cluster
    _cluster.clear()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


def toy_problems(patch):
    """Toy problems, whose hosts have toy GPUs."""
    op = make_op()
    patch.setitem(ops._OPS, op.name, op)
    patch.setattr(clusters, "Host", ToyHost)
    return [(op, problem) for problem in TOYS]


class Watcher:
    """Says nothing; tests fill in what they watch for."""

    def __init__(self):
        self.said, self.finished = [], []

    @contextlib.contextmanager
    def __call__(self, run):
        run.watchers.append(self)
        yield

    def changed(self, run): ...

    def ended(self, run, state, again):
        self.finished.append((state.where, state.label, again))

    def told(self, run, text):
        self.said.append(text)


def chosen(path):
    """What a run has stored, without its times: the verdicts, and which trials each problem has."""
    with Registry.open(path) as registry:
        verdicts = {
            (v.device.name, v.problem): (v.status, v.implementation, Config(v.config)) for v in registry.verdicts()
        }
        trials = sorted((t.device.name, t.problem, str(Config(t.config)), t.failure or "") for t in registry.trials())
    return verdicts, trials


def test_without_gpus_cores_stand_for_them_and_the_outcome_is_that_of_a_run_without_ray(nodes, tmp_path):
    nodes.add("one")
    nodes.add("two")
    problems = [(ops.get(name), ops.get(name).problem.parse(shape, "bf16")) for name, shape in SHAPES.items()]
    options = {"gpu": "H200", "method": "grid", "trials": 3, "workers": 1}
    watcher = Watcher()
    paths = [tmp_path / "ray.db", tmp_path / "alone.db"]
    (there,) = clusters.tune_cluster(problems, nodes.address, registry=str(paths[0]), watch=watcher, **options)
    here = tune_problems(problems, registry=str(paths[1]), **options)
    assert chosen(paths[0]) == chosen(paths[1])
    assert [state.label for state in there.states] == [state.label for state in here.states]
    assert there.gpu == here.gpu
    assert {where for where, _, _ in watcher.finished} == {"worker 0 of one", "worker 0 of two"}
    with Registry.open(paths[0]) as ours, Registry.open(paths[1]) as theirs:
        assert {v.environment for v in ours.verdicts()} == {v.environment for v in theirs.verdicts()}


def test_each_gpu_model_gets_its_verdicts_and_a_node_with_other_kernels_takes_no_part(nodes, monkeypatch, path):
    nodes.add("h200", gpus=1, TOY_GPU="H200")
    nodes.add("a100", gpus=1, TOY_GPU="A100")
    nodes.add("old", gpus=1, TOY_GPU="B200", TOY_KERNELS="old")
    watcher = Watcher()
    toys = toy_problems(monkeypatch)[:2]
    found = clusters.tune_cluster(toys, nodes.address, registry=str(path), trials=8, watch=watcher)
    assert sorted(each.gpu.name for each in found) == ["NVIDIA A100", "NVIDIA H200"]
    assert not [state.error for each in found for state in each.states if state.error]
    verdicts, _ = chosen(path)
    assert len(verdicts) == 4
    assert {where.split(", ")[1] for where, _, _ in watcher.finished} == {"NVIDIA H200", "NVIDIA A100"}
    assert "not used: GPU 0 of old: another version of tilebook's kernels" in watcher.said


class Events(Watcher):
    """When the node `early` has finished a problem it waits until `late` is there and has one; in its next one it is
    killed, and `tried` says how far it had come."""

    def __init__(self, nodes, **environment):
        super().__init__()
        self.nodes, self.environment, self.late = nodes, environment, threading.Event()
        self.tried = {}

    def changed(self, run):
        for state in run.now:
            if "late" in state.where:
                self.late.set()
            elif self.late.is_set() and state.label != DEADLY and state.tried >= 4 and not self.tried:
                self.tried[state.label] = state.tried
                self.nodes.kill("early")

    def ended(self, run, state, again):
        super().ended(run, state, again)
        if len(self.finished) == 1:
            self.nodes.add("late", gpus=1, **self.environment)
            assert self.late.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def eventful(_cluster, tmp_path_factory):
    """A run during which a node comes, a host dies and a node dies: what came of it, and who saw it."""
    folder = tmp_path_factory.mktemp("eventful")
    environment = {"TOY_GPU": "H200", "TOY_DEADLY": str(folder / "died")}
    watcher = Events(_cluster, **environment)
    _cluster.add("early", gpus=1, **environment)
    with pytest.MonkeyPatch.context() as patch:
        toys = toy_problems(patch)
        registry = str(folder / "registry.db")
        (found,) = clusters.tune_cluster(toys, _cluster.address, registry=registry, trials=40, watch=watcher)
    assert (folder / "died").exists()
    _cluster.clear()
    return {state.label: state for state in found.states}, watcher


def test_a_node_that_comes_while_a_run_goes_gets_problems(eventful):
    states, watcher = eventful
    assert list(states) == [problem.label for problem in TOYS]
    assert watcher.finished[0] == ("GPU 0 of early, NVIDIA H200", TOYS[0].label, False)
    assert "GPU 0 of late, NVIDIA H200" in {state.where for state in states.values()}


def test_what_a_killed_node_had_under_way_another_goes_on_with_and_nothing_stored_is_measured_again(eventful):
    states, watcher = eventful
    ((label, tried),) = watcher.tried.items()
    assert ("GPU 0 of early, NVIDIA H200", label, True) in watcher.finished
    assert states[label].where == "GPU 0 of late, NVIDIA H200"
    assert states[label].reused >= tried - 1
    assert {Config(state.verdict.config) for state in states.values()} == {BEST}


def test_what_a_host_had_under_way_that_died_is_done_by_the_next_one(eventful):
    states, watcher = eventful
    assert [again for _, label, again in watcher.finished if label == DEADLY] == [True, False]
    assert states[DEADLY].reused >= 3  # of five, but what the GPU was given last may not have been told
    assert not any(state.error for state in states.values())


def test_ctrl_c_ends_in_one_line_and_leaves_neither_actors_nor_their_processes(nodes, path):
    nodes.add("interrupted")
    arguments = ["--shape", "M4096,H64,I64", "--shape", "M8192,H64,I64", "--direction", "fwd", "--gpu", "H200"]
    command = [sys.executable, "-m", "tilebook.cli", "tune", "mlp", *arguments, "--registry", str(path)]
    process = subprocess.Popen(
        [*command, "--ray", nodes.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not _trials(path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _hosts(b"interrupted")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("tilebook: interrupted")
    assert "Traceback" not in err
    assert "not reached: mlp_up_fwd M4096,H64,I64 bf16: interrupted" in out
    while _hosts(b"interrupted") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _hosts(b"interrupted") == []


def _trials(path):
    with contextlib.suppress(RegistryError), Registry.open(path) as registry:
        return len(registry.trials())
    return 0


def _hosts(node):
    """The actors on a node, and the processes that they have started."""
    found = []
    for pid in marked(b"TOY_NODE=" + node):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            if b"ray::Host" in command or b"tilebook.tuner.process" in command:
                found.append(command)
    return found


@pytest.mark.usefixtures("forked")
def test_ray_is_imported_by_nobody_who_does_not_ask_for_it():
    code = "import tilebook, tilebook.cli, tilebook.tuner.cluster.cluster, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ray", "auto"], "tilebook: --ray needs ray: pip install 'ray[client]'\n"),
        (["--ray", "auto", "--gpus", "all"], "tilebook: give --ray or --gpus, not both"),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch, path, arguments, says):
    monkeypatch.setitem(sys.modules, "ray", None)
    found = CliRunner().invoke(main, ["tune", "mlp", "--registry", str(path), *arguments])
    assert found.exit_code != 0
    assert found.stderr.startswith(says)
    assert found.stderr.count("\n") == 1


def test_no_cluster_is_one_line(path):
    pytest.importorskip("ray")
    found = CliRunner().invoke(main, ["tune", "mlp", "--registry", str(path), "--ray", "nowhere"])
    assert found.exit_code == 2
    assert found.stderr.startswith("tilebook: --ray nowhere: no such Ray cluster: ")
    assert found.stderr.count("\n") == 1


def test_each_model_has_its_table_and_json_is_one_list(monkeypatch, path):
    state = ProblemState("mlp_up_fwd", "M64", 0, 0, 0, unreached="interrupted", dtype="bf16")
    outcomes = [Outcome([state], devices.find(name), "explicit") for name in ("H200", "A100")]
    monkeypatch.setattr(clusters, "tune_cluster", lambda problems, address, **options: outcomes)
    command = ["tune", "mlp", "--registry", str(path), "--ray", "auto"]
    found = CliRunner().invoke(main, [*command, "--format", "json"])
    assert [each["device"] for each in json.loads(found.stdout)] == ["NVIDIA H200", "NVIDIA A100"]
    assert CliRunner().invoke(main, command).stdout.count("not reached: mlp_up_fwd M64 bf16: interrupted") == 2


def test_a_view_of_many_gpus_has_a_line_for_each(capsys):
    run = Run(40, True, gpus=2)
    run.now = [ProblemState("mlp_up_fwd", "M64", 9, 0, 9, gpu, where=f"GPU {gpu} of host") for gpu in range(12)]
    with view(run):
        (watcher,) = run.watchers
    assert len(watcher.render().renderables) == len(run.now) + 1
