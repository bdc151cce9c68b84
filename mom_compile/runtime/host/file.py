"""One file without a name for all keys and values that a process keeps in a folder.

Terms
-----
extent    A run of the file's bytes that backs a run of some store's addresses. A store has a few; they need not be
          neighbours in the file, and are in its addresses.

    file         | extent of A | extent of B | free | extent of A |
    addresses A  | extent | extent |  room, reserved but not backed ...

A file for each store would be an open descriptor for each, of which a process has a thousand. This file is as large as
what is in it, whatever has been reserved, and what is given back is a hole in it at once.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import mmap
import os
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mom_compile.runtime.host.limits import HostMemoryError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

#: Names that `mmap` lacks: the same on Linux and macOS, and on Linux alone.
_FIXED, NORESERVE = 0x10, getattr(mmap, "MAP_NORESERVE", 0x4000)
#: Fixed, but not in place of what is there. Only Linux has it.
_FIXED_WHERE_FREE = 0x100000 if sys.platform == "linux" else _FIXED
_PUNCH_A_HOLE = 0x01 | 0x02  # keep the size, punch

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def _map(address: int, size: int, flags: int, file: int, offset: int, protection: int = _READ_WRITE) -> None:
    mapped = _LIBC.mmap(address, size, protection, flags, file, offset)
    if mapped == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if mapped != address:  # a kernel that does not know a flag
        _LIBC.munmap(mapped, size)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def unmap(address: int, size: int) -> None:
    """Addresses that are reserved and have nothing behind them."""
    _map(address, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE | _FIXED, -1, 0)


def hold(address: int, size: int) -> None:
    """Addresses that nothing else may be put at, and that nobody may read. Raises `OSError` if something is there."""
    _map(address, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE | _FIXED_WHERE_FREE, -1, 0, protection=0)


class File(Protocol):
    @property
    def number(self) -> int:
        """Its descriptor."""

    def give_back(self, offset: int, size: int) -> None:
        """Free disk space that nothing maps any more."""


@dataclass(frozen=True)
class Extent:
    """Bytes `[offset, offset + size)` of a file, behind the bytes of a region that begin at `first`."""

    file: File
    offset: int
    first: int
    size: int

    def map(self, region: int) -> None:
        """Put it behind the addresses of the region that begins there."""
        _map(region + self.first, self.size, mmap.MAP_SHARED | _FIXED, self.file.number, self.offset)

    def part(self, first: int, end: int) -> Extent | None:
        """What lies within `[first, end)` of the region."""
        first, end = max(first, self.first), min(end, self.first + self.size)
        return Extent(self.file, self.offset + first - self.first, first, end - first) if first < end else None

    def write(self, view: memoryview) -> None:
        """All of it. Who has it mapped sees that. Raises `OSError` where the disk is full or broken."""
        done = 0
        while done < len(view):
            done += os.pwrite(self.file.number, view[done:], self.offset + done)

    def read(self, view: memoryview) -> None:
        """All of it. Raises `OSError` where the disk is broken."""
        done = 0
        while done < len(view):
            more = os.preadv(self.file.number, [view[done:]], self.offset + done)
            if more == 0:
                raise OSError(errno.EIO, "the file ends before the rows do")
            done += more

    def give_back(self) -> None:
        self.file.give_back(self.offset, self.size)


class HostFile:
    """`number` is the one descriptor that is open. Only the owner can read the file, and it vanishes with its last
    user, whatever ends the process. Raises `HostMemoryError`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.number, name = tempfile.mkstemp(prefix="mom-kv-", dir=directory)
            os.unlink(name)
        except OSError as error:
            raise HostMemoryError(
                f"no file for keys and values can be made in kv_dir={str(directory)!r}: "
                f"{error.strerror}{_advice(error)}"
            ) from error
        #: Not at the end of the process: other finalizers, which run then too, still free what is in it.
        weakref.finalize(self, os.close, self.number).atexit = False
        self.process = os.getpid()
        self._end = 0
        self._free: list[tuple[int, int]] = []
        #: What came back since, from whichever thread drops the last tensor: appended without a lock.
        self._returned: collections.deque[tuple[int, int]] = collections.deque()
        self._lock = threading.Lock()

    def extent(self, first: int, size: int) -> Extent:
        """Disk space for `size` bytes of a region from `first` on. Raises `HostMemoryError`."""
        with self._lock:
            offset = self._find(size)
        try:
            os.posix_fallocate(self.number, offset, size)
        except OSError as error:
            self.give_back(offset, size)
            raise HostMemoryError(
                f"{size} bytes on disk for keys and values cannot be had ({error.strerror}); "
                "choose another kv_dir, or kv_offload=True to keep them in host memory"
            ) from error
        return Extent(self, offset, first, size)

    def _find(self, size: int) -> int:
        """The first hole that is large enough, or the end of the file."""
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free = _joined(self._free)
        for i, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[i : i + 1] = [(offset + size, free - size)] if free > size else []
                return offset
        self._end += size
        return self._end - size

    def give_back(self, offset: int, size: int) -> None:
        """Free disk space that nothing maps any more. A fork leaves what its parent maps alone."""
        if self.process != os.getpid():
            return
        if hasattr(_LIBC, "fallocate"):  # elsewhere it is used again, and freed with the file
            _LIBC.fallocate(self.number, _PUNCH_A_HOLE, ctypes.c_int64(offset), ctypes.c_int64(size))
        self._returned.append((offset, size))


def _joined(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one, ascending."""
    joined: list[tuple[int, int]] = []
    for offset, size in sorted(free):
        if joined and sum(joined[-1]) == offset:
            offset, size = joined[-1][0], joined.pop()[1] + size
        joined.append((offset, size))
    return joined


def _advice(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ". One is needed for a folder: close files, or raise the limit (ulimit -n)"
    return ""


#: The file of each folder, as long as something is in it. A fork makes its own.
_FILES: weakref.WeakValueDictionary[tuple[Path, int], HostFile] = weakref.WeakValueDictionary()


def file_in(directory: Path) -> HostFile:
    """The file of a folder. Raises `HostMemoryError`."""
    key = (directory, os.getpid())
    file = _FILES.get(key)
    if file is None:
        file = _FILES[key] = HostFile(directory)
    return file


def give_all_back(extents: list[Extent]) -> None:
    """When nothing maps them any more."""
    while extents:
        with contextlib.suppress(OSError):
            extents.pop().give_back()
