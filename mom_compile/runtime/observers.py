"""Callbacks for events of running programs; usually there are none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec

P = ParamSpec("P")


class Observers(Generic[P]):
    """Observers of one kind of event. They must not keep their arguments, which would hold the program's memory."""

    def __init__(self) -> None:
        self.now: list[Callable[P, None]] = []
        self._joining = threading.Lock()

    @contextlib.contextmanager
    def joined_by(self, observer: Callable[P, None]) -> Iterator[None]:
        # A new list each time: another thread may be iterating over the old one.
        with self._joining:
            self.now = [*self.now, observer]
        try:
            yield
        finally:
            with self._joining:
                at = self.now.index(observer)
                self.now = [*self.now[:at], *self.now[at + 1 :]]
