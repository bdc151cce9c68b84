"""Run tasks in a background thread, one after another.

    task = tasks.put(work)        returns at once
    task.wait()                   `work()` has run or has failed: `error`

A fork starts its own thread with its first task. Its parent's unfinished tasks are `Lost` in the fork. At exit, tasks
that have not started are `Lost`, as no one uses their results.
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

#: The time that running tasks get at exit. Their threads are daemons, so the interpreter then ends without them.
SECONDS_AT_EXIT = 10.0


class Lost(RuntimeError):
    """A task that will not run: its parent process had not run it at a fork, or the process ended."""


class Task:
    """`error` is the exception of the task. Everything the task refers to is released before `wait` returns."""

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
            self.error = error.with_traceback(None)  # the frames hold tensors
        finally:
            self._work = None
            self._ran.set()

    def lose(self) -> None:
        """Give up the task at exit. Waiting callers continue."""
        self.error = Lost("it had not begun when the process ended")
        self._work = None
        self._ran.set()

    def wait(self) -> None:
        """Wait until it has run. Does not raise: see `error`."""
        if self._process == os.getpid():
            self._ran.wait()
        elif not self._ran.is_set() and self._work is not None:
            self.error = Lost("it was pending when this process was forked, and a fork does not continue it")


class TaskQueue:
    """Runs tasks in order, in a thread that starts with the first task."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()
        _ALL.add(self)

    def reset(self) -> None:
        """Drop all tasks and the thread."""
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
        """Mark tasks that have not started as `Lost`. Returns the thread, which ends after its current task."""
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
            del task  # release what it refers to before the next task


_ALL: weakref.WeakSet[TaskQueue] = weakref.WeakSet()


def _forked() -> None:
    """A fork has no threads, and must not run its parent's tasks."""
    for tasks in list(_ALL):
        tasks.reset()


def _ending() -> None:
    """End the threads before the interpreter does: ending a thread inside PyTorch crashes the process."""
    threads = [tasks.lose() for tasks in list(_ALL)]
    until = time.monotonic() + SECONDS_AT_EXIT
    for thread in threads:
        if thread is not None:
            thread.join(max(0.0, until - time.monotonic()))


atexit.register(_ending)
os.register_at_fork(after_in_child=_forked)
