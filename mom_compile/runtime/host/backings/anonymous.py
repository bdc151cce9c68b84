"""Ordinary host memory."""

from __future__ import annotations

import mmap

from mom_compile.runtime.host.backings.base import Backing


class Anonymous(Backing):
    """Commits need no call: the kernel allocates pages on first write, and frees them on `madvise`."""

    def commit(self, first: int, size: int) -> None:
        pass

    def release(self, first: int, size: int) -> bool:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return False
        self.memory.madvise(mmap.MADV_DONTNEED, first, size)
        return True
