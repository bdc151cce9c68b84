"""Which layers' keys and values stay on the device when not all of them fit, decided anew for each run.

    device bytes = weights + batch * (iteration + tokens * per_token) + resident layers * a layer's keys and values

`iteration` is what one mini-sequence takes, `per_token` the full-length values that are alive at a time: the residual
stream, and keys and values of the two layers that are on the device whatever is decided. Both are of the batch that was
captured, `batch` is how many times that batch a run has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Residency:
    """A budget for the device, in bytes, and what is needed of it before any layer's keys and values stay."""

    budget: int
    weights: int
    iteration: int
    per_token: int
    layers: int

    def resident_layers(self, tokens: int, layer_bytes: int, batch: float = 1) -> int:
        """How many layers may stay, for a prompt of so many tokens whose layers take `layer_bytes` each."""
        room = self.budget - self.weights - math.ceil(batch * (self.iteration + tokens * self.per_token))
        return max(0, min(self.layers, room // max(1, layer_bytes)))

    def stays(self, layer: int, tokens: int, layer_bytes: int, batch: float = 1) -> bool:
        """Whether a layer is among those. They are spread evenly: each fetch has resident layers to hide behind."""
        resident = self.resident_layers(tokens, layer_bytes, batch)
        return (layer + 1) * resident // self.layers > layer * resident // self.layers


@dataclass(frozen=True)
class Stays:
    """Whether a value stays, from what a run has of it. The layer's and its own bytes per token are those captured."""

    residency: Residency
    layer: int
    layer_bytes: int
    own_bytes: int

    def __call__(self, tokens: int, rows: int, size: int) -> bool:
        """`tokens` it was computed for, of which it keeps so many `rows` that take `size` bytes."""
        batch = size / max(1, rows * self.own_bytes)
        return self.residency.stays(self.layer, tokens, int(batch * rows * self.layer_bytes), batch)
