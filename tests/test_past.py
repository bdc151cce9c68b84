"""Rows before those that are computed: handed from mini-sequence to mini-sequence, never kept at full length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from mom_passes.graph.arguments import replace
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import Stored
from mom_passes.rules import All, Claim, Dim, Past, Window, register, registered
from mom_passes.rules.factories import checked
from mom_passes.rules.registry import _FACTS, CannotChunk
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import check_every_length, rewrite, trace

#: Rows before a row that `short_conv` reads.
BEFORE = 3


@torch.library.custom_op("mom_tests::short_conv", mutates_args=())
def short_conv(x: torch.Tensor, weight: torch.Tensor, start: int, first: int) -> torch.Tensor:
    """A causal convolution over four tokens, `[B, S, H]`, for rows from `start` on. Row 0 of `x` is row `first` of the
    sequence; rows before the sequence are not there, whatever they hold."""
    x = x[:, max(0, -first) :]
    padded = F.pad(x, (0, 0, BEFORE, 0))
    summed = sum(padded[:, i : i + x.shape[1]] * weight[i] for i in range(BEFORE + 1))
    return summed[:, start - max(first, 0) :].clone()  # type: ignore[index]


@short_conv.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, start: int, first: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - (start - first), x.shape[2])


OP = torch.ops.mom_tests.short_conv.default


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    """Registered for these tests alone: every registered operator must have samples for the law."""

    @register(OP, recompute=False, work=lambda node: 1)
    def short_conv_rule(node: fx.Node, dim: Dim) -> Claim:
        if checked(node, dim).index != 1 or not dim.plain:
            raise CannotChunk(node, dim, "only along the tokens")

        def edit(args: Any, kwargs: Any, window: Window) -> Any:
            return replace(node.target, args, kwargs, start=window.start, first=window.first[0])

        return Claim((Past(dim, BEFORE), All()), edit=edit)

    yield
    del _FACTS[OP]
    assert OP not in registered()


def conv(x: torch.Tensor, w: Weights) -> torch.Tensor:
    return x + short_conv(x, w.square[: BEFORE + 1], 0, 0)


def program(names: list[str]) -> Any:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = Weights(*parameters)
        for name in names:
            x = conv(x, w) if name == "conv" else STEPS[name](x, w)
        return x, x.amax(1)

    return run


@settings(RANDOM_PROGRAMS, max_examples=40)
@given(
    st.lists(st.sampled_from(["conv", "conv", "linear", "mlp", "causal", "rope"]), min_size=1, max_size=5),
    st.integers(5, 23),
    st.integers(2, 7),
    st.booleans(),
)
def test_any_program_keeps_its_meaning(names: list[str], tokens: int, mini: int, dynamic: bool) -> None:
    """Mini-sequences shorter than the past, and lengths that they do not divide, are among them."""
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


def test_a_bounded_past_is_no_barrier() -> None:
    """Four convolutions are one loop, which stores nothing but what is returned."""
    weights = weights_of(torch.float64)
    gm = trace(program(["mlp", "conv"] * 4), torch.randn(2, 17, HIDDEN, dtype=torch.float64), *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert len(report.stages) == 1
    ((_, module),) = loop_nodes(rewritten)
    assert len(module.loop.stored) == 1
    assert len(module.loop.carries) == 5  # a past for each convolution, and the maximum


def test_a_past_of_an_input() -> None:
    """What is there at full length is handed over row by row all the same."""
    weights = weights_of(torch.float64)
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)
    gm = trace(program(["conv", "mlp"]), x, *weights)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    ((_, module),) = loop_nodes(rewritten)
    assert [type(output) for output in module.loop.outputs].count(Stored) == 1
    assert len(module.loop.carries) == 2
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)


def test_what_reads_rows_before_its_own_is_not_narrowed() -> None:
    """Of the last layer a single row is needed; a convolution in it needs more than that one of its operand."""
    weights = weights_of(torch.float64)

    def last_row(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
        return (program(["mlp", "causal", "conv", "mlp"])(x, *parameters)[0][:, -1:],)

    x = torch.randn(2, 17, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gm = trace(last_row, x, *weights)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    assert rewritten(x, *weights)[0].shape == (2, 1, HIDDEN)
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)


def test_compiled_for_every_length() -> None:
    """One body for all lengths, among them some that its mini-sequences do not divide."""
    check_every_length(program(["mlp", "conv", "causal", "conv", "mlp"]))
