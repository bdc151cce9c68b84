"""The placement of new stores. `TIERS` is the only place that maps tiers to backings.

Terms
-----
tier      A kind of memory for rows, named by `kv_offload`: True is `MEMORY`, a string names any other.
backing   What provides the storage of one region (see `backings.base`).

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
    """The tier of new stores and its parameters: a folder, and a function that pins memory for a device.

    Pickling omits the function, which is only valid in its process.
    """

    tier: str = MEMORY
    directory: Path | None = None
    pin: Pin | None = None

    def __reduce__(self) -> Any:
        return Placement, (self.tier, self.directory)

    def backing(self) -> Backing:
        """Return the backing of a new region. Raises `KeyError` for an unknown tier."""
        return TIERS[self.tier].backing(self)


@dataclass(frozen=True)
class Tier:
    """A factory of backings, and whether it needs the folder `kv_dir`."""

    backing: Callable[[Placement], Backing]
    needs_directory: bool = False


def _memory(place: Placement) -> Backing:
    return Anonymous() if place.pin is None else Pinned(place.pin)


def _disk(place: Placement) -> Backing:
    assert place.directory is not None, "the options require a folder for this tier"
    return InFile(place.directory)


#: To add a tier, add a line: `kv_offload` then accepts its name, and `tests/test_backings.py` tests it.
TIERS: dict[str, Tier] = {
    MEMORY: Tier(_memory),
    "disk": Tier(_disk, needs_directory=True),
}
