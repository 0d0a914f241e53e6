"""A guess at a candidate's time on a GPU that is not here: a roofline, bent by occupancy. For ranking configs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilebook.device import Device
from tilebook.occupancy import programs_per_sm
from tilebook.problem import Cost
from tilebook.tuner.process.compile import Binary, Compiled

# What well-tuned kernels reach of the datasheet's rates.
_COMPUTE_SHARE = 0.75
_MEMORY_SHARE = 0.85
_L2_RATE = 60e9  # bytes per second and SM; 8 TB/s on an H100: what 128 × 256 tiles draw at 700 TFLOP/s
_L2_MISSES = 0.25  # of re-reads, once the tensors outgrow the L2 cache
_HALF_HIDDEN = 4.0  # loads in flight (warps × stages) at which half of the time goes into waiting
_SPILL_BYTES = 512.0  # per thread: as much doubles the time
_LAUNCH_S = 2.5e-6


@dataclass(frozen=True)
class Prediction:
    """occupancy: resident share of the warps that an SM can hold. waves: programs over those resident at a time.

    bound: "compute", "l2" or "memory"; "latency" where waiting, idle SMs and launches take over half of the time.
    occupancy and waves are those of the kernel that does most of the work.
    """

    time_ms: float
    occupancy: float
    waves: float
    bound: str


def predict(op_cost: Cost, work: Cost | None, compiled: Compiled, device: Device) -> Prediction:
    """The predicted time of a candidate that compiled.

    op_cost: the op's floor; its bytes must cross device memory. work: what the config really does (`Space.work`), its
    padding counted as flops and its re-reads as bytes through L2; None if the space does not say.

        time = Σ over kernels: launch + max(compute (b + 1) / b, max(l2, memory) (p + 4) / p) (1 + spills / 512)

    where b is the programs resident on an SM, which fill each other's waits for tensor cores, and p its loads in
    flight, resident warps · stages; compute and l2 are stretched by the share of SM time that the last, partial round
    of programs wastes. The work is split among a candidate's kernels by programs × shared memory: that is where tiles
    pass through.

    Against 5,000 configs timed on an H200 the rank correlation within a problem is 0.3–0.4 and the first choice takes
    1.1–1.3 times as long as the best (docs/perf-notes.md): better than chance, no replacement for measuring.

    Left out: instruction mix and tensor-core efficiency of a tile shape, bank conflicts, clocks under load, uneven
    programs (causal attention) and what persistent programs do, atomics, dtypes other than bf16. Good for leaving out
    the hopeless and for a decent default; the order of the best few is noise.
    """
    if not compiled.binaries:
        raise ValueError("nothing to predict: the candidate has no binaries")
    work = work or op_cost
    weights = [each.grid * (each.shared + 1) for each in compiled.binaries]
    shares = [weight / max(1, sum(weights)) for weight in weights]
    parts = [_kernel(each, share, op_cost, work, device) for each, share in zip(compiled.binaries, shares, strict=True)]
    main = parts[shares.index(max(shares))]
    return Prediction(sum(part.time_ms for part in parts), main.occupancy, main.waves, main.bound)


def _kernel(kernel: Binary, share: float, floor: Cost, work: Cost, device: Device) -> Prediction:
    blocks = max(1, programs_per_sm(kernel.warps, kernel.registers, kernel.shared, device))
    grid = max(1, kernel.grid)
    rounds = math.ceil(grid / device.sm_count)  # programs that the busiest SM runs, one beside or after the other
    busy = grid / (rounds * device.sm_count)
    # Half of the SMs can saturate device memory, all of them are needed for the rest.
    reaching = min(1.0, 2 * grid / device.sm_count)
    misses = _L2_MISSES if floor.bytes > device.l2 else 0.0
    through_memory = floor.bytes + misses * max(0.0, work.bytes - floor.bytes)
    ideal = {
        "compute": work.flops / (device.flops * _COMPUTE_SHARE),
        "l2": work.bytes / (_L2_RATE * device.sm_count),
        "memory": through_memory / (device.bandwidth * _MEMORY_SHARE),
    }
    resident = min(blocks, rounds)
    in_flight = resident * kernel.warps * max(1, kernel.stages)
    loads, programs = in_flight / (in_flight + _HALF_HIDDEN), resident / (resident + 1)
    stretch = {"compute": busy * programs, "l2": busy * loads, "memory": reaching * loads}
    seconds = {bound: share * ideal[bound] / stretch[bound] for bound in ideal}
    bound = max(seconds, key=lambda each: seconds[each])
    time = _LAUNCH_S + seconds[bound] * (1 + kernel.spills / _SPILL_BYTES)
    if share * ideal[bound] < time / 2:
        bound = "latency"
    occupancy = min(1.0, blocks * kernel.warps * device.warp_size / device.threads_per_sm)
    return Prediction(time * 1e3, occupancy, grid / (device.sm_count * blocks), bound)
