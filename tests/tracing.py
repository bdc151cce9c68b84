"""ATen graphs of plain functions, decomposed as Inductor would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import mom_compile
from mom_compile.pipeline import NotWorthwhile, Outcome, run_pipeline
from mom_compile.report import Report
from mom_passes.loops.loop import RowLimit
from mom_passes.program.rewritten import Rewritten
from mom_passes.verify import Contract, verify
from tests.programs import HIDDEN, Weighted


def trace(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
    """The functional ATen graph of a function of tensors; with `dynamic`, all sizes are symbols."""
    mode = "symbolic" if dynamic else "fake"
    with torch.no_grad():
        functional = torch.func.functionalize(function, remove="mutations")
        return make_fx(functional, decomposition_table=select_decomp_table(), tracing_mode=mode)(*inputs)


def rewrite(
    gm: fx.GraphModule, mini_seq_len: int, static_inputs: tuple[str, ...] = (), **options: Any
) -> tuple[fx.GraphModule, Report]:
    """The graph with loops, and what was done; every law holds of it, also those that are too slow for every run.

    Raises `NotWorthwhile` with the reason.
    """
    rewritten, report = reported(run_pipeline(gm, static_inputs=static_inputs, limit=RowLimit(mini_seq_len), **options))
    verify(rewritten.gm, Contract.of(gm), level=2)
    return rewritten.gm, report


def reported(made: Outcome) -> tuple[Rewritten, Report]:
    """The program and the report on it. Raises `NotWorthwhile` for a graph that may go to stock Inductor."""
    if made.program is None or made.by_layers:
        raise NotWorthwhile(str(made.no_loops))
    return made.program, Report.of(made.facts, made.program)


def check_every_length(program: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """A program of a tensor and weights, compiled once for a fixed length and once for all others, equals itself: also
    at lengths that mini-sequences do not divide. Everything is in loops, and Inductor compiles all of it."""
    torch._dynamo.reset()  # what was compiled before has reports of its own
    model = Weighted(program)
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 8})
    for tokens in (41, 64, 18, 100):
        x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            for expected, actual in zip(model(x), compiled(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    reports = mom_compile.reports()
    assert len(reports) == 2
    assert all(report.stages and not report.left_out and not report.eager_pieces for report in reports)
