"""Shared set-up: `gpu` tests are skipped where there is no CUDA device; every test starts with nothing compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from mom_compile.pieces import Piece, Variant

# torch traces every symbolic decision to this logger; pytest would keep it all, at half the time of some tests.
logging.getLogger("torch.__trace").propagate = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager_pieces(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Run pieces eagerly: everything but Inductor's code generation, in a fraction of the time."""

    def compile_nothing(piece: Piece, hints: object = None) -> None:
        piece.variants.append(Variant(piece.run_eagerly, None))

    monkeypatch.setattr(Piece, "compile", compile_nothing)
