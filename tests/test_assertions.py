"""Operators that return nothing, assertions and messages, stay in a program with loops and run in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from mom_compile import reports
from mom_passes.errors import PassError
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.values import returns_nothing
from mom_passes.loops.loop import loops
from mom_passes.loops.ports import CarryOut
from mom_passes.verify import Contract, verify
from tests.programs import ATTENTION, HIDDEN, ROWWISE, Weights, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

W = weights_of(torch.float64)
MINI = {"mini_seq_len": 8, "strict": True}

Program = Callable[..., Any]


def block(x: torch.Tensor, w: Weights = W) -> torch.Tensor:
    return ROWWISE["mlp"](ATTENTION["causal"](x, w), w)


def values(tokens: int = 40) -> torch.Tensor:
    return torch.randn(2, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def ids(tokens: int = 40) -> torch.Tensor:
    return torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(tokens))


# Where assertions come from: programs of two blocks. Those in `FAILING` raise where the input is too large.


def on_hidden_states(x: torch.Tensor, w: Weights = W) -> torch.Tensor:
    y = block(x, w)
    torch._assert_async((y < 1e6).all(), "out of range")
    return block(y, w)


def on_the_result(x: torch.Tensor, w: Weights = W) -> torch.Tensor:
    y = block(block(x, w), w)
    torch._assert_async((y < 1e6).all(), "out of range")
    return y


def on_an_input(x: torch.Tensor, w: Weights = W) -> torch.Tensor:
    torch._assert_async((x < 1e6).all(), "out of range")
    return block(block(x, w), w)


def experts_by_one_hot(x: torch.Tensor, w: Weights = W) -> torch.Tensor:
    y = block(x, w)
    scores, chosen = torch.softmax(y @ w.square, -1).topk(2, -1)
    gates = (F.one_hot(chosen, HIDDEN) * scores[..., None]).sum(-2)
    return block(y * gates, w)


def ahead_of_the_last_row(x: torch.Tensor, w: Weights = W) -> torch.Tensor:
    """The last block is computed for one row, and what is asserted of the second for all."""
    y = block(block(x, w), w)
    torch._assert_async((y < 1e6).all(), "out of range")
    return block(y, w)[:, -1:]


FAILING = [on_hidden_states, on_the_result, on_an_input, ahead_of_the_last_row]


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("program", [*FAILING, experts_by_one_hot])
def test_a_graph_with_assertions_has_loops(program: Program) -> None:
    """One that is captured for a length, and one for all lengths."""
    fast = torch.compile(program, backend="mom", options=MINI)
    with torch.no_grad():
        for tokens in (40, 61):
            torch.testing.assert_close(fast(values(tokens)), program(values(tokens)), rtol=1e-9, atol=1e-9)
        assert len(reports()) == 2
        assert all(report.stages for report in reports())
        assert program is ahead_of_the_last_row or not any(report.work_outside for report in reports())
        if program in FAILING:
            with pytest.raises(RuntimeError, match="out of range"):
                fast(values() + 1e9)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_one_hot_of_an_input_is_checked() -> None:
    def program(tokens: torch.Tensor, classes: int) -> torch.Tensor:
        return block(block(F.one_hot(tokens, classes).to(torch.float64)[..., :HIDDEN] @ W.square))

    fast = torch.compile(program, backend="mom", options=MINI)
    with torch.no_grad():
        for tokens in (40, 61):
            torch.testing.assert_close(fast(ids(tokens), 64), program(ids(tokens), 64), rtol=1e-9, atol=1e-9)
        assert all(report.stages and not report.work_outside and not report.left_out for report in reports())
        with pytest.raises(RuntimeError, match="smaller than num_classes"):
            fast(ids() + 64, 64)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_a_check_of_sizes_stays() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[1] < 4096)
        return block(block(x))

    fast = torch.compile(program, backend="mom", options=MINI)
    with torch.no_grad():
        for tokens in (40, 61):
            torch.testing.assert_close(fast(values(tokens)), program(values(tokens)), rtol=1e-9, atol=1e-9)
    assert reports()[-1].stages and not reports()[-1].work_outside
    assert any("_assert_scalar" in str(node.target) for node in reports()[-1].graph.graph.nodes)


# What holds of the rewritten graph


def traced(program: Program) -> fx.GraphModule:
    return trace(lambda x, *weights: program(x, Weights(*weights)), values(), *W)


def rewritten(program: Program) -> fx.GraphModule:
    gm = traced(program)
    new, report = rewrite(gm, 8, parameter_names(gm))
    assert report.stages
    return new


@pytest.mark.parametrize("program", [on_hidden_states, on_the_result])
def test_what_is_asserted_of_rows_is_folded_in_their_loop(program: Program) -> None:
    """Not even a flag for each token is at full length."""
    new = rewritten(program)
    folded = [out for _, loop in loops(new) for out in loop.outputs if isinstance(out, CarryOut)]
    assert len(folded) == 1
    checks = [node for node in new.graph.nodes if returns_nothing(node)]
    assert checks
    assert not any(40 in node.meta["val"].shape for check in checks for node in check.all_input_nodes)


def test_an_assertion_runs_as_soon_as_its_operand_is_there() -> None:
    """Behind the loop of the first block, before that of the second one's queries."""
    kinds = [node.op for node in rewritten(on_hidden_states).graph.nodes if is_step(node)]
    assert kinds.index("call_function") < len(kinds) - 1


