"""What a thread does beside everybody else, one errand after another.

    errand = errands.put(work)        returns at once
    errand.wait()                     `work()` has run, or has failed: `error`

A fork has a thread of its own, begun with its first errand. What its parent had given and not done by then is `Lost`.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable


class Lost(RuntimeError):
    """An errand of a parent process, which it had not run when it was forked."""


class Errand:
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

    def wait(self) -> None:
        """Until it has run. Raises nothing of its own: `error`."""
        if self._process == os.getpid():
            self._ran.wait()
        elif not self._ran.is_set() and self._work is not None:
            self.error = Lost("it was under way when this process was forked, and no thread of a fork goes on with it")


class Errands:
    """In the order they are given, by a thread that begins with the first and stays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.begin_anew()
        _ALL.add(self)

    def begin_anew(self) -> None:
        """With nothing to do, and no thread."""
        self._waiting: queue.SimpleQueue[Errand] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], None]) -> Errand:
        errand = Errand(work)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(self._waiting,), name=self.name, daemon=True)
                self._thread.start()
            self._waiting.put(errand)
        return errand

    @staticmethod
    def _run(waiting: queue.SimpleQueue[Errand]) -> None:
        while True:
            waiting.get().run()


_ALL: weakref.WeakSet[Errands] = weakref.WeakSet()


def _forked() -> None:
    """A fork has no threads, and must not do what its parent was asked for."""
    for errands in list(_ALL):
        errands.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
