"""Search for the longest prompt that fits; every length is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Relative distance of the longest fitting and the shortest failing length at which the search ends.
CLOSE = 1 / 50
#: Limit on the next length, as a multiple of the longest that fits: extrapolation from short prompts is poor.
AT_ONCE = 4


@dataclass(frozen=True)
class Longest:
    """`fits` tokens ran, `fails` did not; None: nothing failed."""

    fits: int
    fails: int | None


def longest(peak_at: Callable[[int], int | None], limit: int, *, first: int, grain: int, most: int) -> Longest:
    """Bisect between the longest length that fitted into `limit` bytes and the shortest that did not.

    `peak_at(n)` is the peak of a prompt of `n` tokens, None if it ran out of memory. Until something fails, the next
    length is where the peak would pass the limit if it were proportional to the length. Lengths are multiples of
    `grain`, from `first` to `most`.
    """
    fits, fails, length = 0, None, first
    while True:
        peak = peak_at(length)
        if peak is None or peak > limit:
            fails = length
        else:
            fits = length
        if fails is None:
            if fits >= most:
                return Longest(fits, None)
            assert peak is not None
            length = min(most, max(fits + grain, _rounded(fits * min(AT_ONCE, 1.01 * limit / peak), grain)))
        elif fails - fits <= max(grain, int(fits * CLOSE)):
            return Longest(fits, fails)
        else:
            length = max(fits + grain, _rounded((fits + fails) / 2, grain))


def _rounded(length: float, grain: int) -> int:
    return int(length) // grain * grain