def is_step(node: fx.Node) -> bool:
    return node.op == "call_module" or returns_nothing(node)


@torch.library.custom_op("mom_tests::note", mutates_args=())
def note(x: torch.Tensor, text: str) -> None:
    NOTED.append(text)


@note.register_fake
def _(x: torch.Tensor, text: str) -> None:
    return None


NOTED: list[str] = []
fx.node.has_side_effect(torch.ops.mom_tests.note.default)


def three_notes(x: torch.Tensor, w: Weights = W) -> torch.Tensor:
    y = block(x, w)
    note((y > 0).any(), "of the first block")
    note(x.sum(), "of the input")
    z = block(y, w)
    note((z > 0).any(), "of the second")
    return z


def test_they_run_in_their_order() -> None:
    """One that could run earlier waits for those before it."""
    new = rewritten(three_notes)
    NOTED.clear()
    new(values(), *W)
    assert NOTED == ["of the first block", "of the input", "of the second"]


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_they_run_before_writes_to_the_inputs() -> None:
    """What fails has left the caller's buffer alone, as with stock Inductor."""

    def program(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        y = block(x)
        state.add_(1)
        torch._assert_async((y < 1e6).all(), "out of range")
        return block(y)

    fast = torch.compile(program, backend="mom", options=MINI)
    state = torch.zeros(HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        fast(values(), state)
        assert state.tolist() == [1.0] * HIDDEN and reports()[-1].stages
        with pytest.raises(RuntimeError, match="out of range"):
            fast(values() + 1e9, state)
    assert state.tolist() == [1.0] * HIDDEN


def test_no_pass_may_lose_one() -> None:
    gm = traced(on_hidden_states)
    contract, broken = Contract.of(gm), copy_graph(gm)
    broken.graph.erase_node(next(node for node in broken.graph.nodes if returns_nothing(node)))
    with pytest.raises(PassError, match="_assert_async"):
        verify(broken, contract)


def test_compiled_assertions_hold() -> None:
    fast = torch.compile(on_hidden_states, backend="mom", options=MINI)
    with torch.no_grad():
        torch.testing.assert_close(fast(values()), on_hidden_states(values()), rtol=1e-9, atol=1e-9)
        assert reports()[-1].stages and not reports()[-1].eager_pieces
        with pytest.raises(RuntimeError, match="out of range"):
            fast(values() + 1e9)
