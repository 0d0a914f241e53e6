"""How models of transformers come to run on tilebook, for tests on the CPU."""

import contextlib

import pytest
from programs.hf_models import OWN, on_tilebook

from tilebook import dispatch
from tilebook.huggingface import attention

WAYS = [("enabled", False), ("enabled", True), ("implementation", False), ("implementation", True)]


def ways(name):
    """How it is called, and whether structured."""
    return [way for way in WAYS if name not in OWN or way[0] == "enabled"]


@contextlib.contextmanager
def on(model, called, structured):
    """Kernels do not run. Structured, masks with a simple structure are passed on as on a GPU, in fp32 too.

    What is called then is the plain PyTorch of the same functions.
    """
    with on_tilebook(model, called), pytest.MonkeyPatch.context() as patch:
        if structured:
            patch.setattr(attention, "_served", lambda *_: True)
        with dispatch.use("torch") if structured and called == "enabled" else contextlib.nullcontext():
            yield
