"""Nodes of a graph whose numbers are known before the program runs: those that no input of it goes into.

Graphs are of torch functions, as Dynamo hands them to a compiler: not functional, with fake tensors for examples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilebook.kernels.attention.pytorch import scaled_dot_product_attention
from tilebook.sizes import Unknown, size

_CHECKPOINT = "tag_activation_checkpoint"
"""The operator that runs a graph, and runs it again in the backward pass."""

Constants = Mapping[Node, Callable[[], torch.Tensor]]
"""Placeholders whose numbers are known, and what makes them."""

_FUNCTIONS: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.mod, operator.floordiv, operator.neg, operator.getitem,
    operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne, operator.and_, operator.or_,
    operator.xor, operator.invert, torch.arange, torch.ones, torch.zeros, torch.full, torch.tril, torch.triu,
    torch.where, torch.cat, torch.stack, torch.diff, torch.cumsum, torch.abs, torch.logical_and, torch.logical_or,
    torch.logical_not, torch.ones_like, torch.zeros_like, torch.full_like, torch.le, torch.lt, torch.ge, torch.gt,
    torch.eq, torch.ne, torch.add, torch.sub, torch.mul, torch.bitwise_and, torch.bitwise_or, torch.bitwise_not,
    torch.logical_xor,
}  # fmt: skip
"""That only depend on what they are given, and change nothing."""

_METHODS = {
    "abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "bool", "clone", "contiguous", "cumsum", "diff", "eq",
    "expand", "expand_as", "flatten", "float", "ge", "gt", "int", "le", "logical_and", "logical_not", "logical_or",
    "long", "lt", "masked_fill", "ne", "new_full", "new_ones", "new_zeros", "permute", "repeat", "reshape", "squeeze",
    "mul", "sub", "to", "transpose", "tril", "triu", "type", "unsqueeze", "view", "view_as", "where",
    # Operators, as some versions of Dynamo write them.
    "__add__", "__and__", "__eq__", "__floordiv__", "__ge__", "__getitem__", "__gt__", "__invert__", "__le__", "__lt__",
    "__mod__", "__mul__", "__ne__", "__neg__", "__or__", "__radd__", "__rand__", "__rmul__", "__ror__", "__rsub__",
    "__rxor__", "__sub__", "__xor__",
}  # fmt: skip


def numbers(node: Node, given: Constants, known: dict[Node, Any] | None = None) -> Any:
    """What a node computes, of nothing that the program is given. Raises Unknown."""
    known = {} if known is None else known
    if node in known:
        return known[node]
    if node in given:
        found = given[node]()
    elif pure(node):
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: numbers(each, given, known))
        try:
            if node.op == "call_method":
                found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                found = node.target(*args, **kwargs)
        except Exception as broken:
            raise Unknown from broken
    else:
        raise Unknown
    known[node] = found
    return found


def pure(node: Node) -> bool:
    """Does it depend on nothing but what it is given, and change nothing?"""
    if node.op == "call_function":
        return node.target in _FUNCTIONS and node.kwargs.get("out") is None
    return node.op == "call_method" and node.target in _METHODS


_BOTH: set[Any] = {operator.and_, torch.logical_and, torch.bitwise_and, "__and__", "logical_and", "bitwise_and"}

_THE_SAME: set[Any] = {"to", "bool", "expand", "expand_as", "contiguous", "clone"}
"""Methods after which booleans are the same ones, if they are booleans still."""


def factors(mask: Node) -> tuple[list[Node], list[Node]]:
    """The booleans that must all be True where a mask is, each broadcast to it; and the nodes between it and them."""
    found, between, open_ = [], [], [mask]
    while open_:
        node = open_.pop()
        value, inner = node.meta.get("example_value"), node.all_input_nodes
        several = node.target in _BOTH and len(node.args) == len(inner) == 2
        same = node.op == "call_method" and node.target in _THE_SAME
        parts = inner if several else inner[:1] if same else []
        booleans = all(getattr(each.meta.get("example_value"), "dtype", None) is torch.bool for each in (node, *parts))
        if parts and booleans and isinstance(value, torch.Tensor):
            between.append(node)
            open_.extend(parts)
        elif node not in found:
            found.append(node)
    return found, between


def ancestors(node: Node, given: Constants) -> set[Node]:
    """What a node's numbers are made of, itself included. Raises Unknown where that is an input."""
    found, open_ = set[Node](), [node]
    while open_:
        each = open_.pop()
        if each in found:
            continue
        if each not in given and not pure(each):
            raise Unknown
        found.add(each)
        if each not in given:
            open_.extend(each.all_input_nodes)
    return found


