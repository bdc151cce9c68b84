"""The passes as one list: ATen graph in, the same graph with loops over mini-sequences out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import fx

from mom_compile.report import PassReport, Report
from passes.attention_form import attention_form
from passes.demands import DemandGraph, build_demands
from passes.graphs import copy_graph
from passes.mini_sequence import insert_loops
from passes.sizes import hint
from passes.stages import Stages, plan_stages
from passes.token_dims import TokenDims, analyse_token_dims
from passes.verify import verify

log = logging.getLogger(__name__)


class NotWorthwhile(Exception):
    """Nothing to gain: the graph goes to stock Inductor. Its text is the reason."""


@dataclass
class State:
    """What one step hands to the next."""

    gm: fx.GraphModule
    static_inputs: Collection[str]
    mini_seq_len: int
    report: Report
    dims: TokenDims | None = None
    demands: DemandGraph | None = None
    stages: Stages | None = None
    dumps: dict[str, str] = field(default_factory=dict)


Step = Callable[[State], str]


def canonical_attention(state: State) -> str:
    """One attention operator with grouped heads and proven masks: one rule, one kernel, K/V at their own width."""
    before = len(state.gm.graph.nodes)
    state.gm = attention_form(state.gm)
    return f"{before} -> {len(state.gm.graph.nodes)} nodes"


def find_tokens(state: State) -> str:
    """Which dimension of each value is the token dimension."""
    static = {n for n in state.gm.graph.nodes if n.op == "placeholder" and n.name in state.static_inputs}
    dims = analyse_token_dims(state.gm, static_inputs=static)
    if dims is None:
        raise NotWorthwhile("no input has a dimension that carries the matmul work from its rows to the outputs' rows")
    if isinstance(dims.length, int) and dims.length <= state.mini_seq_len:
        raise NotWorthwhile(f"its {dims.length} tokens fit in one mini-sequence of {state.mini_seq_len}")
    state.dims = dims
    state.report.token_dimension = f"{dims.seed_dim} of {dims.seed.name}, {dims.length} (now {hint(dims.length)})"
    state.report.left_out = {
        f"{n.target} ({n.name})": why for n, why in dims.mixing.items() if "getitem" not in str(n.target)
    }
    return f"{len(dims.rowwise)} row-wise values, {len(dims.mixing)} mixing operators, {dims.barriers} barriers"


def follow_demands(state: State) -> str:
    """Who needs which rows of what, from the outputs back."""
    assert state.dims is not None
    state.demands = build_demands(state.gm, state.dims)
    return f"{len(state.demands.order)} instances"


def cut_stages(state: State) -> str:
    """Stages between barriers, and by min-cut the few values that live at full length between them."""
    assert state.demands is not None
    state.stages = plan_stages(state.demands)
    stored = sum(len(plan.stored) for plan in state.stages.plans)
    if not stored:
        raise NotWorthwhile("no value would be computed in a loop")
    return f"{len(state.stages.plans)} stages, {stored} values at full length"


def loops_over_mini_sequences(state: State) -> str:
    """Every stage's rows in one loop."""
    assert state.stages is not None
    before = len(state.gm.graph.nodes)
    state.gm = insert_loops(state.gm, state.stages, mini_seq_len=state.mini_seq_len)
    return f"{before} -> {len(state.gm.graph.nodes)} nodes"


PIPELINE: tuple[Step, ...] = (
    canonical_attention,
    find_tokens,
    follow_demands,
    cut_stages,
    loops_over_mini_sequences,
)


def run_pipeline(
    gm: fx.GraphModule,
    *,
    static_inputs: Collection[str],
    mini_seq_len: int,
    report: Report,
    skip: Collection[str] = (),
) -> fx.GraphModule:
    """The rewritten graph; `gm` is left as it was. Raises `NotWorthwhile` with the reason."""
    report.nodes = len(gm.graph.nodes)
    state = State(copy_graph(gm), static_inputs, mini_seq_len, report)
    for step in PIPELINE:
        if step.__name__ in skip:
            continue
        began = time.perf_counter()
        change = step(state)
        verify(state.gm)
        seconds = time.perf_counter() - began
        report.passes.append(PassReport(step.__name__, seconds, change))
        log.debug("%s: %.0f ms: %s", step.__name__, seconds * 1e3, change)
    report.describe_loops(state.gm)
    log.debug("rewritten graph:\n%s", state.gm.code)
    return state.gm
