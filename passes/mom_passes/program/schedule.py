"""From a rewritten graph to its program: operators in a row become one piece, everything else a step of its own.

    for node in graph:
        loop, copy      -> ends the run of operators before it; a step of its own
        size            -> a step of its own; it ends the run if it is read off a value of it
        operator        -> goes on with the run, together with what takes its several results apart
    a run of views alone is no piece: each is called as it is
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mom_passes.graph.aliasing import seen_from
from mom_passes.graph.sizes import expr, product
from mom_passes.graph.values import tensors_of
from mom_passes.loops.loop import Loop, MiniSequence, loop_nodes
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import APPEND, COPIES, FETCH_WAIT, OFFLOAD
from mom_passes.program.program import Call, Compute, LoopStep, Place, Program, Step, Storage, Transfer, Why
from mom_passes.rules.views import relabels
from mom_passes.torch_compat import SYMBOLIC

aten = torch.ops.aten


def schedule(gm: fx.GraphModule) -> Program:
    """The program of a rewritten graph."""
    output = next(iter(reversed(gm.graph.nodes)))
    returned = output.args[0]
    outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    inputs = tuple(node for node in gm.graph.nodes if node.op == "placeholder")
    return Program(inputs, tuple(_Scheduler(gm).steps()), outputs, storages(gm))


class _Scheduler:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.made: list[Step] = []
        self.run: list[fx.Node] = []
        #: What is taken from several returned values goes with the operator that returned them.
        self.items: set[fx.Node] = set()

    def steps(self) -> list[Step]:
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                self.made.append(Call(node, Why.CONSTANT))
            elif node.op == "call_module":
                self._loop(node)
            elif node.op == "call_function" and node not in self.items:
                self._operator(node)
        self._flush()
        return self.made

    def _loop(self, node: fx.Node) -> None:
        self._flush()
        module = self.gm.get_submodule(str(node.target))
        assert isinstance(module, MiniSequence)
        results = module.loop.results(node)
        self.items.update(results.values())
        self.made.append(LoopStep(node, module.loop, tuple(results.get(i) for i in range(len(module.loop.outputs)))))

    def _operator(self, node: fx.Node) -> None:
        if node.target in COPIES:
            self._flush()
            self.made.append(Transfer(node))
        elif isinstance(node.meta.get("val"), (int, float, bool, *SYMBOLIC)):
            if any(n in self.run for n in node.all_input_nodes):
                self._flush()
            self.made.append(Call(node, Why.NUMBER))
        elif node.target is aten.full.default and all(user.op == "call_module" for user in node.users):
            self.made.append(Call(node, Why.CONSTANT))
        elif node.target is COPY_ROWS and all(relabels(n) for n in self.run):
            self._flush()
            self.made.append(Call(node, Why.COPY))
        else:
            # A piece's inputs are tensors and sizes: several values at once are taken apart where they are made.
            items = _items(node)
            self.run += [node, *items]
            self.items.update(items)

    def _flush(self) -> None:
        nodes, self.run = self.run, []
        if all(relabels(node) for node in nodes):
            self.made += [Call(node, Why.VIEW) for node in nodes]
            return
        inside = set(nodes)
        ins = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
        outs = tuple(n for n in nodes if any(user not in inside for user in n.users))
        self.made.append(Compute(f"piece_{nodes[0].name}", tuple(nodes), tuple(ins), outs))


def _items(node: fx.Node) -> list[fx.Node]:
    """What is taken from the values that an operator returns at once, and from lists among those."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return []
    items = [user for user in node.users if user.target is operator.getitem]
    return [each for item in items for each in (item, *_items(item))]


def storages(gm: fx.GraphModule) -> dict[fx.Node, Storage]:
    """The storage of every tensor of a rewritten graph."""
    loops = {node: module.loop for node, module in loop_nodes(gm)}
    found: dict[fx.Node, Storage] = {}
    for node in gm.graph.nodes:
        if not tensors_of(node) or node in loops:
            continue
        base = _shares(node, loops)
        if base in found:
            found[node] = found[base]
        else:
            found[node] = Storage(node, _bytes(node), _place(node))
    return found


def _shares(node: fx.Node, loops: dict[fx.Node, Loop]) -> Any:
    """The value whose storage a node's result is in; itself if it has its own."""
    source: Any = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return node
    if source in loops:
        return loops[source].overwritten_by(node) or node
    # A copy that is waited for is where it was begun, and what a write returns is what it has written to.
    within = node.target in (FETCH_WAIT, aten.copy_.default, operator.getitem)
    return source if within else seen_from(node) or node


def _place(node: fx.Node) -> Place:
    if node.op in ("placeholder", "get_attr"):
        return Place.CALLER
    return Place.HOST if node.target in (APPEND, OFFLOAD) else Place.DEVICE


def _bytes(node: fx.Node) -> Any:
    return sum(expr(product(value.shape)) * value.element_size() for value in tensors_of(node))
