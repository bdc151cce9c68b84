"""Rows and resident layers for a budget, chosen together and anew for each run.

Terms
-----
needed   What a run holds at its peak beside weights, inputs and layers that stay, as its program says: the residual
         stream, keys and values of the layers that are on the device whatever is decided, and what one step holds.
fewest   The same with as few rows as there may be.
sizes    The values that a run gives the symbols of its graph: how many sequences, how many tokens. Where all were
         captured as numbers, there are none: guards keep such a graph to those sizes.

    device bytes = weights + inputs + needed(sizes, rows) + resident layers * a layer's keys and values

    layers = as many as there is room for with the fewest rows
    rows   = as many as these layers leave room for, at most those that the rule says without a budget

So rows go before layers do. Fewer rows cost a quarter of a prefill's time at the very most (`bounds`), once. A layer
that leaves is brought back for every token that is generated, and a step for one token has next to nothing to hide that
behind; in the prefill itself either is nearly free. And what the layers do not need goes back to the rows: layers are
large, and what is left of the room when the last one fits is often all that the rows want.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mom_compile.memory.choose_rows import Footprint, StepSizes
from mom_compile.memory.refusal import MemoryBudgetError, Refusal, last_that_fits
from mom_passes.graph.size_values import SizeFunction


@dataclass(frozen=True)
class Budget:
    """Bytes of a device for everything; `asked` where the user has named them, and will be told if they are too few."""

    bytes: int
    asked: bool = False


@dataclass(frozen=True)
class Chosen:
    """Rows of each step of the footprint, and what is needed with these."""

    rows: tuple[int, ...]
    needed: int


@dataclass(frozen=True)
class InTokens:
    """A choice as a function of the tokens alone, and how many were captured."""

    choice: Choice
    captured: int


@dataclass(frozen=True)
class Choice:
    """What is chosen from for a program's runs; without a budget, rows alone.

    `layers` are those whose keys and values may stay, each of `layer_bytes` at most: none, where the user says where
    they go. `tokens` is the number of the symbol that says how many tokens there are; where they were captured as a
    number, `in_tokens` has the same choice with a symbol for them, which never says less than fewer tokens need.
    """

    footprint: Footprint
    weights: int
    inputs: SizeFunction
    budget: Budget | None
    layers: int
    layer_bytes: SizeFunction
    tokens: int | None = None
    in_tokens: InTokens | None = None
    _last: list[tuple[tuple[int, ...], Chosen]] = field(default_factory=list, repr=False, compare=False)

    def at(self, sizes: tuple[int, ...]) -> Chosen:
        """For a run of these sizes: every loop and every value that may leave asks for it, so the last answer is kept.

        Raises `MemoryBudgetError` where the budget was asked for and cannot be kept.
        """
        for known, answer in self._last:
            if known == sizes:
                return answer
        if self.budget is not None and self.budget.asked and self.smallest(sizes) > self.budget.bytes:
            raise MemoryBudgetError(str(self._refusal(sizes)))
        chosen = self.best(sizes)
        self._last[:] = [(sizes, chosen)]
        return chosen

    def best(self, sizes: tuple[int, ...]) -> Chosen:
        """The same without asking whether it does: the fewest rows and no layer where nothing does."""
        rows = self.footprint.rows(sizes)
        if self.budget is None:
            return Chosen(rows, self.footprint.bytes(sizes, rows))
        fewest = self._fewest(sizes, rows)
        least, layer = self.footprint.bytes(sizes, fewest), max(1, int(self.layer_bytes(sizes)))
        room = self.budget.bytes - self._beside(sizes)
        room -= min(self.layers, max(0, room - least) // layer) * layer
        steps = zip(self.footprint.steps, fewest, rows, strict=True)
        rows = tuple(self._most(step, sizes, low, high, room) for step, low, high in steps)
        return Chosen(rows, self.footprint.bytes(sizes, rows))

    def smallest(self, sizes: tuple[int, ...]) -> int:
        """The smallest budget that can be kept: no layer stays, and mini-sequences have the fewest rows."""
        return self._beside(sizes) + self.footprint.bytes(sizes, self._fewest(sizes, self.footprint.rows(sizes)))

    def resident_layers(self, sizes: tuple[int, ...], layer_bytes: int) -> int:
        """How many layers may stay in a run of these sizes whose layers take `layer_bytes` each."""
        if self.budget is None:
            return self.layers
        room = self.budget.bytes - self._beside(sizes) - self.at(sizes).needed
        return max(0, min(self.layers, room // max(1, layer_bytes)))

    def stays(self, layer: int, sizes: tuple[int, ...], layer_bytes: int) -> bool:
        """Whether a layer is among those. They are spread evenly: each fetch has resident layers to hide behind."""
        resident = self.resident_layers(sizes, layer_bytes)
        return (layer + 1) * resident // self.layers > layer * resident // self.layers

    def with_budget(self, size: int) -> Choice:
        """The same for another budget, what another process has say."""
        return self if self.budget is None else replace(self, budget=replace(self.budget, bytes=size), _last=[])

    def _fewest(self, sizes: tuple[int, ...], rows: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(min, self.footprint.fewest(sizes), rows))

    def _most(self, step: StepSizes, sizes: tuple[int, ...], fewest: int, most: int, room: int) -> int:
        """The most rows, between the fewest and the most, with which a step needs no more than there is room for; as
        few as there may be where it needs more in any case."""
        if step.loop is None or step.bytes(sizes, most) <= room:
            return most
        each = self.footprint.multiple(step.loop, sizes)
        low, high = fewest // each, most // each
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if step.bytes(sizes, middle * each) <= room else (low, middle)
        return max(fewest, low * each)

    def _refusal(self, sizes: tuple[int, ...]) -> Refusal:
        assert self.budget is not None
        lengths = [step.loop.length(sizes) for step in self.footprint.steps if step.loop is not None]
        smallest, tokens = self.smallest(sizes), max(lengths, default=None)
        return Refusal(self.budget.bytes, smallest, self.weights, tokens, self._longest(sizes))

    def _longest(self, sizes: tuple[int, ...]) -> int | None:
        """How many tokens there is room for; None where nothing is known of other lengths, or there is no room at all.

        Exact where the length is a symbol. Where it was a number, what grows with it is told by the sizes of values,
        and what is not told counts in full: there may be room for a few more.
        """
        if self.in_tokens is not None:
            return self.in_tokens.choice._longest((self.in_tokens.captured,))
        if self.tokens is None or self.budget is None:
            return None
        budget, before, after = self.budget.bytes, sizes[: self.tokens], sizes[self.tokens + 1 :]
        return last_that_fits(lambda n: self.smallest((*before, n, *after)) <= budget, sizes[self.tokens])

    def _beside(self, sizes: tuple[int, ...]) -> int:
        return self.weights + int(self.inputs(sizes))


@dataclass(frozen=True)
class RowsOf:
    """The rows of a loop, from what a run has of sizes."""

    choice: Choice
    number: int

    def __call__(self, sizes: tuple[int, ...]) -> int:
        return self.choice.at(sizes).rows[self.number]


@dataclass(frozen=True)
class KeepsBudget:
    """The first step of a program whose sizes are symbols: whether a budget that was asked for can be kept."""

    choice: Choice

    def __call__(self, arguments: list[int]) -> tuple[()]:
        self.choice.at(tuple(arguments))
        return ()


@dataclass(frozen=True)
class Stays:
    """Whether a value stays, from what a run has of it. The layer's and its own bytes per token are those captured."""

    choice: Choice
    layer: int
    layer_bytes: int
    own_bytes: int

    def __call__(self, sizes: tuple[int, ...], size: int) -> bool:
        """`sizes` are those of the run, `size` is the bytes of the value's rows that the cache keeps."""
        return self.choice.stays(self.layer, sizes, size * self.layer_bytes // max(1, self.own_bytes))