def written_to(mask: Node, given: Constants) -> bool:
    """Might something in the graph write to what the mask is made of, by whatever name? Raises Unknown."""
    return written(ancestors(mask, given))


def written(nodes: Iterable[Node]) -> bool:
    """Might something in the graph write to the memory of these nodes? What is not known to only read might."""
    nodes = list(nodes)
    memory = {_memory(each) for each in nodes}
    if None in memory:
        return True
    return any(
        _memory(each) in memory and not _harmless(node, each)
        for node in nodes[0].graph.nodes
        if not _only_reads(node)
        for each in node.all_input_nodes
    )


_READERS: set[Any] = {
    getattr, operator.mul, operator.truediv, operator.pow, operator.matmul, torch.matmul, torch.bmm, torch.einsum,
    torch.addmm, torch.softmax, torch.sum, torch.mean, torch.rsqrt, torch.sqrt, torch.cos, torch.sin, torch.exp,
    torch.tanh, torch.sigmoid, torch.neg, torch.split, torch.chunk, torch.layer_norm, torch.rms_norm,
    torch._C._nn.linear, torch._C._nn.gelu, torch._C._nn.pad, torch.nn.functional.layer_norm,
    torch.nn.functional.rms_norm, torch.nn.functional.softmax, scaled_dot_product_attention,
}  # fmt: skip
"""That only read, beside those that `pure` knows, unless they are told where to write."""

_READING = {
    "all", "amax", "amin", "any", "argmax", "bfloat16", "chunk", "cos", "dim", "double", "exp", "flip", "half", "item",
    "matmul", "max", "mean", "min", "neg", "numel", "pow", "roll", "rsqrt", "sin", "size", "softmax", "split", "sqrt",
    "stride", "sum", "tanh", "tolist", "type_as", "unbind", "unflatten",
}  # fmt: skip


def _only_reads(node: Node) -> bool:
    """Is it known to write to none of its arguments?"""
    if pure(node) or node.op == "output":
        return True
    if node.op == "call_method":
        return node.target in _READING
    if node.op != "call_function" or node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return False
    if node.target is torch.nn.functional.embedding:  # which may norm its weight
        return len(node.args) < 4 or node.args[3] is None
    schema = getattr(node.target, "_schema", None)
    return not schema.is_mutable if schema is not None else node.target in _READERS


def checkpointed(node: Node) -> GraphModule | None:
    """The graph that a node runs, and runs again in the backward pass."""
    body = node.args[0] if node.args and getattr(node.target, "__name__", "") == _CHECKPOINT else None
    if not isinstance(body, Node) or body.op != "get_attr":
        return None
    inner = getattr(node.graph.owning_module, str(body.target), None)
    return inner if isinstance(inner, GraphModule) else None


def operands(node: Node, inner: GraphModule) -> list[tuple[Node, Node]]:
    """The nodes that what is checkpointed is given, each with its placeholder."""
    places = [each for each in inner.graph.nodes if each.op == "placeholder"]
    return [(place, each) for place, each in zip(places, node.args[1:]) if isinstance(each, Node)]  # noqa: B905


def _harmless(node: Node, given: Node) -> bool:
    """Is it what is checkpointed, and writes nothing to what it is given there?"""
    inner = checkpointed(node)
    mine = [place for place, each in operands(node, inner) if each is given] if inner is not None else []
    return bool(mine) and not written(mine)


def _memory(node: Node) -> Any:
    """What tells a tensor's memory from others' in this graph; None where there is no word of it."""
    value = node.meta.get("example_value")
    try:
        return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else ("no tensor", node)
    except (RuntimeError, NotImplementedError):
        return None


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """Of a node's tensor: numbers, or expressions of symbols where they are not known yet; None of what is none."""
    value = node.meta.get("example_value")
    return tuple(map(size, value.shape)) if isinstance(value, torch.Tensor) else None
