"""`tilebook profile` around programs on a GPU: what it says is so, and the program is as fast and right as without."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu

LAYERS, STEPS = 4, 400

PROGRAM = f"""
import statistics, sys, time
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(1024), nn.Linear(1024, 3072), nn.Linear(1024, 1024)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 16, 64).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, 1024))


model = nn.Sequential(*[Layer() for _ in range({LAYERS})], nn.Linear(1024, 32000)).to("cuda", torch.bfloat16)
x = torch.randn(8, 2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # as in every layer
target = torch.randint(32000, (8 * 2048,), device="cuda")
"""

TRAINING = """
model = torch.compile(model) if "compiled" in sys.argv else model
optimizer, took = torch.optim.SGD(model.parameters(), lr=1e-3), []
for step in range(%d):
    begun = time.perf_counter()
    loss = F.cross_entropy(model(x).view(-1, 32000), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    took.append(time.perf_counter() - begun)
print(loss.item(), statistics.median(took[10:]))
"""

GRAPH = """
with torch.no_grad():
    for _ in range(3):
        model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
print(y.float().sum().item())
"""


@pytest.fixture
def run(tmp_path):
    """Runs a program with tilebook on, profiled or not; returns what it prints and, profiled, what is told of it."""
    given = {name: value for name, value in os.environ.items() if name != "TILEBOOK_REGISTRY"}

    def ran(text, *arguments, profiled=True, launcher=(sys.executable,)):
        program, out = tmp_path / "program.py", tmp_path / "out.json"
        program.write_text(PROGRAM + text)
        before = [sys.executable, "-m", "tilebook", "profile", "--json", out, "--"] if profiled else []
        command = [*map(str, before), *launcher, str(program), *arguments]
        environment = {**given, "TILEBOOK": "1", "XDG_DATA_HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        numbers = [float(each) for each in done.stdout.split()]
        return (numbers, json.loads(out.read_text()), done.stderr) if profiled else numbers

    return ran


def rows(data):
    found = {}
    for each in data["problems"]:
        found.setdefault(each["op"], []).append(each)
    return found


def test_a_training_step_is_told_apart_and_is_as_fast_as_without(run):
    loss, alone = run(TRAINING % STEPS, profiled=False)
    (other, watched), data, text = run(TRAINING % STEPS)
    print(text)
    assert other == pytest.approx(loss, rel=1e-2)
    assert watched < 1.05 * alone
    found = rows(data)
    for op in ("attention_fwd", "attention_bwd", "layer_norm_fwd", "layer_norm_bwd"):
        (each,) = found[op]
        assert each["calls"] == pytest.approx(LAYERS * data["steps"], abs=LAYERS), op
        assert each["timed"], op
        assert op.endswith("fwd") or not each["waited"], op  # a step begins with the GPU idle
    for op in ("cross_entropy_fwd", "cross_entropy_bwd"):
        assert sum(each["calls"] for each in found[op]) == pytest.approx(data["steps"], abs=1)
        assert all(each["timed"] for each in found[op])
    assert data["step_ms"] == pytest.approx(1e3 * alone, rel=0.2)
    assert 0.1 < data["dispatched"] < 0.9


def test_a_calls_time_is_the_gpus(run):
    q, k, v = (torch.randn(8, 16, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (start, end):
        torch.cuda._sleep(10_000_000)
        for _ in range(20):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        event.record()
    torch.cuda.synchronize()
    bare_ms = (start.elapsed_time(end) - _sleep_ms()) / 20
    _, data, _ = run(TRAINING % 20)
    (each,) = rows(data)["attention_fwd"]
    assert 0.4 * bare_ms < each["time_ms"] < 2 * bare_ms


def _sleep_ms():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def test_what_a_graph_replays_counts(run):
    alone = run(GRAPH, profiled=False)
    found, data, _ = run(GRAPH)
    assert found == pytest.approx(alone, rel=1e-2)
    (each,) = rows(data)["attention_fwd"]
    assert 25 * LAYERS < each["calls"] <= 53 * LAYERS
    assert each["timed"]


def test_a_compiled_program_runs(run):
    (loss, _), (other, _) = run(TRAINING % 20, "compiled", profiled=False), run(TRAINING % 20, "compiled")[0]
    assert other == pytest.approx(loss, rel=1e-2)


def test_processes_of_a_distributed_program_are_put_together(run):
    torchrun = sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"
    _, data, _ = run(f"torch.distributed.init_process_group('gloo')\n{TRAINING % 20}", launcher=torchrun)
    assert data["processes"] == 2
