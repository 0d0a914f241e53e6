"""Kernels as users have them, honest configs of each, and configs with faults; what programs call them with.

A config's `FAULT` says what is wrong with it, 0 for nothing: see `faults`. `CALLS` are programs that run each kernel
once by its first config, on the device that is asked for, and look at what came of it. `RULES` is what their records
want to know of integers.
"""

from corpus import lines, tiles

CALLS = {
    "corpus.lines:add_kernel": lines.add,
    "corpus.lines:scale_kernel": lines.scale,
    "corpus.lines:softmax_kernel": lines.softmax,
    "corpus.lines:layer_norm_kernel": lines.layer_norm,
    "corpus.lines:cumsum_kernel": lines.cumsum,
    "corpus.lines:total_kernel": lines.total,
    "corpus.lines:adam_kernel": lines.adam,
    "corpus.lines:dropout_kernel": lines.dropout,
    "corpus.tiles:matmul_kernel": tiles.matmul,
    "corpus.tiles:split_kernel": tiles.split,
    "corpus.tiles:transpose_kernel": tiles.transpose,
    "corpus.tiles:embed_kernel": tiles.embed,
    "corpus.tiles:pool_kernel": tiles.pool,
    "corpus.tiles:packed_kernel": tiles.packed,
    "corpus.tiles:rope_kernel": tiles.rope,
}

RULES = {
    "corpus.tiles:embed_kernel": {"index": {"below": 30}},
    "corpus.tiles:packed_kernel": {"offsets": {"cumulative": 50}},
    "corpus.lines:adam_kernel": {"v": {"uniform": [0, 1]}},
}


def tuner(name):
    """The autotuner of a kernel of `CALLS`."""
    module, _, kernel = name.partition(":")
    return getattr({"corpus.lines": lines, "corpus.tiles": tiles}[module], kernel)


def planted():
    """(kernel, fault) of all faulty configs, and how many honest ones there are."""
    every = [(name, config.kwargs["FAULT"]) for name in CALLS for config in tuner(name).configs]
    return [(name, fault) for name, fault in every if fault], sum(fault == 0 for _, fault in every)
