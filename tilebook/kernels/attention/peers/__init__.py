"""What others compute attention with, a file each: what it is, where it runs, what it takes. Each registers itself.

The backward passes all add something up in an order of its own each time, so none of them is deterministic.
"""

from tilebook.kernels.attention.peers import cudnn, efficient, flash4, flex, torch, torch_flash

__all__ = ["cudnn", "efficient", "flash4", "flex", "torch", "torch_flash"]
