"""A range of host addresses that grows in place: reserved whole at first, backed as rows arrive, freed from both ends.

Terms
-----
reserve   Take addresses and no memory. A 64-bit process has more of them than any machine has bytes.
commit    Back the next bytes: with host memory, pinned where a CUDA device will copy from it, or with part of a file.
block     What is committed at a time, at least. What has been committed never moves.
seam      Where two pinned ranges meet: each commit pins a range of its own, and a driver may refuse a copy across.

    addresses   | given back | held ............ | reserved ...              |
                0           low                 high                     capacity

Growing by appending to a tensor would copy it, and a list of blocks is not one tensor that a graph could take.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mom_compile.runtime.host.engine import Ticket
from mom_compile.runtime.host.file import NORESERVE, Extent, file_in, give_all_back, unmap
from mom_compile.runtime.host.limits import HostMemoryError, available_memory

#: Bytes pinned, or mapped from a file, at a time: each is a system call, and a range that the kernel keeps a record of.
BLOCK = 1 << 20

#: Other memory costs nothing until it is written: a few pages.
SMALL_BLOCK = 4 * mmap.PAGESIZE

#: What is held grows by this share of itself at least, and what is not needed any more is given back when it has become
#: as much: decoding seldom pays for a system call, and no more than two such shares are held in vain.
SHARE = 16

#: Host memory that is left to everybody else.
MARGIN = 256 << 20


#: Pins `(address, size)` and returns what undoes it.
Pin = Callable[[int, int], Callable[[], None]]


@dataclass
class Totals:
    """Bytes committed now, by all regions: in memory and in files."""

    memory: int = 0
    disk: int = 0


TOTALS = Totals()


class Backing(Protocol):
    """What is behind the addresses of one region."""

    block: int
    on_disk: bool

    def commit(self, first: int, size: int) -> None:
        """Back bytes `[first, first + size)`. Raises `HostMemoryError`, and then nothing has changed."""

    def release(self, first: int, size: int) -> bool:
        """Give them back, if that can be done. Nobody reads or writes there."""


class HostRegion:
    """`capacity` bytes of addresses, or fewer where those cannot be had, but not fewer than `least`.

    `directory` puts the bytes into a file there. `pin(address, size)` is called for each new range of host memory
    and returns what undoes it. Raises `HostMemoryError`.
    """

    def __init__(
        self, capacity: int, directory: Path | None = None, pin: Pin | None = None, least: int | None = None
    ) -> None:
        self.pin = pin if directory is None else None
        #: The last copy that reads or writes here. Copies are in order, so those before it are done when it is.
        self.pending: Ticket | None = None
        self.low = self.high = 0
        memory = _reserve(_in(BLOCK, capacity), _in(BLOCK, capacity if least is None else least))
        self.capacity = len(memory)
        #: All addresses as bytes. It keeps the mapping alive, and so does every view of it.
        with torch.inference_mode(False):
            self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        #: Ends of the pinned ranges, in bytes, ascending.
        self.seams: list[int] = []
        self._undo: list[Callable[[], None]] = []
        self.backing: Backing
        if directory is not None:
            self.backing = _InFile(directory, memory, self.bytes.data_ptr())
        elif pin is not None:
            self.backing = _Pinned(pin, self.bytes.data_ptr(), self.seams, self._undo)
        else:
            self.backing = _Pageable(memory)
        self._account = _Account(self.backing.on_disk)
        self._finalizer = weakref.finalize(self, _release, self._undo, self._account)

    @property
    def committed(self) -> int:
        """Bytes that are held."""
        return self.high - self.low

    def commit(self, size: int) -> None:
        """Back the bytes up to `size`. Raises `HostMemoryError`, and then nothing has changed."""
        if size <= self.high:
            return
        room = self.capacity - self.high
        wanted = min(_in(self.backing.block, size) - self.high, room)
        more = min(_in(self.backing.block, self.committed // SHARE), room) if self.committed else 0
        if more > wanted:
            with contextlib.suppress(HostMemoryError):
                return self._commit_next(more)
        self._commit_next(wanted)

    def _commit_next(self, size: int) -> None:
        self.backing.commit(self.high, size)
        self.high += size
        self._account.add(size)

    def keep(self, first: int, end: int) -> None:
        """Give back what is held outside bytes `[first, end)`, where that is worth a system call.

        Rows outside must have no readers and no writers: they are gone.
        """
        slack = self.slack(end - first)
        low = min(first // self.backing.block * self.backing.block, self.high)
        if low - self.low >= slack and self.backing.release(self.low, low - self.low):
            self._account.add(self.low - low)
            self.low = low
        high = max(_in(self.backing.block, end), self.low)
        if self.high - high >= slack and self.backing.release(high, self.high - high):
            self._account.add(high - self.high)
            self.high = high

    def slack(self, shown: int) -> int:
        """Bytes that may be held in vain at each end, beside so many that are shown."""
        return max(self.backing.block, shown // SHARE)

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Bytes `[first, end)` as runs that each lie within one pinned range."""
        for seam in self.seams:
            if first < seam < end:
                yield first, seam
                first = seam
        yield first, end

    def wait(self) -> None:
        """Until the host may read and write here itself."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.synchronize()

    def close(self) -> None:
        """Give pins back. Views of the bytes must not be used afterwards."""
        self._finalizer()


class _Pageable:
    """Host memory as it is: what is committed is only counted, and the kernel gives a page when it is written."""

    block = SMALL_BLOCK
    on_disk = False

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = weakref.ref(memory)  # the tensor holds it, and views of that may outlive the region

    def commit(self, first: int, size: int) -> None:
        _check_available(size)

    def release(self, first: int, size: int) -> bool:
        memory = self.memory()
        if memory is None or not hasattr(mmap, "MADV_DONTNEED"):
            return False
        memory.madvise(mmap.MADV_DONTNEED, first, size)
        return True


class _Pinned:
    """Host memory in ranges that stay pinned until the region is closed."""

    block = BLOCK
    on_disk = False

    def __init__(self, pin: Pin, address: int, seams: list[int], undo: list[Callable[[], None]]) -> None:
        self.pin = pin
        self.address = address
        self.seams = seams
        self.undo = undo

    def commit(self, first: int, size: int) -> None:
        _check_available(size)
        self.undo.append(self.pin(self.address + first, size))
        self.seams.append(first + size)

    def release(self, first: int, size: int) -> bool:
        return False


class _InFile:
    """Extents of the folder's file, mapped one behind another into the addresses."""

    block = BLOCK
    on_disk = True

    def __init__(self, directory: Path, memory: mmap.mmap, address: int) -> None:
        self.directory = directory
        self.address = address
        self.extents: list[Extent] = []
        self.file = file_in(directory)
        weakref.finalize(memory, give_all_back, self.extents).atexit = False

    def commit(self, first: int, size: int) -> None:
        self.file = file_in(self.directory)  # a fork has one of its own
        extent = self.file.extent(first, size)
        try:
            extent.map(self.address)
        except OSError as error:
            extent.give_back()
            raise HostMemoryError(
                f"{size} bytes on disk for keys and values cannot be mapped ({error.strerror}); "
                "a limit on mappings (vm.max_map_count) or on address space (ulimit -v) may forbid it: raise it, "
                "or use kv_offload=True to keep them in host memory"
            ) from error
        self.extents.append(extent)

    def release(self, first: int, size: int) -> bool:
        try:
            unmap(self.address + first, size)
        except OSError:  # one mapping would become two, and there may be no more
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


