"""Property tests that do something: how many of the random programs were really rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_least(share: float, of: str) -> Iterator[list[bool]]:
    """A list to note of each example whether it was what the property is about; at the end, enough of them were."""
    outcomes: list[bool] = []
    yield outcomes
    found = sum(outcomes) / max(1, len(outcomes))
    assert found >= share, f"{sum(outcomes)} of {len(outcomes)} programs {of}, fewer than {share:.0%}"
