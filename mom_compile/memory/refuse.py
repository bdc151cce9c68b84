"""The error for a budget that cannot be kept, with the smallest budget and the longest context."""

from __future__ import annotations

from collections.abc import Callable

from mom_compile.quantities import unit_hint
from mom_compile.report.units import in_units
from mom_compile.torch_compat.errors import UserError


class MemoryBudgetError(UserError):
    """A `ValueError`: a run of these sizes, or every run, cannot keep the `memory_budget` that was given.

    The message names the smallest budget that can be kept, and the longest context that fits, where that is known.
    """


def below_weights(budget: int, weights: int) -> str:
    """Return the message for a budget that is smaller than the parameters and buffers that a graph reads."""
    return (
        f"memory_budget={_exactly(budget)} is less than the weights alone, {_exactly(weights)}: "
        f"mom_compile.offload_weights(model, ...) keeps weights on the host{unit_hint(budget)}"
    )


def below_smallest(
    budget: int, smallest: int, weights: int, tokens: int | None = None, longest: int | None = None
) -> str:
    """Return the message for a `budget` below the `smallest` of a run, which includes the `weights`.

    The run has `tokens` tokens of each sequence, and the budget has room for `longest`, where these are known.
    """
    run = "a run of these sizes" if tokens is None else f"a prompt of {tokens} tokens"
    of_weights = f", of which weights take {in_units(weights)}" if weights else ""
    room = "" if longest is None else f"; the one given has room for {longest} tokens"
    return (
        f"memory_budget={_exactly(budget)} cannot be kept for {run}: "
        f"the smallest budget is {_exactly(smallest)}{of_weights}{room}{unit_hint(budget)}"
    )


def last_that_fits(fits: Callable[[int], bool], above: int) -> int | None:
    """Return the most tokens that fit, given that `above` do not; None if two tokens do not fit."""
    low, high = 2, above
    if above <= low or not fits(low):
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _exactly(size: int) -> str:
    return f"{size} bytes ({in_units(size)})"
