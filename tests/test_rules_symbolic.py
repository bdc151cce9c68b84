"""Chunk rules on symbolic shapes: no guards are added, and no body argument carries the sequence length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from mom_passes.graph.sizes import expr, product, quotient, same
from mom_passes.rules import Dim, Rows, Window, claim_for
from mom_passes.rules.arithmetic import add, mul
from mom_passes.rules.view import view_candidates

aten = torch.ops.aten


def capture(function: Callable[..., Any], *shape: int) -> fx.GraphModule:
    """The function's ATen graph for an input whose first two sizes are symbols."""
    sizes = [DimDynamic.DYNAMIC] * 2 + [DimDynamic.STATIC] * (len(shape) - 2)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(
        torch.randn(*shape),
        static_shapes=False,
        symbolic_context=StatelessSymbolicContext(sizes),
        source=ConstantSource("x"),
    )
    with mode:
        return make_fx(function, tracing_mode="symbolic")(fake)


def find(graph: fx.GraphModule, target: Any) -> fx.Node:
    return graph.graph.find_nodes(op="call_function", target=target)[0]


def guards(node: fx.Node) -> int:
    return len(node.meta["val"].fake_mode.shape_env.guards)


def test_views_with_symbolic_batch_and_length() -> None:
    graph = capture(lambda x: x.view(x.shape[0] * x.shape[1], 4, 3), 2, 7, 12)
    node = find(graph, aten.view.default)
    before = guards(node)
    batch = next(iter(graph.graph.nodes)).meta["val"].shape[0]
    (dim,) = view_candidates(node, (Dim(1),))
    assert dim == Dim(0, outer=batch)
    claim = claim_for(node, dim)
    assert claim.needs == (Rows(Dim(1)),)
    assert claim.edit is not None
    (_, shape), _ = claim.edit(node.args, {}, Window(0, 3, (0,)))
    assert shape == [-1, 4, 3]
    assert claim.target is aten.reshape.default
    assert guards(node) == before


def test_unfolding_tokens_keeps_the_symbolic_batch_size() -> None:
    graph = capture(lambda x: (x.flatten(0, 1) * 2).view(x.shape[0], -1, 12), 2, 7, 12)
    *_, node = graph.graph.find_nodes(op="call_function", target=aten.view.default)
    batch = next(iter(graph.graph.nodes)).meta["val"].shape[0]
    claim = claim_for(node, Dim(1))
    assert claim.needs == (Rows(Dim(0, outer=batch)),)
    assert claim.edit is not None
    (_, shape), _ = claim.edit(node.args, {}, Window(0, 3, (0,)))
    assert isinstance(shape[0], fx.Node)
    assert shape[1:] == [-1, 12]


@pytest.mark.parametrize(
    ("function", "target", "dim", "expected"),
    [
        (lambda x: x.unsqueeze(1).expand(-1, 4, x.shape[1], 12), aten.expand.default, Dim(2), [-1, 4, -1, 12]),
        (lambda x: aten.full.default([x.shape[1], 5], 0), aten.full.default, Dim(0), [3, 5]),
        (lambda x: x[:, :1].expand(-1, x.shape[1], 12), aten.expand.default, Dim(1), [-1, 3, 12]),
    ],
)
def test_no_argument_in_a_body_contains_the_length(
    function: Callable[..., Any], target: Any, dim: Dim, expected: list[int]
) -> None:
    node = find(capture(function, 2, 7, 12), target)
    before = guards(node)
    edit = claim_for(node, dim).edit
    assert edit is not None
    args, _ = edit(node.args, dict(node.kwargs), Window(2, 3, (2,)))
    sizes = args[0] if target is aten.full.default else args[1]
    assert [size for size in sizes if not isinstance(size, fx.Node)] == [
        size for size, old in zip(expected, sizes, strict=True) if not isinstance(old, fx.Node)
    ]
    assert sizes[dim.index] == expected[dim.index]
    assert guards(node) == before


def test_row_arithmetic_emits_nodes_only_for_nodes() -> None:
    graph = fx.Graph()
    start = graph.placeholder("start")
    start.meta["val"] = 5
    assert add(2, 3) == 5
    assert mul(2, 3) == 6
    assert add(start, 0) is start
    assert mul(1, start) is start
    total = add(mul(start, 2), 1)
    assert total.meta["val"] == 11
    assert [node.name for node in graph.nodes] == ["start", "mul", "add"]


def test_sizes_compare_and_divide_without_guards() -> None:
    value = next(iter(capture(lambda x: x + 1, 2, 7, 12).graph.nodes)).meta["val"]
    shape_env = value.fake_mode.shape_env
    before = len(shape_env.guards)
    batch, length, width = value.shape
    assert not same(batch, length)
    assert same(product([batch, length]), product([length, batch]))
    assert same(length * 2, product([2, length]))
    assert quotient(product([batch, length, width]), length) == 12 * expr(batch)
    assert quotient(batch, length) is None
    assert quotient(product([4, length]), length) == 4
    assert len(shape_env.guards) == before
