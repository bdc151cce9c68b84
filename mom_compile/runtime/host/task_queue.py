"""What a thread does beside everybody else, one task after another.

    task = tasks.put(work)        returns at once
    task.wait()                     `work()` has run, or has failed: `error`

A fork has a thread of its own, begun with its first task. What its parent had given and not done by then is `Lost`.
So is what has not begun when a process ends: nobody reads it any more.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable

#: For what a thread does when a process ends. It is left to itself after that, as a daemon is.
SECONDS_AT_EXIT = 10.0


class Lost(RuntimeError):
    """A task that nobody runs: a parent's, which it had not run at a fork, or one of a process that ends."""


class Task:
    """`error` is what it failed with. What it worked on is let go before anybody knows that it has run."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._work: Callable[[], None] | None = work
        self._ran = threading.Event()
        self._process = os.getpid()

    @property
    def ran(self) -> bool:
        return self._ran.is_set()

    def run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:
            self.error = error.with_traceback(None)  # its frames hold tensors
        finally:
            self._work = None
            self._ran.set()

    def lose(self) -> None:
        """It is not run, because the process ends. Whoever waits for it goes on."""
        self.error = Lost("it had not begun when the process ended")
        self._work = None
        self._ran.set()

    def wait(self) -> None:
        """Until it has run. Raises nothing of its own: `error`."""
        if self._process == os.getpid():
            self._ran.wait()
        elif not self._ran.is_set() and self._work is not None:
            self.error = Lost("it was under way when this process was forked, and no thread of a fork goes on with it")


class TaskQueue:
    """In the order they are given, by a thread that begins with the first and stays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.begin_anew()
        _ALL.add(self)

    def begin_anew(self) -> None:
        """With nothing to do, and no thread."""
        self._waiting: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], None]) -> Task:
        task = Task(work)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(self._waiting,), name=self.name, daemon=True)
                self._thread.start()
            self._waiting.put(task)
        return task

    def lose(self) -> threading.Thread | None:
        """What has not begun is `Lost`. The thread, which ends with what it does now."""
        with self._lock:
            thread, waiting = self._thread, self._waiting
            self._thread, self._waiting = None, queue.SimpleQueue()
        with contextlib.suppress(queue.Empty):
            while (task := waiting.get_nowait()) is not None:
                task.lose()
        waiting.put(None)
        return thread

    @staticmethod
    def _run(waiting: queue.SimpleQueue[Task | None]) -> None:
        while (task := waiting.get()) is not None:
            task.run()
            del task  # what it worked on must not live until the next


_ALL: weakref.WeakSet[TaskQueue] = weakref.WeakSet()


def _forked() -> None:
    """A fork has no threads, and must not do what its parent was asked for."""
    for tasks in list(_ALL):
        tasks.begin_anew()


def _ending() -> None:
    """A thread that the interpreter ends while it is inside of PyTorch takes the process down: they end before."""
    threads = [tasks.lose() for tasks in list(_ALL)]
    until = time.monotonic() + SECONDS_AT_EXIT
    for thread in threads:
        if thread is not None:
            thread.join(max(0.0, until - time.monotonic()))


atexit.register(_ending)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
