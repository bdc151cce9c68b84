"""What several passes do to graphs: copy one, look an attribute up, emit sizes, values and calls on rows."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from passes.errors import PassError
from passes.rules.registry import Claim, Rows, is_tensor
from passes.sizes import Size, expr, same

aten = torch.ops.aten


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes keep their metadata; parameters and fake values are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    new_output = graph.output(output)
    new_output.meta = dict(next(iter(reversed(gm.graph.nodes))).meta)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def compute_device(gm: fx.GraphModule) -> torch.device:
    """Where a graph computes: the first accelerator among its inputs' devices, else the CPU."""
    values = (node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder")
    devices = [value.device for value in values if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def attribute(gm: fx.GraphModule, name: str) -> Any:
    """The value of a `get_attr` target such as `"layers.0.table"`."""
    owner: Any = gm
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def call_on_rows(
    node: fx.Node, claim: Claim, rows: Rows, operands: Iterable[fx.Node], other: Callable[[fx.Node], Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target and arguments of an operator that computes rows only.

    `operands` are what the claim demands, in its order; `other` gives the new graph's node for anything else
    (sizes), also where a rule takes one from the node it was asked about.
    """
    values = iter(operands)
    # A claim's demands follow the tensor operands in order of appearance, and so does this visit.
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: next(values) if is_tensor(arg) else other(arg))
    if claim.edit is not None:
        args, kwargs = claim.edit(args, kwargs, rows)
        args, kwargs = fx.map_arg((args, kwargs), lambda arg: other(arg) if arg.graph is node.graph else arg)
    return claim.target or node.target, args, kwargs


def size_node(graph: fx.Graph, size: Size, before: fx.Node | None = None) -> Any:
    """An int, or a node of the graph whose value is that size; one is made at the insertion point where there is none.

    Only nodes ahead of `before` are looked at. Raises `PassError` for a size that cannot be had from their values.
    """
    wanted = expr(size)
    if wanted.is_Integer:
        return int(wanted)
    known = list(itertools.takewhile(lambda node: node is not before, graph.nodes))
    for node in known:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and same(value, wanted):
            return node
    for node in known:
        value = node.meta.get("val")
        for index, entry in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if same(entry, wanted):
                return emit(graph, aten.sym_size.int, (node, index))
    return _size_arithmetic(graph, wanted, before)


def _size_arithmetic(graph: fx.Graph, wanted: Any, before: fx.Node | None) -> fx.Node:
    """A size that no value of the graph has, computed from sizes that some have."""
    target = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv}.get(wanted.func.__name__)
    if target is None:
        raise PassError(f"no value of the graph has the size {wanted}")
    total, *others = [size_node(graph, part, before) for part in wanted.args]
    for part in others:
        total = emit(graph, target, (total, part))
    return total


def emit(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """Append a call and compute its fake value from those of its arguments."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = fake_value(node)
    return node


def fake_value(node: fx.Node) -> Any:
    """What a call returns, on fake tensors. Nothing is assumed of the graph's symbols that it did not assume before."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    assert callable(node.target)
    with fake_mode(node.graph), torch.no_grad():
        return node.target(*args, **kwargs)


@contextlib.contextmanager
def fake_mode(graph: fx.Graph) -> Iterator[None]:
    """The mode of the graph's fake tensors: what makes a tensor out of sizes alone needs it. Adds no guards."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in graph.nodes)
    mode = next((mode for mode in modes if mode is not None), None)
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        yield
