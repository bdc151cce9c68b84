"""Scans over tokens: each mini-sequence passes its last row to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import mom_compile
from mom_passes.errors import CannotChunk
from mom_passes.loops.loop import loop_nodes
from mom_passes.rules import Dim, claim_for
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.rule_law import Call, node_of
from tests.rule_samples import floats
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import check_every_length, rewrite, trace

aten = torch.ops.aten

SCANS = {
    "cumsum": lambda x: x.cumsum(1) / x.shape[1],
    "cumprod": lambda x: (1 + x / 100).cumprod(1),
}


def test_a_scan_has_a_claim_only_if_rows_are_computed_in_order() -> None:
    node = node_of(Call(aten.cumsum.default, (floats(2, 6, 5), 1)))
    assert not claim_for(node, Dim(0)).carries
    with pytest.raises(CannotChunk, match="accumulates along it"):
        claim_for(node, Dim(1))
    with pytest.raises(CannotChunk, match="more than tokens"):
        claim_for(node, Dim(1, outer=2), in_order=True)


def test_scans_in_half_precision_are_refused() -> None:
    node = node_of(Call(aten.cumsum.default, (floats(2, 6, 5).bfloat16(), 1)))
    with pytest.raises(CannotChunk, match="rounded"):
        claim_for(node, Dim(1), in_order=True)


def program(names: list[str]) -> Any:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = Weights(*parameters)
        for name in names:
            x = x + SCANS[name](x) if name in SCANS else STEPS[name](x, w)
        return (torch.tanh(x),)

    return run


@random_examples(
    8,
    80,
    RANDOM_PROGRAMS,
    st.lists(st.sampled_from([*SCANS, *SCANS, "linear", "mlp", "causal", "rope"]), min_size=1, max_size=5),
    st.sampled_from(sorted(SCANS)),
    st.integers(8, 23),
    st.integers(2, 7),
    st.booleans(),
)
def test_programs_with_scans_are_equal(names: list[str], last: str, tokens: int, mini: int, dynamic: bool) -> None:
    """Every scan is in a loop, for any operators before and after it."""
    weights = weights_of(torch.float64)
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    gm = trace(program(["mlp", "causal", *names, "mlp", last]), x, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, mini, parameter_names(gm))
    assert not any("cum" in name for name in report.left_out), report.left_out
    assert sum(len(module.loop.carries) for _, module in loop_nodes(rewritten)) >= 1
    for expected, actual in zip(gm(x, *weights), rewritten(x, *weights), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_a_scan_is_no_barrier() -> None:
    """Four scans are in one loop, which stores only the returned value."""
    weights = weights_of(torch.float64)
    names = ["causal", *["mlp", "cumsum"] * 4]
    gm = trace(program(names), torch.randn(2, 17, HIDDEN, dtype=torch.float64), *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    *_, (_, module) = loop_nodes(rewritten)
    assert len(module.loop.carries) == 4
    assert len(module.loop.stored) == 1
    assert not report.left_out


def test_a_scan_of_an_input_is_computed_once() -> None:
    """Positions computed from padding are as cheap as an input, and every layer reads them."""

    def run(x: torch.Tensor, mask: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
        w = Weights(*parameters)
        table = w.table[mask.cumsum(1)]
        for _ in range(2):
            x = STEPS["causal"](STEPS["mlp"](x + table, w), w)
        return (x,)

    weights = weights_of(torch.float64)
    x, mask = torch.randn(2, 17, HIDDEN, dtype=torch.float64), torch.ones(2, 17, dtype=torch.long)
    gm = trace(run, x, mask, *weights)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm)[1:])
    assert [node.target for node in rewritten.graph.nodes].count(aten.cumsum.default) == 1
    torch.testing.assert_close(rewritten(x, mask, *weights)[0], gm(x, mask, *weights)[0], rtol=0, atol=1e-10)


def test_compiled_scans_are_equal_for_every_length() -> None:
    check_every_length(program(["mlp", "causal", "cumsum", "mlp", "cumprod"]))


def test_a_compiled_body_reads_a_carry_after_computing_the_next_value():
    """The next value must not overwrite the received one while other operators still read it."""
    torch._dynamo.reset()

    def program(x: torch.Tensor) -> torch.Tensor:
        total = (x @ x.new_ones(8, 8)).cumsum(1)
        return total * torch.arange(x.shape[1], dtype=x.dtype)[:, None]

    x = torch.randn(2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(program, backend="mom", options={"mini_seq_len": 8, "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), program(x))
    assert mom_compile.reports()[-1].stages
