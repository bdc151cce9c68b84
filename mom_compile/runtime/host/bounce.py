"""Copies between a device and a file: through pinned buffers, which a thread empties into the file and fills from it.

Terms
-----
buffer   One of two for a direction, pinned. A driver copies there beside everybody; to a mapped file it would not.
piece    As many bytes of a copy as a buffer has, or fewer.

    to the host    device:   piece 0 -> A, piece 1 -> B,                       piece 2 -> A, ...
                   thread:                   wait for A, A -> file,  wait for B, B -> file, ...
    to the device  thread:   file -> A,   file -> B,   wait until A is sent, file -> A, ...
                   device:            A -> piece 0,   B -> piece 1, ...

The thread reads and writes the file by calls, not where it is mapped: there, a disk that is full or broken would end
the process. Who waits for a copy waits for the thread: then rows that left are in the file, and those that arrive have
been read, and are the device's when an event says so.
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

#: 0.2 milliseconds of a link and 1 or 2 of a disk's cache: a call, an event and a thread that wakes up (0.03) are
#: little beside it, and a copy's first rows are soon on their way. Four are pinned for as long as there is an engine.
STAGE = 8 << 20


@dataclass(frozen=True)
class FileRows:
    """Bytes of rows, or of a weight, and where they are in a file, in order."""

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
    """The same pinned bytes as a tensor and for calls. `used` is the device's last copy to or from there."""

    bytes: torch.Tensor
    view: memoryview
    used: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))


#: Rows in a file and as many bytes on a device.
Piece = tuple[FileRows, torch.Tensor]


@dataclass(frozen=True)
class FileDone:
    """The file's rows are read, or written. `event` is recorded by the task, behind the device's last copy.

    `failed` is how an error begins that says they could not be.
    """

    task: Task
    event: torch.cuda.Event
    failed: str

    def check(self) -> None:
        if self.task.error is not None:
            # A new error each time: the frames of whoever waits must not live as long as the copy.
            told = isinstance(self.task.error, CopyError)  # by the copy before
            raise CopyError(str(self.task.error) if told else f"{self.failed}: {self.task.error}") from self.task.error

    def synchronize(self) -> None:
        self.task.wait()
        self.check()

    def finished(self) -> bool:
        """Nobody touches what was copied any more."""
        return self.task.ran and self.event.query()

    def finish(self) -> None:
        self.task.wait()
        self.event.synchronize()


class Way:
    """One direction, with the stream of a device that copies there."""

    def __init__(self, queue: torch.cuda.Stream, pin: Pin, tasks: TaskQueue) -> None:
        self.queue = queue
        self._pin = pin
        self._tasks = tasks
        self._buffers: tuple[Buffer, ...] = ()

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, ready: torch.cuda.Event, after: Done | None, to_host: bool
    ) -> FileDone:
        """Begin to copy rows of a file, or to them. `ready` is when the device's may be touched."""
        pieces = in_pieces(target, source) if to_host else in_pieces(source, target)
        done = torch.cuda.Event()
        move = self._leave if to_host else self._arrive
        # It keeps both tensors, and with rows on the host their lease, until it has run.
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
        """What the thread does. Raises `OSError`, `CopyError` where the one before has failed, `HostMemoryError`."""
        if after is not None:
            after.synchronize()
        self.queue.wait_event(ready)
        try:
            move(pieces)
        finally:
            done.record(self.queue)

    def _leave(self, pieces: Sequence[Piece]) -> None:
        buffers, full = self._two(), collections.deque[tuple[FileRows, Buffer]]()
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

    def _arrive(self, pieces: Sequence[Piece]) -> None:
        buffers = self._two()
        for number, (rows, target) in enumerate(pieces):
            buffer = buffers[number % 2]
            buffer.used.synchronize()
            rows.read(buffer)
            with torch.cuda.stream(self.queue):
                target.copy_(buffer.bytes[: target.numel()], non_blocking=True)
            buffer.used.record(self.queue)

    def _two(self) -> tuple[Buffer, ...]:
        """They are had with the first copy. Raises `HostMemoryError`."""
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
    """Whether a tensor shows rows that are kept in a file."""
    holder = holder_of(host)
    return holder is not None and holder.in_file


def in_pieces(host: torch.Tensor, other: torch.Tensor) -> list[Piece]:
    """Rows in a file and as many elsewhere, in the same layout, each piece no larger than a buffer."""
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
