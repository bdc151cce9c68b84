"""Asynchronous copies between device and host: the interface of copy engines, and an engine of threads.

Tickets are defined in `done.py`. Each direction is a queue of its own, so copies to the device do not wait for copies
to the host. Each copy waits for the earlier copy of the same rows that it is given, in whichever queue that is: waiting
for the last one means waiting for all. There are no cycles, as a copy waits for earlier ones only.
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

#: Copies to the host that may run when another one starts: keys and values of the previous layer, whose stage has run
#: meanwhile. Without a limit, a slower link would keep the keys and values of more and more layers on the device.
MOST_LEAVING = 2


@dataclass
class Traffic:
    """Bytes copied so far, by direction. `on_host` counts copies within host memory."""

    to_host: int = 0
    to_device: int = 0
    on_host: int = 0


class CopyEngine:
    """Asynchronous copies for one device. Subclasses implement `begin`. Thread-safe.

    `after` is the last copy that touched the same rows on the host, if any: the new one waits for it, and fails if it
    failed.
    """

    #: Whether the device uses host memory.
    in_host_memory = False

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._leaving: collections.deque[Ticket] = collections.deque()

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Done | None, to_host: bool) -> Ticket:
        raise NotImplementedError

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate host memory to copy from asynchronously. Freed memory is not reused while a copy reads it.

        Only for a device with its own memory.
        """
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Done | None) -> Ticket:
        """Start a copy of rows to a device buffer. The buffer must not be read before `wait`."""
        self.traffic.to_device += source.numel() * source.element_size()
        return self.begin(target, source, after, to_host=False)

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Done | None) -> Ticket:
        """Start a copy of rows to the host. The ticket keeps the source alive until the copy is done."""
        self._let_leave(MOST_LEAVING - 1)
        self.traffic.to_host += source.numel() * source.element_size()
        ticket = self.begin(target, source, after, to_host=True)
        self._leaving.append(ticket)
        return ticket

    def settle(self) -> None:
        """At the end of a program: wait until all copies to the host are done, and their sources are freed."""
        self._let_leave(0)

    def _let_leave(self, most: int) -> None:
        """Wait until at most `most` copies to the host are running. Other threads may do the same."""
        while len(self._leaving) > most:
            with contextlib.suppress(IndexError):
                self._leaving.popleft().release()


class ThreadTicket:
    """A copy made by a thread."""

    def __init__(self, task: Task) -> None:
        self._task = task  # a finished task keeps nothing alive

    @property
    def done(self) -> ThreadTicket:
        return self

    def wait(self) -> None:
        self._task.wait()
        error = self._task.error
        if error is not None:
            # A new error each time, so that the frames of a waiting caller do not live as long as the ticket.
            message = str(error) if isinstance(error, CopyError) else f"rows could not be copied: {error!r}"
            raise CopyError(message) from error

    def synchronize(self) -> None:
        self.wait()

    def finished(self) -> bool:
        return self._task.ran

    def release(self) -> None:
        self._task.wait()


class ThreadedEngine(CopyEngine):
    """The engine of the CPU: one thread per direction. Before each copy it sleeps `delay()` seconds, if set."""

    in_host_memory = True

    def __init__(self) -> None:
        super().__init__()
        self.delay: Callable[[], float] | None = None
        self._to_host = TaskQueue("mom-copies-to-host")
        self._to_device = TaskQueue("mom-copies-to-device")

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Done | None, to_host: bool) -> ThreadTicket:
        tasks = self._to_host if to_host else self._to_device
        return ThreadTicket(tasks.put(functools.partial(self._copy, target, source, after)))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Done | None) -> None:
        """Run in a thread. Raises `CopyError`."""
        if self.delay is not None:
            time.sleep(self.delay())
        if after is not None:
            after.synchronize()
        try:
            with torch.inference_mode():
                copy_rows(target, source)
        except CopyError:
            raise
        except Exception as error:
            # The frames of the error hold tensors.
            raise CopyError(f"{error_prefix(target, source)}: {error}") from error.with_traceback(None)
