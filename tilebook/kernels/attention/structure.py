"""Masks whose structure somebody has noted: what they show is computed, and they are not read.

A model of transformers whose batch is padded, packed or windowed hands a boolean mask (B, 1, Sq, Sk) to PyTorch's
function, whose kernels read it and skip nothing. Who makes such a mask may note what it shows (`tilebook.huggingface`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilebook.call import recorded, way
from tilebook.casting import factor_dtype
from tilebook.dispatch import forced
from tilebook.kernels.attention.check import Causal
from tilebook.kernels.attention.pytorch import BOUNDS
from tilebook.left import ORDINARY, again, recall
from tilebook.notes import Notes, state

__all__ = ["PACKED", "Lengths", "Note", "Structure", "by_note", "capturing", "notes"]

PACKED = 4.0
"""How many times `BOUNDS` a call of packed sequences must be. The host waits for their lengths, once for all
layers, while the GPU has nothing to do: that is worth it where one call alone takes the GPU longer."""

_ANY = -1
"""In the place of a stream."""

_functorch: Any = torch._C._functorch


@dataclass(frozen=True)
class Lengths:
    """Sequences one after the other in a batch that is flattened to (B · S): where they end, and the longest."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass
class Structure:
    """What a boolean mask (B, 1, Sq, Sk) shows, as `tilebook.attention` takes it.

    causal, window: its arguments.
    keys:    (B, 1, 1, Sk) booleans, False for padding; None without padding.
    packs:   (B, S) numbers, the same for tokens of one sequence; None where each row of the batch is one.
    """

    causal: Causal
    window: tuple[int, int] | None
    keys: Tensor | None
    packs: Tensor | None
    _lengths: Lengths | None = field(default=None, repr=False)

    def of(self, q: Tensor) -> bool:
        """May it be that of a mask for these queries, (B, H, Sq, D)?"""
        if self.keys is not None and self.keys.shape[0] not in (1, q.shape[0]):
            return False
        return self.packs is None or self.packs.shape == (q.shape[0], q.shape[2])

    def lengths(self) -> Lengths:
        """Those of the packs. The host waits for them, once for all layers."""
        assert self.packs is not None
        if self._lengths is None:
            with torch.inference_mode(False), torch.no_grad():  # tensors of inference no graph could keep
                first = torch.ones_like(self.packs, dtype=torch.bool)
                first[:, 1:] = self.packs.diff(dim=1) != 0
                starts = first.flatten().nonzero().flatten().to(torch.int32)
                ends = F.pad(starts, (0, 1), value=self.packs.numel())
                longest = int(ends.diff().max())
                self._lengths = Lengths(ends, ends, longest, longest)
        return self._lengths


class Note:
    """The structure of a mask, looked for when it is first asked for: small problems are never worth the time.

    describe: gives the structure, None where there is none. It may start kernels, and wait for them.
    made_of:  the tensors that the mask was made of, which it reads.
    packed:   attention of packed sequences, for whose lengths the host has to wait; None where there are none. Of q, k,
              v, the structure and the scale it gives the result, or None where the mask is to serve.
    """

    def __init__(
        self,
        describe: Callable[[], Structure | None],
        made_of: Iterable[Tensor] = (),
        packed: Callable[..., Tensor | None] | None = None,
    ) -> None:
        self.packed = packed
        self._describe = describe
        self._made_of = [(x, state(x)) for x in made_of]
        self._found: dict[int, Structure | None] = {}

    def structure(self, x: Tensor) -> Structure | None:
        """What the mask shows, for a call on x's device. Tensors of it are made on the stream that asks, for it alone:
        nobody else has waited for them."""
        if _ANY in self._found:
            return self._found[_ANY]
        stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
        if stream not in self._found:
            self._found[stream] = self._looked()
        return self._found[stream]

    def settled(self) -> Structure | None:
        """The same, for all streams: where the mask has just been made, who waits for it waits for what is found."""
        found = self._found[_ANY] = self._looked()
        return found

    def _looked(self) -> Structure | None:
        if any(state(each) != before for each, before in self._made_of):
            return None
        for each, _ in self._made_of:
            if each.is_cuda:  # it may be gone before this stream has read it
                each.record_stream(torch.cuda.current_stream(each.device))
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference no graph could keep
            return self._describe()


notes: Notes[Note] = Notes()
"""Those on masks."""


