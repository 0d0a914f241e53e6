"""Whatever computes attention registers itself when it is imported: our own kernels first, the baseline."""

from tilebook.kernels.attention.triton import launch  # isort: skip
from tilebook.kernels.attention import forward_gluon, others

__all__ = ["forward_gluon", "launch", "others"]
