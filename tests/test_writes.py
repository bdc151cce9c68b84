"""Graphs that write to their inputs: every read of the old contents stays ahead of the write."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from mom_compile.pipeline import NotWorthwhile
from mom_passes.errors import PassError
from mom_passes.graph.writes import read_after_write
from mom_passes.verify import verify
from tests.programs import ATTENTION, HEADS, HIDDEN, ROWWISE, Weights, weights_of
from tests.test_properties import RANDOM_PROGRAMS
from tests.tracing import rewrite, trace

aten = torch.ops.aten

#: `(tokens, state, other, kept, weights) -> tokens`: a line of a program with two buffers `[HIDDEN]`.
LINES = {
    "linear": lambda x, s, o, kept, w: ROWWISE["linear"](x, w),
    "causal": lambda x, s, o, kept, w: ATTENTION["causal"](x, w),
    "read": lambda x, s, o, kept, w: x + s,
    "read the other": lambda x, s, o, kept, w: torch.relu(x * o + 1),
    "read as a weight": lambda x, s, o, kept, w: x @ (w.square * s[:, None]),
    "keep a copy": lambda x, s, o, kept, w: _keep(x, kept, s.clone()),
    "keep it repeated": lambda x, s, o, kept, w: _keep(x, kept, s.expand(3, -1).clone()),
    "keep it per token": lambda x, s, o, kept, w: _keep(x, kept, s.expand(x.shape[0], x.shape[1], -1).clone()),
    "keep its heads repeated": lambda x, s, o, kept, w: _keep(
        x, kept, s.view(1, HEADS, -1)[:, :, None].expand(-1, -1, 2, -1).reshape(1, 2 * HEADS, -1)
    ),
    "keep the other": lambda x, s, o, kept, w: _keep(x, kept, o.expand(2, -1).clone()),
    "keep a sum": lambda x, s, o, kept, w: _keep(x, kept, s + o),
    "keep a slice": lambda x, s, o, kept, w: _keep(x, kept, s[2:].clone()),
    "add a number": lambda x, s, o, kept, w: _after(x, s.add_(1)),
    "scale the other": lambda x, s, o, kept, w: _after(x, o.mul_(0.5)),
    "add tokens": lambda x, s, o, kept, w: _after(x, s.add_(x.mean((0, 1)))),
    "copy from the other": lambda x, s, o, kept, w: _after(x, s.copy_(o)),
    "copy to the other": lambda x, s, o, kept, w: _after(x, o.copy_(s)),
    "write a part": lambda x, s, o, kept, w: _after(x, s[1:3].copy_(o[2:4])),
    "add to the other": lambda x, s, o, kept, w: _after(x, o.add_(x[:, -1].sum(0))),
}


def _keep(x: torch.Tensor, kept: list[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    kept.append(value)
    return x


def _after(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return x


def run_and_compare(lines: list[str], batch: int, tokens: int, mini: int) -> tuple[bool, fx.GraphModule]:
    """Whether a program was rewritten. It then returns the same and leaves the same in its buffers."""
    weights = weights_of(torch.float64)

    def program(x: torch.Tensor, state: torch.Tensor, other: torch.Tensor, *parameters: torch.Tensor) -> tuple:
        kept: list[torch.Tensor] = []
        for line in lines:
            x = LINES[line](x, state, other, kept, Weights(*parameters))
        return (x, *kept)

    generator = torch.Generator().manual_seed(tokens)
    x, state, other = (torch.randn(s, generator=generator).double() for s in ((batch, tokens, HIDDEN), 8, 8))
    gm = trace(program, x, state.clone(), other.clone(), *weights)
    theirs, ours = (state.clone(), other.clone()), (state.clone(), other.clone())
    expected = gm(x, *theirs, *weights)
    names = tuple(n.name for n in gm.graph.nodes if n.op == "placeholder")[3:]
    try:
        rewritten, _ = rewrite(gm, mini, names)
    except NotWorthwhile:
        return False, gm
    actual = rewritten(x, *ours, *weights)
    for got, wanted in zip((*actual, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9 * max(1.0, float(wanted.abs().max())))
    return True, gm


programs = st.lists(st.sampled_from(sorted(LINES)), min_size=2, max_size=9)


@settings(RANDOM_PROGRAMS, max_examples=30)
@given(programs, st.integers(1, 2), st.integers(5, 13))
def test_random_programs_with_buffers_compute_the_same(lines, batch, tokens):
    rewritten, _ = run_and_compare(["causal", "linear", *lines, "linear", "causal"], batch, tokens, 4)
    assert rewritten


@pytest.mark.slow
@settings(RANDOM_PROGRAMS, max_examples=500)
@given(programs, st.integers(1, 2), st.integers(5, 23), st.integers(2, 9))
def test_five_hundred_random_programs_with_buffers_compute_the_same(lines, batch, tokens, mini):
    rewritten, _ = run_and_compare(["causal", *lines, "linear", "causal"], batch, tokens, min(mini, tokens // 2))
    assert rewritten


@pytest.mark.parametrize("keep", [name for name in sorted(LINES) if name.startswith("keep")])
@pytest.mark.parametrize("write", ["add a number", "add tokens", "copy from the other", "write a part"])
def test_a_copy_made_before_a_write_has_the_old_contents(keep, write):
    rewritten, gm = run_and_compare(["causal", "linear", keep, write, "read", "causal", "linear"], 2, 9, 4)
    assert rewritten
    assert any(n.target is aten.copy_.default for n in gm.graph.nodes)


@pytest.mark.parametrize("lines", [("read", "add a number"), ("read as a weight", "add a number", "read")])
def test_a_loop_reads_a_buffer_before_it_is_written(lines):
    rewritten, _ = run_and_compare(["causal", "linear", *lines], 1, 9, 4)
    assert rewritten


# --- the law itself ---


def graph_of(build) -> fx.GraphModule:
    graph = fx.Graph()
    state, new = graph.placeholder("state"), graph.placeholder("new")
    for node in (state, new):
        node.meta["val"] = torch.zeros(4)
    build(graph, state, new)
    for node in graph.nodes:
        node.meta.setdefault("val", torch.zeros(4))
    return fx.GraphModule(torch.nn.Module(), graph)


def _read_behind(graph, state, new):
    view = graph.call_function(aten.alias.default, (state,))
    graph.call_function(aten.copy_.default, (state, new))
    graph.output((graph.call_function(aten.add.Tensor, (view, 1)),))


def _item_behind(graph, state, new):
    parts = graph.call_function(aten.split.Tensor, (state, 2))
    graph.call_function(aten.copy_.default, (state, new))
    item = graph.call_function(operator.getitem, (parts, 0))
    graph.output((graph.call_function(aten.clone.default, (item,)),))


def _reshaped_behind(graph, state, new):
    graph.call_function(aten.copy_.default, (state, new))
    graph.output((graph.call_function(aten.reshape.default, (state, [2, 2])),))


def _write_elsewhere(graph, state, new):
    made = graph.call_function(aten.add.Tensor, (state, new))
    graph.call_function(aten.copy_.default, (made, new))
    graph.output((made,))


@pytest.mark.parametrize("build", [_read_behind, _item_behind, _reshaped_behind, _write_elsewhere])
def test_a_read_after_a_write_is_reported(build):
    gm = graph_of(build)
    assert read_after_write(gm) is not None
    with pytest.raises(PassError, match="copy_"):
        verify(gm)


def test_a_view_after_a_write_is_no_read():
    def build(graph, state, new):
        copied = graph.call_function(aten.add.Tensor, (state, 1))
        write = graph.call_function(aten.copy_.default, (state, new))
        graph.output((copied, write, graph.call_function(aten.alias.default, (state,))))

    gm = graph_of(build)
    assert read_after_write(gm) is None
    verify(gm)


# --- as a user writes it ---


def test_the_old_contents_of_a_state_can_be_returned(eager_pieces):
    """A copy larger than its source is made where it is read, and an output is read last."""
    weight, weights = torch.randn(HIDDEN, HIDDEN), weights_of(torch.float32)

    @torch.compile(backend="mom", options={"strict": True, "mini_seq_len": 16})
    def step(x, state):
        before = state.expand(8, -1).clone()
        y = ATTENTION["causal"](x @ weight, weights) @ weight
        state.add_(1)
        return y, before

    state = torch.arange(8.0)
    with torch.no_grad():
        _, before = step(torch.randn(1, 100, HIDDEN), state)
    torch.testing.assert_close(before, torch.arange(8.0).expand(8, -1))
    torch.testing.assert_close(state, torch.arange(8.0) + 1)


def test_inputs_that_share_a_storage_compute_the_same(eager_pieces):
    weight, weights = torch.randn(HIDDEN, HIDDEN), weights_of(torch.float32)

    def step(x, state, view):
        before = view.expand(3, -1).clone()
        y = ATTENTION["causal"](x @ weight + state, weights) @ weight
        state.mul_(2)
        return y, before, view + 0

    compiled = torch.compile(step, backend="mom", options={"strict": True, "mini_seq_len": 16})
    x, a, b = torch.randn(1, 100, HIDDEN), torch.arange(8.0), torch.arange(8.0)
    with torch.no_grad():
        expected, actual = step(x, a, a[2:6]), compiled(x, b, b[2:6])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b, a)
