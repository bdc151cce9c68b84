"""Canonical form: graphs that compute the same share a compiled piece.

    sizes     The graph's symbols are the first inputs of a piece. The piece computes all other sizes from them, whether
              the graph passes `s0 - 1` as an input or computes it.
    literals  A graph that was captured for one length has the length as a number in its sizes and arguments. A piece
              has a symbol instead, with the number as its value. The graph for all lengths, which is captured next,
              then finds its pieces compiled.

Canonical form does not change results. The key of a piece contains its whole graph. If the number has another meaning,
for instance a window as long as the prompt, then the graph for all lengths contains the number, and has another key.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.lowering.templates import SizeTemplate, SymbolFacts, Template, expressions, substitute
from mom_passes.errors import PassError
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import add_input
from mom_passes.graph.meta import meta_value
from mom_passes.graph.size_values import interpret
from mom_passes.graph.sizes import fixed_sizes
from mom_passes.graph.values import is_tensor, value_of
from mom_passes.loops.loop import loops
from mom_passes.loops.ports import COUNT, START
from mom_passes.torch_compat import schema_of, takes_sizes

aten = torch.ops.aten

CAPTURED = sympy.Symbol("captured", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Literals:
    """Symbols for the length that a graph was captured for.

    A graph for all lengths has a symbol for the length of each past key and value, and one symbol for all other values.

    length    the number; 0: the graph has no such length
    shared    the symbol of all values that are not in `own`
    own       the symbol of a past, by input and dimension
    """

    length: int = 0
    shared: sympy.Symbol = CAPTURED
    own: Mapping[tuple[fx.Node, int], sympy.Symbol] = field(default_factory=dict)

    @staticmethod
    def of(gm: fx.GraphModule, static: Collection[str]) -> Literals:
        """Return the length of the graph's loops or, without loops, of its longest past.

        There are no literals if a parameter has this size.
        """
        pasts = {} if any(True for _ in loops(gm)) else _pasts(gm, static)
        lengths = list(pasts.values()) or [loop.length for _, loop in loops(gm) if isinstance(loop.length, int)]
        length = max(lengths, default=0)
        taken = fixed_sizes(meta_value(n) for n in gm.graph.nodes if n.op == "placeholder" and n.name in static)
        if length < 8 or taken & {length - 1, length, length + 1}:
            return NO_LITERALS
        longest = [past for past in pasts if pasts[past] == length]
        own = {past: sympy.Symbol(f"past_{i}", integer=True, nonnegative=True) for i, past in enumerate(longest)}
        return Literals(length, next(iter(own.values()), CAPTURED), own)

    @property
    def facts(self) -> dict[sympy.Symbol, SymbolFacts]:
        return {symbol: SymbolFacts(self.length, 2) for symbol in (self.shared, *self.own.values())}

    def size(self, node: fx.Node | None, size: Any, dim: int = 0) -> Any:
        """Return a number as an expression of the length, if it differs from the length by at most 1.

        The number is the size of `node` along `dim`, or an argument of an operator if `node` is None.
        """
        if not self.length or type(size) is not int or abs(size - self.length) > 1:
            return size
        symbol = self.shared if node is None else self.own.get((node, dim), self.shared)
        return symbol + (size - self.length)


NO_LITERALS = Literals()


def _pasts(gm: fx.GraphModule, static: Collection[str]) -> dict[tuple[fx.Node, int], int]:
    """Return the lengths of inputs that a graph concatenates new rows to, by input and dimension."""
    found = {}
    for node in gm.graph.nodes:
        if node.target is aten.cat.default and is_tensor(node):
            first = argument(node, "tensors")[0]
            dim = axis(argument(node, "dim"), value_of(node).dim())
            size = value_of(first).shape[dim]
            if first.op == "placeholder" and first.name not in static and isinstance(size, int):
                found[first, dim] = size
    return found


@dataclass(frozen=True)
class CanonicalForm:
    """The inputs of a piece.

    templates    of all inputs: first the values of its symbols, then the inputs that are left
    symbols      the symbols of the piece, in order; `start` and `count` of a loop are the last
    given        the graph's symbols that the piece's symbols stand for, in order
    left         for each input before, whether the piece still takes it
    """

    templates: list[Template]
    symbols: dict[sympy.Symbol, SymbolFacts]
    given: list[sympy.Symbol]
    left: list[bool]


def in_canonical_form(
    graph: fx.Graph, templates: Sequence[Template], facts: Mapping[sympy.Symbol, SymbolFacts], literals: Literals
) -> CanonicalForm:
    """Rewrite a piece's graph, in place. `templates` describes its placeholders, in order."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    # Sizes last, so that the numbering of symbols does not depend on their position among the inputs.
    in_order = sorted(templates, key=lambda template: isinstance(template, SizeTemplate))
    found = [s for t in in_order for e in expressions(t) for s in sorted(e.free_symbols, key=str)]
    given = [s for s in dict.fromkeys(found) if s not in (START, COUNT)]
    names = {s: sympy.Symbol(f"n{i}", integer=True, nonnegative=True) for i, s in enumerate(given)}
    looping = [s for s in (START, COUNT) if s in found]
    symbols = {names[s]: facts[s] for s in given} | {s: facts[s] for s in looping}
    with graph.inserting_before(inputs[0] if inputs else next(iter(graph.nodes))):
        leads: dict[sympy.Expr, fx.Node] = {names[s]: add_input(graph, names[s].name) for s in given}
    own = [substitute(template, names) for template in templates]
    of_loop = {t.value: node for node, t in zip(inputs, own, strict=True) if isinstance(t, SizeTemplate)}
    leads |= {s: of_loop[s] for s in looping}
    left = _in_symbols(graph, inputs, own, leads, literals, names)
    leading: list[Template] = [SizeTemplate(names[s]) for s in given]
    return CanonicalForm([*leading, *itertools.compress(own, left)], symbols, given, left)


