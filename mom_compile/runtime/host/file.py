"""One unnamed file per folder that stores all keys and values a process keeps there.

Terms
-----
extent    A run of bytes in the file that backs a run of a store's addresses. The extents of a store are contiguous in
          its addresses, but not necessarily in the file.

    file         | extent of A | extent of B | free | extent of A |
    addresses A  | extent | extent |  reserved, not committed ...

One file per store would need one open descriptor per store, and a process may have about a thousand. The file is as
large as its contents, not as the reserved addresses; released extents become holes at once.
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

#: Constants that `mmap` lacks: the first has the same value on Linux and macOS, the second is for Linux.
_FIXED, NORESERVE = 0x10, getattr(mmap, "MAP_NORESERVE", 0x4000)
#: Like `_FIXED`, but fails instead of replacing an existing mapping. Linux only.
_FIXED_WHERE_FREE = 0x100000 if sys.platform == "linux" else _FIXED
_PUNCH_A_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def _map(address: int, size: int, flags: int, file: int, offset: int, protection: int = _READ_WRITE) -> None:
    mapped = _LIBC.mmap(address, size, protection, flags, file, offset)
    if mapped == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if mapped != address:  # kernels that do not know a flag ignore it
        _LIBC.munmap(mapped, size)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def unmap(address: int, size: int) -> None:
    """Replace the mapping of these addresses by a reservation without storage."""
    _map(address, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE | _FIXED, -1, 0)


def hold(address: int, size: int) -> None:
    """Reserve addresses without access. Raises `OSError` if something is mapped there."""
    _map(address, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE | _FIXED_WHERE_FREE, -1, 0, protection=0)


class File(Protocol):
    @property
    def number(self) -> int:
        """File descriptor."""

    def give_back(self, offset: int, size: int) -> None:
        """Free disk space that is no longer mapped."""


@dataclass(frozen=True)
class Extent:
    """Bytes `[offset, offset + size)` of a file that back a region's bytes from `first` on."""

    file: File
    offset: int
    first: int
    size: int

    def map(self, region: int) -> None:
        """Map this extent into the region that starts at address `region`."""
        _map(region + self.first, self.size, mmap.MAP_SHARED | _FIXED, self.file.number, self.offset)

    def part(self, first: int, end: int) -> Extent | None:
        """Return the part within bytes `[first, end)` of the region, or None."""
        first, end = max(first, self.first), min(end, self.first + self.size)
        return Extent(self.file, self.offset + first - self.first, first, end - first) if first < end else None

    def write(self, view: memoryview) -> None:
        """Write the whole extent; mappings of it see the data. Raises `OSError` if the disk is full or broken."""
        done = 0
        while done < len(view):
            done += os.pwrite(self.file.number, view[done:], self.offset + done)

    def read(self, view: memoryview) -> None:
        """Read the whole extent. Raises `OSError` if the disk is broken."""
        done = 0
        while done < len(view):
            more = os.preadv(self.file.number, [view[done:]], self.offset + done)
            if more == 0:
                raise OSError(errno.EIO, "the file is shorter than expected")
            done += more

    def give_back(self) -> None:
        self.file.give_back(self.offset, self.size)


class HostFile:
    """The file of one folder. `number` is its only descriptor.

    Only its owner can read the file. It disappears with its last user, however the process ends. Raises
    `HostMemoryError`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.number, name = tempfile.mkstemp(prefix="mom-kv-", dir=directory)
            os.unlink(name)
        except OSError as error:
            raise HostMemoryError(
                f"cannot create a file for keys and values in kv_dir={str(directory)!r}: "
                f"{error.strerror}{_advice(error)}"
            ) from error
        #: Not closed at exit: other finalizers that run then still free parts of the file.
        weakref.finalize(self, os.close, self.number).atexit = False
        self.process = os.getpid()
        self._end = 0
        self._free: list[tuple[int, int]] = []
        #: Extents released since the last search. Any thread appends, without a lock, when it drops the last tensor.
        self._returned: collections.deque[tuple[int, int]] = collections.deque()
        self._lock = threading.Lock()

    def extent(self, first: int, size: int) -> Extent:
        """Allocate disk space for `size` bytes of a region from `first` on. Raises `HostMemoryError`."""
        with self._lock:
            offset = self._find(size)
        try:
            os.posix_fallocate(self.number, offset, size)
        except OSError as error:
            self.give_back(offset, size)
            raise HostMemoryError(
                f"cannot allocate {size} bytes on disk for keys and values ({error.strerror}); "
                "choose another kv_dir, or kv_offload=True to keep them in host memory"
            ) from error
        return Extent(self, offset, first, size)

    def _find(self, size: int) -> int:
        """Return the offset of the first hole that is large enough, or of the end of the file."""
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
        """Free disk space that is no longer mapped. A fork must not free what its parent maps."""
        if self.process != os.getpid():
            return
        if hasattr(_LIBC, "fallocate"):  # on other systems the space is reused, and freed with the file
            _LIBC.fallocate(self.number, _PUNCH_A_HOLE, ctypes.c_int64(offset), ctypes.c_int64(size))
        self._returned.append((offset, size))


def _joined(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent holes; ascending by offset."""
    joined: list[tuple[int, int]] = []
    for offset, size in sorted(free):
        if joined and sum(joined[-1]) == offset:
            offset, size = joined[-1][0], joined.pop()[1] + size
        joined.append((offset, size))
    return joined


def _advice(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ". Each folder needs one descriptor: close files, or raise the limit (ulimit -n)"
    return ""


#: The file of each folder while it has contents. A fork creates its own.
_FILES: weakref.WeakValueDictionary[tuple[Path, int], HostFile] = weakref.WeakValueDictionary()


def file_in(directory: Path) -> HostFile:
    """Return the file of a folder. Raises `HostMemoryError`."""
    key = (directory, os.getpid())
    file = _FILES.get(key)
    if file is None:
        file = _FILES[key] = HostFile(directory)
    return file


def give_all_back(extents: list[Extent]) -> None:
    """Free extents that are no longer mapped."""
    while extents:
        with contextlib.suppress(OSError):
            extents.pop().give_back()
