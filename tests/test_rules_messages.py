"""Messages of refusals: the operator, the node, the dimension and a reason."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from mom_passes.errors import CannotChunk, RuleError
from mom_passes.rules import All, Carry, Claim, Dim, Final, OperatorFacts, Rows, claim_for, register, registered
from mom_passes.rules.registry import facts_of, register_fold
from tests.rule_law import Call, node_of
from tests.rule_samples import floats, integers

aten, prims, mom = torch.ops.aten, torch.ops.prims, torch.ops.mom

x = floats(2, 6, 5)
heads, shared = floats(2, 4, 6, 8), floats(2, 2, 6, 8)
sdpa = aten._scaled_dot_product_flash_attention_for_cpu.default

REFUSALS: list[tuple[Call, Dim, str]] = [
    (Call(aten.sum.dim_IntList, (x, [1], True)), Dim(1), "reduces over it"),
    (Call(aten._softmax.default, (x, -1, False)), Dim(2), "normalises over it"),
    (Call(aten.native_layer_norm.default, (x, [5], None, None, 1e-5)), Dim(2), "normalises over it"),
    (Call(aten.cumsum.default, (x, 1)), Dim(1), "accumulates along it"),
    (Call(aten.sort.default, (x, 1)), Dim(1), "sorts along it"),
    (Call(aten.cat.default, ([x, x], 1)), Dim(1), "concatenates along it"),
    (Call(aten.stack.default, ([x, x], 1)), Dim(1), "stacks along it"),
    (Call(aten.slice.Tensor, (x, 1, 2, 5)), Dim(1), "slices along it"),
    (Call(aten.split.Tensor, (x, 3, 1)), Dim(1), "splits it"),
    (Call(aten.flip.default, (x, [1])), Dim(1), "reverses it"),
    (Call(aten.roll.default, (x, [1], [1])), Dim(1), "rotates it"),
    (Call(aten.roll.default, (x, [1])), Dim(0), "rotates it"),
    (Call(aten.repeat.default, (x, [1, 2, 1])), Dim(1), "repeats it"),
    (Call(aten.constant_pad_nd.default, (x, [0, 0, 1, 0])), Dim(1), "pads it"),
    (Call(aten.unsqueeze.default, (x, 1)), Dim(1), "a new dimension of size 1 has no rows"),
    (Call(aten.view_as_real.default, (torch.complex(x, x),)), Dim(3), "the two parts of one number"),
    (Call(aten.view.default, (x, [4, 15])), Dim(0), r"the reshape \[2, 6, 5\] -> \[4, 15\] mixes rows"),
    (Call(aten.view.dtype, (x, torch.int16)), Dim(2), "elements of another size"),
    (Call(aten.gather.default, (x, 1, integers(1, 2, 5, below=6))), Dim(0), "different lengths along it"),
    (Call(aten.index.Tensor, (x, [x[..., 0] > 0.5])), Dim(0), "known only at run time"),
    (Call(aten.scatter.value, (x, 1, integers(2, 2, 5), 1.0)), Dim(1), "writes anywhere along it"),
    (Call(aten.scatter.value, (x, 1, integers(1, 2, 5), 1.0)), Dim(0), r"the index \[1, 2, 5\] does not cover it"),
    (Call(aten.select_scatter.default, (x, x[:, 0], 1, 0)), Dim(1), "writes one position of it"),
    (Call(aten.slice_scatter.default, (x, x[:, :2], 1, 0, 2)), Dim(1), "writes a range of it"),
    (Call(aten.arange.start_step, (0.0, 1.0, 0.3)), Dim(0), "floating-point"),
    (Call(aten.arange.default, (6,)), Dim(0, outer=2), "not one range of positions"),
    (Call(aten.triu.default, (x,)), Dim(1, inner=2), "not one range of positions"),
    (Call(sdpa, (heads, heads, heads, 0.0, True)), Dim(2), "causal rows need an offset"),
    (Call(sdpa, (heads, heads, heads)), Dim(3), "all channels"),
    (Call(mom.attention.default, (heads, shared, shared, None, 0, True, 1.0)), Dim(1), "share a key head"),
    (Call(mom.attention.default, (heads, heads, heads, None, 0, True, 1.0)), Dim(2, outer=2), "not one range"),
    (Call(aten.relu.default, (x,)), Dim(3), "the output has 3 dimensions"),
    (Call(aten.sum.default, (x,)), Dim(0), "no chunk rule is registered for this operator"),
    (Call(aten.bernoulli.p, (x, 0.5)), Dim(0), "no chunk rule is registered for this operator"),
]


@pytest.mark.parametrize(("call", "dim", "reason"), REFUSALS, ids=[str(call.target) for call, _, _ in REFUSALS])
def test_a_refusal_names_operator_node_dim_and_reason(call: Call, dim: Dim, reason: str) -> None:
    node = node_of(call)
    with pytest.raises(CannotChunk, match=reason) as refusal:
        claim_for(node, dim)
    message = str(refusal.value)
    assert str(call.target) in message
    assert node.name in message
    assert str(dim) in message
    assert refusal.value.node is node


def test_dropout_is_refused() -> None:
    node = node_of(Call(sdpa, (heads, heads, heads)))
    node.args = (*node.args, 0.1)
    with pytest.raises(CannotChunk, match="dropout draws other random numbers"):
        claim_for(node, Dim(2))


def test_the_refusal_of_a_tuple_item_names_the_producer_and_its_reason() -> None:
    producer = node_of(Call(aten.sort.default, (x, 1)))
    item: Any = producer.graph.call_function(operator.getitem, (producer, 1))
    item.meta["val"] = producer.meta["val"][1]
    with pytest.raises(CannotChunk, match=r"getitem.*aten.sort.default.*sorts along it"):
        claim_for(item, Dim(1))


# --- invalid rules ---


NO_OVERLOADS: list[tuple[Any, str]] = [
    (aten.add, r"torch\.ops\.aten\.add is a packet of overloads; register one or more of .*aten\.add\.Tensor"),
    (torch.add, r"and <built-in method add .*> is none; pass torch\.ops\.mylib\.scale_rows\.default"),
    (torch.relu_, "operator overloads"),
    ("aten.add.Tensor", r"'aten\.add\.Tensor' is none"),
    (lambda node, dim: None, "operator overloads"),  # @chunk_rule without parentheses
]


@pytest.mark.parametrize(("target", "message"), NO_OVERLOADS)
def test_register_rejects_targets_that_are_no_overloads(target: Any, message: str) -> None:
    before = registered()
    with pytest.raises(TypeError, match=message):
        register(aten.bernoulli.p, target)(lambda node, dim: Claim((Rows(dim),)))
    assert registered() == before


def test_register_rejects_a_custom_operator_and_suggests_its_overload() -> None:
    @torch.library.custom_op("mom_tests::a_rule_is_wanted", mutates_args=())
    def a_rule_is_wanted(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(TypeError, match=r"a_rule_is_wanted.* is none; pass torch\.ops\."):
        register(a_rule_is_wanted)
    with pytest.raises(TypeError, match="at least one operator overload"):
        register()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (3, "3 cannot be called"),
        (lambda node: Claim((All(),)), r"called with a node and a dim.*takes \(node\)"),
        (lambda: None, r"takes \(\)"),
    ],
)
def test_register_rejects_rules_with_a_wrong_signature(rule: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register(aten.bernoulli.p)(rule)
    assert aten.bernoulli.p not in registered()


def test_chunk_rule_and_fold_rule_can_be_registered_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mom_passes.rules.registry._FACTS", {})
    register_fold("mom_tests::total")(lambda node, dims: Claim(()))
    register("mom_tests::total", recompute=False)(lambda node, dim: Claim(()))
    facts = facts_of("mom_tests.total.default")
    assert facts.rule is not None and facts.fold is not None


def forgets_to_return(node: Any, dim: Dim) -> Any:
    return None


def fails(node: Any, dim: Dim) -> Claim:
    return node.args[7]


NO_CLAIMS: list[tuple[Any, str]] = [
    (forgets_to_return, "returned None; return a Claim, or raise CannotChunk"),
    (lambda node, dim: (dim,), r"returned \(Dim\(.*\),\); return a Claim"),
    (lambda node, dim: Claim((1,)), r"needs \(1,\); expected a tuple of Rows\(dim, before\) and All\(\)"),
    (lambda node, dim: Claim((dim,)), r"a tuple of Rows\(dim, before\)"),
    (lambda node, dim: Claim(Rows(dim)), r"a tuple of Rows\(dim, before\)"),
    (lambda node, dim: Claim((Rows(dim), Rows(dim))), "has 2 needs for 1 tensor operands"),
    (lambda node, dim: Claim((Rows(dim, before=-1),)), "`before` must not be negative"),
    (lambda node, dim: Claim((Rows(dim),), (dim,)), r"expected a tuple of Rows\(dim\), Fold, Final\(carry\) and None"),
    (lambda node, dim: Claim((Rows(dim),), (Final(0),)), "but has 0 carries"),
    (lambda node, dim: Claim((Rows(dim),), carries=(Carry(0, 0),)), "name either the operand that receives it or"),
    (lambda node, dim: Claim((Rows(dim),), carries=(Carry(0, 0, "state"),)), "aten.relu.default has no argument state"),
    (fails, "raised IndexError: tuple index out of range"),
]


@pytest.mark.parametrize(("rule", "fault"), NO_CLAIMS)
def test_a_rule_error_names_the_rule_that_returns_no_valid_claim(rule: Any, fault: str) -> None:
    node = node_of(Call(aten.relu.default, (x,)))
    with pytest.raises(RuleError, match=fault) as refusal:
        OperatorFacts(rule).claim(node, Dim(1))
    assert "the chunk rule of aten.relu.default" in str(refusal.value)
    assert f"asked for {node.name} along dim 1" in str(refusal.value)


@pytest.mark.parametrize(
    "claim",
    [Claim((Rows(Dim(0, 2), before=3),)), Claim((Rows(Dim(0, 2)),), carries=(Carry(0, 0, join=aten.add.Tensor),))],
    ids=["rows ahead", "a carry"],
)
def test_rows_are_handed_on_only_along_a_dimension_that_holds_tokens_alone(claim: Claim) -> None:
    node = node_of(Call(aten.relu.default, (x,)))
    with pytest.raises(CannotChunk, match="along a dimension that holds more than tokens"):
        OperatorFacts(lambda node, dim: claim).claim(node, Dim(0, 2), in_order=True)
