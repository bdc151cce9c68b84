"""The interface of backings, which provide the storage of a region: one class for each kind of memory.

Terms
-----
reserve   Take addresses but no memory. A 64-bit process has more addresses than any machine has memory.
commit    Provide storage for the next bytes. Committed bytes never move.
ahead     Commit bytes before they are needed, in the background. `ready` waits for them.
release   Undo a commit at either end of the committed bytes.
close     Free what outlives the addresses, e.g. a pin.

    backing = Anonymous()
    address = backing.reserve(capacity, least)        once, at the start
    backing.commit(high, size); backing.release(low, size); ...
    backing.close()                                   once, at the end

The region decides how much is committed and released; the placement decides which backing it has.
`tests/test_backings.py` tests this interface for every backing.
"""

from __future__ import annotations

import mmap

import torch

from mom_compile.runtime.host.file import NORESERVE
from mom_compile.runtime.host.limits import HostMemoryError

#: Bytes pinned, or mapped from a file, at a time: each block costs a system call and a kernel record. The size of a
#: region is a multiple of it.
BLOCK = 1 << 20

#: Commit granularity of other memory, which costs nothing until it is written: a few pages.
SMALL_BLOCK = 4 * mmap.PAGESIZE


class Backing:
    """The storage of one region. Sizes and offsets are in bytes, in whole blocks.

    block      commit granularity: a multiple of the page size that divides `BLOCK`
    on_disk    whether it takes disk space instead of host memory
    reusable   whether creating one is so slow that the region of a deleted store is kept for the next cache
    goes_ahead whether it can commit in the background
    lost       whether this process is a fork that did not inherit the storage
    seams      ends of ranges that a driver may not copy across, ascending
    """

    block = SMALL_BLOCK
    on_disk = False
    reusable = False
    goes_ahead = False
    lost = False

    def __init__(self) -> None:
        self.seams: list[int] = []

    def reserve(self, capacity: int, least: int) -> torch.Tensor:
        """Reserve addresses for `capacity` bytes, or fewer if they run out, but not for fewer than `least`.

        The result shows them as bytes. It and its views keep the addresses and their storage alive. Raises
        `HostMemoryError`.
        """
        self.memory = reserve_addresses(capacity, least)
        addresses = as_bytes(self.memory)
        self.address = addresses.data_ptr()
        return addresses

    def commit(self, first: int, size: int) -> None:
        """Commit bytes `[first, first + size)`. Raises `HostMemoryError`; nothing has changed then."""
        raise NotImplementedError

    def commit_ahead(self, first: int, size: int) -> None:
        """Start to commit and return at once; `ready` reports a failure. Only if `goes_ahead`."""
        raise NotImplementedError

    def ready(self, end: int) -> int:
        """Wait for background commits up to byte `end`. Returns the end of the committed bytes.

        A result below `end` means that the remaining bytes were refused and are not committed.
        """
        return end

    def release(self, first: int, size: int) -> bool:
        """Release unused bytes. Returns False if that is impossible; nothing has changed then."""
        return False

    def close(self) -> None:
        """Free what outlives the addresses. Views of them must not be used afterwards."""


def whole_blocks(block: int, size: int) -> int:
    """Round `size` up to whole blocks, at least one."""
    return -(-max(size, 1) // block) * block


def as_bytes(memory: mmap.mmap, first: int = 0, size: int = -1) -> torch.Tensor:
    """Return (`size` bytes of) a mapping as a tensor that keeps the mapping alive and starts its storage.

    The result may be written outside inference mode even if it is created inside.
    """
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, offset=first, count=size)


def reserve_addresses(capacity: int, least: int) -> mmap.mmap:
    """Reserve `capacity` bytes of addresses without memory; on failure half as many, and so on, down to `least`.

    Raises `HostMemoryError`.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    while True:
        try:
            return mmap.mmap(-1, capacity, **flags)
        except OSError as error:
            if capacity > least:
                capacity = max(least, whole_blocks(BLOCK, capacity // 2))
                continue
            raise HostMemoryError(
                f"cannot reserve {capacity} bytes of host addresses for keys and values ({error.strerror}); "
                "the cause may be a limit on address space (ulimit -v) or strict overcommit: raise the limit, "
                "or keep keys and values on the device with kv_offload=False"
            ) from error
