"""The sum of two large tensors that PyTorch's kernel is slow with: of two dtypes, or of two orders in memory.

Residual streams under autocast are the first (fp32 and bf16), those behind a convolution the second. It has no function
of its own: under `tilebook.enable()` it stands in PyTorch's addition (see `standing`).
"""

__all__: list[str] = []
