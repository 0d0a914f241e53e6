"""`torch.nn.functional.scaled_dot_product_attention`, with our kernels where they can serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook.call import untraced, way
from tilebook.casting import autocast, factor_dtype
from tilebook.determinism import only_warns
from tilebook.dispatch import forced
from tilebook.frames import as_it_is
from tilebook.kernels.attention.pytorch import BOUNDS, in_pieces, in_vectors, lies_whole, placed, positive
from tilebook.kernels.attention.pytorch import scaled_dot_product_attention as plain_sdpa
from tilebook.kernels.attention.structure import by_note, notes
from tilebook.layout import VECTOR, aligned
from tilebook.left import ORDINARY, again, gated, recall


def kind(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None = None
) -> tuple[Any, ...]:
    """What a call is known again by, as far as it is PyTorch's to serve."""
    found = q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, causal
    return found if mask is None else (*found, mask.shape, mask.stride(), mask.dtype)


@gated("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`: same arguments, same meaning, same errors.

    Args:
        query: (…, H, L, E), with any number of batch dimensions or none.
        key: (…, H, S, E); fewer heads with `enable_gqa`.
        value: (…, H, S, Ev).
        attn_mask: boolean, True where a pair takes part, or added to the scores; broadcasts to (…, H, L, S).
        dropout_p: probability of dropping a weight; applied always, as in PyTorch, whatever a module's mode.
        is_causal: row i sees columns 0 … i, aligned at the top left.
        scale: what the scores are multiplied by; E^-0.5 if None.
        enable_gqa: key and value have fewer heads, each for several of query's in a row.

    Returns:
        (…, H, L, Ev) in the dtype of query. A row that sees nothing is what PyTorch's kernel makes of it: 0, a mean or
        NaN. With `tilebook.attention` it is 0, and so are its gradients.

    Raises:
        RuntimeError, ValueError: what PyTorch does not take either.

    A mask that transformers has made while tilebook was enabled is not read where its structure is known and the GPU
    takes longer for the call than the host (`structure.by_note`): rows that see nothing are 0 then.

    What `tilebook.attention` has no kernel for (E ≠ Ev, batch dimensions to broadcast, nested tensors) is PyTorch's,
    and so is dropout, whose weights would not be the same ones. So is what overrides PyTorch's function: tensor
    subclasses, modes, `torch.nn.attention.bias.CausalBias`. Where this function is in the place of PyTorch's, they are
    told of this one, which they find there.
    """
    given = query, key, value, attn_mask
    overridden = has_torch_function(given)
    if overridden and not _jagged(*given) and in_place(scaled_dot_product_attention, given):
        more: Any = {"scale": scale, "enable_gqa": enable_gqa}
        return handle_torch_function(scaled_dot_product_attention, given, *given, dropout_p, is_causal, **more)  # type: ignore[no-any-return]
    usual = type(query) is type(key) is type(value) is torch.Tensor and not dropout_p
    usual = usual and (scale is None or (type(scale) is float and scale > 0))
    if usual and not overridden and not query.is_cuda and not forced():  # at once: every layer of a model may ask
        return plain_sdpa(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    loaded, of = attn_mask, None
    if attn_mask is not None:
        usual = usual and not torch.compiler.is_compiling()
        if usual and not is_causal and id(attn_mask) in notes.held and _noted(query, key):
            ours: Any = scaled_dot_product_attention
            found = by_note(query, key, value, attn_mask, scale, enable_gqa, ours)
            if found is not None:
                return found
        if usual and not _looked(lambda: _loads(attn_mask, key.shape[-2])):
            loaded = _loadable(attn_mask, query, key)
            usual = loaded is not attn_mask
        of = attn_mask.shape, attn_mask.dtype
    tensors = (query, key, value) if loaded is None else (query, key, value, loaded)
    known_as: Any = None
    if usual and not (query.is_nested or key.is_nested or value.is_nested):
        near = query.shape, is_causal, of
        if again(near, *tensors):
            return plain_sdpa(query, key, value, loaded, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
        if query.ndim == 4:
            known_as = (of, *kind(query, key, value, is_causal, loaded)), near, loaded
            if recall(*known_as[:2], *tensors):
                return plain_sdpa(query, key, value, loaded, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    grouped: Any = {"enable_gqa": enable_gqa} if enable_gqa else {}
    if overridden or dropout_p or only_warns() or not _fits(query, key, value, attn_mask, is_causal, scale, enable_gqa):
        if not overridden:
            _refuse(query, key, value, dropout_p)
            if type(scale) in (int, float):
                query, scale = positive(query, scale)
            loaded = _loadable(loaded, query, key)
            if dropout_p and all(placed(x) for x in (query, key, value)):
                query, key, value = aligned(query), aligned(key), aligned(value)
        return plain_sdpa(query, key, value, loaded, dropout_p, is_causal, scale=scale, **grouped)  # type: ignore[no-any-return]
    if usual and all(placed(x) for x in (query, key, value)) and _looked(lambda: query.shape[-2] == 1) and not forced():
        # Decoding: another length at every call is another problem, and to ask about it takes the host 0.2 ms.
        query, key, value = aligned(query), aligned(key), aligned(value)
        loaded = _loadable(loaded, query, key)
        return plain_sdpa(query, key, value, loaded, 0.0, is_causal, scale=scale, **grouped)  # type: ignore[no-any-return]
    from tilebook.kernels.attention import attend  # the package imports this module

    lead, q, k, v, mask = query.shape[:-3], query, key, value, attn_mask
    if query.ndim != 4:
        q, k, v = (x.reshape(-1, *x.shape[-3:]) if x.ndim > 2 else x[None, None] for x in (query, key, value))
        if mask is not None and mask.ndim > 3 and query.ndim > 4:
            mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
        elif mask is not None:  # cuDNN takes no other number of axes beside four of the query
            mask = mask[(None,) * (4 - mask.ndim)]
        loaded = mask

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked, factor = positive(q, scale)
        return plain_sdpa(asked, k, v, _loadable(loaded, q, k), 0.0, is_causal, scale=factor, **grouped)  # type: ignore[no-any-return]

    o: torch.Tensor = attend(
        q, k, v, causal=is_causal, scale=scale, attn_mask=mask, usual=usual and mask is None, known_as=known_as,
        theirs=None if mask is None else theirs,
    )  # fmt: skip
    return o if query.ndim == 4 else o.reshape(query.shape)


def _noted(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Is a note on the mask of such a call to be looked at? Of most, which are small, it costs the least to say no."""
    return not key.is_nested and (query.numel() * key.size(-2) > BOUNDS[torch.is_grad_enabled()] or forced())


@as_it_is
def under_note(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None, grouped: bool
) -> torch.Tensor | None:
    """`by_note`, asked by the extension, under whose eyes PyTorch's own function serves what needs no mask."""
    return by_note(query, key, value, mask, scale, grouped, plain_sdpa)


NOTES = notes.held, under_note, BOUNDS
"""Masks that have notes, by `id`; what answers for a call with one, and what q times keys must exceed for it."""


def in_place(ours: Callable[..., Any], given: Sequence[Any]) -> bool:
    """Is our function what a subclass or mode that overrides PyTorch's finds in its place, and is to be told of?

    What records a program, as `torch.fx` does by things that are no tensors, and compiled programs have PyTorch's own.
    """
    if torch.compiler.is_compiling() or getattr(torch.nn.functional, ours.__name__) is not ours:
        return False
    return all(each is None or isinstance(each, torch.Tensor) for each in given)


def _jagged(*given: Any) -> bool:
    """Is there a nested tensor among them? Those know PyTorch's function by its own name, and no other."""
    return any(isinstance(each, torch.Tensor) and each.is_nested for each in given)


def _fits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
) -> bool:
    """Is this a call without dropout that `attention` takes, and not PyTorch's own to serve or to refuse?"""
    if not all(isinstance(x, torch.Tensor) and not x.is_nested for x in (query, key, value)):
        return False
    if any(_in_pieces(x) for x in (query, key, value)):
        return False
    if type(is_causal) is not bool or type(enable_gqa) is not bool:  # which PyTorch refuses
        return False
    if way(query, key, value, optional=(mask,)) == "pytorch":
        return False
    if not (2 + enable_gqa <= query.ndim == key.ndim == value.ndim) or not (query.numel() and key.numel()):
        return False
    heads = query.ndim < 3 or query.shape[-3] == key.shape[-3] or (enable_gqa and query.shape[-3] % key.shape[-3] == 0)
    return (
        query.shape[:-3] == key.shape[:-3]
        and key.shape == value.shape
        and query.shape[-1] == key.shape[-1]
        and query.is_floating_point()
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and heads
        and (scale is None or isinstance(scale, int | float))
        and not (is_causal and mask is not None)
        and (mask is None or _takes(mask, query, key))
    )


