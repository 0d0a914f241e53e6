"""What is spelled out, and what is called, for tests of `attn_implementation="tilebook"`."""

import pytest

from tilebook.huggingface import attention
from tilebook.kernels.varlen import packs


@pytest.fixture
def structured(monkeypatch):
    """Masks with a simple structure are passed on as on a GPU, to the plain PyTorch of the same functions."""
    monkeypatch.setattr(attention, "_served", lambda *_: True)


@pytest.fixture
def called(monkeypatch):
    """The options of each call of our functions, and the tensors by name."""
    calls = []

    def spy(module, name, *names):
        ours = getattr(module, name)

        def function(*tensors, **options):
            calls.append((name, dict(zip(names, tensors, strict=True)) | options))
            return ours(*tensors, **options)

        monkeypatch.setattr(module, name, function)

    spy(attention, "attention", "q", "k", "v")
    spy(attention, "scaled_dot_product_attention", "q", "k", "v", "attn_mask", "dropout_p", "causal")
    spy(packs, "attention_varlen", "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    return calls
