"""Where a graph's keys and values go, and what else lowering needs to know of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from mom_compile.memory.choice import Choice, RowsOf
from mom_compile.runtime.host.placement import Placement


@dataclass(frozen=True)
class KVPlace:
    """Where a graph computes, where what its cache keeps goes, and what is chosen for each run: how many rows at a
    time, and which layers stay (None: rows as they are, and no layer)."""

    device: torch.device
    placement: Placement
    choice: Choice | None = None
    #: Of loops whose rows are for each run to say, by their nodes.
    rows: Mapping[fx.Node, RowsOf] = field(default_factory=dict)
    #: Whether pieces of a graph without loops are recorded as CUDA graphs.
    cuda_graphs: bool = False

    @property
    def is_for_each_run(self) -> bool:
        """Whether a budget that was asked for may be kept by some runs and not by others."""
        if self.choice is None or self.choice.budget is None:
            return False
        return self.choice.budget.asked and bool(self.choice.footprint.symbols)
