"""Copies between device and host that run beside the computation: one small interface, and an engine of threads.

Terms
-----
ticket        One copy under way. It keeps both tensors alive until nobody can touch them any more.
wait          What the computation calls before it uses a copy's result, or frees or rewrites its source.
synchronize   What the host calls before it reads or writes rows itself.

Copies of one engine are done in the order they were asked for. So whoever waits for one has waited for those before.
"""

from __future__ import annotations

import collections
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


class Ticket(Protocol):
    def wait(self) -> None:
        """The computation goes on only when the copy is done. Raises `CopyError` if it failed."""

    def synchronize(self) -> None:
        """Return when the copy is done. Raises `CopyError` if it failed."""

    def release(self) -> None:
        """Like `wait`, for one who only wants the source's memory: whoever reads the result learns of an error."""


@dataclass
class Traffic:
    """Bytes copied so far, by direction. `on_host` is what had to be moved within host memory."""

    to_host: int = 0
    to_device: int = 0
    on_host: int = 0


class CopyEngine:
    """Copies in order, beside the computation. `begin` is what an engine for a kind of device provides.

    `after` is the last copy that touched the same rows on the host, if any: a ticket fails if one before it failed.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._leaving: collections.deque[Ticket] = collections.deque()

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Ticket | None) -> Ticket:
        raise NotImplementedError

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Ticket | None) -> Ticket:
        """Copy rows to a device buffer. They must not be read before `wait`."""
        self.traffic.to_device += source.numel() * source.element_size()
        return self.begin(target, source, after)

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Ticket | None) -> Ticket:
        """Copy rows to the host. The source may be dropped at once; it lives until it has left."""
        while len(self._leaving) >= MOST_LEAVING:
            self._leaving.popleft().release()
        self.traffic.to_host += source.numel() * source.element_size()
        ticket = self.begin(target, source, after)
        self._leaving.append(ticket)
        return ticket

    def settle(self) -> None:
        """The end of a program: nothing is leaving any more, so the device has its sources' memory back."""
        while self._leaving:
            self._leaving.popleft().release()


class ThreadTicket:
    """A copy that a thread makes."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor, after: Ticket | None) -> None:
        self._copy: tuple[torch.Tensor, torch.Tensor, Ticket | None] | None = (target, source, after)
        self._done = threading.Event()
        self._error: BaseException | None = None

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
            self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            # A new error each time: the frames of whoever waits must not live as long as the ticket.
            raise CopyError(f"keys or values could not be copied: {self._error!r}") from self._error

    def synchronize(self) -> None:
        self.wait()

    def release(self) -> None:
        self._done.wait()


class ThreadedEngine(CopyEngine):
    """For the CPU: one thread copies while the others compute. `delay()` gives seconds to sleep before each copy."""

    def __init__(self) -> None:
        super().__init__()
        self.delay: Callable[[], float] | None = None
        self._queue: queue.SimpleQueue[ThreadTicket] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Ticket | None) -> ThreadTicket:
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






