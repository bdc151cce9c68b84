"""Programs of one graph for calls with short and with long packed sequences.

Where packed sequences begin and end is data. A program holds short sequences inside its loops; in another program of
the same graph, attention to long ones is a barrier (`mom_passes.tokens.packed_keys`). A call computes the ranges of its
sequences first and runs the program for them, which is compiled when the first such call comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mom_compile.memory.refuse import MemoryBudgetError
from mom_compile.pipeline.packing import Packing
from mom_compile.runtime.program import Program
from mom_compile.torch_compat.dynamo import COMPILING
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import hint

log = logging.getLogger(__name__)

#: Compiles the program for a call with these inputs.
Make = Callable[[Sequence[Any]], Program]


class ProgramPerPacking:
    """`run(inputs)` runs the program for the packed sequences of a call. `first` is compiled already.

    It is not stored in a compile cache: a process that read it could not compile another program of the graph.
    """

    def __init__(self, first: Program, packing: Packing, make: Make) -> None:
        self.first, self.packing, self._make = first, packing, make
        self._programs: dict[tuple[bool, ...], Program] = {packing.held: first}

    def __call__(self, inputs: list[Any]) -> Any:
        held = self.packing.fit(inputs)
        program = self._programs.get(held)
        return (self._compile(held, inputs) if program is None else program)(inputs)

    def _compile(self, held: tuple[bool, ...], inputs: Sequence[Any]) -> Program:
        with COMPILING:
            if held not in self._programs:
                try:
                    self._programs[held] = self._make(inputs)
                except MemoryBudgetError:
                    raise
                except Exception:
                    # Every program is right for every call: it needs more memory, or has more barriers.
                    log.debug("no program for these packed sequences; another one computes them", exc_info=True)
                    self._programs[held] = self.first
            return self._programs[held]


def values_of_call(gm: fx.GraphModule, call: Sequence[Any] | None) -> list[Any] | None:
    """Return the inputs of a graph in the call for which it was captured, None if `call` does not have all of them.

    Dynamo's inputs are those of the ATen graph, unless AOTAutograd has merged or added some.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if call is None or len(call) != len(placeholders):
        return None
    values = [hint(value) if isinstance(value, torch.SymInt) else value for value in call]
    return values if all(map(_is_value_of, placeholders, values)) else None


def _is_value_of(node: fx.Node, value: Any) -> bool:
    expected = meta_value(node)
    if isinstance(expected, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return False
        return value.dtype == expected.dtype and list(value.shape) == [hint(size) for size in expected.shape]
    return not isinstance(value, torch.Tensor) and hint(expected) == value
