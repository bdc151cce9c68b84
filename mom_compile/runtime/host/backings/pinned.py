"""Host memory that a device copies from beside its computation."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import torch

from mom_compile.runtime.host.backings.base import BLOCK, Backing, as_bytes, reserve_addresses

#: Of x86 and of ARM: a whole number of blocks. The last one may be pinned in part, and is there as a whole.
HUGE_PAGE = 2 * BLOCK

#: Pins `(address, size)` and returns what undoes it. Raises `HostMemoryError`.
Pin = Callable[[int, int], Callable[[], None]]


class Pinned(Backing):
    """Ranges that stay pinned until the region is closed. Each commit pins one of its own, so they meet at seams."""

    block = BLOCK
    reusable = True

    def __init__(self, pin: Pin) -> None:
        super().__init__()
        self.pin = pin
        self._undo: list[Callable[[], None]] = []

    def reserve(self, capacity: int, least: int) -> torch.Tensor:
        """Of huge pages where the kernel has them: it pins page by page. The first one begins where one may begin.

        A fork does not have them. Pages that both had would be copied when one of them is written, and a device that
        copies to the old page would write where its process does not look.
        """
        self.memory = reserve_addresses(capacity + HUGE_PAGE, least + HUGE_PAGE)
        first = -as_bytes(self.memory).data_ptr() % HUGE_PAGE
        addresses = as_bytes(self.memory, first, len(self.memory) - HUGE_PAGE)
        self.address = addresses.data_ptr()
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                with contextlib.suppress(OSError):  # a kernel without it
                    self.memory.madvise(getattr(mmap, advice))
        return addresses

    def commit(self, first: int, size: int) -> None:
        self._undo.append(self.pin(self.address + first, size))
        self.seams.append(first + size)

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()
