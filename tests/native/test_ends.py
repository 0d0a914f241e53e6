"""A program ends while threads of its own are in the extension: Python takes them away, and nothing of ours breaks.

Before 3.14 it does so by `pthread_exit`, wherever such a thread asks for its lock. Of calls of PyTorch's own that are
under way then, PyTorch ends the process.
"""

import subprocess
import sys

PROGRAM = """
import operator
import sys
import threading
import time

import torch
from tilebook import native

it = native._loaded()
it.pretend(1)
at_it = []


def going(name):
    at_it.append(name)
    while True:
        pass


def answered():
    def cross_entropy(
        input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, softcap=0.0, z_loss=0.0
    ):
        it.settle(True, False, None, (input, target))

    it.gate(cross_entropy, "cross_entropy")
    logits, labels, kept = torch.randn(4000, 256), torch.zeros(4000, dtype=torch.long), []
    at_it.append("answered")
    while True:  # to let go of a tensor is PyTorch's own
        kept.append(operator.call(cross_entropy, logits, labels))


def looked_at():
    def rms_norm(x, weight=None, eps=1e-6):
        going("looked at")

    it.gate(rms_norm, "rms_norm")
    operator.call(rms_norm, torch.randn(3, 8), torch.randn(8))


def in_turns():
    class Turns:
        def host_bound(self):
            going("in turns")

    def rms_norm(x, weight=None, eps=1e-6):
        it.settle(Turns(), False, None, (x, weight))

    it.gate(rms_norm, "rms_norm")
    x, weight = torch.randn(5, 8), torch.randn(8)
    for _ in range(2):
        operator.call(rms_norm, x, weight)


def asked():
    torch.relu(torch.randn(3))


def by_note():
    q = torch.randn(1, 1, 4, 8)
    torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)


def keyed():
    class Other(torch.Tensor):
        pass

    it.key(None, (torch.randn(3).as_subclass(Other),))


mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
it.install("aten::relu")
it.notes({id(mask): None}, lambda *_: going("by note"), (0.0, 0.0))
it.keys(torch.nn.Parameter, lambda *_: going("keyed"))
it.open(torch.compiler, torch.nn.Parameter)
it.start(lambda *_: going("asked"))
sys.setswitchinterval(1e-4)
ways = {"answered": answered, "looked at": looked_at, "in turns": in_turns, "asked": asked, "by note": by_note}
ways["keyed"] = keyed
for name in sys.argv[1:] or ways:
    threading.Thread(target=ways[name], daemon=True).start()
    while name not in at_it:
        time.sleep(1e-3)
"""


def test_threads_that_are_in_the_extension_when_the_program_ends(library, folder, monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(folder))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
