"""A budget that cannot be kept: the error, and what it can truly say of the smallest one and of the longest context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mom_compile.quantities import unit_hint
from mom_compile.report.units import in_units
from mom_compile.torch_compat.errors import UserError


class MemoryBudgetError(UserError):
    """A `ValueError`: a run of these sizes, or any run, needs more memory than the given `memory_budget`.

    The message names the smallest budget that suffices and, where it is known, the longest context that fits into the
    given one.
    """


def below_weights(budget: int, weights: int) -> str:
    """What is wrong with a budget that is smaller than what a graph reads of parameters and buffers."""
    return (
        f"memory_budget={_exactly(budget)} is less than the weights alone, {_exactly(weights)}: "
        f"mom_compile.offload_weights(model, ...) keeps weights on the host{unit_hint(budget)}"
    )


@dataclass(frozen=True)
class Refusal:
    """What there is to say of a `budget` for a run: the `smallest` that can be kept, `weights` included, and for how
    many `tokens` of each sequence; and for how many the given one has room, where that is known."""

    budget: int
    smallest: int
    weights: int
    tokens: int | None = None
    longest: int | None = None

    def __str__(self) -> str:
        run = "a run of these sizes" if self.tokens is None else f"a prompt of {self.tokens} tokens"
        weights = f", of which weights take {in_units(self.weights)}" if self.weights else ""
        longest = "" if self.longest is None else f"; the one given has room for {self.longest} tokens"
        return (
            f"memory_budget={_exactly(self.budget)} cannot be kept for {run}: "
            f"the smallest budget is {_exactly(self.smallest)}{weights}{longest}{unit_hint(self.budget)}"
        )


def last_that_fits(fits: Callable[[int], bool], above: int) -> int | None:
    """The most tokens that fit, fewer than those `above`, which do not; None where no two do."""
    low, high = 2, above
    if above <= low or not fits(low):
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _exactly(size: int) -> str:
    return f"{size} bytes ({in_units(size)})"