def capturing(x: Tensor) -> bool:
    """Is a graph being captured, so that nobody can look at a number?"""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def by_note(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    enable_gqa: bool,
    unmasked: Callable[..., Tensor],
) -> Tensor | None:
    """What PyTorch's `scaled_dot_product_attention` gives under this mask, by the structure that is noted of it.

    query: (B, H, Sq, D); key, value: (B, Hkv, Sk, D). A row that sees nothing is 0. unmasked: PyTorch's function, or
    who stands in its place, for what needs no mask.

    None where there is no note, and where the mask itself is to serve: where the host takes as long for the call as the
    GPU, where dispatch has PyTorch ahead, on the CPU, in fp32, in a trace, a transform, a mode or a capture.
    """
    note = notes.of(mask)
    if note is None or not (_large(query, key, value, note) and _serves(query, key, value, mask, scale, enable_gqa)):
        return None
    found = note.structure(query)
    if found is None or not found.of(query):
        notes.drop(mask)
        return None
    if found.packs is not None:
        return note.packed(query, key, value, found, scale) if note.packed and found.keys is None else None
    return _attended(query, key, value, mask, found, scale, enable_gqa, unmasked)


def _large(q: Tensor, k: Tensor, v: Tensor, note: Note) -> bool:
    """Does the GPU take longer for such a call than the host?"""
    if q.is_nested or k.is_nested or v.is_nested or not (q.ndim == k.ndim == v.ndim == 4):
        return False
    bound = BOUNDS[recorded((q, k, v))]
    return q.numel() * k.shape[2] > (bound * PACKED if note.packed else bound) or forced()


def _serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: Any, grouped: bool) -> bool:
    """Have we kernels for what may be noted of such tensors, and is nothing under way that is to see PyTorch's?"""
    if not all(type(x) in ORDINARY for x in (q, k, v, mask)) or not (scale is None or type(scale) is float):
        return False
    (batch, heads, rows, width), dtype = q.shape, factor_dtype(q)
    if k.shape != v.shape or mask.shape != (batch, 1, rows, k.shape[2]) or k.shape[::3] != (batch, width):
        return False
    if k.shape[1] != heads and not (grouped and k.shape[1] and heads % k.shape[1] == 0):
        return False
    if dtype not in (torch.bfloat16, torch.float16) or width % 8 or not 16 <= width <= 256:
        return False
    if not (q.numel() and k.numel()) or not q.dtype == k.dtype == v.dtype or (scale is not None and not scale > 0):
        return False
    if not q.device == k.device == v.device == mask.device or not _fused() or any(x.is_neg() for x in (q, k, v)):
        return False
    if torch._C._len_torch_dispatch_stack() or _functorch.peek_interpreter_stack() is not None or capturing(q):
        return False
    return way(q, k, v, optional=(mask,)) != "pytorch"


def _fused() -> bool:
    """May a fused kernel serve? Who has asked for PyTorch's plain formula gets it."""
    of = torch.backends.cuda
    return bool(of.flash_sdp_enabled() or of.mem_efficient_sdp_enabled() or of.cudnn_sdp_enabled())


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, found: Structure, scale: Any, grouped: bool, unmasked: Any
) -> Tensor | None:
    """The result of `_serves` of a mask without packs; None where PyTorch is to serve, with the mask."""
    from tilebook.kernels.attention import attend  # which imports this module
    from tilebook.kernels.attention.drop_in import kind

    rows, columns, causal = q.shape[2], k.shape[2], found.causal
    if found.keys is None and found.window is None and (causal != "bottom_right" or rows == columns):
        if causal and columns < rows:
            return None
        if causal:  # PyTorch's kernels for what is causal want as many columns as rows
            k, v = k[:, :, :rows], v[:, :, :rows]
        whole: Tensor = unmasked(q, k, v, None, 0.0, bool(causal), scale=scale, enable_gqa=grouped)
        return whole
    known_as: Any = None
    if not forced():
        told = causal, found.window, found.keys is not None
        near = ("noted", *told, q.shape, mask.shape)
        own = ("noted", *told, *kind(q, k, v, False, mask))
        if again(near, q, k, v, mask) or recall(own, near, q, k, v, mask):
            return None
        known_as = own, near, mask
    return attend(  # type: ignore[no-any-return]
        q, k, v, causal=causal, window=found.window, scale=scale, attn_mask=found.keys, known_as=known_as,
        theirs=lambda *_: None,  # type: ignore[arg-type, return-value]
    )  # fmt: skip
