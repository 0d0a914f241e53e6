"""Graphs that PyTorch's compiler is given: attention under a mask that is a constant is told what the mask shows.

What is traced cannot look at the numbers of a tensor, and so a model whose sequences might be padded or packed makes a
mask of all pairs, also where they are not, as transformers' models do. Attention with a mask takes about three times as
long as causal attention, of heads that share keys it wants copies, and the mask is made and kept. In the graph all that
the mask is made of can be seen: where it is no input of the program, its numbers are known before the program runs. A
window, for which PyTorch has no kernel, is an op of ours where the GPU takes longer for it than the host for the op.
So is a causal mask or a window beside padding, which may be an input and hides keys from all rows.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tilebook.casting import factor_dtype
from tilebook.constant_nodes import Constants, checkpointed, numbers, operands, pure, shape_of, written, written_to
from tilebook.kernels.attention.layout import like
from tilebook.kernels.attention.pytorch import TRACED, scaled_dot_product_attention
from tilebook.shown import ALL, CAUSAL, Shown, shown_by
from tilebook.sizes import Unknown, alike, hinted, size, trials
from tilebook.traced import left

_log = logging.getLogger("tilebook")

_WIDEST = 256
"""Of heads that PyTorch's fused kernels take, and so share keys among."""


def simplified(module: GraphModule) -> int:
    """Replaces masks of a graph of torch functions, as Dynamo makes them, by what they show.

    Returns how many calls of attention were changed. All is looked at before anything is changed.
    """
    changes, replaced = list(_changes(module, {})), dict[Node, Node]()
    for change in changes:
        change.make(replaced)
    for changed in {id(each.module): each.module for each in changes}.values():
        for node in reversed(changed.graph.nodes):
            if not node.users and pure(node):
                changed.graph.erase_node(node)
        changed.recompile()
    return len(changes)


def _changes(module: GraphModule, given: Constants) -> Iterator[_Change]:
    """What can be changed in a graph, and in those that it runs again in the backward pass. given: placeholders whose
    numbers are known."""
    if not _chosen_freely(module.graph):
        return
    # Layers have one mask: it is looked at once.
    shown = functools.cache(functools.partial(shown_by, given, trials(module.graph)))
    maker = functools.cache(_maker)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is scaled_dot_product_attention:
            change = _change(module, node, shown)
            if change is not None:
                yield change
        inner = checkpointed(node)
        if inner is not None and len(node.args[0].users) == 1:  # no other node runs it
            known = _known(node, inner, maker)
            yield from _by_keys(node, inner, shown, known)
            yield from _changes(inner, known)


def _chosen_freely(graph: Graph) -> bool:
    """May PyTorch choose kernels that share keys and know what is causal? Who has asked for others gets them."""
    of: Any = torch.backends.cuda
    chosen = any("sdpa_kernel" in getattr(node.target, "__name__", "") for node in graph.nodes)
    return not chosen and bool(of.flash_sdp_enabled() or of.cudnn_sdp_enabled())


@dataclass
class _Change:
    """A call of attention, and what it is to be: shown, with these arguments beside q, k and v.

    passing: gives what is checkpointed a node from outside of it, of which `shown` has the keys.
    """

    module: GraphModule
    node: Node
    tensors: tuple[Node, Node, Node]
    shown: Shown
    rest: dict[str, Any]
    passing: Callable[[Node], Node] | None = None

    def make(self, replaced: dict[Node, Node]) -> None:
        """replaced: results of calls that are no longer there, and what is in their place."""
        tensors = tuple(replaced.get(each, each) for each in self.tensors)
        if self.shown.plain:
            self.node.args = tensors
            self.node.kwargs = self.rest | {"is_causal": self.shown.limits == CAUSAL}
            return
        import tilebook.kernels.attention.entry  # noqa: F401  # which registers the op

        graph, width, (left, right) = self.node.graph, shape_of(self.tensors[0])[-1], self.shown.limits  # type: ignore[index]
        scale = width**-0.5 if self.rest["scale"] is None else float(self.rest["scale"])
        keys = [self.passing(each) if self.passing is not None else each for each in self.shown.keys]
        with graph.inserting_before(self.node):
            options = scale, left, right, False, 0.0, 0.0, False, torch.are_deterministic_algorithms_enabled()
            both = graph.call_function(_windowed(), (*tensors, _mask(graph, keys), None, None, *options))
            o = graph.call_function(operator.getitem, (both, 0))
        o.meta.update(self.node.meta)
        self.node.replace_all_uses_with(o)
        replaced[self.node] = o
        graph.erase_node(self.node)


def _mask(graph: Graph, keys: Sequence[Node]) -> Node | None:
    """(B or 1, H or 1, 1, Sk or 1) booleans of the keys, where some may be hidden."""
    masks = []
    for each in keys:
        missing = 4 - len(shape_of(each) or ())
        masks.append(graph.call_function(operator.getitem, (each, (None,) * missing)) if missing else each)
    if not masks:
        return None
    return functools.reduce(lambda one, other: graph.call_function(operator.and_, (one, other)), masks)


