"""How many rows the mini-sequences of each loop have, by what the program's memory model says of them: one rule for
every device.

Terms
-----
full      What lives at full length at the peak: the most, over the steps, of the storages alive beside scratch.
room      What a mini-sequence may hold: a tenth of that. More rows than there is room for cost memory, fewer cost time.
bounds    Between how many rows the device is efficient (`bounds`).

    room = SHARE * full
    rows = as many as there is room for, between the fewest that are efficient and the most that help
           fewer, down to the fewest of all, where a value that is wider than the device's layer would take more than
           `VALUE_BYTES`: logits
           fewer, down to the fewest of all, where even the efficient ones of such a loop would hold more than all at
           full length, and it is not a short one
           for experts, as many as give each expert's product the rows that it should have

Sizes are those of a run: a graph that was captured for all lengths has other rows for each. Rows are counted over all
sequences of a batch, and evened out over the mini-sequences where the device has no use for a multiple of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from mom_compile.memory.bounds import Bounds, DeviceRows
from mom_passes.graph.size_values import SizeFunction, function_of
from mom_passes.graph.sizes import expr
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import COUNT
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import LoopStep

#: What a mini-sequence may hold of what lives at full length.
SHARE = 0.1

#: Bytes that one value of a mini-sequence may take: 128 rows of logits over a vocabulary of 262,144 in float32. A
#: product as wide as that is bound by arithmetic with 128 rows, not by reading the weights.
VALUE_BYTES = 128 << 20

#: A loop whose experts ask for longer mini-sequences has at least so many.
FEWEST_ITERATIONS = 4

#: As many mini-sequences of efficient rows make a loop a long one: what a shorter one holds is little in any case.
LONG = 8

#: Rows between which a mini-sequence's bytes are compared: what does not grow with them is not theirs.
FEW, MANY = 1024, 2048


@dataclass(frozen=True)
class RowRule:
    """What a device wants, and how many sequences each loop of a program has rows of at once, by the loop's node."""

    device: DeviceRows
    sequences: Mapping[fx.Node, sympy.Expr]


@dataclass(frozen=True)
class LoopSizes:
    """A loop as functions of a run's sizes, with what its widest value takes for a token, how many tokens give each of
    its experts a row, and the rows that it has where no rule says it."""

    length: SizeFunction
    sequences: SizeFunction
    widest: int
    spread: float
    rows: int


