"""Who holds bytes of host memory that a device copies from or to: found by the storage that a tensor shows.

A holder of keys and values is a store, one of weights holds what their storage is. Copies ask both the same few things.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from mom_compile.runtime.host.done import Done, Ticket
from mom_compile.runtime.host.file import Extent

#: Begins a copy behind another one of the same rows, if there is one.
Begin = Callable[[Done | None], Ticket]


class Region(Protocol):
    """The bytes of one storage."""

    bytes: torch.Tensor

    def copied(self, begin: Begin) -> Ticket:
        """Begin a copy that reads or writes there, in order with those before it. Several threads may."""

    def check(self) -> None:
        """Raises `RuntimeError` where this process has none of the bytes."""

    def wait(self) -> None:
        """Until the host may read and write there itself. Raises `CopyError`."""

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Bytes `[first, end)` as runs that each lie within one pinned range."""


class Holder(Protocol):
    #: What it holds, as errors say it: "weights".
    what: str

    @property
    def region(self) -> Region: ...

    @property
    def in_file(self) -> bool:
        """Whether the bytes are a file's: a driver would not copy them beside the computation."""

    @property
    def where(self) -> str:
        """The file, as errors say it. Of what is in one."""

    def extents(self, first: int, end: int) -> tuple[Extent, ...]:
        """Where bytes `[first, end)` of the region are in their file."""


#: By the address of their storage, as long as they live.
HOLDERS: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()


def hold(holder: Holder) -> None:
    """From now on `holder_of` finds it."""
    HOLDERS[holder.region.bytes.untyped_storage().data_ptr()] = holder


def holder_of(tensor: torch.Tensor) -> Holder | None:
    """Who holds the bytes that a tensor shows, or None for any other tensor."""
    if tensor.device.type != "cpu":
        return None
    return HOLDERS.get(tensor.untyped_storage().data_ptr())


def error_prefix(*tensors: torch.Tensor) -> str:
    """How an error begins that tells of a copy between these."""
    holder = next((held for held in map(holder_of, tensors) if held is not None), None)
    if holder is None:
        return "rows could not be copied between device and host"
    return f"{holder.what} could not be copied" + (f" to or from {holder.where}" if holder.in_file else "")


def between(seams: Iterable[int], first: int, end: int) -> Iterator[tuple[int, int]]:
    """Bytes `[first, end)` as runs that no seam lies within. `seams` ascend."""
    for seam in seams:
        if first < seam < end:
            yield first, seam
            first = seam
    yield first, end


class Readers:
    """Which holders running programs read, by the thread that runs them: nobody else may write there meanwhile."""

    def __init__(self) -> None:
        self._by_thread: dict[int, weakref.WeakSet[Holder]] = {}

    def begin(self, holder: Holder) -> None:
        """The program of this thread reads it, from now on to its end."""
        self._by_thread.setdefault(threading.get_ident(), weakref.WeakSet()).add(holder)

    def end(self) -> None:
        """The program of this thread has ended."""
        self._by_thread.pop(threading.get_ident(), None)

    def elsewhere(self, holder: Holder) -> bool:
        """Whether a program of another thread reads it."""
        own = threading.get_ident()
        return any(thread != own and holder in held for thread, held in list(self._by_thread.items()))


READERS = Readers()


def settle(tensor: torch.Tensor) -> None:
    """Until the host may read and write a tensor's bytes itself."""
    holder = holder_of(tensor)
    if holder is not None:
        holder.region.wait()
