"""Our own kernels, in Triton: forward, and backward by rows (dq) and by columns (dk and dv)."""
