"""Property tests that do something: how many of the random programs were really rewritten, and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings


@contextmanager
def at_least(share: float, of: str) -> Iterator[list[bool]]:
    """A list to note of each example whether it was what the property is about; at the end, enough of them were."""
    outcomes: list[bool] = []
    yield outcomes
    found = sum(outcomes) / max(1, len(outcomes))
    assert found >= share, f"{sum(outcomes)} of {len(outcomes)} programs {of}, fewer than {share:.0%}"


def some_and_many(few: int, many: int) -> pytest.MarkDecorator:
    """A test is given `runs`: a few, and in the sweep many."""
    return pytest.mark.parametrize("runs", [few, pytest.param(many, marks=pytest.mark.slow)])


def random_examples(
    few: int, many: int, base: settings, *strategies: Any, **named: Any
) -> Callable[[Callable[..., None]], Any]:
    """Makes a property a test of a few random examples, and in the sweep of many."""

    def decorate(holds: Callable[..., None]) -> Any:
        @some_and_many(few, many)
        def test(runs: int) -> None:
            settings(base, max_examples=runs)(given(*strategies, **named)(holds))()

        test.__name__, test.__qualname__, test.__doc__ = holds.__name__, holds.__qualname__, holds.__doc__
        test.__module__ = holds.__module__
        return test

    return decorate
