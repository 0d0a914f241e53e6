"""One model on tilebook: modules that compute what a function of ours does call it, until they are changed back.

`tilebook.enable` reaches what calls PyTorch's functions. Language models write RMSNorm out in several of them, have
MLPs of two or three layers with an activation between, and rotate heads by a function of their own. What a module
computes is not read off its name: it is tried on random numbers, and a module whose numbers are not those of our
function is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from tilebook.beside import Beside
from tilebook.casting import autocast_on
from tilebook.hooks import hooked, usual
from tilebook.kernels.glu import form as gated
from tilebook.kernels.glu import geglu, swiglu
from tilebook.kernels.glu.pytorch import plain_block
from tilebook.kernels.mlp import mlp
from tilebook.kernels.mlp.form import ACTIVATIONS
from tilebook.kernels.mlp.pytorch import plain
from tilebook.kernels.norms import rms_norm
from tilebook.recurrence import recurrent
from tilebook.rotation import rotary
from tilebook.trial import Forward, Function, Left, alike, called, drawn, result, served, standing

_REPLICATE = "_replicate_for_data_parallel"
_EPSILONS = "variance_epsilon", "eps", "epsilon"
_WIDTH, _INNER, _OUT = 8, 12, 6
_NONE = "as nothing here is written out; PyTorch's own norms, attention and losses are tilebook.enable()'s"
_SIZES = 1.0, 1e4
"""Of the numbers that an MLP is tried on: some clamp what is large."""
_NO_HEAD = "no head of a language model of transformers, whose logits a loss is made of, is in it for loss_head"

_SCALES = 3.0, 1e-3
"""Of the numbers that a norm is tried on: of the smaller ones its epsilon decides."""
_TRIALS = (True, (5,), 0), (True, (2, 5), 1), (False, (2, 5), 0), (False, (5,), 1)
"""Is it in training, the axes before the last, and which size the numbers are of: all that a module may tell apart."""


@dataclass(frozen=True)
class Report:
    """What was changed in a model, and what was not.

    changed: by a module's name, what it calls by now.
    left:    by the name of a norm, an MLP or an attention that rotates its heads, why it was left as it is; by "", the
             model's own, why its loss was, where that was asked for.
    """

    changed: Mapping[str, str]
    left: Mapping[str, str]
    _ours: Sequence[tuple[nn.Module, str, Function]] = field(default=(), repr=False, compare=False)

    @property
    def forwards(self) -> list[Forward]:
        """What modules call by now."""
        return [ours for _, _, ours in self._ours if isinstance(ours, Forward)]

    def undo(self) -> None:
        """Changes back what this report says was changed, except where somebody has changed it again."""
        for module, name, ours in self._ours:
            if module.__dict__.get(name) is ours:
                delattr(module, name)

    def __str__(self) -> str:
        def lines(of: Mapping[str, str]) -> list[str]:
            grouped: dict[str, list[str]] = {}
            for name, what in of.items():
                grouped.setdefault(what, []).append(name)
            return [f"  {what}: {len(names)}, {names[0] or 'the model itself'} …" for what, names in grouped.items()]

        none = "changed: nothing" if self.left else f"changed: nothing, {_NONE}"
        changed = ["changed:", *lines(self.changed)] if self.changed else [none]
        return "\n".join([*changed, *(["left:", *lines(self.left)] if self.left else ["left: nothing"])])


def patch(model: nn.Module, *, loss_head: bool = False) -> Report:
    """Lets a model's modules call tilebook's functions; says what was changed, what was left and why.

    An RMSNorm that is written out becomes `tilebook.rms_norm`, also one that multiplies by 1 + weight. Two linear
    layers with biases and GELU (exact or tanh) or ReLU between them become `tilebook.mlp`; three, or two of which the
    first makes gate and up at once, with SiLU or GELU become `tilebook.swiglu` or `geglu`. Attention that calls its
    file's `apply_rotary_pos_emb` calls `tilebook.apply_rope` there, in this model alone and not where it is compiled;
    so do layers with the gated delta rule, as of Qwen3-Next, call `tilebook.gated_delta_rule`.

    Parameters, state dicts, names and hooks of the modules themselves stay as they are; `Report.undo` changes it back.
    PyTorch's own norms and attention are `tilebook.enable`'s. Ours rounds once where several functions of PyTorch's
    round one after the other, and so may differ by a rounding.

    With loss_head a language model of transformers that is called with `labels=` while it trains makes its loss by
    `tilebook.linear_cross_entropy`, and never has its logits: `logits` of what it returns is None then, as it is with
    Liger-Kernel. In `eval()`, under `torch.no_grad()`, without labels and with `logits_to_keep=` it is as it was.

    Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a model, a torch.nn.Module, not {model!r}")
    changed, left, ours = dict[str, str](), dict[str, str](), list[tuple[nn.Module, str, Function]]()
    headed = not loss_head
    for name, module in model.named_modules():
        looked = False
        try:
            alone = _norm(module) or rotary(module) or recurrent(module) or _mlp(module) or _gated(module)
            looked = loss_head and not alone
            head = _head(module) if looked else None
        except Left as why:
            left[name], headed = str(why), headed or looked
            continue
        found, headed = alone or head, headed or head is not None
        if found is not None:
            changed[name], places = found
            for place in [(module, "forward", places)] if callable(places) else places:
                for each in (place, (place[0], _REPLICATE, partial(_replica, place[0]))):
                    setattr(*each)
                    ours.append(each)
    if not headed:
        left.setdefault("", _NO_HEAD)
    return Report(changed, left, ours)


