"""A lowered program, and the report on it, as bytes that another process reads.

    fx.Graph       the calls of its nodes, with their names: by these Inductor's cache finds a piece again
    OpOverload     its name
    SymInt         its expression: the SymInt of one process means nothing in another
    a report       names of steps and of graph nodes; loops and computed nodes are not kept

A program that holds anything else that cannot be pickled, such as a local function, is not stored.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_compile.runtime.calls import filled, numbered
from mom_compile.torch_compat.compile_cache import NotStorable
from mom_compile.torch_compat.tensors import FakeTensor, OpOverload
from mom_passes.graph.sizes import expr
from mom_passes.graph.structure import Structured
from mom_passes.loops.loop import Loop
from mom_passes.program.program import Compute

#: The most bytes of a constant of a program that is stored.
LARGEST_CONSTANT = 1 << 20


def dumps(value: Any) -> bytes:
    """Return a value as bytes. Raises `NotStorable` with the reason."""
    written = io.BytesIO()
    try:
        _Pickler(written, pickle.HIGHEST_PROTOCOL).dump(value)
    except NotStorable:
        raise
    except Exception as error:
        raise NotStorable(f"a program cannot be stored: {type(error).__name__}: {error}") from error
    return written.getvalue()


def loads(data: bytes) -> Any:
    """Return a value from bytes. Raises `NotStorable` for bytes that cannot be read, such as another version's."""
    try:
        return pickle.loads(data)
    except Exception as error:
        raise NotStorable(f"a stored program cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class NodeName:
    """The name of a node of a graph that is not stored."""

    name: str
    op: str
    target: str


@dataclass(frozen=True)
class _StoredNode:
    """`eager` marks a call of a custom operator: Inductor takes strides from its operands as captured."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    eager: bool


def _graph(graph: fx.Graph) -> Any:
    number: dict[fx.Node, int] = {}
    stored = []
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            raise NotStorable(f"a piece has a part of its own, {node.target}")
        args, kwargs = numbered(node, number)
        stored.append(_StoredNode(node.name, node.op, node.target, args, kwargs, "eager_input_vals" in node.meta))
        number[node] = len(number)
    return _restored, (stored,)


def _restored(stored: Sequence[_StoredNode]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for node in stored:
        args, kwargs = filled((node.args, node.kwargs), nodes)
        made = graph.create_node(node.op, node.target, args, kwargs, node.name)  # type: ignore[arg-type]
        if node.eager:
            made.meta["eager_input_vals"] = None  # filled in with the values
        nodes.append(made)
    return graph


def _operator(operator: Any) -> Any:
    return _named, (operator.namespace, str(operator).split(".")[1], str(operator).split(".")[2])


def _named(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _tensor(value: torch.Tensor) -> Any:
    if isinstance(value, FakeTensor) or type(value) is not torch.Tensor or value.nbytes > LARGEST_CONSTANT:
        raise NotStorable(f"a program has a constant of type {type(value).__name__} and {value.nbytes} bytes")
    return NotImplemented


#: By type: what pickles a value, as `__reduce__` would.
_RULES: dict[type, Callable[[Any], Any]] = {
    fx.Graph: _graph,
    fx.Node: lambda node: (NodeName, (node.name, node.op, str(node.target))),
    Loop: lambda _: (_nothing, ()),
    Compute: lambda step: (Compute, (step.name, (), (), ())),
    OpOverload: _operator,
    torch.SymInt: lambda size: (_itself, (expr(size),)),
}


def _nothing() -> None:
    return None


def _itself(value: Any) -> Any:
    return value


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Module | Structured):
            # Graphs within an operator are identified by addresses of this process.
            raise NotStorable(f"a program holds a {type(value).__name__}")
        rule = _tensor if isinstance(value, torch.Tensor) else _RULES.get(type(value))
        return NotImplemented if rule is None else rule(value)