class _Account:
    """What one region has committed, kept apart from it so that its finalizer can take it off the totals."""

    def __init__(self, on_disk: bool) -> None:
        self.on_disk = on_disk
        self.bytes = 0

    def add(self, size: int) -> None:
        self.bytes += size
        if self.on_disk:
            TOTALS.disk += size
        else:
            TOTALS.memory += size


def _release(undo: list[Callable[[], None]], account: _Account) -> None:
    while undo:
        undo.pop()()
    account.add(-account.bytes)


def _check_available(wanted: int) -> None:
    available = available_memory()
    if available is not None and wanted + MARGIN > available:
        raise HostMemoryError(
            f"{wanted} bytes of host memory for keys and values cannot be had: {available} are available, "
            f"{MARGIN} of which are left to others. kv_offload='disk' with kv_dir keeps them in files, "
            "kv_offload='auto' with a memory_budget keeps more layers on the device"
        )


def _reserve(capacity: int, least: int) -> mmap.mmap:
    """So many bytes of addresses that cost no memory, or half as many, and so on, down to `least`."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    while True:
        try:
            return mmap.mmap(-1, capacity, **flags)
        except OSError as error:
            if capacity > least:
                capacity = max(least, _in(BLOCK, capacity // 2))
                continue
            raise HostMemoryError(
                f"{capacity} bytes of host addresses for keys and values cannot be reserved ({error.strerror}); "
                "a limit on address space (ulimit -v) or strict overcommit may forbid it: raise it, "
                "or keep keys and values on the device with kv_offload=False"
            ) from error


def _in(block: int, size: int) -> int:
    return -(-max(size, 1) // block) * block
