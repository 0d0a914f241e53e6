"""A registry with a verdict on a kernel of others, and a program that believes to be on an H200."""

from tilebook import device as devices
from tilebook.foreign.kernel import Kernel, key_of
from tilebook.registry import Device, Environment, Finalist, Layers, Speedup, Verdict, VerdictStatus

GPU = devices.find("H200")


def on_an_h200(monkeypatch, registry):
    """Only the look-up needs a GPU: kernels run in the interpreter."""
    monkeypatch.setattr(devices, "present", lambda: True)
    monkeypatch.setattr(devices, "current", lambda index=0: GPU)
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(registry))


def verdict(tuner, args, winner, *others, predicted=False, digest=None, trusted=True):
    """A verdict on the call's problem that these configs of the autotuner won, best first."""
    kernel = Kernel(tuner)
    listed = [dict(kernel.config(each)) for each in (winner, *others)]
    if predicted:
        found = [Finalist("triton", each, predicted_ms=1.0 + n) for n, each in enumerate(listed)]
        numbers = {}
    else:
        ratio = Speedup(1.2, 1.1, 1.3)
        found = [Finalist("triton", each, time_ms=1.0 + n, speedup=ratio) for n, each in enumerate(listed)]
        numbers = {"default_time_ms": 1.2, "interval": ratio}
    return Verdict(
        op=kernel.op,
        problem=kernel.problem(key_of(tuner, args, {})),
        device=Device(*GPU.identity),
        environment=Environment({"triton": "3.6.0"}),
        kernel=digest or kernel.digest,
        status=VerdictStatus.PREDICTED if predicted else VerdictStatus.MEASURED,
        finalists=tuple(found),
        sources={"triton": digest or kernel.digest},
        trusted=trusted,
        **numbers,
    )


def stored(registry, *verdicts):
    with Layers([("explicit", str(registry))]).writer() as writer:
        for each in verdicts:
            writer.record((), each)