def _replica(module: Any) -> Any:
    """What `DataParallel` makes of a module: one that has other weights, and so its class's own forward."""
    made = type(module)._replicate_for_data_parallel(module)
    for name in ("forward", "_loss_function", _REPLICATE):
        made.__dict__.pop(name, None)
    return made


@contextmanager
def patched(model: nn.Module, *, loss_head: bool = False) -> Iterator[Report]:
    """Inside the block the model is as after `patch`."""
    report = patch(model, loss_head=loss_head)
    try:
        yield report
    finally:
        report.undo()


def _norm(module: nn.Module) -> tuple[str, Function] | None:
    """What an RMSNorm calls from now on; None for what is none. Raises Left."""
    name = type(module).__name__
    if not ("RMSNorm" in name or name.endswith("T5LayerNorm")) or isinstance(module, nn.RMSNorm):
        return None
    weight = module._parameters.get("weight")
    eps = next((float(getattr(module, each)) for each in _EPSILONS if hasattr(module, each)), None)
    _check(module, weight)
    assert weight is not None
    if eps is None or weight.ndim != 1 or len(module._parameters) > 1:
        raise Left("not one weight and an epsilon")
    draw = drawn()
    trial = draw(len(weight)).to(weight)
    xs, theirs = [], []
    for training, lead, scale in _TRIALS:
        other = standing(module, {}, training)
        other.__dict__["_parameters"] = {"weight": trial}
        xs.append(((draw(*lead, len(weight)) + 0.5) * _SCALES[scale]).to(weight))
        theirs.append(called(module, other, xs[-1]))
    for offset, what in ((0, "tilebook.rms_norm"), (1, "tilebook.rms_norm of 1 + weight")):
        if all(alike(found, rms_norm(x, _scale(trial, offset), eps)) for found, x in zip(theirs, xs, strict=True)):
            return what, Forward(_norm_forward, module, Beside(module), offset, eps)
    raise Left("computes something else than RMSNorm")


def _scale(weight: torch.Tensor, offset: int) -> torch.Tensor:
    return weight.float() + offset if offset else weight


# What is called takes whatever the class takes: who names an argument names it as the class does.


