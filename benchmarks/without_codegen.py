"""mom without Inductor's code generation: everything else happens as it does, in a fraction of the time.

    with pieces_run_eagerly():                  # loop bodies and what is between them run node by node
        ...
    with pieces_run_eagerly(), stock_runs_eagerly():    # and so does what goes to stock Inductor

What compiled code would rely on is checked: every input of a piece is as its template says.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx

import mom_compile.backend as backend_module
from mom_compile.lowering.eager import run_eagerly
from mom_compile.lowering.pieces import Piece, Variant
from mom_compile.lowering.templates import SizeTemplate
from mom_compile.torch_compat.inductor import mark_boxed
from mom_passes.graph.edit import copy_graph


@contextlib.contextmanager
def pieces_run_eagerly() -> Iterator[None]:
    """Pieces that are made within are not compiled. `torch._dynamo.reset()` before and after, since pieces are kept."""

    def compile_nothing(piece: Piece, hints: object = None) -> None:
        def run(inputs: list[Any]) -> Any:
            check_templates(piece, inputs)
            return piece.run_eagerly(inputs)

        piece.variants.append(Variant(run, None))

    with mock.patch.object(Piece, "compile", compile_nothing):
        yield


@contextlib.contextmanager
def stock_runs_eagerly(watch: Callable[[fx.GraphModule], None] = lambda gm: None) -> Iterator[None]:
    """What goes to stock Inductor runs as it was captured; `watch` sees it."""

    def stock(gm: fx.GraphModule, example_inputs: object, **_: object) -> Callable[[list[Any]], Any]:
        watch(gm)
        captured = copy_graph(gm)
        return mark_boxed(lambda inputs: run_eagerly(captured, inputs))

    patched = functools.partial(backend_module.compile_graph, stock=stock)
    with mock.patch.object(backend_module, "compile_graph", patched):
        yield


def check_templates(piece: Piece, inputs: Sequence[Any]) -> None:
    """Sizes, strides, dtypes and devices of a piece's inputs are those that it was made for."""
    known = dict(zip(piece.symbols, inputs, strict=False))
    assert len(inputs) == len(piece.templates)
    for value, template in zip(inputs, piece.templates, strict=True):
        if isinstance(template, SizeTemplate):
            assert value == template.value.xreplace(known)
            continue
        shape, stride = ([int(size.xreplace(known)) for size in sizes] for sizes in (template.shape, template.stride))
        assert isinstance(value, torch.Tensor)
        assert (list(value.shape), value.dtype, value.device) == (shape, template.dtype, template.device)
        # The stride of a dimension of size one says nothing.
        assert all(a == b for a, b, size in zip(value.stride(), stride, shape, strict=True) if size > 1) or 0 in shape
