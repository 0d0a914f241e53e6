"""What is spelled out, and what is called, for tests of `attn_implementation="tilebook"`."""

import pytest

from tilebook.huggingface import attention


@pytest.fixture
def structured(monkeypatch):
    """Masks with a simple structure are passed on as on a GPU, to the plain PyTorch of the same functions."""
    monkeypatch.setattr(attention, "_served", lambda *_: True)


@pytest.fixture
def called(monkeypatch):
    """The options of each call of our functions, and the tensors by name."""
    calls = []

    def spy(name, *names):
        ours = getattr(attention, name)

        def function(*tensors, **options):
            calls.append((name, dict(zip(names, tensors, strict=True)) | options))
            return ours(*tensors, **options)

        monkeypatch.setattr(attention, name, function)

    spy("attention", "q", "k", "v")
    spy("scaled_dot_product_attention", "q", "k", "v", "attn_mask", "dropout_p", "causal")
    spy("attention_varlen", "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    return calls
