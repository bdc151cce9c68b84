"""States that a call receives from the rows before and hands to the rows after: recurrences written by a user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import fx

import mom_compile
from mom_compile.rules import All, CannotChunk, Carry, Claim, Dim, Final, Last, Rows, chunk_rule
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import CarryIn, CarryOut
from mom_passes.rules import registered
from mom_passes.rules.registry import _FACTS
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.rule_law import Call, check_call
from tests.rule_samples import floats
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import Weighted, rewrite, trace


@torch.library.custom_op("mom_tests::recurrence", mutates_args=())
def recurrence(
    x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`state = decay * state + x` for each row of `[B, S, H]`: the states, and the last one, `[B, H]`."""
    last = torch.zeros_like(x[:, 0]) if state is None else state.clone()
    rows = torch.empty_like(x)
    for i in range(x.shape[1]):
        last = decay * last + x[:, i]
        rows[:, i] = last
    return rows, last


@recurrence.register_fake
def _(x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2])


OP = torch.ops.mom_tests.recurrence.default


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    """Registered for these tests alone: every registered operator must have samples for the law."""

    @chunk_rule(OP, recompute=False, work=lambda node: 1)
    def recurrence_rule(node: fx.Node, dim: Dim) -> Claim:
        state = [All()] * (len(node.all_input_nodes) - 2)
        if dim.index == 1:
            return Claim((Rows(dim), All(), *state), (Rows(dim), Final(0)), carries=(Carry(0, 1, operand="state"),))
        raise CannotChunk(node, dim, "only along the tokens")

    yield
    del _FACTS[OP]
    assert OP not in registered()


@pytest.mark.parametrize("state", [None, floats(2, 5)], ids=["no state", "an initial state"])
def test_the_law_holds_for_a_state_that_is_received(state: torch.Tensor | None) -> None:
    assert check_call(Call(OP, (floats(2, 7, 5), floats(5), state))) == 1


def test_the_law_sees_a_state_that_is_not_handed_on() -> None:
    """A claim without the carry computes every piece from zeros."""
    from tests.rule_law import check_rows, node_of

    node = node_of(Call(OP, (floats(2, 7, 5), floats(5))))
    with pytest.raises(AssertionError, match="not close"):
        check_rows(node, Dim(1), Claim((Rows(Dim(1)), All()), (Rows(Dim(1)), None)))


def program(names: list[str], initial: bool, keeps: bool) -> Any:
    """Layers, of which some are recurrences; their last states are returned, as a cache keeps them."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w, kept = Weights(*parameters), []
        state = x.mean(1) if initial else None
        for name in names:
            if name == "recurrence":
                rows, last = recurrence(x, torch.sigmoid(w.square[0]), state)
                x, kept = x + rows, [*kept, last] if keeps else kept
            else:
                x = STEPS[name](x, w)
        return (torch.tanh(x), *kept)

    return run


@random_examples(
    6,
    60,
    RANDOM_PROGRAMS,
    st.lists(st.sampled_from(["recurrence", "recurrence", "linear", "mlp", "causal", "rope"]), min_size=1, max_size=5),
    st.integers(8, 23),
    st.integers(2, 7),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_program_keeps_its_meaning(
    names: list[str], tokens: int, mini: int, initial: bool, keeps: bool, dynamic: bool
) -> None:
    weights = weights_of(torch.float64)
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    gm = trace(program(["mlp", *names, "recurrence", "mlp"], initial, keeps), x, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, mini, parameter_names(gm))
    assert dynamic or not report.left_out  # a head of symbolic width is not recognised
    assert any(module.loop.carries for _, module in loop_nodes(rewritten))
    for expected, actual in zip(gm(x, *weights), rewritten(x, *weights), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_layers_with_states_are_one_loop_that_returns_the_last_states() -> None:
    weights = weights_of(torch.float64)
    gm = trace(
        program(["mlp", "recurrence"] * 3, False, True), torch.randn(2, 17, HIDDEN, dtype=torch.float64), *weights
    )
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    ((_, module),) = loop_nodes(rewritten)
    assert len(module.loop.carries) == 3
    assert [type(output) for output in module.loop.outputs].count(CarryOut) == 3
    assert len(module.loop.stored) == 1 and not report.left_out


def test_an_initial_state_is_read_by_the_loop_alone() -> None:
    """It is the first value of the carry, and no input of the body beside that."""
    weights = weights_of(torch.float64)
    gm = trace(program(["mlp", "recurrence"], True, True), torch.randn(2, 17, HIDDEN, dtype=torch.float64), *weights)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    *_, (node, module) = loop_nodes(rewritten)
    (at,) = module.loop.carries
    state = module.loop.bind(node)[at]
    assert sum(operand is state for operand in module.loop.bind(node)) == 1
    assert sum(isinstance(port, CarryIn) for port in module.loop.inputs) == 1


def test_a_recurrence_compiles_for_every_length() -> None:
    model = Weighted(program(["mlp", "recurrence", "causal", "recurrence", "mlp"], True, True))
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 8})
    for tokens in (41, 64, 18):
        x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            for expected, actual in zip(model(x), compiled(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert all(report.stages and not report.left_out for report in mom_compile.reports())


@pytest.mark.parametrize("keeps", [False, True], ids=["no state returned", "states returned"])
def test_the_last_row_after_a_recurrence_needs_every_row_before_it(keeps: bool) -> None:
    weights = weights_of(torch.float64)
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)

    def last_row(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, *states = program(["mlp", "recurrence", "mlp"], False, keeps)(x, *parameters)
        return rows[:, -1:], *states

    gm = trace(last_row, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert not report.left_out
    for expected, actual in zip(gm(x, *weights), rewritten(x, *weights), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@torch.library.custom_op("mom_tests::plus_the_third_before", mutates_args=())
def plus_the_third_before(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`x` plus half of the result three rows before, `[B, S, H]`; `before` has the results of three rows ahead."""
    rows = [*before.unbind(1)]
    for i in range(x.shape[1]):
        rows.append(x[:, i] + rows[i] / 2)
    return torch.stack(rows[3:], 1)


@plus_the_third_before.register_fake
def _(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_a_carry_of_several_rows_is_handed_through_shorter_mini_sequences() -> None:
    """Mini-sequences of two rows hand on three: one of them is from the mini-sequence before."""
    target = torch.ops.mom_tests.plus_the_third_before.default
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
        x = STEPS["mlp"](x, Weights(*parameters))
        return (plus_the_third_before(x, x.new_zeros(x.shape[0], 3, x.shape[2])),)

    @chunk_rule(target, recompute=False, work=lambda node: 1)
    def rule(node: fx.Node, dim: Dim) -> Claim:
        if dim.index != 1:
            raise CannotChunk(node, dim, "only along the tokens")
        return Claim((Rows(dim), All()), carries=(Carry(0, Last(3), operand="before"),))

    try:
        assert check_call(Call(target, (floats(2, 7, 5), floats(2, 3, 5)))) == 1
        x = torch.randn(2, 13, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gm = trace(run, x, *weights)
        for mini in (2, 3, 5):
            rewritten, report = rewrite(gm, mini, parameter_names(gm))
            assert report.stages and not report.left_out
            torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)
    finally:
        del _FACTS[target]
