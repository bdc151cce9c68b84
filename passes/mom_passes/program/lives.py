"""From where to where each value and each storage of a program is needed.

Terms
-----
last    Of a value, the last step that reads it: the slot it is in may be emptied before that step runs.
alive   Of a storage: from the step that makes it to the last that reads any value in it. What is returned lives on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from mom_passes.program.program import Place, Program, Storage


@dataclass(frozen=True)
class Lives:
    """Numbers are those of steps; `len(steps)` stands for the end of the program."""

    last: dict[fx.Node, int]
    first_of: dict[Storage, int]
    last_of: dict[Storage, int]

    def alive(self, step: int) -> list[Storage]:
        """The storages that exist while a step runs, those that it makes included, in the order they were made."""
        return [storage for storage, first in self.first_of.items() if first <= step <= self.last_of[storage]]


def lives(program: Program, within: Mapping[fx.Node, Collection[Storage]] | None = None) -> Lives:
    """Of every value that a step reads or makes, and of every storage that is not the caller's.

    `within` says in which storages a value may lie, for who has to be careful; else it lies in the one that the program
    says.
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
