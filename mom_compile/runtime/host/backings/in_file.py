"""Parts of a file, mapped one after another into the addresses."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch

from mom_compile.runtime.host.backings.base import BLOCK, Backing
from mom_compile.runtime.host.file import Extent, file_in, give_all_back, unmap
from mom_compile.runtime.host.limits import HostMemoryError


class InFile(Backing):
    """Extents of a folder's file. They are freed with the addresses, since a view may outlive its region."""

    block = BLOCK
    on_disk = True

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.extents: list[Extent] = []

    def reserve(self, capacity: int, least: int) -> torch.Tensor:
        addresses = super().reserve(capacity, least)
        self.file = file_in(self.directory)
        weakref.finalize(self.memory, give_all_back, self.extents).atexit = False
        return addresses

    def commit(self, first: int, size: int) -> None:
        self.file = file_in(self.directory)  # a fork has its own file
        extent = self.file.extent(first, size)
        try:
            extent.map(self.address)
        except OSError as error:
            extent.give_back()
            raise HostMemoryError(
                f"cannot map {size} bytes on disk for keys and values ({error.strerror}); "
                "the cause may be a limit on mappings (vm.max_map_count) or on address space (ulimit -v): raise it, "
                "or use kv_offload=True to keep them in host memory"
            ) from error
        self.extents.append(extent)

    def parts(self, first: int, end: int) -> tuple[Extent, ...]:
        """Return the extents of bytes `[first, end)`, in order. They do not move while a tensor shows the bytes."""
        found = (extent.part(first, end) for extent in self.extents)
        parts = tuple(sorted((part for part in found if part is not None), key=lambda part: part.first))
        assert sum(part.size for part in parts) == end - first, "rows that a tensor shows are in the file"
        return parts

    def release(self, first: int, size: int) -> bool:
        try:
            unmap(self.address + first, size)
        except OSError:  # a mapping would be split, and the process may have reached the limit of mappings
            return False
        held, self.extents[:] = list(self.extents), []
        for extent in held:
            gone = extent.part(first, first + size)
            if gone is None:
                self.extents.append(extent)
                continue
            gone.give_back()
            rest = (extent.part(0, first), extent.part(first + size, extent.first + extent.size))
            self.extents += [part for part in rest if part is not None]
        return True
