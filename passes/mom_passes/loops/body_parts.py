"""A loop body cut at its collectives, so that a second mini-sequence computes while the collective of one is under way.

Terms
-----
part       The operators between two collectives. Parts and collectives alternate: part 0, collective 0, part 1, ...
crossing   A value that a later part reads. Views and sizes do not cross: each part computes them from what crosses.

    operator            -> the part of its place in the body
    a write             -> the first part that has its value, after all reads of what it writes to
    cheap, from inputs  -> the first part that reads it: rotary angles, masks

    part of mini-sequence     0 of A   0 of B   1 of A   1 of B   2 of A   0 of C   2 of B ...
    collective of A                    ~~~~~~            ~~~~~~
    collective of B                             ~~~~~~            ~~~~~~~~~~~~~~~
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.graph.aliasing import base_of, is_mutation, viewed_operand
from mom_passes.graph.sizes import expr, product
from mom_passes.graph.values import returned_values
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import TensorType
from mom_passes.ops.collectives import COLLECTIVES, has_collectives
from mom_passes.rules import facts
from mom_passes.torch_compat import schema_of

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})


@dataclass(frozen=True)
class Part:
    """The nodes of a part, in order. It reads `inputs` and passes on `outputs`: values that cross, and the operand of
    the next collective."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


class BodyParts:
    """The parts of a body's graph; `collectives[i]` runs between part `i` and part `i + 1`.

    `graph` is a body as it was built, or one that writes its results.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.collectives = [node for node in graph.nodes if node.target in COLLECTIVES]
        self._part: dict[fx.Node, int] = {}
        self._place()
        self._sink_cheap_values()
        self._place_writes()

    # --- which part computes a value ---

    def _place(self) -> None:
        part = 0
        for node in self.graph.nodes:
            if node.target in COLLECTIVES:
                part += 1
            elif node.op == "call_function" and not _is_repeated(node):
                several: Any = node.args[0] if node.target is operator.getitem else None
                self._part[node] = self._part.get(several, part)

    def _sink_cheap_values(self) -> None:
        free: set[fx.Node] = set()
        for node in self.graph.nodes:
            repeated = node.op == "placeholder" or _is_repeated(node)
            cheap = node in self._part and facts(node).recompute and not is_mutation(node)
            if (repeated or cheap) and free.issuperset(node.all_input_nodes):
                free.add(node)
        for node in reversed(self.graph.nodes):
            if node in free and node in self._part:
                read_in = [self._read_in(user) for user in node.users]
                known = [part for part in read_in if part is not None]
                self._part[node] = min(known, default=self._part[node])

    def _read_in(self, reader: fx.Node) -> int | None:
        """Return the first part that reads a value through `reader`; None if no part does."""
        if reader.target in COLLECTIVES:
            return self.collectives.index(reader)
        if reader in self._part:
            return self._part[reader]
        return min((part for user in reader.users if (part := self._read_in(user)) is not None), default=None)

    def _place_writes(self) -> None:
        for node in self._part:
            if not is_mutation(node):
                continue
            part = max(map(self.known_in, node.all_input_nodes), default=0)
            for place in _written(node):
                readers = [user for user in _all_readers(place) if user is not node and not is_mutation(user)]
                part = max([part, *map(self._may_be_written, readers)])
            self._part[node] = part

    def _may_be_written(self, reader: fx.Node) -> int:
        """Return the first part that may write to what a node reads, at its end."""
        if reader.target in COLLECTIVES:
            return self.collectives.index(reader) + 1
        return self._part.get(reader, 0)

    def known_in(self, value: fx.Node) -> int:
        """Return the first part that may read a value."""
        if value.target in COLLECTIVES:
            return self.collectives.index(value) + 1
        if value in self._part:
            return self._part[value]
        return max(map(self.known_in, value.all_input_nodes), default=0)

    # --- what a part takes and passes on ---

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        wanted: list[set[fx.Node]] = [set() for _ in range(len(self.collectives) + 1)]
        for node, part in self._part.items():
            wanted[part].add(node)
        results = [value for value in returned_values(self.graph) if isinstance(value, fx.Node)]
        for value in results:
            if _is_repeated(value):
                wanted[self.known_in(value)].add(value)
        for part, collective in enumerate(self.collectives):
            operand = collective.all_input_nodes[0]
            if _is_repeated(operand):
                wanted[part].add(operand)
        closed = [_with_repeated(nodes) for nodes in wanted]
        reads = [dict.fromkeys(n for node in nodes for n in node.all_input_nodes) for nodes in closed]
        found = []
        for part, nodes in enumerate(closed):
            later = {value for others in reads[part + 1 :] for value in others}
            later |= {collective.all_input_nodes[0] for collective in self.collectives[part:]}
            ordered = tuple(node for node in self.graph.nodes if node in nodes)
            outputs = tuple(n for n in ordered if n in later and (not _is_repeated(n) or self._is_operand(n, part)))
            inputs = tuple(value for value in self.graph.nodes if value in reads[part] and value not in nodes)
            found.append(Part(ordered, inputs, outputs))
        return tuple(found)

    def _is_operand(self, value: fx.Node, part: int) -> bool:
        return part < len(self.collectives) and self.collectives[part].all_input_nodes[0] is value

    def owns_operand(self, number: int) -> bool:
        """Return whether the operand of a collective is read by nothing else, so that the result may replace it.

        Only the result of a matrix product is certainly a buffer of its own: for other operators a compiler may return
        an input, or one buffer for two results.
        """
        operand = self.collectives[number].all_input_nodes[0]
        base = base_of(operand)
        if base not in self._part or base.target not in _PRODUCTS:
            return False
        return all(base_of(value) is not base for value in self._read_after(number))

    def crossing(self, number: int) -> list[fx.Node]:
        """Return the values that exist while a collective is under way: its result, and what crosses it."""
        before = {node for part in self.parts[: number + 1] for node in part.outputs}
        before |= set(self.collectives[:number])
        both = before & self._read_after(number)
        return [self.collectives[number], *(node for node in self.graph.nodes if node in both)]

    def _read_after(self, number: int) -> set[fx.Node]:
        """Return what parts and collectives read after a collective."""
        found = {value for part in self.parts[number + 1 :] for value in part.inputs}
        return found | {other.all_input_nodes[0] for other in self.collectives[number + 1 :]}


def _is_repeated(node: fx.Node) -> bool:
    """Return whether each part that reads a value computes it: a view, or a number."""
    if node.op != "call_function" or is_mutation(node):
        return False
    return node.meta.get("type") is None or viewed_operand(node) is not None


def _with_repeated(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, pending = set(), list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += filter(_is_repeated, node.all_input_nodes)
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of the body that a node writes to."""
    described = zip(schema_of(node.target).arguments, node.args, strict=False)
    written = (value for argument, value in described if argument.alias_info and argument.alias_info.is_write)
    return [base_of(value) for value in written if isinstance(value, fx.Node)]


