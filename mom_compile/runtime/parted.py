"""A loop body in parts with collectives between them, and several mini-sequences of a loop in flight.

Terms
-----
turn        What a mini-sequence does at once: wait for its collective, run a part, begin the next collective.
in flight   Begun and not finished. With two in flight, one computes while the collective of the other is under way.

All ranks take the same turns in the same order, so their collectives match.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mom_passes.torch_compat import begin_collective, wait_for_collective


@dataclass(frozen=True)
class RunPart:
    """Runs a compiled part on the values at `takes`, and stores its results at `gives`."""

    run: Callable[[list[Any]], Any]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    dying: tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """Begins the functional collective `name` on the value at `takes`; its result replaces that at `gives`."""

    name: str
    arguments: tuple[Any, ...]
    takes: int
    gives: int
    dying: tuple[int, ...]


@dataclass
class Waited:
    """Seconds in which this process waited for collectives of loops, and their number. On a GPU only the host's time,
    which is nearly none: the stream waits."""

    seconds: float = 0.0
    collectives: int = 0

    def wait(self, result: Any) -> None:
        begun = time.perf_counter()
        wait_for_collective(result)
        self.seconds += time.perf_counter() - begun
        self.collectives += 1


#: Of all loops of this process since it started.
WAITED = Waited()


@dataclass(frozen=True)
class PartedBody:
    """A body as steps over numbered values, the first of which are its arguments.

    Parameters
    ----------
    steps
        Parts and collectives, in order.
    values
        The number of values.
    in_flight
        How many mini-sequences are in flight at most.
    """

    steps: tuple[RunPart | Collective, ...]
    values: int
    in_flight: int = 1

    def with_parts(self, changed: Callable[[Any, int], Any]) -> PartedBody:
        """Return the same body with other parts; `changed` takes a part and its number."""
        parts = itertools.count()
        steps = (replace(s, run=changed(s.run, next(parts))) if isinstance(s, RunPart) else s for s in self.steps)
        return replace(self, steps=tuple(steps))

    def turns(self, given: list[Any], check: bool = False) -> Iterator[None]:
        """Run a mini-sequence; an iteration ends after each collective has begun. Empties `given`.

        `check`: compare the arguments of parts with what compiled code assumes.
        """
        values = [*given, *([None] * (self.values - len(given)))]
        given.clear()
        for step in self.steps:
            if isinstance(step, RunPart):
                _run_part(step, values, check)
                continue
            values[step.gives] = begin_collective(step.name, values[step.takes], *step.arguments)
            for i in step.dying:
                values[i] = None
            yield
            WAITED.wait(values[step.gives])


def _run_part(step: RunPart, values: list[Any], check: bool) -> None:
    taken = [values[i] for i in step.takes]
    for i in step.dying:
        values[i] = None
    if check:
        step.run.check(taken)  # type: ignore[attr-defined]
    results = step.run(taken)
    for i, result in zip(step.gives, results or (), strict=True):
        values[i] = result


def run_in_turns(mini_sequences: Iterable[Iterator[None]], in_flight: int) -> None:
    """Run mini-sequences, at most `in_flight` of them begun and not finished. They take turns, the oldest first; where
    one finishes, the next one begins in the same turn."""
    begun: deque[Iterator[None]] = deque()
    for new in mini_sequences:
        while len(begun) >= in_flight:
            _take_turn(begun.popleft(), begun)
        _take_turn(new, begun)
    while begun:
        _take_turn(begun.popleft(), begun)


def _take_turn(one: Iterator[None], begun: deque[Iterator[None]]) -> None:
    finished = object()
    if next(one, finished) is not finished:
        begun.append(one)
