"""A captured graph is replayed without a word to registry, disk or network."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

PROGRAM = """
import json, sys
import torch
import torch.nn.functional as F
import tilebook


def step(x):
    q = F.layer_norm(tilebook.rms_norm(x), (64,))
    o = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return tilebook.attention(o, o, o, window=(64, 0)) if tilebook.status().enabled else o + x


def calls():
    with open("/proc/thread-self/io") as file:
        return [int(line.split()[1]) for line in file if line.startswith("sysc")]


def captured():
    x = torch.randn(4, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x)
    return graph


def replayed(graph):
    graph.replay()
    torch.cuda.synchronize()
    seen.clear()
    before = calls()
    for _ in range(100):
        graph.replay()
    after = calls()
    torch.cuda.synchronize()
    events = [each for each in seen if each != ["open", "/proc/thread-self/io"]]
    return [now - then for now, then in zip(after, before)], events


seen = []
wanted = "open", "sqlite3", "socket", "subprocess", "os.", "import"
sys.addaudithook(lambda event, args: event.startswith(wanted) and seen.append([event, str(args[0]) if args else ""]))
with torch.no_grad():
    plain = captured()
    with tilebook.enabled():
        ours = captured()
        print(json.dumps([replayed(plain), replayed(ours)]))
"""


def test_a_replay_makes_no_call_for_input_or_output():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (plain, _), (ours, events) = json.loads(done.stdout)
    assert ours == plain  # those of looking
    assert max(ours) < 10
    assert events == []
