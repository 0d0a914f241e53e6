"""Runs a program in a process of its own: what it may do to the GPU, it does to itself.

`python -m programs.isolated MODULE FUNCTION '{"argument": "value"}'`, with tests/ on the path.
"""

import faulthandler
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def run(module, function, seconds=120, **arguments):
    """The function of a module in a fresh process; its failure is the test's, its skip too."""
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "programs.isolated", module, function, json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired as late:
        said = late.stderr.decode(errors="replace") if isinstance(late.stderr, bytes) else late.stderr or ""
        pytest.fail(f"still running after {seconds} s\n{said[-3000:]}", pytrace=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}", pytrace=False)
    return done.stdout


def alone_on_a_gpu(body):
    """A test whose body runs in a process of its own where its device is a GPU, which it could take from the others."""

    @functools.wraps(body)
    def test(**arguments):
        if arguments.get("device") == "cuda":
            run(body.__module__, body.__name__, **arguments)
        else:
            body(**arguments)

    return test


def each(names, body):
    """Runs the body with each name; all that fail are told, but after a lost GPU nothing more is asked of it."""
    failures = []
    for name in names:
        try:
            body(name)
        except Exception as failure:
            failures.append(f"{name}: {type(failure).__name__}: {str(failure)[:600]}")
            if "CUDA error" in str(failure):
                break
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def main():
    faulthandler.enable()  # which function an abort came from
    module, function, arguments = sys.argv[1:]
    body = getattr(importlib.import_module(module), function)
    try:
        getattr(body, "__wrapped__", body)(**json.loads(arguments))
    except pytest.skip.Exception as skipped:
        print(skipped)
        sys.exit(77)
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
