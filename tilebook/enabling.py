"""Models as they are on tilebook: our functions in the places of PyTorch's, until they are taken out again.

`torch.nn`'s modules, transformers, timm and diffusers look `torch.nn.functional`'s functions up when they call them, so
that a model needs no change. What ours do not take they hand to PyTorch's, and a program that is traced gets PyTorch's
own functions wherever no verdict has ours ahead.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import _jit_internal
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import device as devices
from tilebook import native
from tilebook.call import disabled
from tilebook.dispatch import forced
from tilebook.imported import after_import
from tilebook.kernels.addition.standing import STANDINGS as _ADDITIONS
from tilebook.kernels.attention.drop_in import NOTES, in_place, scaled_dot_product_attention
from tilebook.kernels.attention.standing import STANDINGS as _ATTENTIONS
from tilebook.kernels.bias.standing import STANDINGS as _BIASES
from tilebook.kernels.convolution.standing import STANDINGS as _CONVOLUTIONS
from tilebook.kernels.cross_entropy import cross_entropy as our_cross_entropy
from tilebook.kernels.cross_entropy import pytorchs as losses_pytorchs
from tilebook.kernels.cross_entropy import takes
from tilebook.kernels.cross_entropy.check import REDUCTIONS
from tilebook.kernels.norms import layer_norm as our_layer_norm
from tilebook.kernels.norms import pytorchs
from tilebook.kernels.norms import rms_norm as our_rms_norm
from tilebook.kernels.norms.standing import STANDINGS as _NORMS
from tilebook.kernels.pooling.standing import STANDINGS as _POOLINGS
from tilebook.kernels.varlen.standing import STANDINGS as _PACKS
from tilebook.left import ORDINARY
from tilebook.logs import log

_theirs: dict[str, Callable[..., Any]] = {
    name: getattr(F, name) for name in ("scaled_dot_product_attention", "layer_norm", "rms_norm", "cross_entropy")
}
"""What ours have taken the places of; until then, what stood there when this module was loaded."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHAPES = (tuple, list, torch.Size)
_COMPILER = "torch._inductor.compile_fx"
_MASKS = "transformers.masking_utils"
_MODELS = "transformers.modeling_utils"
_NO_ARGUMENT = 1 << 10


def takes_norm(x: Any, normalized_shape: Sequence[int], vectors: Sequence[Any], eps: Any) -> bool:
    """Is a norm's call one over the last axis of ordinary tensors on a GPU, of one dtype that autocast lets be?"""
    if type(x) not in ORDINARY or type(eps) is not float or type(normalized_shape) not in _SHAPES:
        return False
    if not (x.is_cuda or forced()) or not x.ndim or x.dtype not in _DTYPES or len(normalized_shape) != 1:
        return False
    (width,), last, gpu = normalized_shape, x.shape[-1:], x.get_device()
    if type(width) is not int or width != last[0]:
        return False
    if x.dtype != torch.float32 and torch.is_autocast_enabled("cuda"):
        return False  # which has norms in fp32
    for each in vectors:
        if each is not None and (type(each) not in ORDINARY or each.dtype != x.dtype):
            return False
        if each is not None and (each.shape != last or each.get_device() != gpu):
            return False  # PyTorch's to refuse
    return vectors[0] is not None or not any(each is not None for each in vectors)


def _takes_loss(x: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, smoothing: Any) -> bool:
    """Is a call of cross entropy one with class indices, of ordinary tensors on one GPU that go together?"""
    if type(x) not in ORDINARY or type(target) not in ORDINARY or weight is not None or not x.ndim:
        return False
    if not x.is_cuda and not forced():
        return False
    if type(ignore_index) is not int or reduction not in REDUCTIONS or type(smoothing) not in (float, int):
        return False
    return 0 <= smoothing <= 1 and target.device == x.device and takes(x, target, weight, ignore_index)


class _Place:
    """Has functions as bound methods, which `torch.compile` traces into.

    It looks the functions of PyTorch's that it leaves in its graphs up by name when it is loaded, and would find ours.
    What is pickled of them is PyTorch's names: a module that holds one is loaded where there is no tilebook, too.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return importlib.import_module, (F.__name__,)

    def __deepcopy__(self, memo: Any) -> _Place:
        return self

    def layer_norm(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """Drop-in for `torch.nn.functional.layer_norm`: same arguments, same meaning, same errors."""
        given = input, weight, bias
        if not torch.compiler.is_compiling() and has_torch_function(given):
            told: Any = layer_norm if in_place(layer_norm, given) else _theirs["layer_norm"]
            more: Any = {"weight": weight, "bias": bias, "eps": eps}
            return handle_torch_function(told, given, input, normalized_shape, **more)  # type: ignore[no-any-return]
        known = pytorchs("layer_norm", input, weight, bias)
        if not known and takes_norm(input, normalized_shape, (weight, bias), eps):
            return our_layer_norm(input, weight, bias, eps)
        return _theirs["layer_norm"](input, normalized_shape, weight, bias, eps)  # type: ignore[no-any-return]

    def cross_entropy(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Drop-in for `torch.nn.functional.cross_entropy`: same arguments, same meaning, same errors.

        But a target that is no class, which ends the process there, has NaN where a kernel of ours serves.
        """
        given = input, target, weight
        if not torch.compiler.is_compiling() and has_torch_function(given):
            told: Any = cross_entropy if in_place(cross_entropy, given) else _theirs["cross_entropy"]
            more: Any = {"weight": weight, "size_average": size_average, "ignore_index": ignore_index}
            more |= {"reduce": reduce, "reduction": reduction, "label_smoothing": label_smoothing}
            return handle_torch_function(told, given, input, target, **more)  # type: ignore[no-any-return]
        usual = size_average is None and reduce is None
        usual = usual and not losses_pytorchs(input, target, weight, label_smoothing)
        if usual and _takes_loss(input, target, weight, ignore_index, reduction, label_smoothing):
            return our_cross_entropy(input, target, None, ignore_index, reduction, label_smoothing)
        old: Any = size_average, ignore_index, reduce
        return _theirs["cross_entropy"](input, target, weight, *old, reduction, label_smoothing)  # type: ignore[no-any-return]


