"""Strides that operators claim, and those they return: compiled code depends on no claim that is not true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import mom_compile
from mom_compile.lowering.results import lay_out_results
from mom_compile.torch_compat.inductor import is_called
from mom_passes.graph.aliasing import may_be_a_view
from mom_passes.graph.edit import strides_differ
from mom_passes.graph.real_results import check_result_strides
from mom_passes.ops.rows import COPY_ROWS, laid_out
from mom_passes.rules import Claim, Dim, Rows, has_own_rule, register, registered, registry
from tests.captured import capture
from tests.rule_law import Call, node_of
from tests.rule_samples import CUDA_ONLY, all_samples, floats

aten = torch.ops.aten

HIDDEN = 16


# Operators whose claims are false


def from_the_last_dimension(x: torch.Tensor) -> torch.Tensor:
    """A copy that is laid out from its last dimension to its first."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def _claims_to_be_dense(name: str, returns: Callable[..., Any]) -> Any:
    """An operator whose fake kernel claims the strides of its operand."""
    made = torch.library.custom_op(f"mom_claims::{name}", returns, mutates_args=(), schema="(Tensor x) -> Tensor")
    made.register_fake(torch.empty_like)
    return made


doubled = _claims_to_be_dense("doubled", lambda x: from_the_last_dimension(x * 2))
normed = _claims_to_be_dense("normed", lambda x: from_the_last_dimension(x / x.norm(dim=-1, keepdim=True)))
true = _claims_to_be_dense("true", lambda x: x * 2)


@torch.library.custom_op("mom_claims::two", mutates_args=())
def two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return from_the_last_dimension(x + 1), from_the_last_dimension(x - 1)


@two.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@pytest.fixture(autouse=True, scope="module")
def rule_of_normed() -> Iterator[None]:
    """A rule of this file alone: the rule law asks for samples of every registered operator."""
    target = torch.ops.mom_claims.normed.default

    @register(target)
    def rows(node: fx.Node, dim: Dim) -> Claim:
        return Claim((Rows(dim),))

    yield
    del registry._FACTS[target]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)


def attends(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q, k = heads(x @ w), heads(x)
    return x + F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).reshape(x.shape)


PROGRAMS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a result": lambda x, w: attends(doubled(attends(x @ w, w)), w),
    "heads of a result": lambda x, w: folded(heads(doubled(x @ w)) @ w[:8, :8]) @ w,
    "a result and its channels": lambda x, w: (doubled(x @ w), doubled(x @ w)[..., :4] @ w[:4]),
    "two results": lambda x, w: attends(torch.mul(*two(attends(x @ w, w))), w) @ w,
    "rows in a loop": lambda x, w: attends(normed(attends(x @ w, w)), w) @ w,
    "one of the other": lambda x, w: doubled(two(doubled(x @ w))[1]) @ w,
}


