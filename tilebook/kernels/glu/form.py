"""What a gated linear unit may be."""

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
