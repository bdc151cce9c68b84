"""Threads that begin at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: A thread that is not done by then waits for something that will not happen.
SECONDS = 60.0


def together(count: int, work: Callable[[int], T], seconds: float = SECONDS) -> list[T]:
    """What `work(number)` returns in each of so many threads; raises what it raises in any."""
    start = threading.Barrier(count)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait()
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), f"still waiting after {seconds} s"
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]
