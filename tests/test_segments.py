"""Layers without attention between them share a loop, which is cut between layers if it is long."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx

import mom_compile
from mom_compile.config import parse_options
from mom_passes.graph.edit import copy_graph
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import Stored
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

LAYERS = 12
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.mom.linear_recurrence.default)


def layers(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
    """Layers with a recurrence and an MLP each, and no attention."""
    w = Weights(*parameters)
    for _ in range(LAYERS):
        x = x + torch.ops.mom.linear_recurrence(x.sigmoid(), STEPS["linear"](x, w))[0] / 8
        x = STEPS["mlp"](x, w)
    return (x,)


def given() -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, 33, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (x, *weights_of(torch.float64))


@functools.cache
def traced() -> fx.GraphModule:
    return trace(layers, *given())


def rewritten(most: int):
    gm, (x, *weights) = copy_graph(traced()), given()
    made, _ = rewrite(gm, 5, parameter_names(gm), loop_products=most)
    torch.testing.assert_close(made(x, *weights)[0], gm(x, *weights)[0], rtol=1e-12, atol=1e-9)
    return [module for _, module in loop_nodes(made)]


def test_a_stage_that_is_not_long_is_one_loop() -> None:
    assert len(rewritten(10_000)) == 1


@pytest.mark.parametrize("most", [1, 12, 30])
def test_a_long_stage_is_cut_where_only_the_residual_stream_crosses(most: int) -> None:
    loops = rewritten(most)
    counts = [sum(node.target in PRODUCTS for node in module.body.graph.nodes) for module in loops]
    assert len(loops) > 2 and all(count >= 8 for count in counts)
    assert len(set(counts[:-1])) == 1, "the cuts are at the same place of each layer"
    for module in loops:
        stored = [output for output in module.loop.outputs if isinstance(output, Stored)]
        assert [output.type.shape[-1] for output in stored] == [HIDDEN]


def test_a_product_is_computed_before_an_attention_if_it_is_narrower_than_its_operands() -> None:
    """Both branches of a layer are added after the attention; the wide one ends in a product."""

    def branches(x: torch.Tensor, wide: torch.Tensor, narrow: torch.Tensor, *parameters: torch.Tensor):
        w = Weights(*parameters)
        rows, state = torch.ops.mom.linear_recurrence((x @ wide).sigmoid(), x @ wide)
        return STEPS["causal"](x, w) + rows @ narrow, state

    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(HIDDEN, 4 * HIDDEN, dtype=torch.float64, generator=generator) / 4
    x = torch.randn(1, 33, HIDDEN, dtype=torch.float64, generator=generator)
    operands = (x, wide, wide.mT.contiguous(), *weights_of(torch.float64))
    gm = trace(branches, *operands)
    made, _ = rewrite(gm, 5, parameter_names(gm))
    stored = [output for _, module in loop_nodes(made) for output in module.loop.outputs if isinstance(output, Stored)]
    assert stored and all(output.type.shape[-1] < 4 * HIDDEN for output in stored)
    for actual, expected in zip(made(*operands), gm(*operands), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "many", None])
def test_an_invalid_number_of_products_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"loop_products=.* is not valid; it is a whole number of products"):
        parse_options({"loop_products": value})


def test_the_option_reaches_the_passes(eager_pieces: None) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(40))).eval()
    found = {}
    for most in (8, 100):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="mom", options={"mini_seq_len": 8, "loop_products": most})
        x = torch.randn(1, 50, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        found[most] = len(mom_compile.reports()[-1].stages)
    assert found == {8: 5, 100: 1}
