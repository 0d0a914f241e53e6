"""What works here, what does not, and what to do about it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tilebook.registry.overview import Shown

Level = Literal["ok", "note", "fault"]

_TRITON = (3, 6)
_CUDNN_PACKAGES = "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A note is worth knowing; a fault keeps something from working."""

    level: Level
    about: str
    text: str
    advice: str = ""


def findings(registry: str | None = None, *, run: bool = True) -> list[Finding]:
    """All that can be said of this machine. run: also build and run what is ours."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "PyTorch": _torch, "GPU": _gpu, "Triton": _triton, "cuDNN": _cudnn, "flash-attn-4": _flash,
        "extension": _extension, "TILEBOOK": _turned_on, "registry": lambda: _registry(registry),
        "known answers": _answers,
    }  # fmt: skip
    found: list[Finding] = []
    for about, check in checks.items():
        if about in ("extension", "known answers") and not run:
            continue
        try:
            found += check()
        except Exception as broken:  # what is broken is what we are here to tell
            found.append(Finding("fault", about, f"{type(broken).__name__}: {broken}"))
    return found


def _torch() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda or torch.version.hip
    yield Finding("ok", "PyTorch", f"{torch.__version__}, built for {built or 'the CPU alone'}")


def _gpu() -> Iterator[Finding]:
    import torch

    from tilebook import device as devices

    if not torch.cuda.is_available():
        advice = "kernels run on a GPU; --gpu NAME tunes for a model without one"
        yield Finding("note", "GPU", "none that PyTorch sees: PyTorch's own functions run", advice)
        return
    for index in range(torch.cuda.device_count()):
        gpu = devices.current(index)
        yield Finding("ok", "GPU", f"{index}: {gpu.name}, {gpu.arch}, {gpu.sm_count} multiprocessors")


def _triton() -> Iterator[Finding]:
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if version < _TRITON:
        advice = f"install a PyTorch whose Triton is {'.'.join(map(str, _TRITON))} or newer"
        yield Finding("fault", "Triton", f"{triton.__version__} is too old for our kernels", advice)
    else:
        yield Finding("ok", "Triton", triton.__version__)


def _cudnn() -> Iterator[Finding]:
    import torch

    cudnn: Any = torch.backends.cudnn
    loaded = cudnn.version() if cudnn.is_available() else None
    if loaded is None:
        return
    for package in _CUDNN_PACKAGES:
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        major, minor, patch, *_ = (int(part) for part in [*installed.split("."), "0", "0"])
        if (major, minor, patch) != (loaded // 10_000, loaded // 100 % 100, loaded % 100):
            shadow = " LD_LIBRARY_PATH may put another in front." if os.environ.get("LD_LIBRARY_PATH") else ""
            text = f"{loaded} is loaded, {package} {installed} is installed.{shadow}"
            yield Finding("note", "cuDNN", text, "verdicts count for the version that is loaded")
            return
    yield Finding("ok", "cuDNN", str(loaded))


def _flash() -> Iterator[Finding]:
    from tilebook import device as devices

    version = devices.package_version("flash-attn-4")
    if version != "unknown":
        yield Finding("ok", "flash-attn-4", version)
    elif devices.present() and 90 <= devices.current().capability < 120:
        advice = "pip install --pre flash-attn-4"
        yield Finding("note", "flash-attn-4", "not installed; verdicts that it won fall to the next best", advice)


def _turned_on() -> Iterator[Finding]:
    from tilebook import call, enabling
    from tilebook.variables import ASKED, value

    named = {each.name for each in metadata.entry_points(group="torch.backends")}
    asked = os.environ.get(ASKED, "") if value(ASKED) else ""
    status = enabling.status()
    if call.disabled():
        yield Finding("note", "TILEBOOK_DISABLE", "is set: everything is PyTorch's")
    elif status.enabled:
        others = f"; others stand in the places of {', '.join(status.others)}" if status.others else ""
        places = ", ".join((*status.replaced, *status.served))
        yield Finding("ok", "TILEBOOK", f"on, in the places of {places}{others}")
    elif not asked:
        yield Finding("ok", "TILEBOOK", "off: TILEBOOK=1, or tilebook.enable() in a program, turns it on")
    elif "tilebook" not in named:
        yield Finding("fault", "TILEBOOK", f"{asked}, but PyTorch was not told of tilebook", "install it with pip")
    elif os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        yield Finding("fault", "TILEBOOK", f"{asked}, but TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps PyTorch from it")
    else:
        yield Finding("fault", "TILEBOOK", f"{asked} is none of 1, true, yes, on, patch, or it failed with a warning")


def _extension() -> Iterator[Finding]:
    """Builds it: who asks what works here wants it to."""
    from tilebook import device as devices
    from tilebook.native import build, place

    if place.built() is None and not devices.present():
        return
    try:
        yield Finding("ok", "extension", str(build.build()))
    except build.BuildError as broken:
        advice = "without it, norms that TILEBOOK=1 serves cost the host more than PyTorch's do"
        yield Finding("note", "extension", str(broken), advice)


def _registry(explicit: str | None) -> Iterator[Finding]:
    from tilebook import device as devices
    from tilebook import op as ops
    from tilebook.registry import Layers
    from tilebook.registry.current import stands

    gpu = devices.current() if devices.present() else None
    layers = Layers.default(explicit)
    shown, _ = layers.overviews(gpu=None if gpu is None else gpu.name)
    for problem in layers.problems:
        yield Finding("fault", "registry", problem, "tilebook check says more")
    known = ops.ops()
    for name, target in layers.layers:
        found = [each for layer, each in shown if layer == name]
        served = [v for v in found if v.op in known and v.trusted and v.measured and stands(v, known[v.op].digest)]
        of = "" if gpu is None else f" for {gpu.name}"
        if name not in layers.unread and (found or name == "shipped"):
            why = _unserved(found, known)
            told = f"{len(served)} verdicts{of} serve, of {len(found)}{f' ({why})' if why else ''}: {target}"
            yield Finding("ok", f"registry, {name}", told)
    if gpu is not None and not any(layer for layer, _ in shown):
        text = f"no verdict for {gpu.name}: PyTorch's own calls run where it has them"
        yield Finding("note", "registry", text, "tilebook tune --suite seeds, or --misses after a program has run")


def _unserved(verdicts: Iterable[Shown], known: Mapping[str, Any]) -> str:
    """Why some do not serve: how many for which reason, "" where all do."""
    from tilebook.registry.current import stands

    def why(each: Shown) -> str:
        if each.op not in known:
            return "kernels of others, or ops of another version"
        if not each.trusted:
            return "not trusted: tilebook verify measures them here"
        if not stands(each, known[each.op].digest):
            return "of kernels as they were"
        return "" if each.measured else "predicted: they serve only where PyTorch has no kernel of its own"

    counts = Counter(filter(None, map(why, verdicts)))
    return "; ".join(f"{count} {reason}" for reason, count in counts.most_common())


_KNOWN_ANSWERS = """
import torch, tilebook
import torch.nn.functional as F
from tilebook import dispatch