def folded(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def given() -> tuple[torch.Tensor, torch.Tensor]:
    return floats(2, 41, HIDDEN).float(), floats(HIDDEN, HIDDEN).float() / 4


def check(program: Callable[..., Any], *inputs: torch.Tensor, **how: Any) -> Any:
    """A program, compiled, equals itself; the report of its graph."""
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="mom", options={"strict": True, "mini_seq_len": 8}, **how)
    with torch.no_grad():
        for actual, expected in zip(tree_leaves(compiled(*inputs)), tree_leaves(program(*inputs)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    (report,) = mom_compile.reports()
    assert report.stages and not report.eager_pieces
    return report


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any length"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_false_claim_does_no_harm(name: str, dynamic: bool, eager_pieces: None) -> None:
    check(PROGRAMS[name], *given(), dynamic=dynamic)


def test_a_false_claim_does_no_harm_to_compiled_code() -> None:
    check(lambda x, w: (PROGRAMS["rows in a loop"](x, w), PROGRAMS["two results"](x, w)), *given())


def test_a_fused_encoder_layer_behind_a_convolution(eager_pieces: None) -> None:
    """One operator a layer, which claims its operand's strides and returns a contiguous value."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(HIDDEN, 4, 32, batch_first=True)
            self.front, self.layers = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1), nn.TransformerEncoder(layer, 2)
            self.weight = nn.Parameter(given()[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attends(self.layers(self.front(x).mT), self.weight)

    torch.manual_seed(0)
    check(Model().eval(), floats(2, HIDDEN, 41).float())


def test_a_cut_of_a_result_with_strides_of_its_own() -> None:
    """The solution lies column by column, and what is cut of it is copied by Inductor, which claims a view."""

    def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows, length = torch.tanh(x @ w), x.shape[1]
        padded = heads(F.pad(rows, (0, 0, 0, 64 - length)))
        triangle = torch.eye(64).expand(*padded.shape[:2], 64, 64) * 2
        solved = torch.linalg.solve_triangular(triangle, padded, upper=False) + 1
        return torch.relu(folded(solved[:, :, :length]) @ w) @ w

    check(program, *given())


def test_what_is_true_costs_nothing() -> None:
    value = torch.empty_permuted((2, 1, 5, 3), (2, 0, 1, 3))
    assert laid_out(value, [2, 0, 1, 3]) is value
    assert laid_out(value, [1, 2, 0, 3]) is value  # the dimension of size one lies anywhere
    copied = laid_out(value, [0, 1, 2, 3])
    assert copied is not value and copied.is_contiguous()


def test_operators_that_are_believed_are_not_checked() -> None:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        best = attends(x, w).topk(3, -1)
        return best.values.cumsum(1).sort(1).values + best.indices

    gm = capture(run, x=given()[0], w=given()[1]).gm
    assert sum(is_called(node.target) for node in gm.graph.nodes) >= 1
    assert check_result_strides(gm, lambda target: is_called(target) and not has_own_rule(target)) == 0


@pytest.mark.parametrize(("order", "copies"), [((0, 1, 2), 1), ((2, 1, 0), 0), (None, 0)])
def test_a_piece_ends_with_a_copy_where_its_readers_expect_another_layout(
    order: Sequence[int] | None, copies: int
) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty_permuted((2, 3, 4), (2, 1, 0), device="meta")
    y = graph.call_function(aten.relu.default, (x,))
    y.meta["val"] = torch.relu(x.meta["val"])
    graph.output((y,))
    gm = fx.GraphModule(nn.Module(), graph)
    lay_out_results(gm, [order])
    assert len(gm.graph.find_nodes(op="call_function", target=COPY_ROWS)) == copies
    result = gm(from_the_last_dimension(torch.randn(2, 3, 4)))[0]
    assert result.stride() == torch.empty_permuted((2, 3, 4), order or (2, 1, 0)).stride()


# Operators whose claims are believed


#: Those that Inductor calls and that have a rule.
BELIEVED = sorted(
    (target for target in registered() if has_own_rule(target) and is_called(target)
     and target.namespace in ("aten", "prims") and target not in {*select_decomp_table(), *CUDA_ONLY}),
    key=str,
)  # fmt: skip


def laid_otherwise(call: Call) -> Iterator[Call]:
    """The call, and the same with operands that are laid out from the last dimension to the first."""
    yield call

    def turned(value: Any) -> Any:
        return from_the_last_dimension(value) if isinstance(value, torch.Tensor) and value.dim() > 1 else value

    yield Call(call.target, tree_map(turned, call.args), tree_map(turned, call.kwargs))


def claims_what_is(call: Call) -> bool:
    """Whether the fake kernel says the strides that the operator returns."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with mode:
        claimed = call.target(*tree_map(fake, call.args), **tree_map(fake, call.kwargs))
    returned = call.target(*call.args, **call.kwargs)
    pairs = zip(tree_leaves(claimed), tree_leaves(returned), strict=True)
    return all(not isinstance(b, torch.Tensor) or not b.numel() or not strides_differ(a, b) for a, b in pairs)


@pytest.mark.parametrize("target", BELIEVED, ids=str)
def test_operators_that_are_believed_claim_what_they_return(target: Any) -> None:
    calls = all_samples()[target]
    if target.is_view:
        assert all(may_be_a_view(node_of(call)) for call in calls)  # not held to anything
        return
    assert not [str(each) for call in calls for each in laid_otherwise(call) if not claims_what_is(each)]


def test_what_experts_call_claims_what_it_returns() -> None:
    """Their rows are computed in a loop's body, where nothing is checked."""
    from transformers.integrations import moe  # noqa: F401  # defines the operator

    rows, matrices = floats(12, 16).bfloat16(), floats(3, 16, 16).bfloat16()
    ends = torch.tensor([2, 7, 12], dtype=torch.int32)
    calls = [
        Call(aten._grouped_mm.default, (rows, matrices, ends)),
        Call(aten._grouped_mm.default, (rows, matrices.mT, ends)),
        Call(torch.ops.transformers.grouped_mm_fallback.default, (rows.float(), matrices.float(), ends)),
        Call(torch.ops.transformers.grouped_mm_fallback.default, (rows.float(), matrices.float().mT, ends)),
        Call(aten.histc.default, (torch.tensor([0.0, 1.0, 1.0, 2.0]), 3, 0, 2)),
    ]
    assert all(map(claims_what_is, calls))


def test_the_law_of_claims_catches_a_false_one() -> None:
    assert claims_what_is(Call(torch.ops.mom_claims.true.default, (floats(3, 4),)))
    assert not claims_what_is(Call(torch.ops.mom_claims.doubled.default, (floats(3, 4),)))
