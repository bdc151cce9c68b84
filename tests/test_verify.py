"""`verify` as a table of laws: a sound graph passes all of them, and each way to spoil one is refused by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from mom_compile.pipeline import NotWorthwhile
from mom_passes.errors import PassError
from mom_passes.graph.edit import emit
from mom_passes.loops.loop import MiniSequence, loop_nodes
from mom_passes.loops.ports import CarryIn, RowsIn, SizeIn, Stored
from mom_passes.verify import Contract, verify
from tests.programs import HIDDEN, STEPS, Weights, folded, heads, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

aten = torch.ops.aten
WEIGHTS = weights_of(torch.float64)


def decoder(x: torch.Tensor, state: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two layers, a reduction over the tokens, and a view of the residual stream that somebody reads."""
    w = Weights(*parameters)
    for _ in range(2):
        keys, values = heads(x @ w.square.t()), heads(x * w.scale)
        seen = F.scaled_dot_product_attention(heads(x @ w.square), keys, values, is_causal=True)
        x = STEPS["mlp"](STEPS["linear"](x + folded(seen), w), w)
    return x, x.mean(1), state + 1


def graph(dynamic: bool = False, **options: Any) -> tuple[fx.GraphModule, Contract]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 13, HIDDEN, generator=generator, dtype=torch.float64)
    gm = trace(decoder, x, torch.zeros(3), *WEIGHTS, dynamic=dynamic)
    return rewrite(gm, 4, parameter_names(gm), **options)[0], Contract.of(gm)


def stage(gm: fx.GraphModule, number: int) -> tuple[fx.Node, MiniSequence]:
    return loop_nodes(gm)[number]


def state_of(gm: fx.GraphModule) -> fx.Node:
    return [n for n in gm.graph.nodes if n.op == "placeholder"][1]


def output_of(gm: fx.GraphModule) -> fx.Node:
    return next(iter(reversed(gm.graph.nodes)))


def returned(module: MiniSequence) -> tuple[fx.Node, ...]:
    return tuple(next(iter(reversed(module.body.graph.nodes))).args[0])  # type: ignore[arg-type]


def set_output(module: MiniSequence, number: int, **changes: Any) -> None:
    outputs = list(module.loop.outputs)
    outputs[number] = replace(outputs[number], **changes)
    module.loop = replace(module.loop, outputs=tuple(outputs))


