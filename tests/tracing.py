"""ATen graphs of plain functions, decomposed as Inductor would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from mom_compile.pipeline import run_pipeline
from mom_compile.report import Report
from mom_passes.loops.loop import RowLimit
from mom_passes.verify import Contract, verify


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
    report = Report()
    limit = RowLimit(mini_seq_len)
    rewritten = run_pipeline(gm, static_inputs=static_inputs, limit=limit, report=report, **options)
    verify(rewritten.gm, Contract.of(gm), level=2)
    report.describe(rewritten)
    return rewritten.gm, report
