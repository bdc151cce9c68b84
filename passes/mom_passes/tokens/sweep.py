"""Propagate one token dimension through a graph: which values carry tokens, and along which dim. See `tokens.dims`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from mom_passes.errors import CannotChunk, NoRule
from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, hint, product, same
from mom_passes.graph.values import operands, value_of
from mom_passes.rules import All, Claim, Dim, Rows, claim_for, dim_of, facts
from mom_passes.rules.work import matmul_work


@dataclass(frozen=True)
class Carrier:
    """A value's token dimension and its number of tokens (one fewer after `hidden[:, 1:]`)."""

    dim: Dim
    length: Size


#: A dim of a result, the claim for its rows, and their number. Without a claim, rows are sliced from the whole value.
Option = tuple[Dim, Claim | None, Size]


@dataclass
class Sweep:
    """State of the propagation. See `tokens.dims.TokenDims` for the results."""

    length: Size
    activations: set[fx.Node]
    #: Values that depend on the seed.
    reached: set[fx.Node]
    carriers: dict[fx.Node, Carrier] = field(default_factory=dict)
    rowwise: set[fx.Node] = field(default_factory=set)
    worked: set[fx.Node] = field(default_factory=set)
    mixing: dict[fx.Node, str] = field(default_factory=dict)
    #: The options of values that may carry tokens along several dims, the likeliest first.
    options: dict[fx.Node, list[Option]] = field(default_factory=dict)
    #: Dims along which rows of a value cannot be computed.
    refused: set[tuple[fx.Node, Dim]] = field(default_factory=set)
    barriers: int = 0
    batched: int = 0
    work: int = 0

    def visit(self, node: fx.Node) -> None:
        if not self.reached.isdisjoint(node.all_input_nodes):
            self.reached.add(node)
        inputs = operands(node)
        carried = [self.carriers[operand] for operand in inputs if operand in self.carriers]
        if not carried:
            return
        if node.target is operator.getitem:
            self._visit_getitem(node)
            return
        found = self._find_options(node, inputs)
        if isinstance(found, CannotChunk):
            self.mixing[node] = found.reason
            # A product without rows, such as an attention of one query to all keys, is a barrier, too.
            if not isinstance(found, NoRule) and matmul_work(node) > 0 and sum(map(self._is_reached, inputs)) > 1:
                factors = [self.carriers[n].dim for n in inputs if n in self.carriers and self._is_reached(n)]
                apart = bool(factors) and all(dim.index in facts(node).apart for dim in factors)
                self.batched += apart
                self.barriers += not apart
            self._restart_after(node, carried)
            return
        dim, claim, length = found[0]
        assert claim is not None
        self.carriers[node] = Carrier(dim, length)
        self.rowwise.add(node)
        found += self._cuts(node)
        if len(found) > 1:
            self.options[node] = found
        needed = list(zip(inputs, claim.needs, strict=True))
        # A scan of values that are as cheap as an input (padding) is cheap, too.
        heavy = not facts(node).recompute and not claim.carries
        if heavy or any(n in self.worked for n in inputs):
            self.worked.add(node)
            # Rows that need rows before them, or a carry, are tokens: batch entries are independent.
            self.barriers += bool(claim.carries) or any(need.before for need in claim.needs if isinstance(need, Rows))
        # A product that needs rows of weights only does not count: the dimension may be features.
        if matmul_work(node) and any(n in self.carriers and not isinstance(need, All) for n, need in needed):
            self.work += matmul_work(node)
            # Count floating-point factors only, not the masks and positions of an attention's keys.
            activations = [need for n, need in needed if self._is_activation(n)]
            self.batched += len(activations) > 1 and all(isinstance(need, Rows) for need in activations)
            # A factor that does not depend on the seed (a weight that is a graph input, a bias per head) is needed
            # whole along a batch, too.
            self.barriers += any(not isinstance(need, Rows) for n, need in needed if self._is_reached(n))

    def _is_activation(self, node: fx.Node) -> bool:
        return node in self.activations and value_of(node).is_floating_point()

    def _is_reached(self, node: fx.Node) -> bool:
        return node in self.reached and value_of(node).is_floating_point()

    def _visit_getitem(self, node: fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        if source not in self.rowwise:
            return
        found: list[Option] = []
        for dim, length in self._dims(source):
            outputs = claim_for(source, dim, in_order=True).outputs
            own = outputs[index] if outputs is not None else Rows(dim)
            found += [(own.dim, Claim((Rows(dim),)), length)] if isinstance(own, Rows) else []
        if found:
            self.carriers[node] = Carrier(found[0][0], found[0][2])
            self.rowwise.add(node)
            self.worked |= {node} if source in self.worked else set()
            if len(found) > 1:
                self.options[node] = found

    def _dims(self, node: fx.Node) -> list[tuple[Dim, Size]]:
        """Return the dims along which a value may carry tokens, with their lengths, the likeliest first."""
        if node not in self.carriers:
            return []
        if node in self.options:
            return [(dim, length) for dim, _, length in self.options[node]]
        return [(self.carriers[node].dim, self.carriers[node].length)]

    def _find_options(self, node: fx.Node, inputs: Sequence[fx.Node]) -> list[Option] | CannotChunk:
        """Return the options of a result, those that need rows of most carriers first, or why there is none."""
        found: list[tuple[int, tuple[Dim, Claim, Size]]] = []
        refused: CannotChunk | None = None
        dims = [self._dims(operand) for operand in inputs]
        for dim, length in _candidates(node, dims):
            try:
                claim = claim_for(node, dim, in_order=True)
            except CannotChunk as refusal:
                refused = refusal
                continue
            needed = self._needed_dims(inputs, claim)
            if all(self._may_carry(operand, along, length) for operand, along in needed):
                found.append((len(needed), (dim, claim, length)))
        if not found:
            return refused or _why_no_options(node)
        return [option for _, option in sorted(found, key=lambda pair: -pair[0])]

    def _needed_dims(self, inputs: Sequence[fx.Node], claim: Claim) -> list[tuple[fx.Node, Dim]]:
        """Return the carriers among the operands of which a claim needs rows, with the dims of these rows."""
        needed = ((operand, dim_of(need)) for operand, need in zip(inputs, claim.needs, strict=True))
        return [(operand, along) for operand, along in needed if operand in self.carriers and along is not None]

    def _may_carry(self, node: fx.Node, dim: Dim, length: Size) -> bool:
        """Whether rows of a value along this dim can be computed, back to values that carry tokens along theirs.

        Example: a mask that is expanded over queries and keys. The dims found become options of the values.
        """
        if self.carriers[node].dim == dim and same(self.carriers[node].length, length):
            return True
        found: list[tuple[fx.Node, Option]] = []
        pending, seen = [(node, dim)], {(node, dim)}
        while pending:
            value, along = pending.pop()
            if any(along == at and same(n, length) for at, n in self._dims(value)):
                continue
            option = None if (value, along) in self.refused else self._option(value, along, length)
            if option is None:
                self.refused.add((node, dim))
                return False
            found.append((value, option))
            more = self._needed_dims(operands(value), option[1]) if option[1] is not None else []
            pending += [pair for pair in more if pair not in seen]
            seen.update(more)
        for value, option in found:
            self.options.setdefault(value, [self._current_option(value)]).append(option)
        return True

    def _option(self, node: fx.Node, dim: Dim, length: Size) -> Option | None:
        if node not in self.rowwise or node.target is operator.getitem:
            return None
        cut = next((option for option in self._cuts(node) if option[0] == dim and same(option[2], length)), None)
        if cut is not None:
            return cut
        try:
            return dim, claim_for(node, dim), length
        except CannotChunk:
            return None

    def _current_option(self, node: fx.Node) -> Option:
        carrier = self.carriers[node]
        return carrier.dim, _claim_of(node, carrier.dim), carrier.length

    def _cuts(self, node: fx.Node) -> list[Option]:
        """Return options of a slice or concatenation along a token dim: a value with two may have rows along either."""
        if node.target not in (aten.slice.Tensor, aten.cat.default):
            return []
        dims = [dim for dim, _ in self._dims(operands(node)[0]) if dim.plain and _cuts_or_adds_rows(node, dim.index)]
        sizes = [(dim, value_of(node).shape[dim.index]) for dim in dims]
        return [(dim, None, size) for dim, size in sizes if hint(size) > 1]

    def _restart_after(self, node: fx.Node, carried: list[Carrier]) -> None:
        """Make the result of a mixing operator a carrier if it has one row per token."""
        value = meta_value(node)
        if not isinstance(value, torch.Tensor):
            self._restart_with_items(node)
            return
        if any(n in self.worked for n in operands(node)):
            self.worked.add(node)
        for carrier in carried:
            index = carrier.dim.index
            if carrier.dim.plain and _cuts_or_adds_rows(node, index):
                # `hidden[:, 1:]` still carries tokens, and so does a sequence after a prefix of embeddings.
                if hint(value.shape[index]) > 1:
                    self.carriers[node] = Carrier(carrier.dim, value.shape[index])
                return
            fits = [i for i, size in enumerate(value.shape) if same(size, carrier.length)]
            fits = [i for i in fits if not self._has_no_tokens(node, Dim(i))]
            if fits:
                self.carriers[node] = Carrier(Dim(index if index in fits else fits[0]), carrier.length)
                return

    def _has_no_tokens(self, node: fx.Node, dim: Dim) -> bool:
        """Whether a dim of a result comes from dims of the carriers without tokens, such as an equally large batch."""
        try:
            needed = self._needed_dims(operands(node), claim_for(node, dim, in_order=True))
        except CannotChunk:
            return False
        return bool(needed) and all(self.carriers[operand].dim != along for operand, along in needed)

    def _restart_with_items(self, node: fx.Node) -> None:
        """Make the results of an attention that have one row per query carriers, and count its work."""
        query = self.carriers.get(operands(node)[0])
        if query is None or not matmul_work(node):
            return
        items = [user for user in node.users if user.target is operator.getitem]
        found = [item for item in items if query is not None and _has_rows(item, query)]
        if query is not None:
            self.carriers.update(dict.fromkeys(found, query))
        self.worked.update(found)
        self.work += matmul_work(node) if found else 0


def _cuts_or_adds_rows(node: fx.Node, index: int) -> bool:
    if node.target not in (aten.slice.Tensor, aten.cat.default):
        return False
    return axis(argument(node, "dim"), value_of(node).dim()) == index


def _has_rows(item: fx.Node, carrier: Carrier) -> bool:
    shape, index = value_of(item).shape, carrier.dim.index
    return carrier.dim.plain and index < len(shape) and same(shape[index], carrier.length)


def _why_no_options(node: fx.Node) -> CannotChunk:
    """Return why a result has no rows, if no rule refused them."""
    if facts(node).rule is None:
        return NoRule(node, None)
    return CannotChunk(node, None, "its rows need other rows of its operands")


def _candidates(node: fx.Node, dims: list[list[tuple[Dim, Size]]]) -> list[tuple[Dim, Size]]:
    value = meta_value(node)
    first = value[0] if isinstance(value, (tuple, list)) else value
    if not isinstance(first, torch.Tensor):
        return []
    candidates = facts(node).candidates
    found: list[tuple[Dim, Size]] = []
    for i, options in enumerate(dims):
        for own, length in options:
            if candidates is not None:
                given = tuple(own if j == i else others[0][0] if others else None for j, others in enumerate(dims))
                likely = candidates(node, given)
            else:
                size = product([own.outer, length, own.inner])
                likely = [own.at(at) for at, s in enumerate(first.shape) if same(s, size)]
            found += [(dim, length) for dim in likely if (dim, length) not in found]
    return found


def choose_options(gm: fx.GraphModule, sweep: Sweep) -> dict[fx.Node, Carrier]:
    """Choose the dim of each value with several options: the one that most readers need rows along.

    Example: a softmax needs scores `[S, S]` by rows of queries, and no reader needs them by rows of keys.
    """
    found: dict[fx.Node, Carrier] = {}
    needed: dict[fx.Node, list[Dim]] = {}
    for node in reversed(gm.graph.nodes):
        if node not in sweep.rowwise:
            continue
        options = sweep.options.get(node, [])
        if options:
            votes = needed.get(node, [])
            dim, claim, length = max(options, key=lambda option: votes.count(option[0]))
            found[node] = Carrier(dim, length)
            if claim is None:
                sweep.rowwise.discard(node)
                sweep.mixing[node] = "its rows need other rows of its operands"
                continue
        elif any(operand in sweep.options for operand in operands(node)):
            claim = _claim_of(node, sweep.carriers[node].dim)
        else:
            continue
        for operand, need in zip(operands(node), claim.needs, strict=True):
            along = dim_of(need)
            if operand in sweep.options and along is not None:
                needed.setdefault(operand, []).append(along)
    return found


def _claim_of(node: fx.Node, dim: Dim) -> Claim:
    return Claim((Rows(dim),)) if node.target is operator.getitem else claim_for(node, dim, in_order=True)