def _norm_forward(module: Any, beside: Beside, offset: int, eps: float, /, *args: Any, **kwargs: Any) -> Any:
    # The weight's dtype decides about that of the result.
    if kwargs or len(args) != 1 or not served(args[0]) or args[0].dtype != module.weight.dtype or not beside.same():
        return type(module).forward(module, *args, **kwargs)
    return rms_norm(args[0], _scale(module.weight, offset), eps)


def _mlp(module: nn.Module) -> tuple[str, Function] | None:
    """What an MLP of two layers calls from now on; None for what is none. Raises Left."""
    layers = {name: each for name, each in module.named_children() if isinstance(each, nn.Linear)}
    if len(layers) != 2 or isinstance(module, nn.Sequential) or module._parameters:
        return None
    if any(True for name, each in module.named_children() if name not in layers for _ in each.parameters()):
        return None  # a whole layer of a transformer, say
    (up, first), (down, second) = layers.items()
    if (first.in_features, first.out_features) != (second.out_features, second.in_features):
        return None
    _check_layers(module, first, second)
    if first.bias is None or second.bias is None:
        raise Left("its layers have no biases")
    draw = drawn()
    tensors = draw(_INNER, _WIDTH), draw(_INNER), draw(_WIDTH, _INNER), draw(_WIDTH)
    tried = _tried(module, {up: _linear(*tensors[:2]), down: _linear(*tensors[2:])})
    forms = [each for each in ACTIVATIONS if all(alike(y, result(plain, (x, *tensors), (each,))) for x, y in tried)]
    if not forms:
        raise Left("computes something else than two layers and GELU or ReLU")
    return f"tilebook.mlp with {forms[0]}", Forward(
        _mlp_forward, module, Beside(module, frozenset(layers)), up, down, forms[0]
    )


def _head(module: Any) -> tuple[str, Sequence[tuple[nn.Module, str, Function]]] | None:
    """What a language model's loss calls from now on; None for what has none. Raises Left."""
    from tilebook.huggingface import head

    linear = head.candidate(module)
    if linear is None:
        return None
    if type(linear) is not nn.Linear:
        raise Left("its last layer is not PyTorch's own Linear")
    for each in (linear, module):
        _check(each, linear.weight)
    if head.another_loss(module):
        raise Left("its loss is another one")
    if hooked(linear):
        raise Left("its last layer has hooks")
    softcap = result(head.tried, module, linear)
    if softcap is None:
        raise Left("computes something else between its last layer and its loss")
    return "tilebook.linear_cross_entropy", head.Head(module, linear, softcap).places()


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def _mlp_forward(module: Any, beside: Beside, up: str, down: str, activation: str, /, *args: Any, **kwargs: Any) -> Any:
    first, second = module._modules[up], module._modules[down]
    if kwargs or len(args) != 1 or not served(args[0]) or not beside.same():
        return type(module).forward(module, *args, **kwargs)
    # Somebody may have put something else there, or listen.
    if not usual(first, second) or not _of_one_dtype(args[0], first, second):
        return type(module).forward(module, *args, **kwargs)
    return mlp(args[0], first.weight, first.bias, second.weight, second.bias, activation=activation)


def _gated(module: nn.Module) -> tuple[str, Function] | None:
    """What a gated MLP calls from now on; None for what is none. Raises Left where a layer's name speaks of a gate."""
    layers = {name: each for name, each in module.named_children() if isinstance(each, nn.Linear)}
    try:
        return _gate(module, layers) if len(layers) in (2, 3) else None
    except Left:
        if any("gate" in name for name in layers):
            raise
        return None