def rand(*shape, scale=1.0):
    return (scale * torch.randn(shape, device="cuda")).bfloat16().requires_grad_()

x, w, b = rand(256, 512), rand(512), rand(512)
qkv = rand(2, 4, 128, 64), rand(2, 4, 128, 64), rand(2, 4, 128, 64)
target = torch.randint(512, (256,), device="cuda")
block = rand(256, 512), rand(1024, 512), rand(1024), rand(512, 1024), rand(512)
head = rand(256, 512), rand(1024, 512, scale=0.05)  # of larger logits bf16 itself errs by more than is allowed
for name, ours, theirs, given in [
    ("attention", tilebook.attention, F.scaled_dot_product_attention, qkv),
    ("layer_norm", tilebook.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), (x, w, b)),
    ("rms_norm", tilebook.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), (x, w)),
    ("cross_entropy", lambda x: tilebook.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), (x,)),
    (
        "linear_cross_entropy",
        lambda x, w: tilebook.linear_cross_entropy(x, w, target),
        lambda x, w: F.cross_entropy(x @ w.t(), target),
        head,
    ),
    ("mlp", tilebook.mlp, lambda x, a, c, d, e: F.linear(F.gelu(F.linear(x, a, c)), d, e), block),
]:
    right = theirs(*[each.float() for each in given])
    start = torch.randn_like(right)
    right = [right, *torch.autograd.grad(right, given, start)]
    with dispatch.use("triton"):
        found = ours(*given)
        found = [found, *torch.autograd.grad(found, given, start.to(found.dtype))]
    worst = max(((a.float() - r.float()).abs().max() / r.float().abs().max()).item() for a, r in zip(found, right))
    print(name, worst)
"""

_ANSWER_S, _WORST = 180, 0.05


def _answers() -> Iterator[Finding]:
    """In a process of its own: a kernel that fails may take the GPU's context along."""
    import subprocess

    from tilebook import device as devices

    if not devices.present():
        return
    command = [sys.executable, "-c", _KNOWN_ANSWERS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("fault", "known answers", f"our kernels had not run after {_ANSWER_S} s")
        return
    yield from judged(done.stdout, done.returncode, done.stderr)


def judged(told: str, status: int, complaint: str) -> Iterator[Finding]:
    """What the process that ran our kernels told: a line for each function with its largest relative error."""
    for line in told.splitlines():
        name, worst = line.split()
        right = float(worst) <= _WORST
        text = f"forward and backward within {float(worst):.1e} of fp32" if right else f"wrong by {float(worst):.1e}"
        advice = "" if right else "tilebook revoke, and please report it"
        yield Finding("ok" if right else "fault", f"known answer, {name}", text, advice)
    if status:
        last = (complaint.strip().splitlines() or ["no word"])[-1]
        yield Finding("fault", "known answers", f"our kernels do not run: {last[:300]}")


def table(found: Sequence[Finding]) -> str:
    """A line each, what is wrong first; then what to do about it."""
    order: dict[str, int] = {"fault": 0, "note": 1, "ok": 2}
    wide = max(len(each.about) for each in found)
    lines = []
    for each in sorted(found, key=lambda one: order[one.level]):
        lines.append(f"{each.level:5}  {each.about:{wide}}  {each.text}")
        if each.advice:
            lines.append(f"{'':5}  {'':{wide}}  → {each.advice}")
    return "\n".join(lines)


def data(found: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(each) for each in found]
