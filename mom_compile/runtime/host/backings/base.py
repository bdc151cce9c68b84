"""What can be behind the addresses of a region: a class for each kind of memory, which keeps the same few promises.

Terms
-----
reserve   Take addresses and no memory. A 64-bit process has more of them than any machine has bytes.
commit    Put something behind the next bytes. What has been committed never moves.
ahead     Commit what nobody needs yet, beside the caller, where that takes long. Before use it is asked for: `ready`.
release   Take it away again, at either end of what is committed.
close     Give back what outlives the addresses, a pin say. What goes with them needs no closing.

    backing = Anonymous()
    address = backing.reserve(capacity, least)        once, at first
    backing.commit(high, size); backing.release(low, size); ...
    backing.close()                                   once, at last

A backing is told what to do and decides nothing: how much is committed and what is given back is the region's, which
kind of backing it has is the placement's. `tests/test_backings.py` holds every kind to the promises.
"""

from __future__ import annotations

import mmap

import torch

from mom_compile.runtime.host.file import NORESERVE
from mom_compile.runtime.host.limits import HostMemoryError

#: Bytes pinned, or mapped from a file, at a time: each is a system call, and a range that the kernel keeps a record of.
#: Regions have whole ones.
BLOCK = 1 << 20

#: Other memory costs nothing until it is written: a few pages.
SMALL_BLOCK = 4 * mmap.PAGESIZE


class Backing:
    """What is behind the addresses of one region. Sizes and places are in bytes from its beginning, in whole blocks.

    block      what is committed at a time, at least: pages, and so many that `BLOCK` is a multiple
    on_disk    whether it takes disk space rather than host memory
    reusable   whether making one is so slow that a dead store's is kept for the next cache
    goes_ahead whether it can commit beside the caller
    lost       whether this process is a fork, which has nothing of it
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
        """Addresses for `capacity` bytes, or for fewer if those cannot be had, but not for fewer than `least`.

        They are returned as bytes; those keep the addresses, and what is behind them, and so does every view of them.
        Raises `HostMemoryError`.
        """
        self.memory = reserve_addresses(capacity, least)
        addresses = as_bytes(self.memory)
        self.address = addresses.data_ptr()
        return addresses

    def commit(self, first: int, size: int) -> None:
        """Back bytes `[first, first + size)`. Raises `HostMemoryError`, and then nothing has changed."""
        raise NotImplementedError

    def commit_ahead(self, first: int, size: int) -> None:
        """Begin to, and return at once: what is refused is known when it is asked for. Of what `goes_ahead`."""
        raise NotImplementedError

    def ready(self, end: int) -> int:
        """Wait for what was committed ahead, up to byte `end`: how far all is there now.

        Less than `end` means that the bytes from there on were refused, and nothing is committed there any more.
        """
        return end

    def release(self, first: int, size: int) -> bool:
        """Give them back. Nobody reads or writes there. False if that cannot be done; then nothing has changed."""
        return False

    def close(self) -> None:
        """Give back what outlives the addresses. Nobody uses views of them afterwards."""


def whole_blocks(block: int, size: int) -> int:
    """The bytes of the blocks that `size` bytes take: one, at least."""
    return -(-max(size, 1) // block) * block


def as_bytes(memory: mmap.mmap, first: int = 0, size: int = -1) -> torch.Tensor:
    """A mapping, or `size` bytes of it, as a tensor that keeps it and begins its storage. Also in inference mode it is
    one that may be written to afterwards."""
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, offset=first, count=size)


def reserve_addresses(capacity: int, least: int) -> mmap.mmap:
    """So many bytes of addresses that cost no memory, or half as many, and so on, down to `least`.

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
                f"{capacity} bytes of host addresses for keys and values cannot be reserved ({error.strerror}); "
                "a limit on address space (ulimit -v) or strict overcommit may forbid it: raise it, "
                "or keep keys and values on the device with kv_offload=False"
            ) from error
