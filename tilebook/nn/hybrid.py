"""Models some of whose layers have linear attention, and some exact."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilebook.call import watched
from tilebook.kernels.bidirectional import features
from tilebook.nn.attention import MultiheadAttention, of_one_width
from tilebook.nn.linear import LinearAttention, attend
from tilebook.patching import Report

NAME = "tilebook_linear"
"""In transformers' registry of attention functions."""
_HOW = "_tilebook_linear"
_WRONG = "linear attention takes masks of padding only, which are the same for all rows and heads"
_PENDING = 8  # masks of which it is not known yet
_KNOWN = "DistilBertSelfAttention", "BertSelfAttention"


@dataclass(frozen=True)
class Hybrid(Report):
    """By a layer's name, in `changed` what it calls by now, in `left` why it was left as it is; `undo` changes back."""

    _back: Sequence[Callable[[], None]] = field(default=(), repr=False, compare=False)

    def undo(self) -> None:
        for each in self._back:
            each()


def hybrid(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    exact_every: int | None = None,
    feature_map: Any = "elu+1",
    causal: bool = False,
    eps: float = 1e-6,
) -> Hybrid:
    """Gives layers of a model linear attention in the place of exact attention, until they are changed back.

    Layers are the model's attention modules in their order: `torch.nn.MultiheadAttention` and tilebook's, as encoders'
    layers have them, and the self-attention of transformers' BERT and DistilBERT. Parameters stay the same tensors,
    and state dicts as they are.

    Args:
        model: what has the layers, or is one.
        layers: the numbers of those to change, from 0, or from −1 backwards. None is all.
        exact_every: the n-th, the 2n-th, … stay exact and all others change; 2 alternates.
        feature_map, causal, eps: as in `tilebook.nn.LinearAttention`. Of transformers' models there are encoders only.

    Returns:
        what was changed, and what was left and why; its `undo()` changes back.

    Dropout of attention drops its outputs in such layers. Under padding a `torch.nn.TransformerEncoder` with such a
    layer makes no nested tensors. Calls that want weights of attention, or have other masks than of padding (and causal
    ones, for PyTorch's classes), raise ValueError.

    Raises:
        ValueError: a feature_map that is none, no layer of a known class, numbers of none, both layers and
            exact_every, or a layer that has what linear attention does not. Nothing is changed then.
    """
    features.check_map(feature_map)
    found = {name: module for name, module in model.named_modules() if _theirs(module) or _pytorchs(module)}
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} has attention that is known here")
    chosen = _chosen(len(found), layers, exact_every)
    changed, left, ways = dict[str, str](), dict[str, str](), list[tuple[Any, bool]]()
    for n, (name, module) in enumerate(found.items()):
        linear = type(module) is LinearAttention or _HOW in module.__dict__
        if n not in chosen or linear:
            left[name] = "linear already" if linear else "stays exact"
            continue
        _check(name, module, causal)
        changed[name] = f"tilebook.linear_attention with {feature_map}"
        ways.append((module, _theirs(module)))
    rows = _Rows()
    back = [
        _to_function(module, feature_map, eps, rows) if theirs else _to_class(module, feature_map, causal, eps)
        for module, theirs in ways
    ]
    ours = {id(module) for module, _ in ways}
    for each in model.modules():
        if getattr(each, "use_nested_tensor", False) and any(id(one) in ours for one in each.modules()):
            set_nested = partial(setattr, each, "use_nested_tensor")
            set_nested(False)
            back.append(partial(set_nested, True))
    return Hybrid(changed, left, _back=back)


def _chosen(count: int, layers: Sequence[int] | None, exact_every: int | None) -> set[int]:
    if exact_every is not None:
        if layers is not None or exact_every < 1:
            raise ValueError("exact_every must be at least 1, and stand without layers")
        return {n for n in range(count) if (n + 1) % exact_every}
    chosen = range(count) if layers is None else layers
    if wrong := [n for n in chosen if not -count <= n < count]:
        raise ValueError(f"the model has {count} layers of attention, and none of number {wrong[0]}")
    return {n % count for n in chosen}


def _pytorchs(module: nn.Module) -> bool:
    return type(module) in (nn.MultiheadAttention, MultiheadAttention, LinearAttention)


def _theirs(module: nn.Module) -> bool:
    return type(module).__name__ in _KNOWN and type(module).__module__.startswith("transformers.")


