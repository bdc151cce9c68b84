"""Bytes of weights on the host, where they lie: in the storage a checkpoint was read to, or in the file, mapped.

Terms
-----
pin       For a CUDA device's sake pages are pinned where they are: nobody has room for a second copy of a model.
mapped    The file's bytes seen as memory, read-only: pages are read when they are needed and dropped when memory is.

Unlike rows of a cache these never grow and are seldom written: a holder has one region, all of its storage.
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
    """All bytes of one storage. Devices read them and never write, so no copy waits for another."""

    def __init__(self, whole: torch.Tensor, keeps: object = None) -> None:
        self.bytes = whole
        self.pins: list[Pages] = []
        #: Where a pinned range begins or ends within.
        self.seams: list[int] = []
        self._keeps = keeps
        self._reads: collections.deque[Done] = collections.deque()
        self._asking = threading.Lock()

    def check(self) -> None:
        """A fork reads its own pages."""

    def copied(self, begin: Begin) -> Ticket:
        with self._asking:
            while self._reads and self._reads[0].finished():
                self._reads.popleft()
            ticket = begin(None)
            self._reads.append(ticket.done)
        return ticket

    def wait(self) -> None:
        """Until nobody reads there, whether he could or not."""
        for read in list(self._reads):
            with contextlib.suppress(CopyError):
                read.synchronize()

    def pinned(self, pages: Pages) -> None:
        """Some of it lies there."""
        if pages not in self.pins:
            self.pins.append(pages)
            begin, size = self.bytes.data_ptr(), self.bytes.numel()
            ends = {*self.seams, pages.first - begin, pages.end - begin}
            self.seams = sorted(end for end in ends if 0 < end < size)

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        return between(self.seams, first, end)


class WeightBytes:
    """A holder of one storage. `file` is what it is mapped from, if it is."""

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
        """Whether some of it is."""
        return bool(self.region.pins)

    def extents(self, first: int, end: int) -> tuple[Extent, ...]:
        assert self.file is not None
        return (Extent(self.file, first, first, end - first),)


def bytes_under(tensor: torch.Tensor) -> WeightBytes:
    """The holder of a tensor's storage, made when first asked for. Whoever asks keeps it."""
    found = holder_of(tensor)
    if isinstance(found, WeightBytes):
        return found
    with torch.inference_mode(False), torch.no_grad():
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return WeightBytes(WeightRegion(whole))


# --------------------------------------------------------------------------------------------------------- mapped


class MappedFile:
    """A file that is open, and mapped read-only. Raises `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number).atexit = False
        self.memory = mmap.mmap(self.number, 0, access=mmap.ACCESS_READ)

    def give_back(self, offset: int, size: int) -> None:
        """It is nobody's to change."""


def map_file(path: Path) -> WeightBytes:
    """A whole file as weights. Writing there would end the process: who writes a weight takes a copy first."""
    file = MappedFile(path)
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        whole = torch.frombuffer(file.memory, dtype=torch.uint8)
    return WeightBytes(WeightRegion(whole, file), file)


# --------------------------------------------------------------------------------------------------------- pinned


class Pages:
    """Pinned pages `[first, end)`, by address: one call's. They are given back with the last region that has bytes
    there. `kept` are those bytes: memory must not be freed while it is pinned."""

    def __init__(self, first: int, end: int, undo: Callable[[], None], kept: Sequence[torch.Tensor]) -> None:
        self.first, self.end = first, end
        weakref.finalize(self, _unpin, first, undo, kept)
        _PINNED[first] = end, weakref.ref(self)


#: All that is pinned for weights: first address -> (end, the pages). A driver pins no page twice, so models that share
#: a storage, or only a page, share what is pinned. Dead pages are here until they have been unpinned.
_PINNED: dict[int, tuple[int, weakref.ref[Pages]]] = {}
_PINNING = threading.Lock()


def _unpin(first: int, undo: Callable[[], None], kept: Sequence[torch.Tensor]) -> None:
    """By whichever thread drops the last weight there; so without a lock."""
    try:
        undo()
    finally:
        _PINNED.pop(first, None)


def _forked() -> None:
    """A fork has nothing pinned."""
    global _PINNING
    _PINNING = threading.Lock()
    _PINNED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True)
class _Run:
    """Neighbouring pages `[first, end)`, by address, and the holders whose bytes lie there."""

    first: int
    end: int
    holders: tuple[WeightBytes, ...]

    def touched(self, first: int, end: int) -> list[WeightBytes]:
        """Whose bytes lie in `[first, end)`."""
        begins = ((holder, holder.region.bytes.data_ptr()) for holder in self.holders)
        return [holder for holder, begin in begins if begin < end and first < begin + holder.size]


def pin_in_place(tensors: Sequence[torch.Tensor], pin: Pin) -> None:
    """Pin the pages under tensors that are no file's, and are not pinned yet, at most `PIECE` bytes in a call.

    It stays pinned as long as one of them is there, or a weight made of it. Raises `HostMemoryError`; what was pinned
    until then stays so, and is copied as such. Small tensors share pages, and no page may be pinned twice: neighbours
    are pinned together.
    """
    with _PINNING:
        for run in _runs(tensors):
            before = _pinned_within(run.first, run.end)
            for pages in before:
                _give(run, pages)
            for first, end in _rest(run, before):
                kept = tuple(holder.region.bytes for holder in run.touched(first, end))
                _give(run, Pages(first, end, pin(first, end - first), kept))


def _give(run: _Run, pages: Pages) -> None:
    """Pages to those whose bytes lie there."""
    for holder in run.touched(pages.first, pages.end):
        holder.region.pinned(pages)


def _pinned_within(first: int, end: int) -> list[Pages]:
    """Pages that have addresses of `[first, end)`, by address. Those that another thread is unpinning it waits for."""
    found = []
    for begin, (until, alive) in sorted(_PINNED.items()):
        if begin < end and first < until:
            pages = alive()
            if pages is not None:
                found.append(pages)
            while pages is None and begin in _PINNED:
                time.sleep(0.001)
    return found


def _rest(run: _Run, before: Sequence[Pages]) -> Iterator[tuple[int, int]]:
    """What of a run is not pinned, in pieces."""
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
            tensor._lease = holder  # type: ignore[attr-defined]  # until a weight is made of it, which keeps it too
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
