"""Other people's Triton kernels: recorded where they run, tuned and proved offline, served by the same registry.

`kernel` says which kernel and config a call of `triton.autotune` is about, `names` what registries call it; `call` is
one recorded call, `record` a program's, and `offered` gives it to a tune. `ops` makes an op of a kernel, which the
tuner takes for one of ours, and `truth` says what is right. `serving` looks verdicts up; `autotune` and `wrap` put that
into programs. `spaces` and `given` do so for kernels that have no autotuner, whose grids follow by `grids`.
"""