def _gate(module: nn.Module, layers: Mapping[str, nn.Linear]) -> tuple[str, Function] | None:
    """The same for these layers, of which the last comes after the activation."""
    *first, (down, last) = layers.items()
    packed = len(first) == 1
    size = first[0][1].in_features, last.in_features * (1 + packed)
    if any((each.in_features, each.out_features) != size for _, each in first) or module._parameters:
        return None
    if any(True for name, each in module.named_children() if name not in layers for _ in each.parameters()):
        return None
    _check_layers(module, *layers.values())
    draw = drawn()
    out = _WIDTH if last.out_features == last.in_features or last.out_features == size[0] else _OUT
    shapes = {name: (_INNER * (1 + packed), _WIDTH) for name, _ in first} | {down: (out, _INNER)}
    small = {
        name: _linear(draw(shape), None if layers[name].bias is None else draw(shape[0]))
        for name, shape in shapes.items()
    }
    tried = _tried(module, small)
    names = [name for name, _ in first]
    for gate, up in [(names[0], None)] if packed else [(names[0], names[1]), (names[1], names[0])]:
        tensors = _tensors(small, gate, up, down)
        for activation in gated.ACTIVATIONS:
            if all(alike(y, result(plain_block, (x, *tensors), (activation,))) for x, y in tried):
                what = {"silu": "swiglu", "gelu_tanh": "geglu with tanh", "gelu": "geglu"}[activation]
                beside = Beside(module, frozenset(layers))
                return f"tilebook.{what}", Forward(_gated_forward, module, beside, gate, up, down, activation)
    raise Left("computes something else than a gate of SiLU or GELU between layers")


def _tried(module: nn.Module, small: Mapping[str, nn.Module]) -> list[tuple[torch.Tensor, Any]]:
    """Random numbers, and what the module makes of them with these layers, small and of fp32."""
    draw, found = drawn(), []
    for training, lead, size in _TRIALS:
        x = draw(*lead, _WIDTH) * _SIZES[size]
        found.append((x, called(module, standing(module, small, training), x)))
    return found


def _tensors(layers: Mapping[str, Any], gate: str, up: str | None, down: str) -> tuple[Any, ...]:
    """Weights, then biases."""
    found = [None if name is None else layers[name] for name in (gate, up, down)]
    return tuple(None if each is None else getattr(each, what) for what in ("weight", "bias") for each in found)


def _gated_forward(
    module: Any, beside: Beside, gate: str, up: str | None, down: str, activation: str, /, *args: Any, **kwargs: Any
) -> Any:
    layers = module._modules
    if kwargs or len(args) != 1 or not served(args[0]) or not beside.same():
        return type(module).forward(module, *args, **kwargs)
    used = (layers[gate], layers[down]) if up is None else (layers[gate], layers[up], layers[down])
    if not usual(*used) or not _of_one_dtype(args[0], *used):
        return type(module).forward(module, *args, **kwargs)
    tensors = _tensors(layers, gate, up, down)
    if activation == "silu":
        return swiglu(args[0], *tensors)
    return geglu(args[0], *tensors, approximate="tanh" if activation == "gelu_tanh" else "none")


def _of_one_dtype(x: torch.Tensor, *layers: nn.Linear) -> bool:
    """Are products of x and these layers of one dtype? Between layers of two, modules cast as they see fit.

    T5's last layer stays in fp32 where a model is loaded in fp16.
    """
    dtype = x.dtype
    for each in layers:
        for weight in each._parameters.values():
            if weight is not None and weight.dtype != dtype:
                return autocast_on(x)  # which casts them all
    return True


def _check_layers(module: nn.Module, *layers: nn.Linear) -> None:
    """Raises Left where the layers are more than their parameters, or there is something between them."""
    if any(type(each) is not nn.Linear for each in layers):
        raise Left("its layers are not PyTorch's own Linear")
    for each in layers:
        _check(module, each.weight)
    dropout = max([each.p for each in module.modules() if isinstance(each, nn.Dropout)], default=0.0)
    if dropout:
        raise Left(f"drops with a probability of {dropout}")
    if not usual(*layers):
        raise Left("its layers have hooks")


def _check(module: nn.Module, weight: torch.Tensor | None) -> None:
    if "forward" in module.__dict__:
        raise Left("its forward was changed already")
    if weight is None or type(weight) is not nn.Parameter or weight.is_meta or not weight.is_floating_point():
        raise Left("its weight is no ordinary parameter with numbers")
