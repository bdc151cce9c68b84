"""Slices along the tokens move up: only the needed rows are computed, with equal results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mom_passes.attention.form import attention_form
from mom_passes.graph.edit import copy_graph
from mom_passes.tokens.demanded_rows import Span, demanded_rows, hull, needed_rows
from mom_passes.tokens.dims import analyse_token_dims
from tests.programs import ATTENTION, HIDDEN, ROWWISE, STEPS, Weights, weights_of
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

SLICES = {
    "last": lambda x: x[:, -1:],
    "last five": lambda x: x[:, -5:],
    "all but last": lambda x: x[:, :-1],
    "without first": lambda x: x[:, 1:],
    "middle": lambda x: x[:, 2:6],
    "select": lambda x: x[:, 3],
    "select last": lambda x: x[:, -1],
    "twice": lambda x: torch.cat([x[:, 2:4], x[:, 3:7]], 1),
    "far apart": lambda x: x[:, 0] + x[:, -1],
    "of a slice": lambda x: x[:, 1:][:, -2:],
    "from before the first": lambda x: x[:, -1000:5],
    "from the end to the middle": lambda x: x[:, -9:7],
    "empty": lambda x: x[:, 4:4],
    "the whole": lambda x: x[:, -1000:],
    "every other": lambda x: x[:, ::2],
}


def graph_of(names, cut, *, batch=2, tokens=13, dynamic=False, also_whole=False):
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        for name in names:
            x = STEPS[name](x, Weights(*parameters))
        rows = SLICES[cut](x) @ Weights(*parameters).square
        return (rows, x) if also_whole else (rows,)

    x = torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return trace(program, x, *weights, dynamic=dynamic), (x, *weights)


def narrowed(gm):
    gm = attention_form(copy_graph(gm))
    static = {n for n in gm.graph.nodes if n.op == "placeholder" and n.name in parameter_names(gm)}
    dims = analyse_token_dims(gm, static_inputs=static)
    return gm if dims is None else demanded_rows(gm, dims)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cut", SLICES)
def test_graphs_with_every_kind_of_slice_are_equal(cut, dynamic):
    gm, inputs = graph_of(["linear", "causal", "mlp", "rope", "causal", "mlp", "layer_norm"], cut, dynamic=dynamic)
    expected = gm(*inputs)
    assert_same(narrowed(gm)(*inputs), expected)
    assert_same(rewrite(gm, 4, parameter_names(gm))[0](*inputs), expected)


@random_examples(
    16,
    40,
    RANDOM_PROGRAMS,
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    st.sampled_from(sorted(SLICES)),
    st.integers(1, 3),
    st.integers(8, 19),
    st.booleans(),
)
def test_random_programs_with_slices_are_equal(names, cut, batch, tokens, also_whole):
    gm, inputs = graph_of(names, cut, batch=batch, tokens=tokens, also_whole=also_whole)
    assert_same(narrowed(gm)(*inputs), gm(*inputs))


def rows_of(gm, target):
    """Sizes of the token dimension over all calls of an operator with a `[B, H, tokens, D]` or `[tokens, H]` result."""
    values = [n.meta["val"] for n in gm.graph.nodes if n.target is target]
    return [tuple(value.shape)[-2] for value in values]


def test_the_last_layer_computes_one_row_of_queries_and_keeps_all_keys():
    gm, _ = graph_of(["causal", "mlp", "causal", "mlp"], "last", batch=1)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    (last,) = [n for n in rewritten.graph.nodes if n.target is torch.ops.mom.attention.default]
    query, key = (n.meta["val"].shape for n in last.args[:2])
    assert query[2] == 1 and key[2] == 13 and last.args[4] == 12
    # The second attention's loop is gone: its one row runs between loops.
    assert [stage.name for stage in report.stages] == ["stage_0"]


def test_masks_and_positions_are_computed_for_the_needed_rows_only():
    gm, inputs = graph_of(["rope", "eager", "rope", "eager"], "last", batch=1)
    after = narrowed(gm)
    assert_same(after(*inputs), gm(*inputs))
    scores = [n.meta["val"].shape for n in after.graph.nodes if n.target is torch.ops.aten.exp.default]
    assert [shape[-2] for shape in scores] == [13, 1]


def test_the_value_with_the_fewest_bytes_is_sliced():
    """The residual is sliced, rather than the norm and the product computed from it."""
    gm, _ = graph_of(["linear", "causal", "rsqrt_norm", "mlp"], "last", batch=1)
    slices = [n for n in narrowed(gm).graph.nodes if n.target is torch.ops.aten.slice.Tensor]
    assert len(slices) == 1
    assert slices[0].args[2:] == (12, 13)


def test_a_value_with_a_reader_of_all_rows_is_computed_once():
    gm, inputs = graph_of(["mlp", "causal", "mlp"], "last", also_whole=True)
    after = narrowed(gm)
    assert_same(after(*inputs), gm(*inputs))
    for product in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        count = [sum(n.target is product for n in g.graph.nodes) for g in (gm, after)]
        assert count[0] == count[1]


def test_spans_of_two_slices_are_joined():
    gm, _ = graph_of(["mlp"], "twice", batch=1)
    dims = analyse_token_dims(gm, static_inputs={n for n in gm.graph.nodes if n.name in parameter_names(gm)})
    spans = {span for span in needed_rows(gm, dims).spans.values() if span is not None}
    assert Span(2, 5) in spans


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 9))
def test_a_hull_is_the_smallest_span_of_both(a, m, b, n):
    import sympy

    joined = hull(Span(sympy.Integer(a), sympy.Integer(m)), Span(sympy.Integer(b), sympy.Integer(n)))
    assert (joined.start, joined.end) == (min(a, b), max(a + m, b + n))


def test_a_hull_of_symbolic_spans_exists_only_if_it_is_certain():
    import sympy

    s = sympy.Symbol("s", integer=True, positive=True)
    assert hull(Span(s - 1, sympy.Integer(1)), Span(s - 4, sympy.Integer(2))) == Span(s - 4, sympy.Integer(4))
    assert hull(Span(sympy.Integer(0), sympy.Integer(2)), Span(s - 1, sympy.Integer(1))) is None


@pytest.mark.parametrize("name", sorted({**ROWWISE, **ATTENTION}))
def test_every_rowwise_step_runs_on_the_demanded_rows_only(name):
    gm, inputs = graph_of(["linear", name, "linear"], "last", batch=1, tokens=11)
    after = narrowed(gm)
    assert_same(after(*inputs), gm(*inputs))
    # The second linear runs on one row: nothing above it needs more.
    assert 1 in rows_of(after, torch.ops.aten.addmm.default) + rows_of(after, torch.ops.aten.mm.default)