@dataclass(frozen=True)
class StepSizes:
    """What a step needs as functions of a run's sizes: `kept` beside its scratch, `scratch` in these and a count.
    `captured` are the sizes of the first run."""

    kept: SizeFunction
    scratch: SizeFunction
    loop: LoopSizes | None
    captured: tuple[int, ...] = ()

    def bytes(self, sizes: tuple[int, ...], rows: int) -> int:
        """With mini-sequences of so many rows, if it is a loop."""
        count = min(rows, self.loop.length(sizes)) if self.loop is not None else 0
        return int(self.kept(sizes) + self.scratch((*sizes, count)))

    def row_bytes(self, sizes: tuple[int, ...]) -> int:
        """What a mini-sequence holds for each of its rows."""
        few, many = (self.scratch((*sizes, count)) for count in (FEW, MANY))
        return max(1, int(many - few) // (MANY - FEW))

    def widest(self, sizes: tuple[int, ...]) -> int:
        """Bytes of a loop's widest value for a token. It is known at the captured sizes, and grows as all values of a
        row together: a row of scores has a value for each key."""
        assert self.loop is not None
        known, row_bytes = self.loop.widest, self.row_bytes(sizes)
        return max(1, known, min(row_bytes, known * row_bytes // self.row_bytes(self.captured)))


@dataclass(frozen=True)
class Footprint:
    """The distinct steps of a program, as functions of the values of `symbols` in a run. `device` is what the rule for
    rows goes by; without one, loops have the rows that they have. `order` has all steps, by their number among these.
    """

    symbols: tuple[sympy.Symbol, ...]
    steps: tuple[StepSizes, ...]
    device: DeviceRows | None = None
    order: tuple[int, ...] = ()

    @staticmethod
    def of(
        memory: Memory,
        rule: RowRule | None = None,
        beside: sympy.Expr = sympy.S.Zero,
        more: Collection[sympy.Expr] = (),
    ) -> tuple[Footprint, dict[fx.Node, int]]:
        """Of a program whose kernels take so much `beside` what each step needs, with the symbols of `more` sizes; and
        the number of each loop's step, by its node."""
        keys = [_key(moment, rule, beside) for moment in memory.moments]
        found = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        sizes = [*more, *(size for key in found for size in key if isinstance(size, sympy.Basic))]
        symbols = tuple(sorted({symbol for size in sizes for symbol in size.free_symbols} - {COUNT}, key=str))
        captured = tuple(int(memory.hints.get(symbol, 2)) for symbol in symbols)
        steps = tuple(_functions(key, symbols, captured) for key in found)
        order = tuple(found[key] for key in keys)
        of_steps = zip(memory.moments, order, strict=True)
        numbers = {m.step.node: number for m, number in of_steps if isinstance(m.step, LoopStep)}
        return Footprint(symbols, steps, None if rule is None else rule.device, order), numbers

    def full(self, sizes: tuple[int, ...]) -> int:
        return max((int(step.kept(sizes)) for step in self.steps), default=0)

    def rows(self, sizes: tuple[int, ...], full: int | None = None) -> tuple[int, ...]:
        """Of each step; 0 where it is no loop. `full` is what lives at full length, if that is not this program's."""
        full = self.full(sizes) if full is None else full
        return tuple(self._rows(step, step.loop, sizes, full) if step.loop is not None else 0 for step in self.steps)

    def fewest(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The same at least, whatever a budget asks for."""
        return tuple(
            0 if step.loop is None
            else step.loop.rows if self.device is None
            else self.device.bounds(step.loop.sequences(sizes)).fewest
            for step in self.steps
        )  # fmt: skip

    def multiple(self, loop: LoopSizes, sizes: tuple[int, ...]) -> int:
        """Of how many rows those of a loop are a multiple."""
        return 1 if self.device is None else self.device.bounds(loop.sequences(sizes)).step

    def bytes(self, sizes: tuple[int, ...], rows: Sequence[int]) -> int:
        """The peak, with these rows."""
        steps = zip(self.steps, rows, strict=True)
        return max((step.bytes(sizes, count) for step, count in steps), default=0)

    def _rows(self, step: StepSizes, loop: LoopSizes, sizes: tuple[int, ...], full: int) -> int:
        if self.device is None:
            return loop.rows
        sequences, length = loop.sequences(sizes), loop.length(sizes)
        bounds, row_bytes = self.device.bounds(sequences), step.row_bytes(sizes)
        widest = step.widest(sizes)
        wide = widest > bounds.width
        rows = _within(bounds, row_bytes, full, wide and length >= LONG * bounds.efficient)
        if loop.spread > 1:
            experts = self.device.experts
            wanted = math.ceil(experts.rows * loop.spread / sequences)
            rows = min(max(rows, min(wanted, length // FEWEST_ITERATIONS)), experts.bytes // widest)
            return max(bounds.fewest, rows // bounds.step * bounds.step)
        if wide:
            rows = min(rows, max(bounds.fewest, VALUE_BYTES // widest // bounds.step * bounds.step))
        return evened(length, rows, bounds)


def rows_at(memory: Memory, rule: RowRule, sizes: Mapping[sympy.Symbol, int] | None = None) -> dict[Loop, int]:
    """The rows that the mini-sequences of each loop would have at other sizes than the captured ones, or at those.

    A pure function of a program's memory: whoever plans for many lengths keeps a `Footprint`.
    """
    footprint, numbers = Footprint.of(memory, rule)
    known = {**memory.hints, **(sizes or {})}
    rows = footprint.rows(tuple(int(known[symbol]) for symbol in footprint.symbols))
    steps = {m.step.node: m.step.loop for m in memory.moments if isinstance(m.step, LoopStep)}
    return {steps[node]: rows[number] for node, number in numbers.items()}


def _within(bounds: Bounds, row_bytes: int, full: int, long: bool) -> int:
    room = int(SHARE * full) // row_bytes // bounds.step * bounds.step
    if room < bounds.efficient and bounds.efficient * row_bytes > full and long:
        return max(bounds.fewest, full // row_bytes // bounds.step * bounds.step)
    return min(bounds.most, max(bounds.efficient, room))


def evened(length: int, rows: int, bounds: Bounds) -> int:
    """As many rows, or a few more, that divide a length into mini-sequences of nearly one length: a short last one is
    not efficient. All of it where it has no two such; of rows in multiples of a step, where the second one of two would
    have less than half."""
    if bounds.step > 1:
        return rows if 2 * length >= 3 * rows else max(rows, math.ceil(length / bounds.step) * bounds.step)
    return max(rows, math.ceil(length / max(1, length // rows)))


_Key = tuple[sympy.Expr, sympy.Expr, sympy.Expr | None, sympy.Expr, int, float, int]


def _key(moment: Moment, rule: RowRule | None, beside: sympy.Expr) -> _Key:
    """What there is to know of a moment. Layers are alike, and so are their keys."""
    kept = sum((storage.bytes for storage in moment.alive), beside)
    if not isinstance(moment.step, LoopStep):
        return kept, moment.scratch, None, sympy.S.One, 0, 1, 0
    loop = moment.step.loop
    sequences = sympy.S.One if rule is None else rule.sequences.get(moment.step.node, sympy.S.One)
    return kept, moment.scratch, expr(loop.length), sequences, loop.widest, loop.spread, loop.rows


def _functions(key: _Key, symbols: tuple[sympy.Symbol, ...], captured: tuple[int, ...]) -> StepSizes:
    kept, scratch, length, sequences, widest, spread, rows = key
    loop = None
    if length is not None:
        loop = LoopSizes(function_of(length, symbols), function_of(sequences, symbols), widest, spread, rows)
    return StepSizes(function_of(kept, symbols), function_of(scratch, (*symbols, COUNT)), loop, captured)