def _check(name: str, module: Any, causal: bool) -> None:
    """Raises ValueError where linear attention cannot take the module's place."""
    if _theirs(module):
        if causal or module.is_causal or getattr(module, "is_decoder", False):
            raise ValueError(f"{name}: linear attention serves transformers' encoders, which are not causal")
    elif not of_one_width(module):
        raise ValueError(f"{name} has kdim or vdim of other widths, add_bias_kv or add_zero_attn")


def _to_class(module: Any, feature_map: Any, causal: bool, eps: float) -> Callable[[], None]:
    """Makes a `LinearAttention` of the module; returns what makes it what it was."""
    before, same = type(module), module._qkv_same_embed_dim
    module.__class__ = LinearAttention
    module._become(feature_map, causal, eps)

    def back() -> None:
        if type(module) is LinearAttention:
            module.__class__, module._qkv_same_embed_dim = before, same
            del module.feature_map, module.causal, module.eps

    return back


def _to_function(module: Any, feature_map: Any, eps: float, rows: _Rows) -> Callable[[], None]:
    """The same for a module of transformers: its config, which it has shared with all, names another function."""
    _register()
    before = module.config
    module.config = ours = copy.copy(before)
    ours._attn_implementation = NAME
    setattr(module, _HOW, (feature_map, eps, rows))

    def back() -> None:
        if module.config is ours:
            module.config = before
            delattr(module, _HOW)

    return back


def _register() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers' layers call. q, k and v (B, H, S, D); (o (B, S, H, D), None).

    Raises:
        ValueError: `output_attentions`, or a mask under which rows see different keys.
    """
    if kwargs.get("output_attentions"):
        raise ValueError("linear attention has no weights of pairs, which output_attentions asks for")
    feature_map, eps, rows = getattr(module, _HOW)
    padding = _padding(attention_mask, rows)
    if padding is not None and padding.shape[0] == 1:  # of all
        padding = padding.expand(key.shape[0], -1)
    o = attend(query, key, value, padding, feature_map=feature_map, causal=False, eps=eps)
    return F.dropout(o.transpose(1, 2), dropout, module.training), None


class _Rows:
    """Do all rows of masks see the same keys? The first mask is waited for; of later ones it is told when it is known,
    at the latest with the next but `_PENDING` masks, so that no step waits for the GPU."""

    def __init__(self) -> None:
        self._first = True
        self._pending: deque[tuple[Tensor, Any]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ()

    def check(self, mask: Tensor) -> None:
        """Raises ValueError for a mask, or an earlier one, under which they do not."""
        same = (mask == mask[:, :, :1]).all()
        if watched() or mask.is_meta or _captured(mask):
            torch._assert_async(same, _WRONG)  # nobody can wait for a number here
            return
        if self._first or not mask.is_cuda:
            self._first = False
            self._raise(same)
            return
        known, event = same.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(mask.device))
        self._pending.append((known, event))
        while self._pending and (len(self._pending) > _PENDING or self._pending[0][1].query()):
            known, event = self._pending.popleft()
            event.synchronize()
            self._raise(known)

    def _raise(self, same: Tensor) -> None:
        if not same:
            self._pending.clear()
            raise ValueError(_WRONG)


def _unpickled() -> _Rows:
    """Of a model that another process has pickled: transformers is to know the function here, too."""
    _register()
    return _Rows()


def _captured(mask: Tensor) -> bool:
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


def _keeps(mask: Tensor) -> bool:
    """May later calls have what is found of a mask? Not if it is a trace's, a transform's or a graph's."""
    return not (
        watched()
        or mask.requires_grad
        or mask.is_inference()
        or torch.is_inference_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _captured(mask)
    )


def _padding(mask: Any, rows: _Rows) -> Tensor | None:
    """The key_padding_mask (B, Sk) in a mask of transformers'. Raises ValueError where rows see different keys."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ValueError(_WRONG)
    if mask.ndim == 2:
        return mask == 0
    keeps = _keeps(mask)
    known: tuple[int, Tensor] | None = getattr(mask, _HOW, None) if keeps else None
    if known is not None and known[0] == mask._version:
        return known[1]  # the other layers have the same mask
    row = mask[:, 0, 0]
    row = row.clone() if mask.is_floating_point() else ~row.bool()  # a view would keep the mask that keeps it
    rows.check(mask)
    if keeps:
        setattr(mask, _HOW, (mask._version, row))
    return row
