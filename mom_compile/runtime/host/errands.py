"""What a thread does beside everybody else, one errand after another.

    errand = errands.put(work)        returns at once
    errand.wait()                     `work()` has run, or has failed: `error`
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Errand:
    """`error` is what it failed with. What it worked on is let go before anybody knows that it has run."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._work: Callable[[], None] | None = work
        self._ran = threading.Event()

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
        self._ran.wait()


class Errands:
    """In the order they are given, by a thread that begins with the first and stays."""

    def __init__(self, name: str) -> None:
        self.name = name
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
