"""Whatever computes attention registers itself when it is imported: our own kernels first, the baseline."""

from tilebook.kernels.attention import backward, forward  # isort: skip
from tilebook.kernels.attention import backward_joint, backward_reduce, forward_gluon, others

__all__ = ["backward", "backward_joint", "backward_reduce", "forward", "forward_gluon", "others"]
