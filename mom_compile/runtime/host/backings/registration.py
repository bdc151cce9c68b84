"""Register (pin) host pages with a driver in pieces, optionally in a background thread.

Terms
-----
register     Let a device copy from and to host pages asynchronously. A GiB takes 0.1 to 0.3 seconds.
piece        What one call registers. The driver blocks every other call of every thread meanwhile.
background   Registration by a thread before the range is needed.
complete     Registration of the remaining pieces by the thread that needs them, after the current piece.

    launches:   .......... .......... complete --->
    thread:     piece      piece      piece          pauses as long as each piece took
    complete:                              rest      without pauses

If a range is dropped while one of its pieces is being registered, the registering thread undoes it. No one waits for
that, so a finalizer may drop a range on any thread.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import os
import threading
import time
from collections.abc import Callable

from mom_compile.runtime.host.limits import HostMemoryError

#: Pins `(address, size)` and returns a function that unpins it. Raises `HostMemoryError`.
Pin = Callable[[int, int], Callable[[], None]]

#: A piece blocks launches for 6 to 20 milliseconds, less than the work queued on a device takes. Each piece is a seam;
#: copying one takes far longer than launching the next copy. (Drivers refuse to register 512 GiB or more at once.)
PIECE = 64 << 20


class Registration:
    """The registration of bytes `[address, address + size)`. `keeps` must not be freed before it is undone."""

    def __init__(self, pin: Pin, address: int, size: int, keeps: object) -> None:
        self.error: BaseException | None = None
        self._pin = pin
        self._keeps = keeps
        self._left = collections.deque((address + first, min(PIECE, size - first)) for first in range(0, size, PIECE))
        self._undo: list[Callable[[], None]] = []
        self._dropped = False
        #: Held while a piece is being registered or undone.
        self._at_work = threading.Lock()

    def complete(self) -> None:
        """Register the remaining pieces. Raises `HostMemoryError` and any other error of the driver's call."""
        while self._piece():
            pass
        if self.error is not None:
            # A new error each time, so that the frames of a waiting caller do not live as long as the range.
            raise HostMemoryError(str(self.error)) from self.error

    def register_in_background(self) -> None:
        """Register the pieces with pauses. `complete` reports errors."""
        with contextlib.suppress(Exception):
            while True:
                began = time.monotonic()
                if not self._piece():
                    return
                time.sleep(time.monotonic() - began)

    @property
    def left(self) -> int:
        """Bytes that are not registered yet."""
        return 0 if self._dropped or self.error is not None else sum(size for _, size in list(self._left))

    def _piece(self) -> bool:
        """Register the next piece. Returns whether there was one."""
        with self._at_work:
            more = bool(self._left) and self.error is None and not self._dropped
            if more:
                try:
                    self._undo.append(self._pin(*self._left.popleft()))
                except HostMemoryError as error:
                    self.error = error
                except BaseException as error:
                    self.error = error
                    raise
        if self._dropped:
            self.drop()
        return more

    def fail(self, error: BaseException) -> None:
        """Do not try any further."""
        self.error = self.error or error

    def drop(self) -> None:
        """Undo the registration. May be called by any thread, the garbage collector included, and repeatedly."""
        self._dropped = True
        if not self._at_work.acquire(blocking=False):
            return  # the thread that holds the lock drops it afterwards
        try:
            while self._undo:
                self._undo.pop()()
        finally:
            self._at_work.release()


class Registrar:
    """A thread that registers ranges in the background, in order. It runs while ranges are queued."""

    def __init__(self) -> None:
        self._waiting: collections.deque[Registration] = collections.deque()
        self._now: Registration | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def left(self) -> int:
        """Bytes that are queued and not registered yet."""
        with self._lock:
            return sum(one.left for one in (self._now, *self._waiting) if one is not None)

    def put(self, one: Registration) -> None:
        with self._lock:
            self._waiting.append(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mom-registration", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._now = one = self._waiting.popleft() if self._waiting else None
                if one is None:
                    self._thread = None
                    return
            one.register_in_background()
            if one.error is not None:
                self._give_up(one.error)

    def _give_up(self, error: BaseException) -> None:
        """Fail the queued ranges: they would be refused too, or take memory that is needed. Regions then retry them."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for one in waiting:
            one.fail(error)

    def finish(self) -> None:
        """Wait until all queued ranges have been tried."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Stop registering. Called at exit, before the driver is shut down."""
        self._give_up(HostMemoryError("the process ends"))
        with self._lock:
            now = self._now
        if now is not None:
            now.drop()
        self.finish()


#: The registrar of this process.
REGISTRAR = Registrar()
atexit.register(REGISTRAR.close)
# A fork has no thread, and the queued ranges belong to its parent
os.register_at_fork(after_in_child=REGISTRAR.__init__)  # type: ignore[misc]
