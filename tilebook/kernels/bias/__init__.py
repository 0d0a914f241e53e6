"""The gradient of a linear layer's bias: the sum of the rows of its result's gradient.

It has no function of its own: under `tilebook.enable()` it stands in autocast's linear layers (see `standing`).
"""

__all__: list[str] = []
