"""Shared set-up: `gpu` tests are skipped where there is no CUDA device; every test starts with nothing compiled."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx

import mom_compile.backend as backend_module
from mom_compile.lowering.pieces import Piece, SizeTemplate, Variant, run_eagerly
from mom_compile.torch_compat import mark_boxed
from mom_passes.graph.edit import copy_graph

# With a handler on this logger torch records every symbolic decision with its stack, a tenth of the time of a trace.
# Its own handler goes by itself; pytest puts its own on all loggers that do not propagate.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What imports have made is there for good: no test's `gc.collect()` need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager_pieces(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Run pieces eagerly: everything but Inductor's code generation, in a fraction of the time.

    What compiled code would rely on is checked: every input is as its template says.
    """

    def compile_nothing(piece: Piece, hints: object = None) -> None:
        def run(inputs: list[Any]) -> Any:
            check_templates(piece, inputs)
            return piece.run_eagerly(inputs)

        piece.variants.append(Variant(run, None))

    monkeypatch.setattr(Piece, "compile", compile_nothing)


def check_templates(piece: Piece, inputs: Sequence[Any]) -> None:
    """Sizes, strides, dtypes and devices of a piece's inputs are those that it was made for."""
    known = dict(zip(piece.symbols, inputs, strict=False))
    assert len(inputs) == len(piece.templates)
    for value, template in zip(inputs, piece.templates, strict=True):
        if isinstance(template, SizeTemplate):
            assert value == template.value.xreplace(known)
            continue
        shape, stride = ([int(size.xreplace(known)) for size in sizes] for sizes in (template.shape, template.stride))
        assert (list(value.shape), value.dtype, value.device) == (shape, template.dtype, template.device)
        # The stride of a dimension of size one says nothing.
        assert all(a == b for a, b, size in zip(value.stride(), stride, shape, strict=True) if size > 1) or 0 in shape


@pytest.fixture
def stock_is_eager(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Run eagerly what goes to stock Inductor."""

    def stock(gm: fx.GraphModule, example_inputs: object, **_: object) -> Callable[[list[Any]], Any]:
        captured = copy_graph(gm)
        return mark_boxed(lambda inputs: run_eagerly(captured, inputs))

    patched = functools.partial(backend_module.compile_graph, stock=stock)
    monkeypatch.setattr(backend_module, "compile_graph", patched)
