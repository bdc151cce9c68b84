"""Host memory that a device copies from beside its computation."""

from __future__ import annotations

from collections.abc import Callable

from mom_compile.runtime.host.backings.base import BLOCK, Backing

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

    def commit(self, first: int, size: int) -> None:
        self._undo.append(self.pin(self.address + first, size))
        self.seams.append(first + size)

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()