def _loads(mask: torch.Tensor, n_k: int) -> bool:
    """Has it all columns, and does each row start where PyTorch's kernels load it, without looking?

    Of booleans PyTorch makes numbers first, row by row without a gap, and so it does of what autocast casts.
    """
    if type(mask) is not torch.Tensor or mask.is_nested or not mask.ndim or mask.shape[-1] != n_k:
        return False
    cast = mask.dtype == torch.bool or factor_dtype(mask) != mask.dtype
    if mask.stride(-1) != 1 or (cast and not in_pieces(n_k, torch.bfloat16)):
        return False
    size = mask.element_size()
    if not any(step * size % VECTOR for step in mask.stride()[:-1]):
        return True
    return lies_whole(mask, n_k)


def _loadable(mask: Any, query: Any, key: Any) -> Any:
    """The mask, copied where PyTorch's kernels on a GPU could not load it: of such they bring the GPU down."""
    if not placed(mask) or not mask.ndim or _looked(lambda: not mask.numel()):
        return mask
    if _looked(lambda: _loads(mask, key.shape[-2])) and not mask.data_ptr() % VECTOR:
        return mask
    (mask,) = autocast(mask)
    return in_vectors(mask, key.shape[-2], factor_dtype(query))


def _looked(at: Callable[[], bool]) -> bool:
    """What is asked of sizes, also while a script is traced."""
    if torch._C._get_tracing_state() is None:
        return at()
    with untraced():
        return at()


