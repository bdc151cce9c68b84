"""Owners of host memory that a device copies from or to, found by the storage of a tensor.

Keys and values are held by a store, weights by the holder of their storage. Copies use the same interface for both.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from mom_compile.runtime.host.done import Done, Ticket
from mom_compile.runtime.host.file import Extent

#: Starts a copy that waits for the given earlier copy of the same rows, if any.
Begin = Callable[[Done | None], Ticket]


class Region(Protocol):
    """The bytes of one storage."""

    bytes: torch.Tensor

    def copied(self, begin: Begin) -> Ticket:
        """Start a copy that reads or writes here, ordered after earlier ones. Thread-safe."""

    def check(self) -> None:
        """Raise `RuntimeError` if this process does not have the bytes."""

    def wait(self) -> None:
        """Wait until the host itself may read and write here. Raises `CopyError`."""

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Split bytes `[first, end)` into runs that each fall within one pinned range."""


class Holder(Protocol):
    #: The contents, for error messages: "weights".
    what: str

    @property
    def region(self) -> Region: ...

    @property
    def in_file(self) -> bool:
        """Whether the bytes are in a file, to and from which a driver cannot copy asynchronously."""

    @property
    def where(self) -> str:
        """The file, for error messages. Only valid if `in_file`."""

    def extents(self, first: int, end: int) -> tuple[Extent, ...]:
        """Return the positions of bytes `[first, end)` of the region in their file."""


#: Living holders by the address of their storage.
HOLDERS: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()


def hold(holder: Holder) -> None:
    """Register a holder for `holder_of`."""
    HOLDERS[holder.region.bytes.untyped_storage().data_ptr()] = holder


def holder_of(tensor: torch.Tensor) -> Holder | None:
    """Return the holder of a tensor's storage, or None for any other tensor."""
    if tensor.device.type != "cpu":
        return None
    return HOLDERS.get(tensor.untyped_storage().data_ptr())


def error_prefix(*tensors: torch.Tensor) -> str:
    """Return the beginning of an error message about a copy between these tensors."""
    holder = next((held for held in map(holder_of, tensors) if held is not None), None)
    if holder is None:
        return "rows could not be copied between device and host"
    return f"{holder.what} could not be copied" + (f" to or from {holder.where}" if holder.in_file else "")


def between(seams: Iterable[int], first: int, end: int) -> Iterator[tuple[int, int]]:
    """Split bytes `[first, end)` at the seams, which are given in ascending order."""
    for seam in seams:
        if first < seam < end:
            yield first, seam
            first = seam
    yield first, end


class Readers:
    """The holders that running programs read, by thread. Other threads must not write to them meanwhile."""

    def __init__(self) -> None:
        self._by_thread: dict[int, weakref.WeakSet[Holder]] = {}

    def begin(self, holder: Holder) -> None:
        """Note that the program of this thread reads `holder` until it ends."""
        self._by_thread.setdefault(threading.get_ident(), weakref.WeakSet()).add(holder)

    def end(self) -> None:
        """Note that the program of this thread has ended."""
        self._by_thread.pop(threading.get_ident(), None)

    def read_by_other_thread(self, holder: Holder) -> bool:
        own = threading.get_ident()
        return any(thread != own and holder in held for thread, held in list(self._by_thread.items()))


READERS = Readers()


def settle(tensor: torch.Tensor) -> None:
    """Wait until the host itself may read and write a tensor's bytes."""
    holder = holder_of(tensor)
    if holder is not None:
        holder.region.wait()