def _windowed() -> Any:
    return torch.ops.tilebook.attention_fwd.default


def _change(module: GraphModule, node: Node, limits: Callable[[Node, Any, Any], Shown | None]) -> _Change | None:
    """limits: `shown_by` of a mask, rows and columns."""
    names = "query", "key", "value", "attn_mask", "dropout_p", "is_causal"
    call: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    call |= {**dict(zip(names, node.args)), **node.kwargs}  # noqa: B905
    tensors = [each for name in names[:4] if isinstance(each := call.get(name), Node)]
    if len(tensors) < 4 or call["is_causal"] is not False:
        return None
    q, k, v, mask = tensors
    rows, columns, shape = shape_of(q), shape_of(k), shape_of(mask)
    if rows is None or columns is None or shape is None or shape_of(v) is None or rows[:-3] != columns[:-3]:
        return None
    scores = (*rows[:-1], columns[-2])
    if len(shape) > len(scores) or any(n not in (1, m) for n, m in zip(shape[::-1], scores[::-1])):  # noqa: B905
        return None  # the mask makes more of the result than there is without it
    if not _positive(call["scale"]) or not _lies_alike(node, q):
        return None
    shown, of = limits(mask, rows[-2], columns[-2]), _factor(node, q)
    if shown is None or (not shown.plain and not _takes((q, k, v), of, call, shown)):
        return None
    rest = {name: call[name] for name in ("dropout_p", "scale", "enable_gqa")}
    shared = None if call["enable_gqa"] or not _half(q, of) else _shared(q, k, v)
    if shared is not None:
        k, v = shared
        rest["enable_gqa"] = True
    return _Change(module, node, (q, k, v), shown, rest)


def _positive(scale: Any) -> bool:
    """Of others PyTorch's kernels make NaN under a causal mask, which they apply first."""
    return scale is None or (type(scale) in (int, float) and 0 < scale < math.inf)


def _lies_alike(node: Node, q: Node) -> bool:
    """Does the result lie as that without the mask will? On a GPU another kernel may serve, and what follows was traced
    with what this one gives."""
    o, given = node.meta.get("example_value"), q.meta["example_value"]
    if not isinstance(o, torch.Tensor) or not given.is_cuda:
        return isinstance(o, torch.Tensor)
    return o.shape == given.shape and tuple(map(size, o.stride())) == tuple(map(size, like(given).stride()))


def _factor(node: Node, q: Node) -> torch.dtype:
    """What attention will have factors of, within the program's own regions of autocast and outside of them."""
    value, within, each = q.meta["example_value"], 0, node.prev
    while each.op != "root":
        name = getattr(each.target, "__name__", "")
        within += name == "_exit_autocast"
        if name == "_enter_autocast":
            if not within:
                device, dtype, on = (*each.args, None, None, True)[:3]
                if device != value.device.type and not (device == "cuda" and value.is_cuda):
                    return factor_dtype(value)
                return (dtype or torch.get_autocast_dtype(device)) if on and value.is_floating_point() else value.dtype  # type: ignore[arg-type, return-value]
            within -= 1
        each = each.prev
    return factor_dtype(value)


def _takes(tensors: tuple[Node, Node, Node], of: torch.dtype, call: dict[str, Any], shown: Shown) -> bool:
    """Is such attention an op of ours, which is done long after the host has called it? of: what its factors are."""
    q, k, v = tensors
    value, shape = q.meta["example_value"], shape_of(k)
    if not _half(q, of) or shape is None or call["dropout_p"] != 0 or len(value.shape) != 4:
        return False
    if not alike(k.meta["example_value"], v.meta["example_value"]):  # which the op makes sure of
        return False
    heads, width, trained = value.shape[1], value.shape[-1], torch.is_grad_enabled()
    if not all(type(n) is int for n in (heads, width, shape[1])):
        return False
    fits = width == shape[-1] and width % 8 == 0 and 16 <= width <= _WIDEST and heads % shape[1] == 0
    bound = TRACED[trained] / (2 if shown.keys else 1)  # under a mask PyTorch's kernels take twice as long
    if not fits or hinted((*value.shape, k.meta["example_value"].shape[-2])) <= bound:
        return False
    return shown.limits != ALL or not _pytorchs(value, of, shape, shown.keys, trained)


def _pytorchs(q: torch.Tensor, of: torch.dtype, shape: tuple[Any, ...], keys: tuple[Node, ...], trained: bool) -> bool:
    """Is attention under a mask of keys PyTorch's own to serve, which has kernels for it?"""
    if not all(type(n) is int for n in (*q.shape, *shape)):
        return True  # a graph for all sizes cannot be another for those with a verdict
    tables = [(1,) * (4 - len(found)) + found for each in keys if (found := shape_of(each)) is not None]
    table = tuple(map(max, zip(*tables, strict=True)))
    described = (tuple(q.shape), of), (shape, of), (shape, of), (table, torch.bool)
    options = 1.0, *ALL, False, 0.0, 0.0, False, False
    return left("attention", (*described, None, None), options, trained, q.device, False)