def _in_pieces(x: torch.Tensor) -> bool:
    """Is it a DTensor whose sequence is cut? Whether its pieces lie in order, only what has cut it knows.

    PyTorch's context parallelism deals them out in turn, and takes its place under PyTorch's own ops.
    """
    if type(x) in ORDINARY:
        return False
    return any(getattr(each, "dim", None) == x.ndim - 2 for each in getattr(x, "placements", ()))


def _refuse(query: Any, key: Any, value: Any, dropout_p: float) -> None:
    """Raises RuntimeError, as PyTorch does, for what cuDNN refuses: asked again, its path ends the process."""
    tensors = query, key, value
    if not all(isinstance(x, torch.Tensor) and x.is_cuda and not x.is_nested and x.ndim > 1 for x in tensors):
        return
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise RuntimeError(f"query, key and value do not go together: {shapes}")
    if not 0 <= dropout_p < 1:
        raise RuntimeError(f"dropout_p must lie in [0, 1), not {dropout_p}")


def _takes(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Does PyTorch take this mask beside this query?"""
    known = mask.ndim > 0 and factor_dtype(mask) in (torch.bool, torch.float32, factor_dtype(query))
    scores = (*query.shape[:-1], key.shape[-2])
    broadcasts = mask.ndim <= len(scores) and all(
        n in (1, m) for n, m in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    return known and broadcasts and mask.device == query.device
