"""Rows and resident layers within a budget, chosen together and anew for each run.

Terms
-----
needed   Bytes that a run holds at its peak besides weights, inputs and resident layers: the residual stream, keys and
         values of the layers that stay in any case, and what one step holds. The program's memory model gives them.
fewest   The same with the fewest rows.

    device bytes = weights + inputs + needed(sizes, rows) + resident layers * a layer's keys and values

    layers = as many as there is room for with the fewest rows
    rows   = as many as these layers leave room for, at most those without a budget

Shrink mini-sequences before evicting layers. Fewer rows cost at most a quarter of a prefill's time (`device`), once. An
evicted layer is fetched for every generated token, and a decode step computes too little to hide that copy; in the
prefill itself either is nearly free. Room that the resident layers leave goes back to the rows: layers are large, and
the rest of the room after the last resident layer is often all that the rows want.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mom_compile.memory.device import DeviceRows
from mom_compile.memory.model import Model, StepSizes
from mom_compile.memory.refuse import MemoryBudgetError, below_smallest, last_that_fits
from mom_compile.memory.row_rule import fewest_rows, multiple_of, rows_of_steps
from mom_passes.graph.size_values import SizeFunction


@dataclass(frozen=True)
class Budget:
    """Bytes of a device for everything. `asked`: the user named them, and a budget that is too small is an error."""

    bytes: int
    asked: bool = False


@dataclass(frozen=True)
class Chosen:
    """The rows of each step of the model, and the bytes needed with these."""

    rows: tuple[int, ...]
    needed: int


@dataclass(frozen=True)
class Choice:
    """What each run of a program chooses from. Without a budget it chooses rows alone.

    Parameters
    ----------
    model, device
        What a run needs, and the rows that the device wants (None: loops keep their rows).
    weights, inputs
        Bytes of parameters and buffers, and of the other inputs.
    layers, layer_bytes
        How many layers' keys and values may stay, and the most bytes that one of them takes. 0 layers where the user
        decides their place.
    tokens
        The position of the symbol for the number of tokens.
    shorter
        The same choice with a symbol for the tokens, where they were captured as a number. It never says less than
        fewer tokens need.
    """

    model: Model
    device: DeviceRows | None
    weights: int
    inputs: SizeFunction
    budget: Budget | None
    layers: int
    layer_bytes: SizeFunction
    tokens: int | None = None
    shorter: Choice | None = None
    _last: list[tuple[tuple[int, ...], Chosen]] = field(default_factory=list, repr=False, compare=False)

    def at(self, sizes: tuple[int, ...]) -> Chosen:
        """Return the choice of a run. The last answer is kept, because every loop and every value that may leave asks.

        Raises
        ------
        MemoryBudgetError
            If the user's budget cannot be kept.
        """
        for known, answer in self._last:
            if known == sizes:
                return answer
        refusal = self.refusal(sizes)
        if refusal:
            raise MemoryBudgetError(refusal)
        chosen = self.best(sizes)
        self._last[:] = [(sizes, chosen)]
        return chosen

    def best(self, sizes: tuple[int, ...]) -> Chosen:
        """Return the choice of a run; the fewest rows and no layer if nothing keeps the budget."""
        rows = rows_of_steps(self.model, self.device, sizes)
        if self.budget is None:
            return Chosen(rows, self.model.bytes(sizes, rows))
        fewest = self._fewest(sizes, rows)
        least, layer = self.model.bytes(sizes, fewest), max(1, int(self.layer_bytes(sizes)))
        room = self.budget.bytes - self._given(sizes)
        room -= min(self.layers, max(0, room - least) // layer) * layer
        steps = zip(self.model.steps, fewest, rows, strict=True)
        rows = tuple(self._most(step, sizes, low, high, room) for step, low, high in steps)
        return Chosen(rows, self.model.bytes(sizes, rows))

    def settle(self, sizes: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """Choose these rows, of each step, in a run of these sizes: the ranks of a group have agreed on them."""
        self._last[:] = [(sizes, Chosen(rows, self.model.bytes(sizes, rows)))]

    def smallest(self, sizes: tuple[int, ...]) -> int:
        """Return the smallest budget that can be kept: no layer stays, and mini-sequences have the fewest rows."""
        rows = rows_of_steps(self.model, self.device, sizes)
        return self._given(sizes) + self.model.bytes(sizes, self._fewest(sizes, rows))

    def refusal(self, sizes: tuple[int, ...]) -> str:
        """Return why a run cannot keep the user's budget; empty if it can."""
        if self.budget is None or not self.budget.asked:
            return ""
        smallest = self.smallest(sizes)
        if smallest <= self.budget.bytes:
            return ""
        lengths = [step.loop.length(sizes) for step in self.model.steps if step.loop is not None]
        tokens = max(lengths, default=None)
        return below_smallest(self.budget.bytes, smallest, self.weights, tokens, self._longest(sizes))

    def resident_layers(self, sizes: tuple[int, ...], layer_bytes: int) -> int:
        """Return how many layers stay in a run whose layers take `layer_bytes` each."""
        if self.budget is None:
            return self.layers
        room = self.budget.bytes - self._given(sizes) - self.at(sizes).needed
        return max(0, min(self.layers, room // max(1, layer_bytes)))

    def stays(self, layer: int, sizes: tuple[int, ...], layer_bytes: int) -> bool:
        """Return whether a layer stays. Resident layers are spread evenly: each hides a fetch."""
        resident = self.resident_layers(sizes, layer_bytes)
        return (layer + 1) * resident // self.layers > layer * resident // self.layers

    def with_budget(self, size: int) -> Choice:
        """Return the same choice for another budget, such as that of another process."""
        return self if self.budget is None else replace(self, budget=replace(self.budget, bytes=size), _last=[])

    def _fewest(self, sizes: tuple[int, ...], rows: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(min, fewest_rows(self.model, self.device, sizes), rows))

    def _most(self, step: StepSizes, sizes: tuple[int, ...], fewest: int, most: int, room: int) -> int:
        """Return the most rows, from the fewest to the most, with which a step fits into the room; the fewest if none
        does."""
        if step.loop is None or step.bytes(sizes, most) <= room:
            return most
        each = multiple_of(step.loop, self.device, sizes)
        low, high = fewest // each, most // each
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if step.bytes(sizes, middle * each) <= room else (low, middle)
        return max(fewest, low * each)

    def _longest(self, sizes: tuple[int, ...]) -> int | None:
        """Return how many tokens fit; None if nothing is known of other lengths, or if none fit.

        Exact where the length is a symbol. Where it was captured as a number, the sizes of values show what grows with
        it and everything else counts in full: a few more tokens may fit.
        """
        if self.shorter is not None:
            return self.shorter._longest(self.shorter.model.captured)
        if self.tokens is None or self.budget is None:
            return None
        budget, before, after = self.budget.bytes, sizes[: self.tokens], sizes[self.tokens + 1 :]
        return last_that_fits(lambda n: self.smallest((*before, n, *after)) <= budget, sizes[self.tokens])

    def _given(self, sizes: tuple[int, ...]) -> int:
        return self.weights + int(self.inputs(sizes))


@dataclass(frozen=True)
class RowsOf:
    """The rows of a loop as a function of a run's sizes."""

    choice: Choice
    number: int

    def __call__(self, sizes: tuple[int, ...]) -> int:
        return self.choice.at(sizes).rows[self.number]


@dataclass(frozen=True)
class KeepsBudget:
    """The first step of a program whose sizes are symbols: it raises if the run cannot keep the user's budget."""

    choice: Choice

    def __call__(self, arguments: list[int]) -> tuple[()]:
        self.choice.at(tuple(arguments))
        return ()


@dataclass(frozen=True)
class Stays:
    """Whether a value stays, as a function of a run. Bytes per token of the layer and of the value are as captured."""

    choice: Choice
    layer: int
    layer_bytes: int
    own_bytes: int

    def __call__(self, sizes: tuple[int, ...], size: int) -> bool:
        """Return whether the value stays; `size` are the bytes of its rows that the cache keeps."""
        return self.choice.stays(self.layer, sizes, size * self.layer_bytes // max(1, self.own_bytes))
