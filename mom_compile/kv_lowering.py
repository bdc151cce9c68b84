"""What the copy operators between compiled pieces become: steps of the running program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_compile.memory.residency import Residency
from mom_compile.runtime.host_storage import Placement
from mom_compile.runtime.kv_steps import Append, FetchRoom, Fill, Offload
from passes.host_ops import APPEND, FETCH_ROOM, FILL, OFFLOAD


@dataclass(frozen=True)
class KVPlace:
    """Where a graph computes, where what its cache keeps goes, and which layers stay (None: no layer)."""

    device: torch.device
    placement: Placement
    residency: Residency | None = None


def copy_step(node: fx.Node, place: KVPlace, layer_bytes: dict[int, int]) -> tuple[Callable[..., Any], list[Any]]:
    """The step of a copy operator and the arguments it takes. `layer_bytes` has each layer's bytes per token."""
    if node.target is FETCH_ROOM:
        host, rows, dim, device = node.args
        return FetchRoom(dim, device), [host, rows]  # type: ignore[arg-type]
    if node.target is FILL:
        room, new, dim = node.args
        return Fill(dim), [room, new]  # type: ignore[arg-type]
    if node.target is APPEND:
        host, new, dim, first = node.args
        return Append(dim, place.device, place.placement), [host, new, first]  # type: ignore[arg-type]
    assert node.target is OFFLOAD
    value, dim, first = node.args
    kv = node.meta["kv"]
    stays = None
    if place.residency is not None:
        stays = Stays(place.residency, kv.layer, layer_bytes[kv.layer], kv.bytes_per_token)
    return Offload(dim, place.device, place.placement, stays), [value, first]  # type: ignore[arg-type]


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
