"""Which operands loops overwrite. Results are the same with and without the pass."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_compile.pipeline import NotWorthwhile
from mom_passes.errors import PassError
from mom_passes.graph.edit import emit
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import TensorType, WholeIn
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import OFFLOAD
from mom_passes.program.in_place import _is_view_of_operand, take_over_storage
from mom_passes.verify import verify
from tests.programs import ATTENTION, HIDDEN, ROWWISE, STEPS, Weights, folded, heads, weights_of
from tests.shares import at_least, some_and_many
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

WEIGHTS = weights_of(torch.float64)


def x_of(batch=2, tokens=13):
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rewritten(function, *inputs, skip=()):
    gm = trace(function, *inputs, *WEIGHTS)
    return gm, rewrite(gm, 4, parameter_names(gm), skip=skip)[0]


def taken(gm):
    return [o.name for _, module in loop_nodes(gm) for o in module.loop.stored if o.over is not None]


def overwritten(gm):
    """The operands that are overwritten, each with the loop that does."""
    stored = [(node, module.loop, output) for node, module in loop_nodes(gm) for output in module.loop.stored]
    return [(loop.bind(node)[output.over], node) for node, loop, output in stored if output.over is not None]


def layer(x, w):
    """Keys and values of an attention, separate from the residual stream."""
    keys, values = heads(x @ w.square.t()), heads(x * w.scale)
    seen = F.scaled_dot_product_attention(heads(x @ w.square), keys, values, is_causal=True)
    return STEPS["mlp"](x + folded(seen), w)


def decoder(x, *parameters, hidden_too=False):
    w = Weights(*parameters)
    first = layer(STEPS["linear"](x, w), w)
    last = layer(layer(first, w), w)
    return (last, first) if hidden_too else (last,)


def test_the_residual_stream_is_overwritten():
    gm, loops = rewritten(decoder, x_of())
    assert len(taken(loops)) == 3
    inputs = (x_of(), *WEIGHTS)
    torch.testing.assert_close(loops(*inputs)[0], gm(*inputs)[0], rtol=0, atol=1e-10)


def check(names, batch, tokens, returned):
    """Compare with and without the pass. Return whether anything is overwritten."""

    def program(x, *parameters):
        w = Weights(*parameters)
        values = [STEPS["linear"](x, w)]
        for name in names:
            values.append(layer(STEPS[name](values[-1], w), w))
        return (values[-1] @ w.square, *(v for i, v in enumerate(values) if i in returned))

    x = x_of(batch, tokens)
    try:
        _, with_it = rewritten(program, x)
        gm, without = rewritten(program, x, skip=("residual_in_place",))
    except NotWorthwhile:
        return False
    assert not taken(without)
    given_x = x.clone()
    for a, b, c in zip(with_it(x, *WEIGHTS), without(x, *WEIGHTS), gm(x, *WEIGHTS), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-10 * max(1.0, float(c.abs().max())))
    assert torch.equal(x, given_x)
    return bool(taken(with_it))


@some_and_many(8, 80)
def test_random_programs_compute_the_same_with_and_without_the_pass(runs):
    with at_least(0.9, "write over something") as in_place:

        @settings(RANDOM_PROGRAMS, max_examples=runs)
        @given(
            st.lists(st.sampled_from(sorted({**ROWWISE, **ATTENTION})), min_size=2, max_size=4),
            st.integers(1, 3),
            st.integers(6, 19),
            st.sets(st.integers(0, 6), max_size=2),
        )
        def gives_the_same(names, batch, tokens, returned):
            in_place.append(check(names, batch, tokens, returned))

        gives_the_same()


def test_an_input_is_never_overwritten():
    def residual_on_the_input(x, *parameters):
        w = Weights(*parameters)
        return (STEPS["causal"](x, w) @ w.square,)

    _, loops = rewritten(residual_on_the_input, x_of())
    assert not taken(loops)


def test_an_output_is_never_overwritten():
    _, loops = rewritten(lambda *a: decoder(*a, hidden_too=True), x_of())
    # The first residual is an output; the third overwrites the second.
    assert len(taken(loops)) == 2


def test_a_value_with_later_readers_is_never_overwritten():
    def read_again(x, *parameters):
        w = Weights(*parameters)
        first = STEPS["linear"](x, w) + 1
        return (layer(layer(layer(first, w), w), w) + first,)

    gm, loops = rewritten(read_again, x_of())
    inputs = (x_of(), *WEIGHTS)
    torch.testing.assert_close(loops(*inputs)[0], gm(*inputs)[0], rtol=0, atol=1e-10)
    takers = overwritten(loops)
    # The first residual lives to the end. An operand that is overwritten has no later reader.
    assert takers
    assert all(max(source.users) is node for source, node in takers)


def test_rows_that_a_loop_passes_on_unchanged_are_kept():
    """The keys are a view of the residual's rows."""

    def program(x, *parameters):
        w = Weights(*parameters)
        first = STEPS["causal"](STEPS["linear"](x, w), w)
        keys = heads(first)
        second = folded(F.scaled_dot_product_attention(heads(first @ w.square), keys, keys, is_causal=True))
        third = folded(F.scaled_dot_product_attention(heads(second), keys, heads(second), is_causal=True))
        return (third,)

    gm, loops = rewritten(program, x_of())
    inputs = (x_of(), *WEIGHTS)
    torch.testing.assert_close(loops(*inputs)[0], gm(*inputs)[0], rtol=0, atol=1e-10)


