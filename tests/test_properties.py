"""A random program, a random split: rewritten equals original."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mom_compile.pipeline import NotWorthwhile
from tests.programs import ATTENTION, HIDDEN, LAST, MIXING, ROWWISE, SEVERAL, STEPS, Weights, weights_of
from tests.shares import at_least, some_and_many
from tests.tracing import rewrite, trace
from tests.writes_seen import bytes_held, writes_seen

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}

#: No shrinking: a program of seven lines is short enough to read, and each attempt traces it anew.
RANDOM_PROGRAMS = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)

#: Whatever else they do, all begin with a product: nothing is worth rewriting without one.
programs = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6).map(lambda names: ["linear", *names])
rowwise_programs = st.lists(st.sampled_from(sorted({**ROWWISE, **ATTENTION})), min_size=2, max_size=7).map(
    lambda names: ["linear", *names]
)
#: Tokens, and at most how many of them a mini-sequence has: mostly fewer than there are.
cuts = st.integers(3, 23).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(2, max(2, tokens // 2))))
batches = st.integers(1, 3)


def check(names: list[str], last: str, batch: int, tokens: int, mini: int, dtype: torch.dtype, dynamic: bool) -> int:
    """Rewritten equals original; returns how many values live at full length (0: nothing was rewritten)."""
    weights = weights_of(dtype)

    def program(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = STEPS[name](x, Weights(*parameters))
        return LAST[last](x, Weights(*parameters))

    x = torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    gm = trace(program, x, *weights, dynamic=dynamic)
    expected = gm(x, *weights)
    try:
        rewritten, report = rewrite(gm, mini, parameter_names(gm))
    except NotWorthwhile:
        return 0  # a graph left alone is right by construction
    actual = rewritten(x, *weights)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    return len(report.full_length_values)


def parameter_names(gm: torch.fx.GraphModule) -> tuple[str, ...]:
    """All inputs but the first."""
    return tuple(n.name for n in gm.graph.nodes if n.op == "placeholder")[1:]


@some_and_many(20, 400)
def test_any_program_keeps_its_meaning(runs):
    with at_least(0.8, "have loops") as rewritten:

        @settings(RANDOM_PROGRAMS, max_examples=runs)
        @given(programs, st.sampled_from(sorted(LAST)), batches, cuts, st.booleans())
        def keeps_its_meaning(names, last, batch, cut, dynamic):
            rewritten.append(check(names, last, batch, *cut, torch.float64, dynamic) > 0)

        keeps_its_meaning()


@some_and_many(12, 30)
def test_other_dtypes_keep_their_meaning(runs):
    with at_least(0.9, "have loops") as rewritten:

        @settings(RANDOM_PROGRAMS, max_examples=runs)
        @given(rowwise_programs, batches, cuts, st.sampled_from([torch.float32, torch.bfloat16]))
        def keeps_its_meaning(names, batch, cut, dtype):
            rewritten.append(check(names, "all", batch, *cut, dtype, False) > 0)

        keeps_its_meaning()


def check_aliases(names: list[str], several: str, batch: int, tokens: int, mini: int, dynamic: bool) -> bool:
    """Outputs equal those of the program, share what these share and hold no more; whether loops compute them."""
    weights = weights_of(torch.float64)

    def program(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for name in names:
            x = STEPS[name](x, Weights(*parameters))
        return SEVERAL[several](x)

    x = torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    gm = trace(program, x, *weights, dynamic=dynamic)
    try:
        rewritten, report = rewrite(gm, mini, parameter_names(gm))
    except NotWorthwhile:
        return False
    expected, actual = gm(x, *weights), rewritten(x, *weights)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10, equal_nan=True)
    assert bytes_held(actual) <= bytes_held(expected)
    assert writes_seen(actual) == writes_seen(expected)
    return bool(report.stages)


@some_and_many(12, 1000)
def test_outputs_share_what_they_share_in_eager_mode(runs: int) -> None:
    with at_least(0.8, "have loops") as rewritten:

        @settings(RANDOM_PROGRAMS, max_examples=runs)
        @given(programs, st.sampled_from(sorted(SEVERAL)), batches, cuts, st.booleans())
        def share_alike(names, several, batch, cut, dynamic):
            rewritten.append(check_aliases(names, several, batch, *cut, dynamic))

        share_alike()


@pytest.mark.parametrize("name", sorted(MIXING))
@pytest.mark.parametrize("batch", [1, 2])
def test_programs_that_mix_tokens_are_right(name, batch):
    check(["linear", "causal", name, "mlp", "causal", name], "all", batch, 13, 4, torch.float64, False)


@pytest.mark.parametrize("name", sorted(ROWWISE))
def test_every_rowwise_step_runs_inside_loops(name):
    """Not merely right: between two attentions nothing may fall out of the loops."""
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        w = Weights(*parameters)
        x = ATTENTION["causal"](x, w)
        return ATTENTION["causal"](ROWWISE[name](x @ w.square, w), w)

    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    gm = trace(program, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)
    assert not report.left_out
    # The first attention reads keys straight from the input; the second waits for the first stage.
    assert [s.name for s in report.stages] == ["stage_0", "stage_1"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_rows_put_before_a_sequence_or_behind_it_belong_to_it(before):
    """A prompt of embeddings, a classifier's token: but for putting them there, all runs in loops."""
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        w = Weights(*parameters)
        rows = w.table[:3].expand(x.shape[0], -1, -1)
        x = torch.cat([rows, x] if before else [x, rows], 1)
        for step in ("causal", "mlp", "causal", "mlp"):
            x = STEPS[step](x, w)
        return x[:, 3:] @ w.square

    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    gm = trace(program, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)
    assert [name.partition(" (")[0] for name in report.left_out] == ["aten.cat.default"]
    assert len(report.stages) == 2 and not report.work_outside


def test_the_table_of_programs_has_at_least_25_operators():
    weights = weights_of(torch.float64)
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    operators = set()
    for step in STEPS.values():
        gm = trace(lambda value, *w, step=step: step(value, Weights(*w)), x, *weights)
        operators |= {n.target for n in gm.graph.nodes if n.op == "call_function"}
    assert len(operators) >= 25
