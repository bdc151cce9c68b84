"""The compiled graph as a list of steps over numbered slots, in which every value dies at its last use.

Terms
-----
slot    Where a value lives while the program runs. Inputs come first, in the order of the graph's placeholders.
step    One call: a compiled piece, a compiled loop, a view, or arithmetic on sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mom_compile.runtime.observers import Observers


@dataclass(frozen=True)
class Slot:
    """A reference to a value of the running program."""

    index: int


@dataclass(frozen=True)
class Step:
    """Calls `run(list of arguments)`, which may empty the list, and stores what it returns.

    `arguments` are slots or constants. `results` are the slots of the returned tuple, None for those nobody reads.
    `dying` are the slots nobody reads after this step: they are emptied before the call, so that the callee
    holds the last reference.
    """

    name: str
    run: Callable[[list[Any]], Sequence[Any]]
    arguments: tuple[Any, ...]
    results: tuple[int | None, ...]
    dying: tuple[int, ...]


_OBSERVERS: Observers[Step, Sequence[Any]] = Observers()


def observing(observer: Callable[[Step, Sequence[Any]], None]) -> AbstractContextManager[None]:
    """While this lasts, `observer` is called after every step of every program, with the step and what it returned."""
    return _OBSERVERS.joined_by(observer)


@dataclass(frozen=True)
class Program:
    """`program(inputs)` empties the list it is given and returns the graph's outputs.

    `finish` is called at the end in any case. After an exception no frame of it keeps a value: a traceback that
    somebody looks at later would otherwise hold device memory.
    """

    steps: tuple[Step, ...]
    slots: int
    unread_inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    finish: Callable[[], None] | None = None

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        values: list[Any] = [*inputs, *([None] * (self.slots - len(inputs)))]
        inputs.clear()
        try:
            self._run(values)
            return tuple(values[o.index] if isinstance(o, Slot) else o for o in self.outputs)
        finally:
            values.clear()
            if self.finish is not None:
                self.finish()

    def _run(self, values: list[Any]) -> None:
        for index in self.unread_inputs:
            values[index] = None
        for step in self.steps:
            arguments = [values[a.index] if isinstance(a, Slot) else a for a in step.arguments]
            for index in step.dying:
                values[index] = None
            try:
                results = step.run(arguments)
            except BaseException:
                arguments.clear()
                raise
            del arguments
            for observe in _OBSERVERS.now:
                observe(step, results)
            for index_or_none, result in zip(step.results, results, strict=True):
                if index_or_none is not None:
                    values[index_or_none] = result
            result = None
            del results
