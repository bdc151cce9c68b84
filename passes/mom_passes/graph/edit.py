"""Edits that several passes share: copying graphs, attributes, size nodes, emitting calls with their fake values."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.graph.size_values import interpret
from mom_passes.graph.sizes import Size, all_same, expr, is_one, same
from mom_passes.graph.strides import is_dense_in
from mom_passes.graph.values import input_node, is_size, is_tensor, tensors_of
from mom_passes.torch_compat import (
    SYMBOLIC,
    fake_mode_of,
    graph_module,
    hint_of,
    new_number,
    shape_env_of,
    without_guards,
)

aten = torch.ops.aten


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph. Nodes keep their metadata; parameters and fake values are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    new_output = graph.output(output)
    new_output.meta = dict(gm.graph.output_node().meta)
    copied = graph_module(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def compute_device(gm: fx.GraphModule) -> torch.device:
    """The first accelerator among the devices of a graph's inputs, else the CPU."""
    values = (meta_value(node) for node in gm.graph.nodes if node.op == "placeholder")
    devices = [value.device for value in values if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def attribute(gm: fx.GraphModule, name: str) -> Any:
    """The value of a `get_attr` target such as `"layers.0.table"`."""
    owner: Any = gm
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def node_after(node: fx.Node) -> fx.Node:
    """The node to insert before to place a node after `node` and the `getitem`s that follow it."""
    following = node.next
    while following.target is operator.getitem:
        following = following.next
    return following


def first_operator(graph: fx.Graph, ahead: Collection[fx.Node] = ()) -> fx.Node:
    """The first operator of a graph that is neither a size nor one of `ahead`."""
    nodes: Iterable[fx.Node] = graph.nodes
    operators = (node for node in nodes if node.op not in ("placeholder", "get_attr"))
    return next(node for node in operators if not is_size(node) and node not in ahead)


def size_node(graph: fx.Graph, size: Size, before: fx.Node | None = None) -> Any:
    """A number, or a node with that size; if there is none, one is made at the insertion point.

    Only nodes ahead of `before` are considered. Raises `PassError` for a size that does not follow from their values.
    """
    return interpret(
        expr(size),
        lambda part: _known_size(graph, part, before),
        lambda value: value,
        lambda part, target, args: _size_call(graph, part, target, args),
    )


def _known_size(graph: fx.Graph, wanted: sympy.Basic, before: fx.Node | None) -> fx.Node | None:
    """A node with this size, or a new one that reads it off a tensor."""
    if not wanted.free_symbols:
        return None
    known: list[fx.Node] = list(itertools.takewhile(lambda node: node is not before, graph.nodes))
    for node in known:
        value = meta_value(node)
        if isinstance(value, SYMBOLIC) and same(value, wanted):
            return node
    for node in known:
        value = meta_value(node)
        entries: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        for index, entry in enumerate(entries):
            if isinstance(entry, torch.SymInt) and same(entry, wanted):
                return emit(graph, aten.sym_size.int, (node, index))
    return None


def _size_call(graph: fx.Graph, part: sympy.Basic, target: Any, args: list[Any]) -> Any:
    """Compute a size from other sizes. Adds no guards."""
    values: list[Any] = [meta_value(arg) if isinstance(arg, fx.Node) else arg for arg in args]
    env: Any = next((shape_env_of(value) for value in values if isinstance(value, SYMBOLIC)), None)
    if env is None:
        return target(*values)
    hints: list[Any] = [hint_of(value) if isinstance(value, SYMBOLIC) else value for value in values]
    example: Any = None if None in hints else target(*hints)
    node = graph.call_function(target, tuple(args))
    if part.is_Boolean or isinstance(example, bool):
        kind: type = bool
    else:
        kind = float if isinstance(example, float) or (example is None and not part.is_integer) else int
    node.meta["val"] = new_number(env, part, kind, example)
    return node


def add_input(graph: fx.Graph, name: str) -> fx.Node:
    """A placeholder of this name, or of the next free one.

    FX makes node names unique, but names the argument of the generated function after the target.
    """
    node = graph.placeholder(name)
    node.target = node.name
    return node


def copy_call(graph: fx.Graph, node: fx.Node, new_of: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of a node at the end of another graph, on the operands `new_of` gives.

    The value is recomputed if an operand has other strides there (dense instead of a slice, say).
    """
    new = graph.node_copy(node, new_of)
    tensors = [operand for operand in node.all_input_nodes if is_tensor(operand)] if is_tensor(node) else []
    if any(_is_laid_out_otherwise(operand, new_of(operand)) for operand in tensors):
        new.meta["val"] = fake_value(new)
    return new


def copy_view(graph: fx.Graph, view: fx.Node, source: fx.Node) -> fx.Node:
    """A copy of a view, at the insertion point, whose first operand is `source`. Its value is not recomputed."""
    viewed = input_node(view)
    return graph.node_copy(view, lambda node: source if node is viewed else node)


def _is_laid_out_otherwise(old: fx.Node, new: fx.Node) -> bool:
    pairs = zip(tensors_of(old), tensors_of(new), strict=False)
    return any(a is not b and strides_differ(a, b) for a, b in pairs)


def strides_differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values of one shape have other strides, dimensions of size one excepted. Adds no guards."""
    pairs = zip(a.stride(), b.stride(), b.shape, strict=True)
    return not all(same(x, y) or is_one(size) for x, y, size in pairs)


def emit(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """Append a call and compute its fake value from those of its arguments."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = fake_value(node)
    return node


def emit_view(node: fx.Node, shape: Sequence[Size], before: fx.Node) -> fx.Node:
    """Emit a value in another shape, as a view if it is dense, else as a view of a copy. Sizes are those of nodes ahead
    of `before`. A value that has the shape is returned itself."""
    value, graph = meta_value(node), node.graph
    if all_same(value.shape, shape):
        return node
    if not is_dense_in(value, range(value.dim())):
        node = emit(graph, aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    return emit(graph, aten.view.default, (node, [size_node(graph, size, before) for size in shape]))


def fake_value(node: fx.Node) -> Any:
    """The result of a call on fake tensors. Adds no guards."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: meta_value(arg))
    assert callable(node.target)
    with fake_mode(node.graph), torch.no_grad():
        return node.target(*args, **kwargs)


@contextlib.contextmanager
def fake_mode(graph: fx.Graph) -> Iterator[None]:
    """Enter the mode of the graph's fake tensors, which factory functions need. Adds no guards."""
    modes = (fake_mode_of(meta_value(node)) for node in graph.nodes)
    mode = next((mode for mode in modes if mode is not None), None)
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(without_guards(mode))
        yield
