"""Host memory as it is."""

from __future__ import annotations

import mmap

from mom_compile.runtime.host.backings.base import Backing


class Anonymous(Backing):
    """Nothing is done to commit: the kernel gives a page when it is written, and takes it when it is told to."""

    def commit(self, first: int, size: int) -> None:
        pass

    def release(self, first: int, size: int) -> bool:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return False
        self.memory.madvise(mmap.MADV_DONTNEED, first, size)
        return True
