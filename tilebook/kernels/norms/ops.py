"""The ops of all norms, as the tuner and the registry know them."""

from tilebook.kernels.norms.added import add_layer_norm_bwd, add_layer_norm_fwd, add_rms_norm_bwd, add_rms_norm_fwd
from tilebook.kernels.norms.layer import layer_norm_bwd, layer_norm_fwd
from tilebook.kernels.norms.rms import rms_norm_bwd, rms_norm_fwd

__all__ = [
    "add_layer_norm_bwd",
    "add_layer_norm_fwd",
    "add_rms_norm_bwd",
    "add_rms_norm_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "rms_norm_bwd",
    "rms_norm_fwd",
]
