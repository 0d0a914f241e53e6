"""Our forward kernel for Hopper in Gluon, Triton's language for what its compiler does not arrange."""
