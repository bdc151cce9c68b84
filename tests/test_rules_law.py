"""The law of chunk rules: rows computed from slices of the operands equal rows of the whole result."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import pytest
import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.ops.collectives import COLLECTIVES
from mom_passes.ops.rows import LAID_OUT
from mom_passes.rules import All, Claim, Dim, Rows, Window, claim_for, registered
from mom_passes.rules.factories import output_shape, pointwise_claim
from mom_passes.rules.slicing import take
from mom_passes.rules.view import view_candidates
from tests.rule_law import Call, accepts, check_call, check_folds, check_rows, node_of, run_rows
from tests.rule_samples import CUDA_ONLY, all_samples, floats, integers, sdpa_for_cuda

aten = torch.ops.aten

#: `getitem` takes a tuple, which only another operator makes; `laid_out` takes the result of an operator with a rule.
#: Both have tests of their own (the second in test_claims.py).
OF_RESULTS = (operator.getitem, LAID_OUT)
#: Collectives obey the law on two ranks, in test_ranks.py.
ELSEWHERE = {*OF_RESULTS, *COLLECTIVES}
TARGETS = sorted((t for t, known in registered().items() if known.rule and t not in ELSEWHERE), key=str)


def samples_of(target: Any) -> list[Call]:
    if target in CUDA_ONLY:
        if not torch.cuda.is_available():
            pytest.skip("this attention kernel exists on CUDA devices only")
        return sdpa_for_cuda(target)
    return all_samples().get(target, [])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rows_computed_from_slices_are_rows_of_the_whole_result(target: Any) -> None:
    calls = samples_of(target)
    assert calls, f"{target} has a chunk rule but no sample: write one in rule_samples.py"
    accepted = sum(check_call(call) for call in calls)
    assert accepted, f"the rule of {target} refuses every dim of every sample"


@pytest.mark.parametrize("target", sorted((t for t, known in registered().items() if known.fold), key=str), ids=str)
def test_folded_parts_equal_the_whole_result(target: Any) -> None:
    """The law of fold rules, on the samples."""
    assert sum(map(check_folds, samples_of(target))), f"the fold rule of {target} refuses every dim of every sample"


def test_pointwise_rules_accept_every_dim() -> None:
    """The law allows a rule to refuse. A pointwise rule must not, since broadcasting works along any dim."""
    rules = registered()
    calls = [call for target, some in all_samples().items() for call in some if rules[target].rule is pointwise_claim]
    nodes = [node_of(call) for call in calls]
    refused = [
        (str(call), index)
        for call, node in zip(calls, nodes, strict=True)
        for index in range(len(output_shape(node)))
        if not accepts(node, Dim(index))
    ]
    assert len(calls) > 1000
    assert not refused


@pytest.mark.parametrize(
    ("call", "accepted"),
    [
        (Call(aten.mm.default, (floats(4, 3), floats(3, 5))), [0, 1]),
        (Call(aten.sum.dim_IntList, (floats(2, 4, 3), [1])), [0, 1]),
        (Call(aten.sum.dim_IntList, (floats(2, 4, 3), [1], True)), [0, 2]),
        # Splitting a dimension: its inner part is a folded dim of the operand, with the outer part before it.
        (Call(aten.view.default, (floats(2, 4, 6), [2, 4, 3, 2])), [0, 1, 2, 3]),
        (Call(aten.view.default, (floats(2, 4, 6), [4, 12])), []),
        (Call(aten.expand.default, (floats(2, 1, 4, 3), [2, 5, 4, 3])), [0, 1, 2, 3]),
        (Call(aten.embedding.default, (floats(9, 3), integers(2, 4))), [0, 1, 2]),
        (Call(aten.gather.default, (floats(2, 4, 9), 2, integers(2, 4, 1))), [0, 1, 2]),
        (Call(aten.cat.default, ([floats(2, 4, 3), floats(2, 4, 3)], -1)), [0, 1]),
        (Call(torch.ops.mom.attention.default, (*[floats(2, 4, 6, 8)] * 3, None, 0, True, 1.0)), [0, 1, 2]),
    ],
    ids=lambda value: str(value.target) if isinstance(value, Call) else None,
)
def test_rules_accept_the_dims_that_decoders_need(call: Call, accepted: list[int]) -> None:
    node = node_of(call)
    assert [index for index in range(len(output_shape(node))) if accepts(node, Dim(index))] == accepted


def test_the_law_rejects_wrong_claims() -> None:
    """Claims with one error each."""
    node = node_of(Call(aten.softmax.int, (floats(4, 6), 1)))
    with pytest.raises(AssertionError, match="not close"):
        check_rows(node, Dim(1), Claim((Rows(Dim(1)),)))
    node = node_of(Call(aten.add.Tensor, (floats(4, 6), floats(4, 6))))
    with pytest.raises(AssertionError, match="shape"):
        check_rows(node, Dim(0), Claim((Rows(Dim(0)), All())))
    node = node_of(Call(aten.triu.default, (floats(4, 6),)))
    with pytest.raises(AssertionError, match="not close"):
        check_rows(node, Dim(0), Claim((Rows(Dim(0)),)))


def of_three(x: torch.Tensor, skip: int = 0) -> torch.Tensor:
    """Each row with the two before it, `[B, S, H]`; the first `skip` rows are only read."""
    before = torch.nn.functional.pad(x, (0, 0, 2, 0))
    return (before[:, :-2] + before[:, 1:-1] + x)[:, skip:]


@pytest.mark.parametrize(("rows", "enough"), [(1, False), (2, True), (5, True)])
def test_the_law_requires_enough_rows_before(rows: int, enough: bool) -> None:
    """The operand has zeros before the first row of the sequence, and `Window.first` is its first row."""
    node = node_of(Call(of_three, (floats(2, 7, 3),)))

    def edit(args: Any, kwargs: Any, window: Window) -> Any:
        return (args[0], window.start - window.first[0]), kwargs

    claim = Claim((Rows(Dim(1), before=rows),), edit=edit)
    with contextlib.nullcontext() if enough else pytest.raises(AssertionError, match="not close"):
        check_rows(node, Dim(1), claim)


# Items of tuples


def getitem_of(producer: fx.Node, item: int) -> fx.Node:
    node = producer.graph.call_function(operator.getitem, (producer, item))
    node.meta["val"] = producer.meta["val"][item]
    return node


def tuple_calls() -> list[Call]:
    calls = [call for target, some in all_samples().items() if target not in CUDA_ONLY for call in some]
    return [call for call in calls if [str(one.type) for one in call.target._schema.returns] != ["Tensor"]]


def test_a_claim_of_a_tuple_item_needs_rows_of_the_tuple() -> None:
    """The claim of an item gives a dim of the tuple, and the producer's claim for this dim computes the item's rows."""
    seen = set()
    for call in tuple_calls():
        producer = node_of(call)
        for item, value in enumerate(producer.meta["val"]):
            node = getitem_of(producer, item)
            for index in range(value.dim() if value is not None and value.numel() else 0):
                dim = Dim(index)
                try:
                    (need,) = claim_for(node, dim).needs
                    assert isinstance(need, Rows)
                    claim = claim_for(producer, need.dim)  # refused for rows that are computed in order
                except CannotChunk:
                    continue
                rows = run_rows(producer, claim, 0, 1)[item]
                torch.testing.assert_close(rows, take(value, dim, 0, 1), equal_nan=True)
                seen.add(call.target)
    assert {aten.split.Tensor, aten.sort.default, aten.var_mean.correction, aten.native_layer_norm.default} <= seen


# Folded dimensions


@pytest.mark.parametrize(
    ("shape", "dim", "view", "expected"),
    [
        ([2, 6, 5], Dim(1), [12, 5], Dim(0, outer=2)),
        ([12, 5], Dim(0, outer=2), [2, 6, 5], Dim(1)),
        ([6, 5], Dim(0), [30], Dim(0, inner=5)),
        ([30], Dim(0, inner=5), [6, 5], Dim(0)),
        ([2, 6, 5], Dim(1), [60], Dim(0, outer=2, inner=5)),
        ([60], Dim(0, outer=2, inner=5), [2, 6, 5], Dim(1)),
        ([60], Dim(0, outer=2, inner=5), [2, 30], Dim(1, inner=5)),
        ([2, 30], Dim(1, inner=5), [12, 5], Dim(0, outer=2)),
        ([2, 6, 5], Dim(0), [12, 5], Dim(0, inner=6)),
        ([2, 6, 8], Dim(1), [2, 6, 4, 2], Dim(1)),
        ([2, 3, 6, 4], Dim(2), [6, 6, 4], Dim(1)),
    ],
)
def test_views_fold_and_unfold_the_token_dimension(shape: list[int], dim: Dim, view: list[int], expected: Dim) -> None:
    """The dims of operand and output are found from each other, and the claim keeps the law."""
    node = node_of(Call(aten.view.default, (floats(*shape), view)))
    assert view_candidates(node, (dim,)) == [expected]
    claim = claim_for(node, expected)
    assert claim.needs == (Rows(dim),)
    check_rows(node, expected, claim)


@pytest.mark.parametrize(("shape", "view", "dim"), [([6, 4], [4, 6], Dim(0)), ([5, 6], [30], Dim(0, inner=4))])
def test_views_that_mix_rows_are_refused(shape: list[int], view: list[int], dim: Dim) -> None:
    with pytest.raises(CannotChunk, match="mixes rows"):
        claim_for(node_of(Call(aten.view.default, (floats(*shape), view))), dim)


def test_an_operand_that_appears_twice_has_two_needs() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = floats(4, 4)
    node = graph.call_function(aten.mm.default, (x, x))
    node.meta["val"] = floats(4, 4) @ floats(4, 4)
    assert claim_for(node, Dim(0)).needs == (Rows(Dim(0)), All())
    assert claim_for(node, Dim(1)).needs == (All(), Rows(Dim(1)))
