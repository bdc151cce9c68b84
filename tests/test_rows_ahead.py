"""Rows ahead of the computed ones: each mini-sequence hands them to the next, and they never exist at full length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx

from mom_passes.graph.arguments import replace
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import Stored
from mom_passes.rules import All, Claim, Dim, Rows, register, registered
from mom_passes.rules.factories import checked
from mom_passes.rules.registry import _FACTS, CannotChunk
from mom_passes.rules.work import products
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import check_every_length, rewrite, trace

#: Rows before a row that `short_conv` reads.
BEFORE = 3


@torch.library.custom_op("mom_tests::short_conv", mutates_args=())
def short_conv(x: torch.Tensor, weight: torch.Tensor, given: int) -> torch.Tensor:
    """A causal convolution over four tokens, `[B, S, H]`. The first `given` rows of `x` are only read."""
    padded = F.pad(x, (0, 0, BEFORE - given, 0))
    rows = padded.shape[1] - BEFORE
    return sum(padded[:, i : i + rows] * weight[i] for i in range(BEFORE + 1)).clone()  # type: ignore[union-attr]


@short_conv.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, given: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - given, x.shape[2])


OP = torch.ops.mom_tests.short_conv.default


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    """Registered for these tests alone: every registered operator must have samples for the law."""

    @register(OP, recompute=False, work=lambda node: 1)
    def short_conv_rule(node: fx.Node, dim: Dim) -> Claim:
        if checked(node, dim).index != 1 or not dim.plain:
            raise CannotChunk(node, dim, "only along the tokens")

        def edit(args: Any, kwargs: Any, window: Any) -> Any:
            return replace(node.target, args, kwargs, given=BEFORE)

        return Claim((Rows(dim, before=BEFORE), All()), edit=edit)

    yield
    del _FACTS[OP]
    assert OP not in registered()


def conv(x: torch.Tensor, w: Weights) -> torch.Tensor:
    return x + short_conv(x, w.square[: BEFORE + 1], 0)


def program(names: list[str]) -> Any:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = Weights(*parameters)
        for name in names:
            x = conv(x, w) if name == "conv" else STEPS[name](x, w)
        return x, x.amax(1)

    return run


@random_examples(
    16,
    40,
    RANDOM_PROGRAMS,
    st.lists(st.sampled_from(["conv", "conv", "linear", "mlp", "causal", "rope"]), min_size=1, max_size=5),
    st.integers(5, 23),
    st.integers(2, 7),
    st.booleans(),
)
def test_any_program_keeps_its_meaning(names: list[str], tokens: int, mini: int, dynamic: bool) -> None:
    """Mini-sequences shorter than the rows ahead, and lengths that they do not divide, are among them."""
    weights = weights_of(torch.float64)
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    gm = trace(program(["mlp", *names, "conv", "mlp"]), x, *weights, dynamic=dynamic)
    if tokens <= mini:
        return
    rewritten, report = rewrite(gm, mini, parameter_names(gm))
    assert dynamic or not report.left_out  # a head of symbolic width is not recognised
    assert any(module.loop.carries for _, module in loop_nodes(rewritten))
    for expected, actual in zip(gm(x, *weights), rewritten(x, *weights), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_rows_ahead_are_no_barrier() -> None:
    """Four convolutions are one loop, which stores nothing but what is returned."""
    weights = weights_of(torch.float64)
    gm = trace(program(["mlp", "conv"] * 4), torch.randn(2, 17, HIDDEN, dtype=torch.float64), *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert len(report.stages) == 1
    ((_, module),) = loop_nodes(rewritten)
    assert len(module.loop.stored) == 1
    assert len(module.loop.carries) == 5  # rows ahead for each convolution, and the maximum


def test_rows_ahead_of_an_input() -> None:
    """An input exists at full length. Its rows are handed on all the same."""
    weights = weights_of(torch.float64)
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)
    gm = trace(program(["conv", "mlp"]), x, *weights)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    ((_, module),) = loop_nodes(rewritten)
    assert [type(output) for output in module.loop.outputs].count(Stored) == 1
    assert len(module.loop.carries) == 2
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)


def multiply_adds(gm: fx.GraphModule) -> int:
    """Of the products that run at full length or in loops, at the captured sizes."""
    loops = sum(module.loop.work for _, module in loop_nodes(gm))
    return loops + sum(products(gm.graph).values())


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_the_last_row_needs_few_rows_before_it(dynamic: bool) -> None:
    """The last layer runs on the rows that the last convolution reads. Where a length is a symbol, it runs on all: the
    sequence may be shorter than the convolution."""
    weights = weights_of(torch.float64)

    def last_row(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
        return (program(["mlp", "causal", "mlp", "conv", "mlp"])(x, *parameters)[0][:, -1:],)

    x = torch.randn(2, 33, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gm = trace(last_row, x, *weights, dynamic=dynamic)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    assert rewritten(x, *weights)[0].shape == (2, 1, HIDDEN)
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)
    assert (multiply_adds(rewritten) < 0.7 * multiply_adds(gm)) == (not dynamic)


def test_compiled_for_every_length() -> None:
    """One body for all lengths, among them some that its mini-sequences do not divide."""
    check_every_length(program(["mlp", "conv", "causal", "conv", "mlp"]))
