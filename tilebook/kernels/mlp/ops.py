"""The four ops of the MLP block, as the tuner and the registry know them."""

from tilebook.kernels.mlp.grads import mlp_grads_bwd
from tilebook.kernels.mlp.products import mlp_act_bwd, mlp_down_fwd, mlp_up_fwd

__all__ = ["mlp_act_bwd", "mlp_down_fwd", "mlp_grads_bwd", "mlp_up_fwd"]

mlp_up_fwd.backward = mlp_act_bwd
