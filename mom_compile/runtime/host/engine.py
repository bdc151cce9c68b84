"""Copies between device and host that run beside the computation: one small interface, and an engine of threads.

What a ticket is, and who waits for it, is in `done.py`. Each direction is a queue: what arrives does not wait for what
leaves. Copies of the same rows are done in the order they were asked for, where each is given the one before
it, whichever queue that is in: whoever waits for the last has waited for all. A copy waits for earlier ones alone, so
no two wait for each other.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mom_compile.runtime.host.done import CopyError, Done, Ticket
from mom_compile.runtime.host.holders import error_prefix
from mom_compile.runtime.host.mapped import copy_rows
from mom_compile.runtime.host.task_queue import Task, TaskQueue

#: Copies to the host that may be under way when another begins: keys and values of the layer before. Its stage has
#: run meanwhile; a link that was slower than that would otherwise let more and more layers wait on the device.
MOST_LEAVING = 2


@dataclass
class Traffic:
    """Bytes copied so far, by direction. `on_host` is what had to be moved within host memory."""

    to_host: int = 0
    to_device: int = 0
    on_host: int = 0


class CopyEngine:
    """Copies beside the computation. `begin` is what an engine for a kind of device provides.

    `after` is the last copy that touched the same rows on the host, if any: the new one waits for it, and fails if it
    failed. Several threads may ask.
    """

    #: Whether the device's memory is the host's.
    in_host_memory = False

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._leaving: collections.deque[Ticket] = collections.deque()

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Done | None, to_host: bool) -> Ticket:
        raise NotImplementedError

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that copies may leave from, and that nobody else is given before they are done. Of a device that
        has memory of its own."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Done | None) -> Ticket:
        """Copy rows to a device buffer. They must not be read before `wait`."""
        self.traffic.to_device += source.numel() * source.element_size()
        return self.begin(target, source, after, to_host=False)

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Done | None) -> Ticket:
        """Copy rows to the host. The source may be dropped at once; it lives until it has left."""
        self._let_leave(MOST_LEAVING - 1)
        self.traffic.to_host += source.numel() * source.element_size()
        ticket = self.begin(target, source, after, to_host=True)
        self._leaving.append(ticket)
        return ticket

    def settle(self) -> None:
        """The end of a program: nothing is leaving any more, so the device has its sources' memory back."""
        self._let_leave(0)

    def _let_leave(self, most: int) -> None:
        """Wait until no more than so many are leaving. Another thread may do the same."""
        while len(self._leaving) > most:
            with contextlib.suppress(IndexError):
                self._leaving.popleft().release()


class ThreadTicket:
    """A copy that a thread makes."""

    def __init__(self, task: Task) -> None:
        self._task = task  # what has run keeps nothing

    @property
    def done(self) -> ThreadTicket:
        return self

    def wait(self) -> None:
        self._task.wait()
        error = self._task.error
        if error is not None:
            # A new error each time: the frames of whoever waits must not live as long as the ticket.
            told = isinstance(error, CopyError)
            raise CopyError(str(error) if told else f"rows could not be copied: {error!r}") from error

    def synchronize(self) -> None:
        self.wait()

    def finished(self) -> bool:
        return self._task.ran

    def release(self) -> None:
        self._task.wait()


class ThreadedEngine(CopyEngine):
    """For the CPU: a thread for each direction copies while others compute. `delay()` gives seconds to sleep before
    each copy; both threads ask it."""

    in_host_memory = True

    def __init__(self) -> None:
        super().__init__()
        self.delay: Callable[[], float] | None = None
        self._to_host = TaskQueue("mom-copies-to-host")
        self._to_device = TaskQueue("mom-copies-to-device")

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Done | None, to_host: bool) -> ThreadTicket:
        way = self._to_host if to_host else self._to_device
        return ThreadTicket(way.put(functools.partial(self._copy, target, source, after)))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Done | None) -> None:
        """What a thread does. Raises `CopyError`."""
        if self.delay is not None:
            time.sleep(self.delay())
        if after is not None:
            after.synchronize()
        try:
            with torch.inference_mode():
                copy_rows(target, source)
        except Exception as error:
            # Its frames hold tensors.
            raise CopyError(f"{error_prefix(target, source)}: {error}") from error.with_traceback(None)
