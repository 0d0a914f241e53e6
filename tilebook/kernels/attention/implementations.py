"""Whatever computes attention registers itself when it is imported: our own kernels first, the baseline."""

from tilebook.kernels.attention.triton import launch  # isort: skip
from tilebook.kernels.attention import peers
from tilebook.kernels.attention.gluon import launch as gluon

__all__ = ["gluon", "launch", "peers"]
