"""What an MLP block may be."""

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