def _half(q: Node, of: torch.dtype) -> bool:
    """Are these factors, of 16 bits on a GPU that has fused kernels for them?"""
    value = q.meta["example_value"]
    if not value.is_cuda or of not in (torch.bfloat16, torch.float16):
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(value.device) >= (8, 0)


def _shared(q: Node, k: Node, v: Node) -> tuple[Node, Node] | None:
    """Keys and values with a head for several of q's, where what attention is given are copies of these."""
    if q.meta["example_value"].shape[-1] > _WIDEST:
        return None  # only PyTorch's fused kernels share keys
    mine, its = _uncopied(k), _uncopied(v)
    if mine is None or its is None:
        return None
    if not all(alike(one.meta["example_value"], other.meta["example_value"]) for one, other in ((mine, its), (k, v))):
        return None
    return None if written((mine, its, k, v)) else (mine, its)  # what is written to may be another by then


def _uncopied(copies: Node) -> Node | None:
    """x (B, Hkv, S, D), of copies (B, H, S, D) that are `x[:, :, None].expand(B, Hkv, n, S, D).reshape(B, H, S, D)`."""
    if (copies.op, copies.target) != ("call_method", "reshape"):
        return None
    expanded = copies.args[0]
    if not isinstance(expanded, Node) or (expanded.op, expanded.target) != ("call_method", "expand"):
        return None
    axis = expanded.args[0]
    if not isinstance(axis, Node) or axis.target is not operator.getitem:
        return None
    x, index = axis.args
    whole = slice(None)
    if index not in ((whole, whole, None), (whole, whole, None, whole, whole)) or not isinstance(x, Node):
        return None
    made, of, between = shape_of(copies), shape_of(x), shape_of(expanded)
    if made is None or of is None or between is None or not len(made) == len(of) == 4 or len(between) != 5:
        return None
    (batch, heads, *rest), (n, heads_kv, *its) = made, of
    alike = rest == its and n == batch and heads_kv and heads % heads_kv == 0
    return x if alike and between == (batch, heads_kv, heads // heads_kv, *rest) else None


Maker = Callable[[], torch.Tensor]


def _known(node: Node, inner: GraphModule, maker: Callable[[Node], Maker | None]) -> Constants:
    """What is known of the inputs of what is checkpointed. maker: `_maker`."""
    made = {place: maker(each) for place, each in operands(node, inner)}
    return {place: make for place, make in made.items() if make is not None}


def _by_keys(
    node: Node, inner: GraphModule, shown: Callable[[Node, Any, Any], Shown | None], constants: Constants
) -> Iterator[_Change]:
    """What can be changed in what is checkpointed where its masks are limits, and keys that it is given. shown: of
    `shown_by`."""
    passing = functools.cache(functools.partial(_given, node, inner))
    for place, mask in operands(node, inner):
        sizes = (shape_of(mask) or ())[-2:]
        if len(sizes) < 2 or place in constants or mask.meta["example_value"].dtype != torch.bool or written((place,)):
            continue
        seen = shown(mask, *sizes)
        if seen is None:
            continue

        def known(its: Node, *asked: Any, place: Node = place, sizes: Any = sizes, seen: Shown = seen) -> Shown | None:
            return seen if its is place and asked == sizes else None

        for each in place.users if _chosen_freely(inner.graph) else ():
            if each.target is scaled_dot_product_attention and (change := _change(inner, each, known)) is not None:
                change.passing = passing
                yield change


def _given(node: Node, inner: GraphModule, outer: Node) -> Node:
    """A placeholder of what is checkpointed for one more node outside of it."""
    *_, last = (each for each in inner.graph.nodes if each.op == "placeholder")
    with inner.graph.inserting_after(last):
        place = inner.graph.placeholder(f"{outer.name}_keys")
    place.meta["example_value"] = outer.meta["example_value"]
    node.args = (*node.args, outer)
    return place


def _maker(node: Node) -> Maker | None:
    """Makes the numbers of a node, once, where they are known before the program runs."""
    try:
        if shape_of(node) is None or written_to(node, {}):
            return None
    except Unknown:
        return None
    return functools.cache(functools.partial(numbers, node, {}))


# In the compiler's way.


def watch(compiler: Any, on: bool) -> None:
    """Has the graphs of programs simplified that Inductor compiles from now on, or no longer.

    compiler: the module with the function that its graphs go through, whatever the version of PyTorch.
    """
    theirs = getattr(compiler.compile_fx, "_tilebook", None)
    if on and theirs is None:
        compiler.compile_fx = _told(compiler.compile_fx)
    elif not on and theirs is not None:
        compiler.compile_fx = theirs


def _told(compile_fx: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_fx)
    def told(model_: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model_, GraphModule):
            try:
                found = simplified(model_)
            except Exception as broken:  # the graph is compiled as it is
                _log.debug("a graph was not looked through: %s: %s", type(broken).__name__, broken)
            else:
                if found:
                    _log.debug("calls of attention that do not read their masks: %d", found)
        return compile_fx(model_, *args, **kwargs)

    told._tilebook = compile_fx  # type: ignore[attr-defined]
    return told
