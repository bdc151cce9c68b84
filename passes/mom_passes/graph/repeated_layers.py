"""Outline repeated layers of a Dynamo graph as calls of one graph, so that AOTAutograd traces them once.

    def forward(x, w0, w1, w2):               def forward(x, w0, w1, w2):
        a = relu(linear(x, w0))                   a = layer(x, w0)        layer(x, w) = relu(linear(x, w))
        b = relu(linear(a, w1))         ->        b = layer(a, w1)
        return relu(linear(b, w2))                return layer(b, w2)

AOTAutograd traces, decomposes and pattern-matches a called graph once for all its calls, which saves seconds per model.
Afterwards `inline_layers` replaces each call by the traced layer, which gives the graph of an ordinary trace.

Terms
-----
layer     Consecutive calls made in one numbered module, the outermost (`model.layers.3`).
operand   A value that a layer reads and does not compute; `results` are its values that other nodes read.
kind      Everything about an operand that tracing depends on: dtype, device, sizes and strides, symbols included.
          Layers are identical if they have the same text and operands of the same kinds in the same order.

A layer stays in place if it writes to an operand, or if another call writes to its operands or results: the operator
that calls a graph must neither mutate nor alias.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_passes.graph.edit import attribute, fake_value
from mom_passes.graph.effects import calls_graphs, changes_state, written_by
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr
from mom_passes.graph.structure import lines_of
from mom_passes.torch_compat import (
    INVOKE_SUBGRAPH,
    LOGS_USAGE,
    SYMBOLIC,
    expression_of,
    has_hint,
    is_wrapper,
    storage_of,
)

#: Tracing an outlined layer costs about as much as tracing two layers in place.
FEWEST_LAYERS = 3
#: Smaller layers are not worth outlining.
FEWEST_CALLS = 8

_NUMBERED = re.compile(r"(\.|\[')?\d+('\]|\])?$")
_NAME = "mom_layer"


@dataclass(frozen=True, eq=False)
class Layer:
    """`body` is a copy of `nodes` as a graph: an input for each of `operands`, an output for each of `results`."""

    nodes: list[fx.Node]
    operands: list[fx.Node]
    results: list[fx.Node]
    body: fx.Graph


def outline_layers(gm: fx.GraphModule) -> int:
    """Replace identical layers by calls of one graph, in place. Return the number of such graphs."""
    _drop_usage_logging(gm.graph)
    groups: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in _layers(gm.graph):
        kinds = tuple(_kind(operand.meta.get("example_value")) for operand in layer.operands)
        if None not in kinds:
            groups[tuple(lines_of(layer.body)), kinds].append(layer)
    names: dict[Layer, str] = {}
    for group in groups.values():
        if len(group) >= FEWEST_LAYERS:
            name = f"{_NAME}_{len(set(names.values()))}"
            gm.add_submodule(name, fx.GraphModule(gm, group[0].body))
            names |= dict.fromkeys(group, name)
    _replace_by_calls(gm.graph, names)
    gm.graph.lint()
    gm.recompile()
    return len(set(names.values()))


def inline_layers(gm: fx.GraphModule) -> bool:
    """Replace the calls that `outline_layers` made by the graphs they call, traced or not, in place.

    Return False if some remain: tracing wraps a call of a graph that writes to its operands in another operator.
    """
    calls = gm.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)
    inlined = {node for call in calls if str(call.args[1]).startswith(_NAME) for node in _inline(gm, call)}
    _compute_sizes_once(gm.graph, inlined)
    gm.graph.lint()
    gm.recompile()
    return not any(_mentions_a_layer(node) for node in gm.graph.nodes)


def calls_nested_regions(gm: fx.GraphModule) -> bool:
    return bool(gm.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH))


def inline_nested_regions(gm: fx.GraphModule) -> int:
    """Replace calls made by `torch.compiler.nested_compile_region` by the graphs they call, in place.

    Return the number of calls.
    """
    calls = gm.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)
    inlined = {node for call in calls for node in _inline(gm, call)}
    _compute_sizes_once(gm.graph, inlined)
    gm.graph.lint()
    gm.recompile()
    return len(calls)


def _mentions_a_layer(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return any(isinstance(arg, str) and _NAME in arg for arg in (*node.args, *node.kwargs.values()))


# --- outlining ---


def _drop_usage_logging(graph: fx.Graph) -> None:
    """Erase calls that count the use of an API. A called graph could not make them, for their side effect."""
    for node in graph.find_nodes(op="call_function", target=LOGS_USAGE):
        graph.erase_node(node)


def _layers(graph: fx.Graph) -> list[Layer]:
    """The layers that may be outlined. None if the graph changes global state (autocast, say) in or after a layer."""
    first = next((node for node in graph.nodes if _numbered_module(node) is not None), None)
    if first is None:
        return []
    nodes = list(graph.nodes)
    begin = nodes.index(first)
    opened: set[fx.Node] = set()
    for node in filter(changes_state, nodes[:begin]):
        opened = opened - set(node.all_input_nodes) if node.all_input_nodes else opened | {node}
    if opened or any(map(changes_state, nodes[begin:])):
        return []
    written = {node: _storages(written_by(node)) for node in nodes[begin:]}
    whole = (_layer(calls) for calls in _consecutive_calls(graph))
    return [layer for layer in whole if _is_movable(layer) and not _meets_a_write(layer, written)]


def _is_movable(layer: Layer) -> bool:
    enough = len(layer.nodes) >= FEWEST_CALLS
    return enough and all(map(_may_move, layer.nodes)) and all(map(_is_tensor, layer.results))


def _meets_a_write(layer: Layer, written: dict[fx.Node, set[int]]) -> bool:
    """Whether a layer writes to the storage of an operand, or another call to that of an operand or result."""
    within = set(layer.nodes)
    passed_in = _storages(layer.operands)
    passed = passed_in | _storages(layer.results)
    return any(storages & (passed_in if node in within else passed) for node, storages in written.items())


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {storage_of(value) for node in nodes for value in _values(node) if isinstance(value, torch.Tensor)}


def _values(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("example_value")
    return value if isinstance(value, (tuple, list)) else (value,)


def _consecutive_calls(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Runs of calls made in the same numbered module. Attribute reads belong to no module."""
    nodes: list[fx.Node] = []
    module = None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        its = _numbered_module(node)
        if its != module and nodes:
            yield nodes
            nodes = []
        module = its
        if its is not None:
            nodes.append(node)


