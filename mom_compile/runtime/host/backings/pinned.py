"""Pinned host memory, which a device copies from asynchronously."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from dataclasses import dataclass

import torch

from mom_compile.runtime.host.backings.base import BLOCK, Backing, as_bytes, reserve_addresses
from mom_compile.runtime.host.backings.registration import PIECE, REGISTRAR, Pin, Registration
from mom_compile.runtime.host.file import hold
from mom_compile.runtime.host.limits import HostMemoryError

#: Of x86 and ARM, in whole blocks. The last huge page may be pinned in part, but is allocated as a whole.
HUGE_PAGE = 2 * BLOCK


#: Mappings of this process and their addresses.
_NOT_IN_FORKS: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()


#: In a fork: mappings of its parent at addresses where something else has been mapped. Closing them would unmap that.
_REPLACED: list[mmap.mmap] = []


def _hold_addresses() -> None:
    for memory, address in list(_NOT_IN_FORKS.items()):
        try:
            hold(address, len(memory))
        except OSError:  # another at-fork handler mapped something here first
            _REPLACED.append(memory)


os.register_at_fork(after_in_child=_hold_addresses)


@dataclass(frozen=True)
class _Range:
    """Bytes `[first, end)` of the region, pinned by one commit."""

    first: int
    end: int
    registration: Registration


class Pinned(Backing):
    """Host memory that stays pinned until the region is closed. Each commit pins its own range."""

    block = BLOCK
    reusable = True
    goes_ahead = True

    def __init__(self, pin: Pin) -> None:
        super().__init__()
        self.pin = pin
        self._process = os.getpid()
        self._ranges: list[_Range] = []
        #: The end of the bytes that are pinned.
        self._ready = 0

    def reserve(self, capacity: int, least: int) -> torch.Tensor:
        """Reserve addresses aligned to huge pages, if the kernel has them: pinning then takes fewer pages.

        A fork does not inherit the pages. If it did, a write by either process would copy a shared page, and a device
        that still accesses the old page would miss the new one. The fork keeps an inaccessible mapping in their
        place; otherwise another mapping could take these addresses, and be unmapped with the last view of the region.
        """
        self.memory = reserve_addresses(capacity + HUGE_PAGE, least + HUGE_PAGE)
        first = -as_bytes(self.memory).data_ptr() % HUGE_PAGE
        addresses = as_bytes(self.memory, first, len(self.memory) - HUGE_PAGE)
        self.address = addresses.data_ptr()
        _NOT_IN_FORKS[self.memory] = self.address - first
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                with contextlib.suppress(OSError):  # not supported by the kernel
                    self.memory.madvise(getattr(mmap, advice))
        return addresses

    @property
    def lost(self) -> bool:  # type: ignore[override]
        return self._process != os.getpid()

    def view(self) -> memoryview:
        """All addresses, for system calls."""
        addresses = as_bytes(self.memory)
        first = self.address - addresses.data_ptr()
        return memoryview(self.memory)[first:]

    def commit(self, first: int, size: int) -> None:
        self._begin(first, size)
        self._wait(first + size)

    def commit_ahead(self, first: int, size: int) -> None:
        REGISTRAR.put(self._begin(first, size))

    def ready(self, end: int) -> int:
        try:
            self._wait(end)
        except HostMemoryError:
            return self._ready
        return end

    def _begin(self, first: int, size: int) -> Registration:
        registration = Registration(self.pin, self.address + first, size, self.memory)
        self._ranges.append(_Range(first, first + size, registration))
        self.seams += [*range(first + PIECE, first + size, PIECE), first + size]
        return registration

    def _wait(self, end: int) -> None:
        """Wait until bytes up to `end` are pinned. On an error, uncommits the failed range and those after it."""
        if end <= self._ready:
            return
        for one in self._ranges:
            if self._ready <= one.first < end:
                try:
                    one.registration.complete()
                except BaseException:
                    self._drop(one.first)
                    raise
                self._ready = one.end

    def _drop(self, first: int) -> None:
        """Drop all ranges from `first` on."""
        dropped = [one for one in self._ranges if one.first >= first]
        self._ranges = [one for one in self._ranges if one.first < first]
        self.seams[:] = [seam for seam in self.seams if seam <= first]
        for one in dropped:
            one.registration.drop()

    def close(self) -> None:
        self._drop(0)