def typed(gm: fx.GraphModule, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    with gm.graph.inserting_before(before):
        return emit(gm.graph, target, args)


def residual(module: MiniSequence) -> tuple[int, int]:
    """The number of an input and of an output that fits where it was."""
    for i, port in enumerate(module.loop.inputs):
        for o, output in enumerate(module.loop.outputs):
            fits = isinstance(port, RowsIn) and isinstance(output, Stored) and port.dim == output.dim
            if fits and output.type.other_than(port.type) is None:
                return i, o
    raise AssertionError("no output fits where an input was")


# --- what was accepted once ---


def writes_over_an_alias_of_an_input(gm: fx.GraphModule) -> None:
    node, module = stage(gm, 0)
    i, o = residual(module)
    x = node.args[1 + i]
    assert isinstance(x, fx.Node) and x.op == "placeholder"
    seen = typed(gm, node, aten.view.default, typed(gm, node, aten.unsqueeze.default, x, 0), list(x.meta["val"].shape))
    node.update_arg(1 + i, seen)
    set_output(module, o, over=i)


def writes_over_what_a_view_shows_later(gm: fx.GraphModule) -> None:
    node, module = stage(gm, -1)
    i, o = residual(module)
    x = node.args[1 + i]
    view = typed(gm, node, aten.unsqueeze.default, x, 0)
    late = typed(gm, output_of(gm), aten.relu.default, view)
    output = output_of(gm)
    last, *others = output.args[0]  # type: ignore[misc, union-attr]
    shown = typed(gm, output, aten.select.int, late, 0, 0)
    output.args = ((typed(gm, output, aten.add.Tensor, last, shown), *others),)
    set_output(module, o, over=i)


def swaps_operands(gm: fx.GraphModule) -> None:
    node, module = stage(gm, 1)
    tensors = [(i, p.type) for i, p in enumerate(module.loop.inputs) if not isinstance(p, SizeIn)]
    (i, type), *others = tensors
    j = next(j for j, other in others if type.other_than(other) is not None)
    arguments = list(node.args)
    arguments[1 + i], arguments[1 + j] = arguments[1 + j], arguments[1 + i]
    node.args = tuple(arguments)


def returns_one_more(gm: fx.GraphModule) -> None:
    output = output_of(gm)
    output.args = ((*output.args[0], output.args[0][0]),)  # type: ignore[index, misc]


def stores_another_shape(gm: fx.GraphModule) -> None:
    _, module = stage(gm, 0)
    type = module.loop.stored[0].type
    set_output(module, 0, type=replace(type, shape=(*type.shape[:-1], 5)))


def stores_another_dtype(gm: fx.GraphModule) -> None:
    _, module = stage(gm, 0)
    set_output(module, 0, type=replace(module.loop.stored[0].type, dtype=torch.float32))


def runs_another_length(gm: fx.GraphModule) -> None:
    _, module = stage(gm, 0)
    module.loop = replace(module.loop, length=12)


def adds_as_a_product(gm: fx.GraphModule) -> None:
    _, module = stage(gm, 1)
    add = next(n for n in module.body.graph.nodes if n.target is aten.add.Tensor)
    add.target = aten.mm.default
    module.body.recompile()


# --- more of the kind ---


def returns_one_less(gm: fx.GraphModule) -> None:
    output = output_of(gm)
    output.args = (output.args[0][:-1],)  # type: ignore[index]


def drops_an_input(gm: fx.GraphModule) -> None:
    output = output_of(gm)
    total, state = output.args[0][2], state_of(gm)  # type: ignore[index]
    zeros = typed(gm, output, aten.zeros.default, [3])
    output.replace_input_with(total, zeros)
    gm.graph.erase_node(total)
    gm.graph.erase_node(state)


def returns_another_dtype(gm: fx.GraphModule) -> None:
    output = output_of(gm)
    first = output.args[0][0]  # type: ignore[index]
    narrow = typed(gm, output, torch.ops.prims.convert_element_type.default, first, torch.float32)
    output.replace_input_with(first, narrow)


def loses_a_value(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem)
    del node.meta["val"]


def loses_a_type(gm: fx.GraphModule) -> None:
    _, module = stage(gm, 0)
    del next(n for n in module.body.graph.nodes if n.op == "call_function" and "type" in n.meta).meta["type"]


def returns_rows_in_another_order(gm: fx.GraphModule) -> None:
    for _, module in loop_nodes(gm):
        rows = returned(module)
        types = [value.meta["type"] for value in rows]
        other = next((i for i, type in enumerate(types) if types[0].other_than(type) is not None), None)
        if other is not None:
            swapped = list(rows)
            swapped[0], swapped[other] = swapped[other], swapped[0]
            next(iter(reversed(module.body.graph.nodes))).args = (tuple(swapped),)
            return
    raise AssertionError("all rows are alike")


def has_the_length_as_a_literal(gm: fx.GraphModule) -> None:
    for _, module in loop_nodes(gm):
        for node in module.body.graph.nodes:
            if node.target in (aten.view.default, aten.reshape.default, aten.expand.default):
                sizes = list(node.args[1])
                node.update_arg(1, [13, *sizes[1:]])
                return
    raise AssertionError("no body reshapes")


def carries_what_is_stored(gm: fx.GraphModule) -> None:
    _, module = stage(gm, -1)
    (i,) = module.loop.carries
    port = module.loop.inputs[i]
    inputs = [replace(port, out=0) if k == i else other for k, other in enumerate(module.loop.inputs)]
    module.loop = replace(module.loop, inputs=tuple(inputs))


def totals_what_is_not_carried(gm: fx.GraphModule) -> None:
    _, module = stage(gm, -1)
    set_output(module, len(module.loop.stored), carry=0)


def begins_a_carry_with_another_shape(gm: fx.GraphModule) -> None:
    node, module = stage(gm, -1)
    (i,) = module.loop.carries
    node.update_arg(1 + i, typed(gm, node, aten.select.int, node.args[1 + i], 0, 0))


def gives_one_operand_less(gm: fx.GraphModule) -> None:
    node, _ = stage(gm, 0)
    node.args = node.args[:-1]


def takes_more_than_is_returned(gm: fx.GraphModule) -> None:
    node, module = stage(gm, 0)
    item = next(user for user in node.users if user.target is operator.getitem)
    item.update_arg(1, len(module.loop.outputs))


def claims_other_strides(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.target is aten.mul.Tensor)
    node.meta["val"] = node.meta["val"].mT.contiguous().mT


def writes_over_what_it_reads_otherwise(gm: fx.GraphModule) -> None:
    node, module = stage(gm, -1)
    i, o = residual(module)
    placeholder = [n for n in module.body.graph.nodes if n.op == "placeholder"][-1]
    with module.body.graph.inserting_after(placeholder):
        again = module.body.graph.placeholder("again")
    again.meta["type"] = placeholder.meta["type"]
    module.loop = replace(module.loop, inputs=(*module.loop.inputs, module.loop.inputs[i]))
    node.args = (*node.args, node.args[1 + i])
    set_output(module, o, over=i)


def writes_over_rows_of_another_shape(gm: fx.GraphModule) -> None:
    _, module = stage(gm, 1)
    _, o = residual(module)
    shape = module.loop.stored[o].type.shape
    tensors = [(k, port.type) for k, port in enumerate(module.loop.inputs) if not isinstance(port, SizeIn | CarryIn)]
    i = next(k for k, type in tensors if type.shape != shape)
    set_output(module, o, over=i)


def reads_what_comes_later(gm: fx.GraphModule) -> None:
    node, _ = stage(gm, 0)
    node.append(next(n for n in gm.graph.nodes if n.op == "placeholder"))


def writes_before_it_reads(gm: fx.GraphModule) -> None:
    state = state_of(gm)
    first = next(iter(state.users))
    typed(gm, first, aten.copy_.default, state, typed(gm, first, aten.zeros.default, [3]))


def writes_to_another_input(gm: fx.GraphModule) -> None:
    end = output_of(gm)
    typed(gm, end, aten.copy_.default, state_of(gm), typed(gm, end, aten.zeros.default, [3]))


SPOILED: dict[Callable[[fx.GraphModule], None], str] = {
    writes_over_an_alias_of_an_input: "aliases an input",
    writes_over_what_a_view_shows_later: "read later by",
    swaps_operands: r"operand \d+ .*, expected",
    returns_one_more: "returns 4 values in place of 3",
    stores_another_shape: ", expected",
    stores_another_dtype: "torch.float32",
    runs_another_length: "its length is 13, expected 12",
    adds_as_a_product: "its body cannot be run",
    returns_one_less: "returns 2 values in place of 3",
    drops_an_input: "the graph takes",
    returns_another_dtype: "output 0 .* is torch.float32",
    loses_a_value: "has no recorded value",
    loses_a_type: "has no type",
    returns_rows_in_another_order: "in its body has shape",
    has_the_length_as_a_literal: "the length 13 as a literal",
    carries_what_is_stored: "takes the same value",
    totals_what_is_not_carried: "which is no carry",
    begins_a_carry_with_another_shape: "has shape",
    gives_one_operand_less: "operands for",
    takes_more_than_is_returned: "output . of .",
    claims_other_strides: "has strides",
    writes_over_what_it_reads_otherwise: "also reads through another operand",
    writes_over_rows_of_another_shape: "does not fit",
    reads_what_comes_later: "malformed graph",
    writes_before_it_reads: "after .* has written to it",
    writes_to_another_input: r"writes to \['\w+'\] in place of \[\]",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_graph_is_refused_by_name(spoil: Callable[[fx.GraphModule], None]) -> None:
    gm, contract = graph(skip=("residual_in_place",))
    verify(gm, contract, level=2)
    spoil(gm)
    with pytest.raises(PassError, match=SPOILED[spoil]):
        verify(gm, contract, level=2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_sound_graph_breaks_no_law(dynamic: bool) -> None:
    gm, contract = graph(dynamic)
    verify(gm, contract, level=2)
    assert any(output.over is not None for _, module in loop_nodes(gm) for output in module.loop.stored)
    assert any(module.loop.carries for _, module in loop_nodes(gm))


def test_a_law_is_not_asked_of_a_graph_that_is_not_rewritten() -> None:
    gm = trace(lambda x: (x + 1,), torch.zeros(2, 3))
    verify(gm, Contract.of(gm), level=2)
    with pytest.raises(NotWorthwhile):
        rewrite(gm, 4)
