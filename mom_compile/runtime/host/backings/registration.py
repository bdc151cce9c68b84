"""Host pages are registered with a driver piece by piece, and ahead of need on a thread of their own.

Terms
-----
register   Make pages ones that a device copies from and to beside its computation. A GiB takes 0.1 to 0.3 seconds.
piece      What one call registers. A driver lets no other call in meanwhile, from no thread.
ahead      Before anybody needs it, by the thread.
need       Who needs a range does himself what is left of it, once the piece that is being registered is there.

    launches:   .......... .......... need --->
    thread:     piece      piece      piece          pauses as long as each took
    need:                                  rest      without pauses

A range that is dropped while a piece of it is being registered is undone by whoever does that: nobody waits for it, so
a finaliser may drop it on any thread, this one too.
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

#: Pins `(address, size)` and returns what undoes it. Raises `HostMemoryError`.
Pin = Callable[[int, int], Callable[[], None]]

#: 6 to 20 milliseconds, in which nothing can be launched: less than what is queued on a device takes. Each is a seam,
#: and a copy of so much takes far longer than launching the next. (From 512 GiB on, drivers refuse to do it at once.)
PIECE = 64 << 20


class Registration:
    """Bytes `[address, address + size)`, on their way to be registered. `keeps` is what must not be freed before."""

    def __init__(self, pin: Pin, address: int, size: int, keeps: object) -> None:
        self.error: BaseException | None = None
        self._pin = pin
        self._keeps = keeps
        self._left = collections.deque((address + first, min(PIECE, size - first)) for first in range(0, size, PIECE))
        self._undo: list[Callable[[], None]] = []
        self._dropped = False
        #: Held while a piece is being registered or undone.
        self._at_work = threading.Lock()

    def need(self) -> None:
        """It is registered when this returns. Raises `HostMemoryError`, and whatever else the driver's call does."""
        while self._piece():
            pass
        if self.error is not None:
            # A new error each time: the frames of whoever waits must not live as long as the range.
            raise HostMemoryError(str(self.error)) from self.error

    def ahead(self) -> None:
        """As `need`, for nobody yet: what goes wrong is told to whoever needs it."""
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
        """Register one more; whether there was one."""
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
        """It will not be tried any more."""
        self.error = self.error or error

    def drop(self) -> None:
        """Nobody will use it. May be called anywhere, by the garbage collector too, and more than once."""
        self._dropped = True
        if not self._at_work.acquire(blocking=False):
            return  # whoever is at work sees it afterwards
        try:
            while self._undo:
                self._undo.pop()()
        finally:
            self._at_work.release()


class Registrar:
    """A thread that registers ranges ahead, in the order they are given. It is there while there are some."""

    def __init__(self) -> None:
        self._waiting: collections.deque[Registration] = collections.deque()
        self._now: Registration | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def left(self) -> int:
        """Bytes that will be taken, and are not yet."""
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
            one.ahead()
            if one.error is not None:
                self._give_up(one.error)

    def _give_up(self, error: BaseException) -> None:
        """What waits would be refused too, and takes what somebody may need: it is tried again when it is needed."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for one in waiting:
            one.fail(error)

    def finish(self) -> None:
        """Until all that was given has been tried."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Nothing is being registered any more: the end of a process, when a driver goes too."""
        self._give_up(HostMemoryError("the process ends"))
        if self._now is not None:
            self._now.drop()
        self.finish()


#: Of this process.
REGISTRAR = Registrar()
atexit.register(REGISTRAR.close)
if hasattr(os, "register_at_fork"):  # a fork has no thread, and what waits is its parent's
    os.register_at_fork(after_in_child=REGISTRAR.__init__)  # type: ignore[misc]