def test_last_rows_that_a_loop_passes_on_are_kept():
    """A carry is a view of the residual's rows: the decoder reads the last row of the encoder, of the same length."""

    def program(x, y, *parameters):
        w = Weights(*parameters)
        x, y = STEPS["linear"](x, w), STEPS["mlp"](y, w)
        keys = heads(y @ w.square)
        rows = x + folded(F.scaled_dot_product_attention(heads(x), keys, torch.sin(keys)))
        return (y - rows[:, -1:])[:, -1:], rows[:, 0]

    inputs = (x_of(), x_of() - 1, *WEIGHTS)
    gm = trace(program, *inputs)
    loops, _ = rewrite(gm, 4, parameter_names(gm)[1:])
    assert taken(loops) and any(module.loop.finals for _, module in loop_nodes(loops))
    torch.testing.assert_close(loops(*inputs), gm(*inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("through", ["view", "unsafe view", "split", "copy"])
def test_views_of_operands_are_recognised(through):
    graph = torch.fx.Graph()
    rows = graph.placeholder("rows")
    if through == "view":
        piece = graph.call_function(torch.ops.aten.reshape.default, (rows, [-1, 4]))
    elif through == "unsafe view":
        piece = graph.call_function(torch.ops.aten._unsafe_view.default, (rows, [-1, 4]))
    elif through == "split":
        parts = graph.call_function(torch.ops.aten.split.Tensor, (rows, 4, -1))
        piece = graph.call_function(operator.getitem, (parts, 0))
    else:
        piece = graph.call_function(torch.ops.aten.clone.default, (rows,))
    assert _is_view_of_operand(piece) is (through != "copy")


def written_over(loop, at):
    """The loop, with an output of the same type written over an input."""
    fits = [o.type.other_than(loop.inputs[at].type) is None and o.dim == loop.inputs[at].dim for o in loop.stored]
    number = fits.index(True)
    changed = replace(loop.outputs[number], over=at)
    return replace(loop, outputs=(*loop.outputs[:number], changed, *loop.outputs[number + 1 :]))


def spoiled(change):
    _, loops = rewritten(decoder, x_of(), skip=("residual_in_place",))
    nodes = loop_nodes(loops)
    node, loop = nodes[-1]
    change(loops, node, loop)
    return loops


def test_verify_rejects_overwriting_a_value_with_later_readers():
    def change(gm, node, loop):
        first_node, first = loop_nodes(gm)[1]
        at, operand = next(iter(first.loop.rows_of(first_node).items()))
        first.loop = written_over(first.loop, at)
        with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op == "output")):
            late = gm.graph.call_function(torch.ops.aten.relu.default, (operand,))
            late.meta["val"] = operand.meta["val"]

    with pytest.raises(PassError, match="read later"):
        verify(spoiled(change))


def test_verify_rejects_overwriting_an_input():
    def change(gm, node, loop):
        loop = loop_nodes(gm)[0][1]
        loop.loop = written_over(loop.loop, next(iter(loop.loop.rows_of(loop_nodes(gm)[0][0]))))

    with pytest.raises(PassError, match="is or aliases an input"):
        verify(spoiled(change))


MADE_BETWEEN_LOOPS = {
    "a view": (torch.ops.aten.view.default, lambda x: ([-1],)),
    "a copy that a compiler drops": (torch.ops.aten.clone.default, lambda x: ()),
    "a sum that a compiler drops": (torch.ops.aten.add.Tensor, lambda x: (0,)),
    "what leaves for the host, or stays after all": (OFFLOAD, lambda x: (1, 0, 0)),
    "rows of their own": (COPY_ROWS, lambda x: ([0, 1, 2],)),
}


@pytest.mark.parametrize("read", ["returned", "given to the loop too", "given to a later loop"])
@pytest.mark.parametrize("made", MADE_BETWEEN_LOOPS)
def test_a_value_that_may_share_a_storage_keeps_it_alive(made, read):
    """Any value computed from an operand between loops, except copied rows, may share its storage."""
    _, loops = rewritten(decoder, x_of())
    value, node = overwritten(loops)[0]
    target, more = MADE_BETWEEN_LOOPS[made]
    with loops.graph.inserting_before(node):
        other = emit(loops.graph, target, (value, *more(value)))
    if read == "returned":
        output = next(iter(reversed(loops.graph.nodes)))
        output.args = ((*output.args[0], other),)
    else:
        readers = [(loop, module) for loop, module in loop_nodes(loops) if loop is node or "later" in read]
        reader, module = readers[-1]
        reader.args = (*reader.args, other)
        module.loop = replace(module.loop, inputs=(*module.loop.inputs, WholeIn(TensorType.of(other.meta["val"]))))
    taken_now = [operand for operand, _ in overwritten(take_over_storage(loops))]
    assert (value in taken_now) is (made == "rows of their own")
    assert taken_now or read == "given to a later loop"


def test_the_pass_is_idempotent():
    _, loops = rewritten(decoder, x_of())
    before = taken(loops)
    assert taken(take_over_storage(loops)) == before
