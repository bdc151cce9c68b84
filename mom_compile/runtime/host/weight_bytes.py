"""Bytes of weights on the host: in the storage that a checkpoint was read into, or in a mapped file.

Terms
-----
pin       For a CUDA device, pages are pinned in place: a second copy of a model may not fit in memory.
mapped    The file's bytes as read-only memory. The kernel reads pages on demand and drops them under memory pressure.

In contrast to rows of a cache, weights never grow and are seldom written. A holder has one region: its whole storage.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mom_compile.runtime.host.backings.registration import PIECE, Pin
from mom_compile.runtime.host.done import CopyError, Done, Ticket
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.holders import Begin, between, hold, holder_of

PAGE = mmap.PAGESIZE


class WeightRegion:
    """All bytes of one storage. Devices only read them, so copies do not wait for each other."""

    def __init__(self, whole: torch.Tensor, keeps: object = None) -> None:
        self.bytes = whole
        self.pins: list[Pages] = []
        #: Boundaries of pinned ranges within it.
        self.seams: list[int] = []
        self._keeps = keeps
        self._reads: collections.deque[Done] = collections.deque()
        self._asking = threading.Lock()

    def check(self) -> None:
        """Nothing to check: a fork inherits the pages."""

    def copied(self, begin: Begin) -> Ticket:
        with self._asking:
            while self._reads and self._reads[0].finished():
                self._reads.popleft()
            ticket = begin(None)
            self._reads.append(ticket.done)
        return ticket

    def wait(self) -> None:
        """Wait until no copy reads the bytes; their errors do not matter."""
        for read in list(self._reads):
            with contextlib.suppress(CopyError):
                read.synchronize()

    def pinned(self, pages: Pages) -> None:
        """Note pinned pages that have some of the bytes."""
        if pages not in self.pins:
            self.pins.append(pages)
            begin, size = self.bytes.data_ptr(), self.bytes.numel()
            ends = {*self.seams, pages.first - begin, pages.end - begin}
            self.seams = sorted(end for end in ends if 0 < end < size)

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        return between(self.seams, first, end)


class WeightBytes:
    """The holder of one storage. `file` is the file it is mapped from, if any."""

    what = "weights"

    def __init__(self, region: WeightRegion, file: MappedFile | None = None) -> None:
        self.region = region
        self.file = file
        hold(self)

    @property
    def in_file(self) -> bool:
        return self.file is not None

    @property
    def where(self) -> str:
        assert self.file is not None
        return repr(str(self.file.path))

    @property
    def size(self) -> int:
        return self.region.bytes.numel()

    @property
    def pinned(self) -> bool:
        """Whether at least some of it is pinned."""
        return bool(self.region.pins)

    def extents(self, first: int, end: int) -> tuple[Extent, ...]:
        assert self.file is not None
        return (Extent(self.file, first, first, end - first),)


def bytes_under(tensor: torch.Tensor) -> WeightBytes:
    """Return the holder of a tensor's storage, created on first use. The caller must keep it alive."""
    found = holder_of(tensor)
    if isinstance(found, WeightBytes):
        return found
    with torch.inference_mode(False), torch.no_grad():
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return WeightBytes(WeightRegion(whole))


# --------------------------------------------------------------------------------------------------------- mapped


