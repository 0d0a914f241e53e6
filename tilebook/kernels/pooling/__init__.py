"""The gradient of two-dimensional max pooling, for the tokenizers in front of vision transformers.

It has no function of its own: under `tilebook.enable()` it stands in PyTorch's op (see `standing`).
"""

__all__: list[str] = []
