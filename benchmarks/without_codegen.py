"""mom without Inductor's code generation: everything else runs, in a fraction of the time.

    with pieces_run_eagerly():                          # loop bodies and pieces between them run node by node
        ...
    with pieces_run_eagerly(), stock_runs_eagerly():    # and so do graphs that go to stock Inductor

Inputs of a piece are checked against its templates, which compiled code relies on.
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
from mom_passes.ops.rows import laid_out


@contextlib.contextmanager
def pieces_run_eagerly() -> Iterator[None]:
    """Compile no piece inside the context. Call `torch._dynamo.reset()` before and after: pieces are cached."""

    def compile_nothing(piece: Piece, hints: object = None) -> None:
        def run(inputs: list[Any]) -> Any:
            check_templates(piece, inputs)
            results = piece.run_eagerly(inputs)
            if not any(piece.orders):
                return results
            # As compiled code returns them (`lowering.results`).
            pairs = zip(results, piece.orders, strict=True)
            return tuple(result if order is None else laid_out(result, order) for result, order in pairs)

        piece.variants.append(Variant(run, None))

    with mock.patch.object(Piece, "compile", compile_nothing):
        yield


@contextlib.contextmanager
def stock_runs_eagerly(watch: Callable[[fx.GraphModule], None] = lambda gm: None) -> Iterator[None]:
    """Run graphs that go to stock Inductor as they were captured; `watch` sees each."""

    def stock(gm: fx.GraphModule, example_inputs: object, **_: object) -> Callable[[list[Any]], Any]:
        watch(gm)
        captured = copy_graph(gm)
        return mark_boxed(lambda inputs: run_eagerly(captured, inputs))

    patched = functools.partial(backend_module.compile_graph, stock=stock)
    with mock.patch.object(backend_module, "compile_graph", patched):
        yield


def check_templates(piece: Piece, inputs: Sequence[Any]) -> None:
    """Check sizes, strides, dtypes and devices of the inputs of a piece against its templates."""
    known = dict(zip(piece.symbols, inputs, strict=False))
    assert len(inputs) == len(piece.templates)
    for value, template in zip(inputs, piece.templates, strict=True):
        if isinstance(template, SizeTemplate):
            assert value == template.value.xreplace(known)
            continue
        shape, stride = ([int(size.xreplace(known)) for size in sizes] for sizes in (template.shape, template.stride))
        assert isinstance(value, torch.Tensor)
        assert (list(value.shape), value.dtype, value.device) == (shape, template.dtype, template.device)
        # The stride of a dimension of size one is arbitrary.
        assert all(a == b for a, b, size in zip(value.stride(), stride, shape, strict=True) if size > 1) or 0 in shape
