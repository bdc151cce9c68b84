"""The compiled graph as a list of steps over numbered slots. Every value is freed after its last use.

Terms
-----
slot    The index of a value while the program runs. Inputs come first, in the order of the graph's placeholders.
step    One call: a compiled piece, a compiled loop, a view, or arithmetic on sizes.
"""

from __future__ import annotations

import functools
import operator
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
    """Calls `run(list of arguments)`, which may empty the list, and stores the results.

    `arguments` are slots or constants. `results` are the slots of the returned tuple; None for unused results.
    `dying` are the slots last used by this step. They are cleared before the call, so that the callee holds the last
    reference.
    """

    name: str
    run: Callable[[list[Any]], Sequence[Any]]
    arguments: tuple[Any, ...]
    results: tuple[int | None, ...]
    dying: tuple[int, ...]


#: Selects a step's arguments from all values.
Take = Callable[[list[Any]], list[Any]]

_OBSERVERS: Observers[Step, Sequence[Any]] = Observers()


def observing(observer: Callable[[Step, Sequence[Any]], None]) -> AbstractContextManager[None]:
    """Within this context, call `observer` after every step of every program, with the step and its results."""
    return _OBSERVERS.joined_by(observer)


@dataclass(frozen=True)
class Program:
    """`program(inputs)` empties the list and returns the graph's outputs.

    `begin` is called first, with the inputs; `finish` last, also after an exception. No frame of a traceback keeps a
    value alive, as that would hold device memory.
    """

    steps: tuple[Step, ...]
    slots: int
    unread_inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    finish: Callable[[], None] | None = None
    begin: Callable[[Sequence[Any]], None] | None = None

    @functools.cached_property
    def _calls(self) -> _Calls:
        return _Calls.of(self)

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        values: list[Any] = [*inputs, *([None] * (self.slots - len(inputs))), *self._calls.constants]
        inputs.clear()
        try:
            if self.begin is not None:
                self.begin(values)
            self._run(values)
            return tuple(self._calls.returned(values))
        finally:
            values.clear()
            if self.finish is not None:
                self.finish()

    def _run(self, values: list[Any]) -> None:
        for index in self.unread_inputs:
            values[index] = None
        for step, take, kept in self._calls.steps:
            arguments = take(values)
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
            for at, index in kept:
                values[index] = results[at]
            del results


@dataclass(frozen=True)
class _Calls:
    """A program's steps, each with the function that selects its arguments and `(position, slot)` of its results.

    Constants are stored in slots after all others, so that one call selects all arguments.
    """

    steps: tuple[tuple[Step, Take, tuple[tuple[int, int], ...]], ...]
    returned: Take
    constants: tuple[Any, ...]

    @staticmethod
    def of(program: Program) -> _Calls:
        constants: list[Any] = []

        def take(arguments: Sequence[Any]) -> Take:
            indices = []
            for argument in arguments:
                if isinstance(argument, Slot):
                    indices.append(argument.index)
                else:
                    indices.append(program.slots + len(constants))
                    constants.append(argument)
            return _taker(indices)

        steps = [
            (step, take(step.arguments), tuple((at, i) for at, i in enumerate(step.results) if i is not None))
            for step in program.steps
        ]
        returned = take(program.outputs)
        return _Calls(tuple(steps), returned, tuple(constants))


def _taker(indices: Sequence[int]) -> Take:
    """Return a function that selects the elements of a list at these indices."""
    if len(indices) < 2:
        return lambda values: [values[index] for index in indices]
    get = operator.itemgetter(*indices)
    return lambda values: list(get(values))
