"""Copies between a device and a file through pinned buffers, which a thread writes to the file and fills from it.

Terms
-----
buffer   One of two per direction, pinned. A driver copies to pinned memory asynchronously, but not to a mapped file.
piece    A part of a copy, at most as large as a buffer.

    to the host    device:   piece 0 -> A, piece 1 -> B,                       piece 2 -> A, ...
                   thread:                   wait for A, A -> file,  wait for B, B -> file, ...
    to the device  thread:   file -> A,   file -> B,   wait until A is sent, file -> A, ...
                   device:            A -> piece 0,   B -> piece 1, ...

The thread reads and writes the file by system calls, not through its mapping: through a mapping, a full or broken disk
would crash the process. Waiting for a copy means waiting for the thread. Rows copied to the host are then in the file;
rows copied to the device have been read, and are on the device once the event is complete.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mom_compile.runtime.host.backings.pinned import Pinned
from mom_compile.runtime.host.backings.registration import Pin
from mom_compile.runtime.host.done import CopyError, Done
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.holders import error_prefix, holder_of
from mom_compile.runtime.host.seams import as_bytes
from mom_compile.runtime.host.task_queue import Task, TaskQueue

#: A link transfers this in 0.2 ms, a disk cache in 1 to 2 ms: a call, an event and a thread wake-up (0.03 ms) are small
#: in comparison, and the first piece is soon under way. Four buffers stay pinned as long as the engine exists.
STAGE = 8 << 20


@dataclass(frozen=True)
class FileRows:
    """Bytes of rows or of a weight, and their positions in a file, in order."""

    bytes: torch.Tensor
    extents: tuple[Extent, ...]

    def write(self, buffer: Buffer) -> None:
        """Raises `OSError`."""
        self._move(buffer, Extent.write)

    def read(self, buffer: Buffer) -> None:
        """Raises `OSError`."""
        self._move(buffer, Extent.read)

    def _move(self, buffer: Buffer, move: Callable[[Extent, memoryview], None]) -> None:
        at = 0
        for extent in self.extents:
            move(extent, buffer.view[at : at + extent.size])
            at += extent.size


@dataclass
class Buffer:
    """One pinned buffer, as a tensor and for system calls. `used` is the device's last copy to or from it."""

    bytes: torch.Tensor
    view: memoryview
    used: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))


#: Rows in a file and as many bytes on a device.
Piece = tuple[FileRows, torch.Tensor]


@dataclass(frozen=True)
class FileDone:
    """The completion of a copy from or to a file. The task records `event` after the device's last copy.

    `failed` is the beginning of an error message.
    """

    task: Task
    event: torch.cuda.Event
    failed: str

    def check(self) -> None:
        if self.task.error is not None:
            # A new error each time, so that the frames of a waiting caller do not live as long as the copy.
            earlier = isinstance(self.task.error, CopyError)  # the copy before this one failed
            message = str(self.task.error) if earlier else f"{self.failed}: {self.task.error}"
            raise CopyError(message) from self.task.error

    def synchronize(self) -> None:
        self.task.wait()
        self.check()

    def finished(self) -> bool:
        """Whether the copy no longer accesses its tensors."""
        return self.task.ran and self.event.query()

    def finish(self) -> None:
        self.task.wait()
        self.event.synchronize()


class FileQueue:
    """Copies in one direction, by a thread and a stream of the device."""

    def __init__(self, queue: torch.cuda.Stream, pin: Pin, tasks: TaskQueue) -> None:
        self.queue = queue
        self._pin = pin
        self._tasks = tasks
        self._buffers: tuple[Buffer, ...] = ()

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, ready: torch.cuda.Event, after: Done | None, to_host: bool
    ) -> FileDone:
        """Start to copy rows from or to a file. The device's rows may be accessed after `ready`."""
        pieces = in_pieces(target, source) if to_host else in_pieces(source, target)
        done = torch.cuda.Event()
        move = self._copy_to_file if to_host else self._copy_from_file
        # The task keeps both tensors, and the lease of host rows, alive until it has run.
        work = functools.partial(self._copy, (target, source), move, pieces, ready, after, done)
        return FileDone(self._tasks.put(work), done, error_prefix(target, source))

    def _copy(
        self,
        kept: tuple[torch.Tensor, ...],
        move: Callable[[Sequence[Piece]], None],
        pieces: Sequence[Piece],
        ready: torch.cuda.Event,
        after: Done | None,
        done: torch.cuda.Event,
    ) -> None:
        """Run in the thread. Raises `OSError`, `HostMemoryError`, or `CopyError` if the copy before failed."""
        if after is not None:
            after.synchronize()
        self.queue.wait_event(ready)
        try:
            move(pieces)
        finally:
            done.record(self.queue)

    def _copy_to_file(self, pieces: Sequence[Piece]) -> None:
        buffers, full = self._both_buffers(), collections.deque[tuple[FileRows, Buffer]]()
        for number, (rows, source) in enumerate(pieces):
            buffer = buffers[number % 2]
            if len(full) == 2:
                self._write(*full.popleft())
            with torch.cuda.stream(self.queue):
                buffer.bytes[: source.numel()].copy_(source, non_blocking=True)
            buffer.used.record(self.queue)
            full.append((rows, buffer))
        for rows, buffer in full:
            self._write(rows, buffer)

    @staticmethod
    def _write(rows: FileRows, buffer: Buffer) -> None:
        buffer.used.synchronize()
        rows.write(buffer)

    def _copy_from_file(self, pieces: Sequence[Piece]) -> None:
        buffers = self._both_buffers()
        for number, (rows, target) in enumerate(pieces):
            buffer = buffers[number % 2]
            buffer.used.synchronize()
            rows.read(buffer)
            with torch.cuda.stream(self.queue):
                target.copy_(buffer.bytes[: target.numel()], non_blocking=True)
            buffer.used.record(self.queue)

    def _both_buffers(self) -> tuple[Buffer, ...]:
        """Return the buffers, allocated for the first copy. Raises `HostMemoryError`."""
        if not self._buffers:
            backing = Pinned(self._pin)
            addresses = backing.reserve(2 * STAGE, 2 * STAGE)
            backing.commit(0, 2 * STAGE)
            view = backing.view()
            self._buffers = tuple(
                Buffer(addresses[first : first + STAGE], view[first : first + STAGE]) for first in (0, STAGE)
            )
            self._backing = backing
        return self._buffers


def in_file(host: torch.Tensor) -> bool:
    """Whether a tensor shows rows that are stored in a file."""
    holder = holder_of(host)
    return holder is not None and holder.in_file


def in_pieces(host: torch.Tensor, other: torch.Tensor) -> list[Piece]:
    """Split a copy of rows in a file to or from `other`, in the same layout, into pieces not larger than a buffer."""
    return list(_pieces(host, other))


def _pieces(host: torch.Tensor, other: torch.Tensor) -> Iterator[Piece]:
    holder = holder_of(host)
    assert holder is not None
    begin = host.data_ptr() - holder.region.bytes.data_ptr()
    one, two = as_bytes(host), as_bytes(other)
    for first in range(0, one.numel(), STAGE):
        rows = one[first : first + STAGE]
        extents = holder.extents(begin + first, begin + first + rows.numel())
        yield FileRows(rows, extents), two[first : first + STAGE]