_place = _Place()
layer_norm, cross_entropy = _place.layer_norm, _place.cross_entropy


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Drop-in for `torch.nn.functional.rms_norm`: same arguments, same meaning, same errors."""
    given = input, weight
    if not torch.compiler.is_compiling() and has_torch_function(given):
        told: Any = rms_norm if in_place(rms_norm, given) else _theirs["rms_norm"]
        more: Any = {"weight": weight, "eps": eps}
        return handle_torch_function(told, given, input, normalized_shape, **more)  # type: ignore[no-any-return]
    if not pytorchs("rms_norm", input, weight) and takes_norm(input, normalized_shape, (weight,), eps):
        return our_rms_norm(input, weight, eps)  # type: ignore[arg-type]
    return _theirs["rms_norm"](input, normalized_shape, weight, eps)  # type: ignore[no-any-return]


_ours: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "cross_entropy": cross_entropy,
}


_BELOW = frozenset({"scaled_dot_product_attention", "layer_norm", "rms_norm"})
"""Of these the ops are served instead, where the extension is there."""

_STANDINGS = (*_ATTENTIONS, *_NORMS, *_CONVOLUTIONS, *_BIASES, *_ADDITIONS, *_POOLINGS, *_PACKS)


@dataclass(frozen=True)
class Status:
    """What of tilebook is on in this process.

    enabled:  has it been turned on, by `enable`, `enabled()` or `TILEBOOK=1`?
    replaced: functions of `torch.nn.functional` in whose places ours are.
    served:   ops of PyTorch's, below its autograd, that run what dispatch chooses (see `tilebook.native`).
    others:   those in whose places somebody else's are, which may call ours or not.
    patched:  how many of transformers' models were patched by themselves, and still are there.
    casts:    are weights that autocast casts, cast many at a time (see `native/casts.cpp`)?
    """

    enabled: bool
    replaced: tuple[str, ...]
    served: tuple[str, ...]
    others: tuple[str, ...]
    patched: int = 0
    casts: bool = False


def _pytorchs(function: Callable[..., Any]) -> bool:
    """Is it PyTorch's own, and nobody's wrapper around it?"""
    # A wrapper may have its name and module, but not its globals.
    return isinstance(function, types.BuiltinFunctionType) or getattr(function, "__globals__", None) is vars(F)


class _State:
    """Who has turned it on: the program as a whole, and blocks that are under way."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.whole, self.blocks = False, 0
        self.patch = False  # every model of transformers?
        self.begun = False  # has building what is missing for the ops?

    @property
    def on(self) -> bool:
        return (self.whole or self.blocks > 0) and not disabled()

    @property
    def served(self) -> tuple[str, ...]:
        """The ops of PyTorch's that are served while it is on."""
        return tuple(each.name for each in _STANDINGS) if self.on and native.available() else ()

    def change(self, whole: bool | None = None, blocks: int = 0, patch: bool = False) -> None:
        """Notes it, and puts functions into their places or takes them out where that makes a difference."""
        with self.lock:
            self.whole = self.whole if whole is None else whole
            self.patch = patch or (self.patch and whole is not False)
            self.blocks += blocks
            below = native.available()
            if below and self.on:
                native.serve(_STANDINGS, NOTES)
            elif below:
                native.stop()
            elif self.on and not self.begun:
                self.begun = True
                native.begin()
            for name, ours in _ours.items():
                if below and name in _BELOW:
                    continue
                there = getattr(F, name)
                if self.on and _pytorchs(there):
                    _theirs[name] = there
                    _scripted(ours, name)
                    setattr(F, name, ours)
                elif not self.on and there is ours:  # who has wrapped ours since keeps the place
                    setattr(F, name, _theirs[name])
        # Outside of the lock: they import.
        if self.on or _COMPILER in sys.modules:
            after_import(_COMPILER, _compiler_is_there)
        if self.on:
            for each in (_MASKS, _MODELS):  # each has a register, and models may import either first
                after_import(each, _masks_are_there)
        elif "tilebook.huggingface.sdpa" in sys.modules:
            _masks_are_there()
        # A program that names it runs where ours are disabled, too.
        if whole or blocks > 0:
            after_import(_MODELS, _transformers_is_there)
        elif whole is False:
            _every_model()


