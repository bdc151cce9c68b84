"""Which layers' keys and values stay on the device when not all of them fit, decided anew for each run.

Terms
-----
needed   What a run holds at its peak beside weights and layers that stay, as its program says: the residual stream,
         keys and values of the layers that are on the device whatever is decided, and what one step holds.
sizes    The values that a run gives the symbols of its graph: how many sequences, how many tokens. Where all were
         captured as numbers, there are none and what is needed is a number: guards keep such a graph to those sizes.

    device bytes = weights + needed(sizes) + resident layers * a layer's keys and values
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from mom_passes.graph.size_values import SizeFunction, function_of
from mom_passes.program.memory import Memory


@dataclass(frozen=True)
class Needed:
    """Bytes of the device, as a function of the values of `symbols`: the most of `functions`."""

    symbols: tuple[sympy.Symbol, ...]
    functions: tuple[SizeFunction, ...]
    _last: list[tuple[tuple[int, ...], int]] = field(default_factory=list, repr=False, compare=False)

    @staticmethod
    def by(found: Memory, beside: sympy.Expr = sympy.S.Zero) -> Needed:
        """The peak of a program, and what its kernels take `beside` it. It is asked for each value that may leave:
        sympy itself would take milliseconds."""
        moments = list(dict.fromkeys(moment.bytes + beside for moment in found.moments))
        symbols = tuple(sorted({symbol for size in moments for symbol in size.free_symbols}, key=str))
        return Needed(symbols, tuple(function_of(size, symbols) for size in moments))

    def bytes(self, sizes: tuple[int, ...]) -> int:
        """All values of a run ask for the same sizes: the last answer is kept."""
        for known, answer in self._last:
            if known == sizes:
                return answer
        most = max((function(sizes) for function in self.functions), default=0)
        self._last[:] = [(sizes, most)]
        return most


@dataclass(frozen=True)
class Residency:
    """A budget for the device, in bytes, and what is needed of it before any layer's keys and values stay."""

    budget: int
    weights: int
    needed: Needed
    layers: int

    def resident_layers(self, sizes: tuple[int, ...], layer_bytes: int) -> int:
        """How many layers may stay in a run of these sizes whose layers take `layer_bytes` each."""
        room = self.budget - self.weights - self.needed.bytes(sizes)
        return max(0, min(self.layers, room // max(1, layer_bytes)))

    def stays(self, layer: int, sizes: tuple[int, ...], layer_bytes: int) -> bool:
        """Whether a layer is among those. They are spread evenly: each fetch has resident layers to hide behind."""
        resident = self.resident_layers(sizes, layer_bytes)
        return (layer + 1) * resident // self.layers > layer * resident // self.layers


@dataclass(frozen=True)
class Stays:
    """Whether a value stays, from what a run has of it. The layer's and its own bytes per token are those captured."""

    residency: Residency
    layer: int
    layer_bytes: int
    own_bytes: int

    def __call__(self, sizes: tuple[int, ...], size: int) -> bool:
        """`sizes` are those of the run, `size` is the bytes of the value's rows that the cache keeps."""
        return self.residency.stays(self.layer, sizes, size * self.layer_bytes // max(1, self.own_bytes))
