"""Those who want to see what happens while programs run: nobody, most of the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec

P = ParamSpec("P")


class Observers(Generic[P]):
    """Of one kind of event. What they are shown must not be kept: it would hold the program's memory."""

    def __init__(self) -> None:
        self.now: list[Callable[P, None]] = []

    @contextlib.contextmanager
    def joined_by(self, observer: Callable[P, None]) -> Iterator[None]:
        self.now.append(observer)
        try:
            yield
        finally:
            self.now.remove(observer)
