"""From a rewritten graph to its program: runs of operators become pieces, all other nodes steps of their own.

    for node in graph:
        loop, copy      -> a step; ends the run of operators before it
        size            -> a step; ends the run if it reads a value of the run
        depends on data -> a step; ends the run: compiled code takes no size that is unknown at capture
        operator        -> joins the run, with the `getitem`s of its results
        end             -> an operator in `ends` ends its run
    view          -> not returned by a piece: the piece returns the owner of the storage and the view runs after it; a
                     dense view is returned itself if no other value of its storage is read after the piece
    a run of views is no piece: each runs eagerly

Compiled code may return a copy for a view, with other strides. A view that runs eagerly shares its operand's storage
and has the strides of a view. A dense view that is alone in its storage looks like a dense copy, and one call
less saves time in a decode step.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import torch
from torch import fx

from mom_passes.graph.aliasing import aliased_operand, is_a_view
from mom_passes.graph.data_dependent import touches_unknown_numbers
from mom_passes.graph.meta import meta_value
from mom_passes.graph.strides import is_dense_in, storage_order
from mom_passes.graph.values import operand_chain, returned_values, returns_nothing
from mom_passes.loops.loop import MiniSequence
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import COPIES
from mom_passes.program.program import Call, Compute, LoopStep, Program, Step, Transfer, Why
from mom_passes.program.storages import storages
from mom_passes.torch_compat import SYMBOLIC

aten = torch.ops.aten


def schedule(gm: fx.GraphModule, ends: Collection[fx.Node] = ()) -> Program:
    """The program of a rewritten graph. A piece ends with each of `ends`."""
    inputs = tuple(gm.graph.find_nodes(op="placeholder"))
    return Program(inputs, tuple(_Scheduler(gm, ends).steps()), returned_values(gm.graph), storages(gm))


class _Scheduler:
    def __init__(self, gm: fx.GraphModule, ends: Collection[fx.Node]) -> None:
        self.gm = gm
        self.ends = ends
        self.made: list[Step] = []
        self.run: list[fx.Node] = []
        #: `getitem`s of several results, which belong to the operator that returns them.
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
        elif isinstance(meta_value(node), (int, float, bool, *SYMBOLIC)):
            if any(n in self.run for n in node.all_input_nodes):
                self._flush()
            self.made.append(Call(node, Why.NUMBER))
        elif touches_unknown_numbers(node):
            self._flush()
            self.made.append(Call(node, Why.DATA))
        elif returns_nothing(node) and not any(n in self.run for n in node.all_input_nodes):
            self._flush()
            self.made.append(Call(node, Why.EFFECT))
        elif node.target is aten.full.default and all(user.op == "call_module" for user in node.users):
            self.made.append(Call(node, Why.CONSTANT))
        elif node.target is COPY_ROWS and all(map(is_a_view, self.run)):
            self._flush()
            self.made.append(Call(node, Why.COPY))
        else:
            # A piece takes tensors and sizes: tuples are taken apart in the piece that makes them.
            items = _items(node)
            self.run += [node, *items]
            self.items.update(items)
            if node in self.ends:
                self._flush()

    def _flush(self) -> None:
        run, self.run = self.run, []
        outs, views = _leaving(run)
        nodes = _computed(run, outs)
        if nodes:
            inside = set(nodes)
            ins = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
            self.made.append(Compute(f"piece_{nodes[0].name}", nodes, tuple(ins), outs))
        self.made += [Call(node, Why.VIEW) for node in views]


def _leaving(run: Sequence[fx.Node]) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The values that a piece returns of a run of operators, and the views that run after the piece, in graph order."""
    inside = set(run)
    by_owner: dict[fx.Node, list[list[fx.Node]]] = {}
    for node in run:
        if not all(user in inside for user in node.users):
            chain = operand_chain(node, lambda value: value in inside and is_a_view(value))
            by_owner.setdefault(chain[-1], []).append(chain)
    outs: set[fx.Node] = set()
    views: set[fx.Node] = set()
    for owner, chains in by_owner.items():
        last = chains[0][0]
        if len(chains) == 1 and owner in inside and aliased_operand(owner) is None and _is_dense(last):
            outs.add(last)
        else:
            outs.add(owner)
            views.update(view for chain in chains for view in chain[:-1])
    return tuple(node for node in run if node in outs), tuple(node for node in run if node in views)


def _is_dense(node: fx.Node) -> bool:
    """Whether a piece can be compiled to return a value's strides: see `lowering.results`."""
    value = meta_value(node)
    return isinstance(value, torch.Tensor) and is_dense_in(value, storage_order(value))


def _computed(run: Sequence[fx.Node], outs: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """A run without the views that are neither read in it nor returned."""
    kept: set[fx.Node] = set()
    for node in reversed(run):
        if node in outs or not is_a_view(node) or not kept.isdisjoint(node.users):
            kept.add(node)
    return tuple(node for node in run if node in kept)


def _items(node: fx.Node) -> list[fx.Node]:
    """The `getitem`s of an operator's results, nested ones included."""
    if not isinstance(meta_value(node), (tuple, list)):
        return []
    items = [user for user in node.users if user.target is operator.getitem]
    return [each for item in items for each in (item, *_items(item))]