class MappedFile:
    """An open file, mapped read-only. Raises `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number).atexit = False
        self.memory = mmap.mmap(self.number, 0, access=mmap.ACCESS_READ)

    def give_back(self, offset: int, size: int) -> None:
        """Nothing to free: the file is not ours."""


def map_file(path: Path) -> WeightBytes:
    """Return a whole file as weights. Writing to the mapping would crash, so writers copy a weight first."""
    file = MappedFile(path)
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        whole = torch.frombuffer(file.memory, dtype=torch.uint8)
    return WeightBytes(WeightRegion(whole, file), file)


# --------------------------------------------------------------------------------------------------------- pinned


class Pages:
    """Pages `[first, end)`, by address, pinned by one call, until the last region with bytes there is gone.

    `kept` are those bytes: memory must not be freed while it is pinned.
    """

    def __init__(self, first: int, end: int, undo: Callable[[], None], kept: Sequence[torch.Tensor]) -> None:
        self.first, self.end = first, end
        weakref.finalize(self, _unpin, first, undo, kept)
        _PINNED[first] = end, weakref.ref(self)


#: All pages pinned for weights: first address -> (end, pages). A driver refuses to pin a page twice, so models that
#: share a storage or a page share the pinned pages. Dead pages stay here until they have been unpinned.
_PINNED: dict[int, tuple[int, weakref.ref[Pages]]] = {}
_PINNING = threading.Lock()


def _unpin(first: int, undo: Callable[[], None], kept: Sequence[torch.Tensor]) -> None:
    """Called by any thread that drops the last weight there; so without a lock."""
    try:
        undo()
    finally:
        _PINNED.pop(first, None)


def _forked() -> None:
    """A fork inherits no pinned pages."""
    global _PINNING
    _PINNING = threading.Lock()
    _PINNED.clear()


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True)
class _Run:
    """Adjacent pages `[first, end)`, by address, and the holders with bytes in them."""

    first: int
    end: int
    holders: tuple[WeightBytes, ...]

    def touched(self, first: int, end: int) -> list[WeightBytes]:
        """Return the holders with bytes in `[first, end)`."""
        begins = ((holder, holder.region.bytes.data_ptr()) for holder in self.holders)
        return [holder for holder, begin in begins if begin < end and first < begin + holder.size]


def pin_in_place(tensors: Sequence[torch.Tensor], pin: Pin) -> None:
    """Pin the pages of tensors that are neither in a file nor pinned yet, at most `PIECE` bytes per call.

    They stay pinned while one of the tensors exists, or a weight made of it. Raises `HostMemoryError`; pages pinned
    before the error stay pinned. Small tensors share pages, and no page may be pinned twice, so adjacent tensors are
    pinned together.
    """
    with _PINNING:
        for run in _runs(tensors):
            before = _pinned_within(run.first, run.end)
            for pages in before:
                _assign(run, pages)
            for first, end in _unpinned(run, before):
                kept = tuple(holder.region.bytes for holder in run.touched(first, end))
                _assign(run, Pages(first, end, pin(first, end - first), kept))


def _assign(run: _Run, pages: Pages) -> None:
    """Assign pages to the holders with bytes in them."""
    for holder in run.touched(pages.first, pages.end):
        holder.region.pinned(pages)


def _pinned_within(first: int, end: int) -> list[Pages]:
    """Return pages that overlap `[first, end)`, by address. Waits for pages that another thread is unpinning."""
    found = []
    for begin, (until, alive) in sorted(_PINNED.items()):
        if begin < end and first < until:
            pages = alive()
            if pages is not None:
                found.append(pages)
            while pages is None and begin in _PINNED:
                time.sleep(0.001)
    return found


def _unpinned(run: _Run, before: Sequence[Pages]) -> Iterator[tuple[int, int]]:
    """Split the unpinned parts of a run into pieces."""
    at = run.first
    for first, end in [*((pages.first, pages.end) for pages in before), (run.end, run.end)]:
        while at < first:
            piece = min(at + PIECE, first)
            yield at, piece
            at = piece
        at = max(at, end)


def _runs(tensors: Sequence[torch.Tensor]) -> list[_Run]:
    pages = []
    for tensor in tensors:
        holder = bytes_under(tensor)
        if not holder.in_file and tensor.nbytes:
            tensor._lease = holder  # type: ignore[attr-defined]  # until it becomes a weight, which keeps it alive
            begin = tensor.data_ptr()
            pages.append((begin // PAGE * PAGE, -(-(begin + tensor.nbytes) // PAGE) * PAGE, holder))
    runs: list[_Run] = []
    for first, end, holder in sorted(pages, key=lambda page: page[:2]):
        if runs and first < runs[-1].end:
            last = runs.pop()
            runs.append(_Run(last.first, max(last.end, end), tuple(dict.fromkeys((*last.holders, holder)))))
        else:
            runs.append(_Run(first, end, (holder,)))
    return runs
