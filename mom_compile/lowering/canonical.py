"""One form for graphs that compute the same, so that they share a compiled piece.

    sizes     The graph's symbols lead a piece's inputs. Any other size it is given, the same once more or an expression
              of them, is computed from these: whether a graph hands on `s0 - 1` or asks for it itself makes no
              difference.
    literals  Where a graph was captured for one length, this is a number in its sizes and among its arguments. In a
              piece it becomes a symbol again, with the number as its value: the graph of all lengths, which is
              captured next, then finds its pieces compiled.

Neither can make a piece wrong. A piece says what it computes for given sizes, its key is all that it says, and a graph
whose literal meant something else, a window that is as long as the prompt, has that number in another length's piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.lowering.layouts import expressions, substitute
from mom_compile.lowering.pieces import SizeTemplate, SymbolFacts, Template
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
    """The length that a graph was captured for, as symbols. Without one there are none.

    Captured for all lengths, every past of a cache has a length of its own, and everything else the same one.
    """

    length: int = 0
    shared: sympy.Symbol = CAPTURED
    own: Mapping[tuple[fx.Node, int], sympy.Symbol] = field(default_factory=dict)

    @staticmethod
    def of(gm: fx.GraphModule, static: Collection[str]) -> Literals:
        """The length of its loops or, without loops, that of the longest past; none that a parameter has for a size."""
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
        """A number, `node`'s along `dim` or nobody's, as an expression of the length if it is within one of it."""
        if not self.length or type(size) is not int or abs(size - self.length) > 1:
            return size
        symbol = self.shared if node is None else self.own.get((node, dim), self.shared)
        return symbol + (size - self.length)


NO_LITERALS = Literals()


def _pasts(gm: fx.GraphModule, static: Collection[str]) -> dict[tuple[fx.Node, int], int]:
    """Inputs that a graph puts new rows behind, with the dimension along which it does, and their lengths."""
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
    """A piece's inputs: `symbols`, its own, whose values come first, and what the `templates` behind these say.

    `given` are the graph's symbols that the first of its own stand for, in order; `left` says which inputs are left.
    """

    templates: list[Template]
    symbols: dict[sympy.Symbol, SymbolFacts]
    given: list[sympy.Symbol]
    left: list[bool]


def in_canonical_form(
    graph: fx.Graph, templates: Sequence[Template], facts: Mapping[sympy.Symbol, SymbolFacts], literals: Literals
) -> CanonicalForm:
    """Rewrite a piece's graph, in place. Its placeholders are what `templates` describe, in order."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    # Sizes last: where among the inputs they stand must make no difference.
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
    """Compute every size that a piece is given or has among its arguments from its leading inputs; which of the other
    inputs are left. Calls for it come first, in the order in which what they compute is read."""
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
    """Nodes for sizes, one for each, ahead of all that computes. What cannot be computed stays as it is."""

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
