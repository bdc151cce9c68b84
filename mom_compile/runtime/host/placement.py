"""Where new stores go: which backing each tier has. This table is the one place that says so.

Terms
-----
tier      A kind of memory that rows can be kept in. `kv_offload` names it: True is `MEMORY`, a text any other.
backing   What is behind the addresses of one region (see `backings.base`).

    Placement("disk", Path("/scratch")).backing()      InFile(Path("/scratch"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mom_compile.runtime.host.backings.anonymous import Anonymous
from mom_compile.runtime.host.backings.base import Backing
from mom_compile.runtime.host.backings.in_file import InFile
from mom_compile.runtime.host.backings.pinned import Pinned
from mom_compile.runtime.host.backings.registration import Pin

#: The tier of `kv_offload=True` and `"auto"`.
MEMORY = "memory"


@dataclass(frozen=True)
class Placement:
    """The tier of new stores, and what tiers may ask for: a folder, and what pins memory for a device's sake.

    It is pickled without what pins: this is one process's own.
    """

    tier: str = MEMORY
    directory: Path | None = None
    pin: Pin | None = None

    def __reduce__(self) -> Any:
        return Placement, (self.tier, self.directory)

    def backing(self) -> Backing:
        """What is behind one new region. Raises `KeyError` for a tier that there is not."""
        return TIERS[self.tier].backing(self)


@dataclass(frozen=True)
class Tier:
    """What makes a backing, and whether it needs the folder that `kv_dir` names."""

    backing: Callable[[Placement], Backing]
    needs_directory: bool = False


def _memory(place: Placement) -> Backing:
    return Anonymous() if place.pin is None else Pinned(place.pin)


def _disk(place: Placement) -> Backing:
    assert place.directory is not None, "options without a folder are refused"
    return InFile(place.directory)


#: A new tier is a line here: `kv_offload` accepts its name then, and the law of backings is tried on it.
TIERS: dict[str, Tier] = {
    MEMORY: Tier(_memory),
    "disk": Tier(_disk, needs_directory=True),
}
