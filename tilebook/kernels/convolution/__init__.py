"""The gradient of a two-dimensional convolution's weight, for the convolutions in front of vision transformers.

It has no function of its own: under `tilebook.enable()` it stands in PyTorch's op (see `standing`).
"""

__all__: list[str] = []