def _all_readers(value: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for user in value.users:
        found += [user, *(_all_readers(user) if _is_repeated(user) else ())]
    return found


def second_in_flight(loop: Loop) -> sympy.Expr:
    """Return the bytes, in `count`, that a second mini-sequence in flight holds beside the one that computes."""
    body = BodyParts(loop.body.graph)
    sizes = [sum((_bytes(node) for node in body.crossing(n)), sympy.S.Zero) for n in range(len(body.collectives))]
    different = list(dict.fromkeys(sizes))
    return sympy.Max(*different, evaluate=False) if len(different) > 1 else sum(different, sympy.S.Zero)


def _bytes(node: fx.Node) -> sympy.Expr:
    type = node.meta["type"]
    assert isinstance(type, TensorType), f"{node.name} crosses a collective and has no type"
    return expr(product(type.shape)) * type.dtype.itemsize


def may_overlap(loop: Loop) -> bool:
    """Return whether two mini-sequences of a loop may be in flight: it has a collective, and each carry is read and
    computed in one part, so that the second mini-sequence gets it in time."""
    graph = loop.body.graph
    if not has_collectives(graph.nodes):
        return False
    body, inputs, results = BodyParts(graph), graph.find_nodes(op="placeholder"), returned_values(graph)
    for number, port in loop.carries.items():
        received, following = inputs[2 + number], results[port.out]
        parts = {body.known_in(following)} if isinstance(following, fx.Node) else set()
        parts |= {part for user in received.users if (part := body._read_in(user)) is not None}
        if len(parts) > 1:
            return False
    return True
