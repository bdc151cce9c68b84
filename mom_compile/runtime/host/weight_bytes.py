"""Bytes of weights on the host, where they lie: in the storage a checkpoint was read to, or in the file, mapped.

Terms
-----
pin       For a CUDA device's sake pages are pinned where they are: nobody has room for a second copy of a model.
mapped    The file's bytes seen as memory, read-only: pages are read when they are needed and dropped when memory is.

Unlike rows of a cache these never grow and are seldom written: a holder has one region, all of its storage.
"""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mom_compile.runtime.host.backings.registration import PIECE, Pin, Registration
from mom_compile.runtime.host.engine import Done
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.holders import hold, holder_of

PAGE = mmap.PAGESIZE


class WeightRegion:
    """All bytes of one storage."""

    def __init__(self, whole: torch.Tensor, keeps: object = None) -> None:
        self.bytes = whole
        self.pending: Done | None = None
        self.seams: list[int] = []
        self.pins: list[Pages] = []
        self._keeps = keeps

    def check(self) -> None:
        """A fork reads its own pages."""

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.synchronize()

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        for seam in self.seams:
            if first < seam < end:
                yield first, seam
                first = seam
        yield first, end


class WeightBytes:
    """A holder of one storage. `file` is what it is mapped from, if it is."""

    def __init__(self, region: WeightRegion, file: MappedFile | None = None) -> None:
        self.region = region
        self.file = file
        hold(self)

    @property
    def in_file(self) -> bool:
        return self.file is not None

    @property
    def size(self) -> int:
        return self.region.bytes.numel()

    @property
    def pinned(self) -> bool:
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
    """Pinned pages, given back with the last region that has bytes there."""

    def __init__(self, registration: Registration) -> None:
        weakref.finalize(self, registration.drop)


@dataclass(frozen=True)
class _Run:
    """Neighbouring pages `[first, end)`, by address, and the holders whose bytes lie there."""

    first: int
    end: int
    holders: tuple[WeightBytes, ...]


def pin_where_they_lie(tensors: Sequence[torch.Tensor], pin: Pin) -> None:
    """Pin the pages under tensors that are no file's. Raises `HostMemoryError`; what is pinned stays so.

    Small ones share pages, and no page may be pinned twice: neighbours are pinned together.
    """
    for run in _runs(tensors):
        kept = tuple(holder.region.bytes for holder in run.holders)
        registration = Registration(pin, run.first, run.end - run.first, kept)
        pages = Pages(registration)
        registration.need()
        for holder in run.holders:
            begin = holder.region.bytes.data_ptr()
            holder.region.pins.append(pages)
            inside = range(run.first + PIECE, run.end, PIECE)
            holder.region.seams += [seam - begin for seam in inside if begin < seam < begin + holder.size]
            holder.region.seams.sort()


def _runs(tensors: Sequence[torch.Tensor]) -> list[_Run]:
    pages = []
    for tensor in tensors:
        holder = bytes_under(tensor)
        if not holder.in_file:
            begin = tensor.data_ptr()
            pages.append((begin // PAGE * PAGE, -(-(begin + tensor.nbytes) // PAGE) * PAGE, holder))
    runs: list[_Run] = []
    for first, end, holder in sorted(pages, key=lambda page: page[0]):
        if runs and first < runs[-1].end:
            last = runs.pop()
            runs.append(_Run(last.first, max(last.end, end), tuple(dict.fromkeys((*last.holders, holder)))))
        else:
            runs.append(_Run(first, end, (holder,)))
    return runs