def _numbered_module(node: fx.Node) -> str | None:
    """The path of the outermost module with a number (an entry of a list of modules) that a call is made in."""
    if node.op not in ("call_function", "call_method"):
        return None
    paths = (path for path, _ in (node.meta.get("nn_module_stack") or {}).values())
    return next((path for path in paths if _NUMBERED.search(path)), None)


def _layer(nodes: list[fx.Node]) -> Layer:
    body = fx.Graph()
    within = set(nodes)
    outside = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in within)
    inputs = [_input(body, number, operand) for number, operand in enumerate(outside)]
    copies = dict(zip(outside, inputs, strict=True))
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
    results = [node for node in nodes if any(user not in within for user in node.users)]
    body.output(tuple(copies[node] for node in results))
    return Layer(nodes, list(outside), results, body)


def _input(body: fx.Graph, number: int, operand: fx.Node) -> fx.Node:
    made = body.placeholder(f"operand_{number}")
    made.meta = dict(operand.meta)
    return made


def _may_move(node: fx.Node) -> bool:
    """Whether a call may be outlined.

    Not if it has graphs of its own, is called for a side effect or reads a number off a tensor. Not with `out=` either:
    PyTorch 2.11 cannot decompose it in a called graph.
    """
    if calls_graphs(node) or node.kwargs.get("out") is not None:
        return False
    plain = all(isinstance(value, torch.Tensor) or _is_known(value) for value in _values(node))
    return plain or (node.meta.get("example_value") is None and not node.users and bool(written_by(node)))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _kind(value: Any) -> Hashable:
    """The kind of a value (see the module). None for wrapper subclasses and for values that cannot be operands."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        plain = value.layout == torch.strided and not is_wrapper(value) and all(map(_is_known, sizes))
        lazy = (value.is_conj(), value.is_neg())
        return (value.dtype, value.device, value.dim(), *lazy, *map(expr, sizes)) if plain else None
    return ("size", expr(value)) if isinstance(value, (int, torch.SymInt)) and _is_known(value) else None


def _is_known(size: Any) -> bool:
    return type(size) is int or (isinstance(size, torch.SymInt) and has_hint(size))


def _replace_by_calls(graph: fx.Graph, names: dict[Layer, str]) -> None:
    """Replace the layers by calls, in graph order: a layer may read the result of another."""
    now: dict[fx.Node, fx.Node] = {}
    order = {node: number for number, node in enumerate(graph.nodes)}
    for layer in sorted(names, key=lambda layer: order[layer.nodes[0]]):
        with graph.inserting_after(layer.nodes[-1]):
            body = graph.get_attr(names[layer])
        with graph.inserting_after(body):
            operands = [now.get(operand, operand) for operand in layer.operands]
            call = graph.call_function(INVOKE_SUBGRAPH, (body, names[layer], *operands))
        call.meta["example_value"] = tuple(node.meta["example_value"] for node in layer.results)
        last = call
        for number, node in enumerate(layer.results):
            with graph.inserting_after(last):
                last = now[node] = graph.call_function(operator.getitem, (call, number))
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
        for node in reversed(layer.nodes):
            graph.erase_node(node)


# --- inlining ---


def _inline(gm: fx.GraphModule, call: fx.Node) -> list[fx.Node]:
    """Replace a call by the nodes of its graph and return these."""
    where = call.args[0]
    assert isinstance(where, fx.Node)
    layer = attribute(gm, str(where.target))
    inputs = layer.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(inputs, call.args[2:], strict=True))
    as_traced = all(_kind(meta_value(inner)) == _kind(_value(copies[inner])) for inner in inputs)
    results: Any = ()
    with gm.graph.inserting_before(call):
        for node in layer.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], copies.__getitem__)
            elif node.op == "get_attr":
                copies[node] = gm.graph.node_copy(node)
                copies[node].target = _own_name(gm, attribute(layer, str(node.target)))
            elif node.op != "placeholder":
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
                if not as_traced and "val" in node.meta:
                    copies[node].meta["val"] = fake_value(copies[node])
    for result in list(call.users):
        result.replace_all_uses_with(results[result.args[1]])
        gm.graph.erase_node(result)
    gm.graph.erase_node(call)
    if not where.users:
        gm.graph.erase_node(where)
    return [copies[node] for node in layer.graph.nodes if node.op in ("call_function", "call_method")]


def _own_name(gm: fx.GraphModule, value: Any) -> str:
    """The attribute name of a value in `gm`; a new one if it has none."""
    known = next((name for name in (*vars(gm), *gm._buffers) if getattr(gm, name, None) is value), None)
    if known is None:
        known = next(name for n in itertools.count() if not hasattr(gm, name := f"_constant_of_a_layer_{n}"))
        setattr(gm, known, value)
    return known


def _compute_sizes_once(graph: fx.Graph, of_layers: set[fx.Node]) -> None:
    """Replace size nodes of inlined layers by earlier nodes with the same expression.

    Each layer computes its own sizes; a trace of the whole graph would have computed them once.
    """
    known: dict[Hashable, fx.Node] = {}
    for node in graph.nodes:
        value = meta_value(node)
        if isinstance(value, SYMBOLIC):
            same = known.setdefault((type(value), expression_of(value)), node)
            if same is not node and node in of_layers:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def _value(operand: Any) -> Any:
    return meta_value(operand) if isinstance(operand, fx.Node) else operand
