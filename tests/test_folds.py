"""Reductions over tokens: a loop combines the parts of its mini-sequences to the result of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_compile.pipeline import NotWorthwhile
from mom_passes.errors import CannotChunk
from mom_passes.rules import Dim, Rows, fold_for
from mom_passes.rules.folds import COMBINE, PARTS
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.rule_law import Call, check_fold, finished, first_values, next_values, node_of, run_rows
from tests.rule_samples import floats
from tests.shares import at_least, some_and_many
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

aten = torch.ops.aten


def test_a_reduction_over_other_dimensions_is_no_fold():
    node = node_of(Call(aten.sum.dim_IntList, (floats(3, 4, 5), [2])))
    with pytest.raises(CannotChunk, match="does not reduce over it"):
        fold_for(node, (Dim(1),))
    with pytest.raises(CannotChunk, match="no rule computes its result from parts"):
        fold_for(node_of(Call(aten.cumsum.default, (floats(3, 4), 1))), (Dim(1),))


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ((None, Dim(1)), "does not contract it"),
        ((Dim(0), Dim(0)), "does not contract it"),
        ((Dim(1, outer=2), Dim(0, inner=2)), "different layouts"),
    ],
)
def test_a_product_is_a_fold_only_if_it_contracts_the_tokens_of_both_operands(dims, reason):
    node = node_of(Call(aten.mm.default, (floats(3, 8), floats(8, 5))))
    assert fold_for(node, (Dim(1), Dim(0))).needs == (Rows(Dim(1)), Rows(Dim(0)))
    with pytest.raises(CannotChunk, match=reason):
        fold_for(node, dims)


def test_folds_of_half_precision_products_are_refused():
    node = node_of(Call(aten.mm.default, (floats(3, 8).bfloat16(), floats(8, 5).bfloat16())))
    with pytest.raises(CannotChunk, match="rounded"):
        fold_for(node, (Dim(1), Dim(0)))


#: Arguments for each overload, reducing over dimension 1 among others.
ARGUMENTS = {
    "default": [()],
    "dim_IntList": [([1],), ([0, 1],), ([1, 2], True), (None,)],
    "dim": [([1],), ([0, 1], True)],
    "dims": [([1],), ([1, 2], True)],
    "dim_int": [(1,), (1, True)],
}
ARGUMENTS_OF = {aten.any.dim: [(1,), (1, True)], aten.all.dim: [(1,), (1, True)]}
ARGUMENTS_OF |= {aten.amax.default: [([1],), ([0, 1, 2],), ([],)], aten.amin.default: [([1], True)]}

CASES = [
    (target, arguments) for target in COMBINE for arguments in ARGUMENTS_OF.get(target, ARGUMENTS[target._overloadname])
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize(("target", "arguments"), CASES, ids=[f"{t}{a}" for t, a in CASES])
def test_folds_equal_the_reduction_in_every_dtype(target, arguments, dtype):
    """A half-precision total is accumulated in float32: it equals the rounded reduction in float64."""
    if target in PARTS and not dtype.is_floating_point:
        pytest.skip("a mean needs floating-point numbers")
    x = (torch.randn(3, 11, 4, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    node = node_of(Call(target, (x, *arguments)))
    claim = fold_for(node, (Dim(1),))
    check_fold(node, claim)
    received = first_values(node, claim, Dim(1))
    for start, count in ((0, 4), (4, 5), (9, 2)):
        received = next_values(claim, Dim(1), run_rows(node, claim, start, count, received), received)
    expected = target(x.double() if dtype == torch.bfloat16 else x, *arguments)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-5}.get(dtype, 1e-12)
    total = finished(claim.outputs[0], received[0])
    torch.testing.assert_close(total.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


REDUCTIONS = {
    "mean": lambda x: x.mean(1),
    "mean of all": lambda x: x.mean(),
    "sum kept": lambda x: x.sum(1, keepdim=True),
    "sum of all": lambda x: x.sum(),
    "largest": lambda x: x.amax(1),
    "smallest of all": lambda x: x.min(),
    "count": lambda x: (x > 0).sum(1),
    "any": lambda x: (x > 1).any(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "variance": lambda x: x.var(1),
    "softmax pooled": lambda x: (torch.softmax(x[..., :1], 1) * x).sum(1),
    "used twice": lambda x: x.mean(1) + x.amax(1),
    "norm": lambda x: x / x.pow(2).sum((1, 2), keepdim=True).sqrt(),
}


FOLDED_STEPS = ["linear", "mlp", "causal", "layer_norm", "rope", "merged"]


def check(names, reduction, batch, tokens, dtype, dynamic):
    """Rewritten equals original; returns whether the reduction was computed in a loop."""
    weights = weights_of(dtype)

    def program(x, *parameters):
        for name in names:
            x = STEPS[name](x, Weights(*parameters))
        return (REDUCTIONS[reduction](x),)

    x = torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    gm = trace(program, x, *weights, dynamic=dynamic)
    (expected,) = gm(x, *weights)
    try:
        rewritten, report = rewrite(gm, 4, parameter_names(gm))
    except NotWorthwhile:
        return False
    (actual,) = rewritten(x, *weights)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    in_a_loop = any(stage.folds for stage in report.stages)
    if reduction in ("count", "any") and dtype == torch.bfloat16:
        return in_a_loop  # rounding decides whether a value is above the threshold
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    scale = max(1.0, float(expected.double().abs().max()))
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)
    return in_a_loop


@some_and_many(16, 40)
def test_random_programs_with_reductions_are_equal(runs):
    with at_least(0.9, "reduce in a loop") as folded:

        @settings(RANDOM_PROGRAMS, max_examples=runs)
        @given(
            st.lists(st.sampled_from(FOLDED_STEPS), min_size=1, max_size=5),
            st.sampled_from(sorted(REDUCTIONS)),
            st.integers(1, 3),
            st.integers(5, 19),
            st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
            st.booleans(),
        )
        def keeps_its_meaning(names, reduction, batch, tokens, dtype, dynamic):
            folded.append(check(["linear", *names], reduction, batch, tokens, dtype, dynamic))

        keeps_its_meaning()


@pytest.mark.parametrize("reduction", ["mean", "sum of all", "largest", "count"])
def test_the_operand_of_a_reduction_is_not_kept_at_full_length(reduction):
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        w = Weights(*parameters)
        return (REDUCTIONS[reduction](STEPS["mlp"](STEPS["causal"](x, w), w)),)

    gm = trace(program, torch.randn(2, 13, HIDDEN, dtype=torch.float64), *weights)
    _, report = rewrite(gm, 4, parameter_names(gm))
    assert not report.left_out
    assert report.stages[-1].folds and not report.stages[-1].crossing


CONTRACTIONS = {
    "of each sequence": lambda x: x.transpose(1, 2) @ x,
    "of all sequences": lambda x: x.flatten(0, 1).t() @ x.flatten(0, 1),
    "with an input": lambda x: torch.arange(x.shape[1], dtype=x.dtype)[None] @ x[0],
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_a_product_that_contracts_the_tokens_is_summed_in_the_loop(contraction, dynamic):
    """Linear attention without a mask is such a product. Neither of its operands exists at full length."""
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        w = Weights(*parameters)
        return (CONTRACTIONS[contraction](STEPS["mlp"](STEPS["linear"](x, w), w)),)

    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm = trace(program, x, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)
    assert report.stages[-1].folds and not report.stages[-1].crossing and not report.left_out


def test_a_bfloat16_mean_is_summed_in_float32():
    """In bfloat16, a sum of thousands of ones stops at 256."""
    weights = weights_of(torch.bfloat16)

    def program(x, *parameters):
        return ((STEPS["linear"](x, Weights(*parameters)) * 0 + 1).sum(1),)

    x = torch.zeros(1, 3000, HIDDEN, dtype=torch.bfloat16)
    gm = trace(program, x, *weights)
    (total,) = rewrite(gm, 4, parameter_names(gm))[0](x, *weights)
    assert torch.equal(total, torch.full_like(total, 3000))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_a_loss_with_ignored_labels_is_equal_and_keeps_no_logits(reduction, ignored):
    weights = weights_of(torch.float64)
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(26).view(2, 13)
    labels[{"none": slice(0, 0), "some": slice(0, 1), "all": slice(0, 2)}[ignored]] = -100

    def program(x, labels, *parameters):
        w = Weights(*parameters)
        hidden = STEPS["mlp"](STEPS["causal"](x, w), w)
        logits = hidden @ w.table.t()
        return (F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=reduction),)

    gm = trace(program, x, labels, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm)[1:])
    actual, expected = rewritten(x, labels, *weights)[0], gm(x, labels, *weights)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    logits = 64 * 4
    assert all(size < logits for stage in report.stages for size in stage.bytes_per_token)
