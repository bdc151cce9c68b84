"""Where a graph's keys and values go, as lowering needs to know it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mom_compile.memory.residency import Residency
from mom_compile.runtime.host.placement import Placement


@dataclass(frozen=True)
class KVPlace:
    """Where a graph computes, where what its cache keeps goes, and which layers stay (None: no layer)."""

    device: torch.device
    placement: Placement
    residency: Residency | None = None
