"""Host memory that a device copies from beside its computation."""

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

#: Of x86 and of ARM: a whole number of blocks. The last one may be pinned in part, and is there as a whole.
HUGE_PAGE = 2 * BLOCK


#: Mappings of this process, and where they begin.
_NOT_IN_FORKS: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()


#: Those of a parent whose addresses a fork has given to others: unmapping them would take them away.
_OF_OTHERS: list[mmap.mmap] = []


def _hold_addresses() -> None:
    for memory, address in list(_NOT_IN_FORKS.items()):
        try:
            hold(address, len(memory))
        except OSError:  # somebody who was asked before us, as soon as the fork began, has been given them
            _OF_OTHERS.append(memory)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hold_addresses)


@dataclass(frozen=True)
class _Range:
    """What one commit pins: bytes `[first, end)` of the region."""

    first: int
    end: int
    registration: Registration


class Pinned(Backing):
    """Ranges that stay pinned until the region is closed. Each commit pins one of its own, so they meet at seams."""

    block = BLOCK
    reusable = True
    goes_ahead = True

    def __init__(self, pin: Pin) -> None:
        super().__init__()
        self.pin = pin
        self._process = os.getpid()
        self._ranges: list[_Range] = []
        #: How far all is pinned.
        self._ready = 0

    def reserve(self, capacity: int, least: int) -> torch.Tensor:
        """Of huge pages where the kernel has them: it pins page by page. The first one begins where one may begin.

        A fork does not have them. Pages that both had would be copied when one of them is written, and a device that
        copies to the old page would write where its process does not look. What it has there instead is no memory, and
        is kept: it would otherwise take the addresses for others, and lose those when the last view of them dies.
        """
        self.memory = reserve_addresses(capacity + HUGE_PAGE, least + HUGE_PAGE)
        first = -as_bytes(self.memory).data_ptr() % HUGE_PAGE
        addresses = as_bytes(self.memory, first, len(self.memory) - HUGE_PAGE)
        self.address = addresses.data_ptr()
        _NOT_IN_FORKS[self.memory] = self.address - first
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                with contextlib.suppress(OSError):  # a kernel without it
                    self.memory.madvise(getattr(mmap, advice))
        return addresses

    @property
    def lost(self) -> bool:  # type: ignore[override]
        return self._process != os.getpid()

    def view(self) -> memoryview:
        """All addresses, for calls of the system."""
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
        """Raises `HostMemoryError`; what cannot be pinned is not committed then, nor what comes behind it."""
        if end <= self._ready:
            return
        for one in self._ranges:
            if self._ready <= one.first < end:
                try:
                    one.registration.need()
                except BaseException:
                    self._drop(one.first)
                    raise
                self._ready = one.end

    def _drop(self, first: int) -> None:
        """Everything from there on."""
        dropped = [one for one in self._ranges if one.first >= first]
        self._ranges = [one for one in self._ranges if one.first < first]
        self.seams[:] = [seam for seam in self.seams if seam <= first]
        for one in dropped:
            one.registration.drop()

    def close(self) -> None:
        self._drop(0)
