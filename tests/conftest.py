"""Shared set-up: `gpu` tests are skipped where there is no CUDA device; every test starts with nothing compiled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx

import mom_compile.backend as backend_module
from mom_compile.lowering.pieces import Piece, Variant, run_eagerly
from mom_compile.torch_compat import mark_boxed
from mom_passes.graph.edit import copy_graph

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


@pytest.fixture
def stock_is_eager(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Run eagerly what goes to stock Inductor."""

    def stock(gm: fx.GraphModule, example_inputs: object, **_: object) -> Callable[[list[Any]], Any]:
        captured = copy_graph(gm)
        return mark_boxed(lambda inputs: run_eagerly(captured, inputs))

    patched = functools.partial(backend_module.compile_graph, stock=stock)
    monkeypatch.setattr(backend_module, "compile_graph", patched)