def register_transformers() -> None:
    """Makes `attn_implementation="tilebook"` known to transformers; calling it twice is calling it once.

    Afterwards `from_pretrained(..., attn_implementation="tilebook")` and `model.set_attn_implementation("tilebook")`
    run a model's attention through `tilebook.attention` and `tilebook.attention_varlen`, in training and in inference.
    `enable`, `enabled` and `TILEBOOK=1` do it as soon as transformers is imported.

    Raises:
        ImportError: there is no transformers, or it is older than 5.17.
    """
    from tilebook.huggingface import register

    register()


def register_kernels() -> None:
    """Makes tilebook's layers known to Hugging Face's `kernels`, for CUDA; calling it twice is calling it once.

    Afterwards `kernels.kernelize(model, mode=…)`, and transformers' `from_pretrained(..., use_kernels=True)` and
    `model.set_use_kernels(True)`, have modules whose classes declare the layers RMSNorm, SwiGLUMLP, GeGLUMLP or
    rotary_pos_emb call tilebook's functions, in training, in inference and compiled. A module is tried when it is first
    called, as by `patch`, and one that computes something else calls what its class has written. Nothing is fetched.

    Raises:
        ImportError: there is no `kernels`.
    """
    from tilebook.kernel_layers import register

    register()


def _compiler_is_there() -> None:
    from tilebook import graphs

    graphs.watch(sys.modules[_COMPILER], _state.on)


def _transformers_is_there() -> None:
    try:
        register_transformers()
    finally:  # which takes newer ones than patching does
        _every_model()


def _masks_are_there() -> None:
    from tilebook.huggingface.sdpa import noting

    with _state.lock:
        noting.turn(_state.on)


def _every_model() -> None:
    """Has models of transformers patched, or what was patched as it was, once transformers is there."""
    if not _state.patch and "tilebook.every_model" not in sys.modules:
        return
    from tilebook.every_model import every_model, watch

    if _state.patch:
        watch()
    every_model.turn(_state.patch and not disabled())


def _scripted(function: Callable[..., Any], name: str) -> None:
    """`torch.jit.script`, which compiles the source of what it meets, takes the function for PyTorch's."""
    if name == "cross_entropy":  # is no op, but compiled from source: a choice of two functions that are both PyTorch's
        choice: Any = {"if_true": _theirs[name], "if_false": _theirs[name], "default": True}
        _jit_internal.boolean_dispatched[function] = choice | {"arg_name": "", "index": _NO_ARGUMENT}
        return
    builtins: Any = torch.jit._builtins
    builtins._register_builtin(function, f"aten::{name}")


_state = _State()


class Handle:
    """Turns it on until `remove` is called, as what `torch.nn.attention.activate_flash_attention_impl` keeps."""

    def __init__(self) -> None:
        self._there = True
        _state.change(blocks=1)

    def remove(self) -> None:
        if self._there:
            self._there = False
            _state.change(blocks=-1)


def enable(*, patch: bool = False) -> None:
    """Puts tilebook's functions in the places of PyTorch's: a model runs on it without being changed.

    `torch.nn.functional.scaled_dot_product_attention`, `layer_norm`, `rms_norm` and `cross_entropy` then run what
    verdicts have ahead on this GPU, and else PyTorch's own code. Under autocast linear layers give the same bits with
    fewer kernels and nodes. transformers gets to know `attn_implementation="tilebook"`. The same as `TILEBOOK=1` in the
    environment. Calling it twice is calling it once. `TILEBOOK_DISABLE=1` in the environment keeps PyTorch's functions.

    With patch, every model of transformers that is made from now on is patched when it is first called, as by
    `tilebook.patch(model)` without its loss_head; `TILEBOOK=patch` is the same. What it changes is logged, at the level
    of information, by the logger "tilebook".
    """
    _state.change(whole=True, patch=patch)
    here = status()
    if here.enabled:
        none = "" if devices.present() else "; there is none here, so that all stays PyTorch's"
        log.debug("on, in the places of %s, for tensors on a GPU%s", ", ".join((*here.replaced, *here.served)), none)


def disable() -> None:
    """Puts PyTorch's functions back, except inside blocks of `enabled()` that are under way; and models, if patched."""
    _state.change(whole=False)


@contextmanager
def enabled() -> Iterator[None]:
    """Inside the block, in every thread, as after `enable`. Blocks may be nested and may overlap."""
    handle = Handle()
    try:
        yield
    finally:
        handle.remove()


def status() -> Status:
    """What of tilebook is on in this process."""
    with _state.lock:
        there = {name: getattr(F, name) for name in _ours}
        replaced = tuple(name for name, function in there.items() if function is _ours[name])
        others = tuple(name for name, function in there.items() if name not in replaced and not _pytorchs(function))
        whole: Any = sys.modules.get("tilebook.every_model")
        patched = 0 if whole is None else whole.every_model.patched
        return Status(_state.on, replaced, _state.served, others, patched, bool(_state.served))
