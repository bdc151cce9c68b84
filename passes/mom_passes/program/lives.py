"""Lifetimes of the values and storages of a program.

Terms
-----
last    The last step that reads a value: its slot may be emptied before that step runs.
alive   A storage is alive from the step that makes it to the last that reads a value in it, or to the end if returned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from mom_passes.program.program import Place, Program, Storage


@dataclass(frozen=True)
class Lives:
    """Step numbers; `len(steps)` is the end of the program."""

    last: dict[fx.Node, int]
    first_of: dict[Storage, int]
    last_of: dict[Storage, int]

    def alive(self, step: int) -> list[Storage]:
        """The storages that exist while a step runs, those that it makes included, in order of creation."""
        return [storage for storage, first in self.first_of.items() if first <= step <= self.last_of[storage]]


def lives(program: Program, within: Mapping[fx.Node, Collection[Storage]] | None = None) -> Lives:
    """The lives of all values that steps read or make, and of all storages that are not the caller's.

    `within` maps a value to the storages that it may be in; by default the one that the program states.
    """
    if within is None:
        within = {node: (storage,) for node, storage in program.storages.items()}
    reads = [(i, node) for i, step in enumerate(program.steps) for node in (*step.ins, *step.outs) if node is not None]
    reads += [(len(program.steps), node) for node in program.outputs if isinstance(node, fx.Node)]
    found = Lives({}, {}, {})
    for i, node in reads:
        found.last[node] = i
        for storage in within.get(node, ()):
            if storage.place is not Place.CALLER:
                found.first_of.setdefault(storage, i)
                found.last_of[storage] = i
    return found
