"""Finds the fastest correct way to run attention and what is around it on this GPU, writes it down, and uses it.

The public functions are those of the kernel families (`tilebook.attention`, `tilebook.mlp`, …), and those that put them
into the places of PyTorch's (`tilebook.enable`, …).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilebook import nn as nn
    from tilebook.dispatch.probing import probe
    from tilebook.enabling import disable, enable, enabled, register_kernels, register_transformers, status
    from tilebook.foreign.autotune import autotune
    from tilebook.foreign.spaces import give_space
    from tilebook.kernels.attention import attention, scaled_dot_product_attention
    from tilebook.kernels.cross_entropy import cross_entropy
    from tilebook.kernels.decode import attention_decode
    from tilebook.kernels.delta_rule import gated_delta_rule, gated_delta_rule_step
    from tilebook.kernels.glu import geglu, glu, swiglu
    from tilebook.kernels.linear_attention import (
        gated_linear_attention,
        linear_attention,
        linear_attention_step,
    )
    from tilebook.kernels.linear_cross_entropy import linear_cross_entropy
    from tilebook.kernels.mlp import mlp
    from tilebook.kernels.mlstm import mlstm, mlstm_step
    from tilebook.kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
    from tilebook.kernels.rope import apply_rope
    from tilebook.kernels.varlen import attention_varlen
    from tilebook.patching import patch, patched
    from tilebook.scripted import tune

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "attention_decode",
    "attention_varlen",
    "autotune",
    "cross_entropy",
    "disable",
    "enable",
    "enabled",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_linear_attention",
    "geglu",
    "give_space",
    "glu",
    "layer_norm",
    "linear_attention",
    "linear_attention_step",
    "linear_cross_entropy",
    "mlp",
    "mlstm",
    "mlstm_step",
    "patch",
    "patched",
    "probe",
    "register_kernels",
    "register_transformers",
    "rms_norm",
    "scaled_dot_product_attention",
    "status",
    "swiglu",
    "tune",
]

__version__ = "0.1.0"

_MODULE = {
    "add_layer_norm": "kernels.norms",
    "add_rms_norm": "kernels.norms",
    "apply_rope": "kernels.rope",
    "attention": "kernels.attention",
    "attention_decode": "kernels.decode",
    "attention_varlen": "kernels.varlen",
    "autotune": "foreign.autotune",
    "cross_entropy": "kernels.cross_entropy",
    "disable": "enabling",
    "enable": "enabling",
    "enabled": "enabling",
    "gated_delta_rule": "kernels.delta_rule",
    "gated_delta_rule_step": "kernels.delta_rule",
    "gated_linear_attention": "kernels.linear_attention",
    "geglu": "kernels.glu",
    "give_space": "foreign.spaces",
    "glu": "kernels.glu",
    "layer_norm": "kernels.norms",
    "linear_attention": "kernels.linear_attention",
    "linear_attention_step": "kernels.linear_attention",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "mlp": "kernels.mlp",
    "mlstm": "kernels.mlstm",
    "mlstm_step": "kernels.mlstm",
    "patch": "patching",
    "patched": "patching",
    "probe": "dispatch.probing",
    "register_kernels": "enabling",
    "register_transformers": "enabling",
    "rms_norm": "kernels.norms",
    "scaled_dot_product_attention": "kernels.attention",
    "status": "enabling",
    "swiglu": "kernels.glu",
    "tune": "scripted",
}
"""Public function → the module that has it, which is imported when it is first asked for."""

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name != "nn" and name not in _MODULE:
            raise AttributeError(f"module 'tilebook' has no attribute {name!r}")
        importlib.import_module("torch")  # first: at its end PyTorch may turn tilebook on
        if name == "nn":
            return importlib.import_module("tilebook.nn")
        found = globals()[name] = getattr(importlib.import_module(f"tilebook.{_MODULE[name]}"), name)
        return found


def __dir__() -> list[str]:
    shown = {name for name in globals() if name not in ("Any", "TYPE_CHECKING", "annotations", "importlib")}
    return sorted({*shown, *__all__, "nn"})
