"""A range of host addresses that grows in place: reserved whole at first, backed block by block as rows arrive.

Terms
-----
reserve   Take addresses and no memory. A 64-bit process has more of them than any machine has bytes.
commit    Back the next blocks: with host memory, pinned where a CUDA device will copy from it, or with a file.
block     What is committed at a time. What has been committed never moves.
seam      Where two pinned ranges meet: each commit pins a range of its own, and a driver may refuse a copy across.

Growing by appending to a tensor would copy it, and a list of blocks is not one tensor that a graph could take.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mom_compile.runtime.copy_engine import Ticket

#: Bytes committed at a time: hundreds of tokens of one layer, so that decoding seldom pays for a system call, and
#: still small beside a long context where every layer has a block that is partly unused.
BLOCK = 1 << 20

#: Pinned memory grows by this share of itself at least: pinning is slow, and each range is a copy of its own.
PINNED_GROWTH = 16

#: Reservations of anonymous memory are not counted against what the machine has; `mmap` lacks the name in 3.11.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

#: Host memory that is left to everybody else.
MARGIN = 256 << 20


#: Pins `(address, size)` and returns what undoes it.
Pin = Callable[[int, int], Callable[[], None]]


class HostMemoryError(MemoryError):
    """Host memory or disk space for keys and values cannot be had. Says how much was asked for and what can be done."""


@dataclass
class Totals:
    """Bytes committed now, by all regions: in memory and in files."""

    memory: int = 0
    disk: int = 0


TOTALS = Totals()


class HostRegion:
    """`capacity` bytes of addresses, of which the first `committed` may be used.

    `directory` puts the bytes into a file there. `pin(address, size)` is called for each new range of host memory
    and returns what undoes it. Raises `HostMemoryError`.
    """

    def __init__(
        self,
        capacity: int,
        directory: Path | None = None,
        pin: Pin | None = None,
    ) -> None:
        self.capacity = _in_blocks(capacity)
        self.committed = 0
        #: The last copy that reads or writes here. Copies are in order, so those before it are done when it is.
        self.pending: Ticket | None = None
        self.file: int | None = None
        if directory is None:
            memory = _reserve(self.capacity)
        else:
            self.file = _unnamed_file(directory, self.capacity)
            memory = mmap.mmap(self.file, self.capacity)
        self.pin = None if directory is not None else pin
        #: All addresses as bytes. It keeps the mapping alive, and so does every view of it.
        with torch.inference_mode(False):
            self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        #: Ends of the pinned ranges, in bytes, ascending.
        self.seams: list[int] = []
        self._undo: list[Callable[[], None]] = []
        self._account = _Account(self.file is not None)
        self._finalizer = weakref.finalize(self, _release, self._undo, self._account, self.file)

    @property
    def on_disk(self) -> bool:
        return self.file is not None

    def commit(self, size: int) -> None:
        """Back the first `size` bytes. Raises `HostMemoryError`, and then nothing has changed."""
        if size <= self.committed:
            return
        wanted = min(_in_blocks(size), self.capacity) - self.committed
        if self.file is not None:
            self._commit_file(wanted)
        elif self.pin is not None:
            wanted = self._commit_pinned(wanted, self.pin)
        else:
            _check_available(wanted)
        self.committed += wanted
        self._account.add(wanted)

    def _commit_pinned(self, wanted: int, pin: Pin) -> int:
        """Pin so many bytes, or some more. Returns how many."""
        some_more = min(_in_blocks(self.committed // PINNED_GROWTH), self.capacity - self.committed)
        if some_more > wanted:
            with contextlib.suppress(HostMemoryError):
                return self._pin_next(some_more, pin)
        return self._pin_next(wanted, pin)

    def _pin_next(self, size: int, pin: Pin) -> int:
        _check_available(size)
        self._undo.append(pin(self.bytes.data_ptr() + self.committed, size))
        self.seams.append(self.committed + size)
        return size

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Bytes `[first, end)` as runs that each lie within one pinned range."""
        for seam in self.seams:
            if first < seam < end:
                yield first, seam
                first = seam
        yield first, end

    def _commit_file(self, wanted: int) -> None:
        assert self.file is not None
        try:
            os.posix_fallocate(self.file, self.committed, wanted)
        except OSError as error:
            raise HostMemoryError(
                f"{wanted} bytes on disk for keys and values cannot be had ({error.strerror}); "
                "choose another kv_dir, or kv_offload=True to keep them in host memory"
            ) from error

    def wait(self) -> None:
        """Until the host may read and write here itself."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.synchronize()

    def close(self) -> None:
        """Give pins and disk space back. Views of the bytes must not be used afterwards."""
        self._finalizer()


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


def _release(undo: list[Callable[[], None]], account: _Account, file: int | None) -> None:
    while undo:
        undo.pop()()
    account.add(-account.bytes)
    if file is not None:
        os.close(file)


def available_memory() -> int | None:
    """Bytes of host memory that may still be taken, or None where the machine does not say (not Linux)."""
    found = [_meminfo("MemAvailable"), *_cgroup_rooms()]
    known = [size for size in found if size is not None]
    return min(known) if known else None


def _check_available(wanted: int) -> None:
    available = available_memory()
    if available is not None and wanted + MARGIN > available:
        raise HostMemoryError(
            f"{wanted} bytes of host memory for keys and values cannot be had: {available} are available, "
            f"{MARGIN} of which are left to others. kv_offload='disk' with kv_dir keeps them in files, "
            "kv_offload='auto' with a memory_budget keeps more layers on the device"
        )


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(size[1]) * 1024 for size in sizes), None)


def _cgroup_rooms() -> list[int]:
    """What the limits of a container leave, by either version of control groups. Cached files count as free."""
    rooms = []
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        rooms.append(room + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0)))
    return rooms


def _reserve(capacity: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, capacity)
    try:
        return mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except OSError as error:
        raise HostMemoryError(
            f"{capacity} bytes of host addresses for keys and values cannot be reserved ({error.strerror}); "
            "a limit on address space (ulimit -v) or strict overcommit may forbid it: raise it, "
            "or keep keys and values on the device with kv_offload=False"
        ) from error


def _unnamed_file(directory: Path, capacity: int) -> int:
    """A file that only its owner can read and that vanishes with its last user, whatever ends the process."""
    try:
        file, name = tempfile.mkstemp(prefix="mom-kv-", dir=directory)
        os.unlink(name)
        os.ftruncate(file, capacity)
    except OSError as error:
        raise HostMemoryError(
            f"no file for keys and values can be made in kv_dir={str(directory)!r}: {error.strerror}"
        ) from error
    return file


def _in_blocks(size: int) -> int:
    return -(-max(size, 1) // BLOCK) * BLOCK
