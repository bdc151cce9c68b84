"""Copies between device and host that run beside the computation: one small interface, and an engine of threads.

Terms
-----
ticket        One copy under way. It keeps both tensors alive until nobody can touch them any more.
wait          What the computation calls before it uses a copy's result, or frees or rewrites its source.
done          The end of a copy, to which anyone may hold on: it keeps nothing alive.
synchronize   What the host calls before it reads or writes rows itself.

Copies of the same rows are done in the order they were asked for: each is given the one before it. So whoever waits
for the last has waited for all.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

#: Copies to the host that may be under way when another begins: keys and values of the layer before. Its stage has
#: run meanwhile; a link that was slower than that would otherwise let more and more layers wait on the device.
MOST_LEAVING = 2


class CopyError(RuntimeError):
    """A copy between device and host failed; what it should have written is not there."""


class Done(Protocol):
    def synchronize(self) -> None:
        """Return when the copy is done. Raises `CopyError` if it failed."""


class Ticket(Protocol):
    @property
    def done(self) -> Done: ...

    def wait(self) -> None:
        """The computation goes on only when the copy is done. Raises `CopyError` if it failed."""

    def release(self) -> None:
        """Like `wait`, for one who only wants the source's memory: whoever reads the result learns of an error."""


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

    def __init__(self, target: torch.Tensor, source: torch.Tensor, after: Done | None) -> None:
        self._copy: tuple[torch.Tensor, torch.Tensor, Done | None] | None = (target, source, after)
        self._ran = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> ThreadTicket:
        return self  # what has run keeps nothing

    def run(self, delay: Callable[[], float] | None) -> None:
        assert self._copy is not None
        try:
            if delay is not None:
                time.sleep(delay())
            target, source, after = self._copy
            if after is not None:
                after.synchronize()
            with torch.inference_mode():
                target.copy_(source)
        except BaseException as error:
            self._error = error
        finally:
            self._copy = None
            target = source = after = None  # type: ignore[assignment]
            self._ran.set()

    def wait(self) -> None:
        self._ran.wait()
        if self._error is not None:
            # A new error each time: the frames of whoever waits must not live as long as the ticket.
            raise CopyError(f"keys or values could not be copied: {self._error!r}") from self._error

    def synchronize(self) -> None:
        self.wait()

    def release(self) -> None:
        self._ran.wait()


class ThreadedEngine(CopyEngine):
    """For the CPU: one thread copies while the others compute. `delay()` gives seconds to sleep before each copy."""

    in_host_memory = True

    def __init__(self) -> None:
        super().__init__()
        self.delay: Callable[[], float] | None = None
        self._queue: queue.SimpleQueue[ThreadTicket] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Done | None, to_host: bool) -> ThreadTicket:
        ticket = ThreadTicket(target, source, after)
        with self._lock:
            if self._process != os.getpid():
                # A fork has no threads and must not copy what its parent queued.
                self._queue, self._thread, self._process = queue.SimpleQueue(), None, os.getpid()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._copy_all, args=(self._queue,), name="mom-copies", daemon=True
                )
                self._thread.start()
            self._queue.put(ticket)
        return ticket

    def _copy_all(self, waiting: queue.SimpleQueue[ThreadTicket]) -> None:
        while True:
            waiting.get().run(self.delay)