def _in_symbols(
    graph: fx.Graph,
    inputs: Sequence[fx.Node],
    templates: Sequence[Template],
    leads: Mapping[sympy.Expr, fx.Node],
    literals: Literals,
    names: Mapping[sympy.Symbol, sympy.Symbol],
) -> list[bool]:
    """Compute all sizes of a piece from its leading inputs. Return for each other input whether it is left.

    The new calls are inserted before all operators, in the order in which their results are read.
    """
    sizes = {n: t.value for n, t in zip(inputs, templates, strict=True) if isinstance(t, SizeTemplate)}
    rewriting = _Rewriting(graph, sizes, dict(leads), literals, names)
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        rewriting.arguments(node)
    left = [node not in sizes or bool(node.users) or node in leads.values() for node in inputs]
    for node, stays in zip(inputs, left, strict=True):
        if not stays:
            graph.erase_node(node)
    return left


class _Rewriting:
    """Replaces sizes by nodes, one per size, in front of all operators. Sizes that cannot be computed stay."""

    def __init__(
        self,
        graph: fx.Graph,
        sizes: Mapping[fx.Node, sympy.Expr],
        made: dict[sympy.Expr, fx.Node],
        literals: Literals,
        names: Mapping[sympy.Symbol, sympy.Symbol],
    ) -> None:
        self.graph = graph
        self.sizes = sizes
        self.made = made
        self.literals = literals
        self.names = names
        self.first = next(node for node in graph.nodes if node.op != "placeholder")

    def arguments(self, node: fx.Node) -> None:
        aggregate = fx.node.map_aggregate
        node.args = aggregate(node.args, self._read)
        node.kwargs = aggregate(node.kwargs, self._read)
        schema = schema_of(node.target) if self.literals.length else None
        for i, described in enumerate(schema.arguments if schema is not None else ()):
            if not takes_sizes(described):
                continue
            if described.name in node.kwargs:
                node.update_kwarg(described.name, aggregate(node.kwargs[described.name], self._literal))
            elif i < len(node.args):
                node.update_arg(i, aggregate(node.args[i], self._literal))

    def _read(self, value: Any) -> Any:
        return self._node(self.sizes[value], value) if isinstance(value, fx.Node) and value in self.sizes else value

    def _literal(self, value: Any) -> Any:
        known = self.literals.size(None, value)
        return value if known is value else self._node(known.xreplace(self.names), value)

    def _node(self, size: sympy.Expr, otherwise: Any) -> Any:
        try:
            return interpret(size, self.made.get, lambda constant: constant, self._call)
        except PassError:
            return otherwise

    def _call(self, part: sympy.Basic, target: Any, args: list[Any]) -> fx.Node:
        with self.graph.inserting_before(self.first):
            self.made[part] = self.graph.call_function(target, tuple(args))  # type: ignore[index]
        return self.made[part]  # type: ignore[index]
