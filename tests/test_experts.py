"""Mixtures of experts: sorting tokens by expert, multiplying in groups and putting them back is row-wise if proved."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  defines the grouped product that models are traced with
from hypothesis import strategies as st
from torch import fx

from mom_passes.graph.edit import copy_graph
from mom_passes.loops.loop import loop_nodes
from mom_passes.rules.matmul import is_grouped_product
from mom_passes.tokens.experts import outline_experts
from mom_passes.tokens.region import inline_regions, regions
from tests.programs import HIDDEN
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

INNER = 6
grouped = torch.ops.transformers.grouped_mm_fallback


@dataclass(frozen=True)
class Routing:
    """How a mixture chooses experts, and how it is written."""

    experts: int = 4
    k: int = 2
    #: What the router's scores are made into before the best are taken: `ties` makes many alike, `one` prefers one. For
    #: `in turn` they stay, and the best are taken one after the other.
    scores: str = "plain"
    back: str = "index_put"
    biased: bool = False


def weights(routing: Routing) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 3

    experts = routing.experts
    of_experts = made(experts, HIDDEN, INNER), made(experts, INNER, HIDDEN), made(experts, INNER)
    return made(HIDDEN, experts), *of_experts, made(HIDDEN, 64)


def scores_of(routing: Routing, logits: torch.Tensor) -> torch.Tensor:
    if routing.scores == "ties":
        return (logits > 0).to(logits.dtype)
    if routing.scores == "one":
        return logits + torch.arange(routing.experts, dtype=logits.dtype) * 100
    return logits


def best_of(routing: Routing, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices `[T, k]`."""
    if routing.scores != "in turn":
        return scores.topk(routing.k)
    values, indices = [], []
    for _ in range(routing.k):
        value, index = scores.max(-1, keepdim=True)
        values, indices = [*values, value], [*indices, index]
        scores = scores.scatter(-1, index, float("-inf"))
    return torch.cat(values, -1), torch.cat(indices, -1)


def ends_of(keys: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.histc(keys.float(), bins=experts, min=0, max=experts - 1).cumsum(0, dtype=torch.int32)


def put_back(rows: torch.Tensor, slots: torch.Tensor, how: str) -> torch.Tensor:
    if how == "rows":
        return torch.zeros_like(rows).index_put((slots,), rows)
    if how == "sort":
        return rows[slots.sort().indices]
    places = torch.empty(slots.shape[0], dtype=slots.dtype)
    order = torch.arange(slots.shape[0])
    places = places.scatter(0, slots, order) if how == "scatter" else places.index_put((slots,), order)
    return rows[places]


def mixture(x: torch.Tensor, w: tuple[torch.Tensor, ...], routing: Routing) -> torch.Tensor:
    """`[B, S, H]`, as models write it."""
    router, up, down, bias, _ = w
    hidden = x.reshape(-1, HIDDEN)
    chosen, indices = best_of(routing, scores_of(routing, hidden @ router))
    keys, slots = indices.reshape(-1).sort()
    rows = hidden[slots // routing.k]
    ends = ends_of(keys, routing.experts)
    inner = grouped(rows, up, ends)
    if routing.biased:
        inner = inner + bias[keys]
    out = grouped(torch.nn.functional.silu(inner), down, ends) * chosen.softmax(-1).reshape(-1)[slots].unsqueeze(-1)
    if routing.back == "sum":
        return torch.zeros_like(hidden).index_add(0, slots // routing.k, out).view(x.shape)
    home = put_back(out, slots, routing.back)
    return home.view(-1, routing.k, HIDDEN).sum(1).view(x.shape)


Mixing = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], torch.Tensor]


def model(mixing: Mixing) -> Callable[..., tuple[torch.Tensor, ...]]:
    """An attention, which identifies the tokens, mixtures before and after it, and a dense product."""

    def run(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor]:
        x = x + mixing(x, w)
        x = x + torch.softmax(x @ x.mT, -1) @ x
        x = x + torch.relu(x @ w[-1]) @ w[-1].mT
        return (x + mixing(x, w),)

    return run


def example(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)


def traced(mixing: Mixing, routing: Routing, batch: int = 2, tokens: int = 17, dynamic: bool = False) -> fx.GraphModule:
    return trace(model(mixing), example(batch, tokens), *weights(routing), dynamic=dynamic)


def in_loops(gm: fx.GraphModule) -> int:
    """Grouped products in loop bodies."""
    return sum(is_grouped_product(node) for _, module in loop_nodes(gm) for node in module.body.graph.nodes)


def outside(gm: fx.GraphModule) -> int:
    return sum(is_grouped_product(node) for node in gm.graph.nodes)


def routings() -> st.SearchStrategy[Routing]:
    made = st.builds(
        Routing,
        st.integers(2, 6),
        st.integers(1, 3),
        st.sampled_from(["plain", "ties", "one", "in turn"]),
        st.sampled_from(["index_put", "scatter", "sort", "rows", "sum"]),
        st.booleans(),
    )
    return made.filter(lambda routing: routing.k <= routing.experts)


@random_examples(
    10, 120, RANDOM_PROGRAMS, routings(), st.integers(1, 3), st.integers(9, 40), st.integers(2, 8), st.booleans()
)
def test_mixtures_of_any_routing_are_equal(routing: Routing, batch: int, tokens: int, mini: int, dynamic: bool) -> None:
    """Includes ties, an expert with every token and experts without tokens. Every product is in a loop."""

    def mixing(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return mixture(x, w, routing)

    gm = traced(mixing, routing, batch, tokens, dynamic)
    rewritten, report = rewrite(gm, mini, parameter_names(gm))
    assert (in_loops(rewritten), outside(rewritten)) == (4, 0), report.left_out
    given = (example(batch, tokens), *weights(routing))
    torch.testing.assert_close(rewritten(*given)[0], gm(*given)[0], rtol=0, atol=1e-10)


def of_this_rank(
    x: torch.Tensor, w: tuple[torch.Tensor, ...], masked: Collection[str] = ("up", "down"), least: int = 4
) -> torch.Tensor:
    """Expert parallelism as transformers writes it: this rank has experts 4 to 7 of 8. Slots of the others have key 4,
    no group and no weight. Their rows of a grouped product are undefined."""
    hidden = x.reshape(-1, HIDDEN)
    scores, chosen = (hidden @ torch.cat([w[0], w[0].flip(0)], 1)).topk(3)
    elsewhere = (chosen // 4) != 1
    keys, slots = torch.where(elsewhere, 4, chosen % 4).reshape(-1).sort()
    rows, factors = hidden[slots // 3], scores.masked_fill(elsewhere, 0.0).reshape(-1)[slots]
    ends, none = ends_of(keys, 4), (keys >= least).unsqueeze(-1)
    keys = keys.clamp(max=3)
    inner = grouped(rows.masked_fill(none, 0.0), w[1], ends) + w[3][keys]
    if "up" in masked:
        inner = inner.masked_fill(none, 0.0)
    out = grouped(torch.nn.functional.silu(inner), w[2], ends)
    if "down" in masked:
        out = out.masked_fill(none, 0.0)
    home = put_back(out * factors.unsqueeze(-1), slots, "index_put")
    return home.view(-1, 3, HIDDEN).sum(1).view(x.shape)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [("up", "down"), ("down",)])
def test_experts_of_one_rank_are_in_loops(masked: tuple[str, ...], dynamic: bool) -> None:
    gm = traced(lambda x, w: of_this_rank(x, w, masked), Routing(), dynamic=dynamic)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert (in_loops(rewritten), outside(rewritten)) == (4, 0), report.left_out
    given = (example(2, 17), *weights(Routing()))
    torch.testing.assert_close(rewritten(*given)[0], gm(*given)[0], rtol=0, atol=1e-10)


def without_a_mask(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return of_this_rank(x, w, ("up",))


def with_another_mask(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return of_this_rank(x, w, least=5)


# What is not row-wise, or cannot be shown to be


def by_number(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Keys from arithmetic, not from an index operator: they may exceed the number of experts."""
    routing = Routing()
    hidden = x.reshape(-1, HIDDEN)
    indices = (hidden[:, :2] * 10).long() % 4
    keys, slots = indices.reshape(-1).sort()
    out = grouped(hidden[slots // 2], w[1], ends_of(keys, 4)) @ w[2][0]
    return put_back(out, slots, routing.back).view(-1, 2, HIDDEN).sum(1).view(x.shape)


def by_number_beside_indices(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A token's first expert is looked up, its second is computed."""
    hidden = x.reshape(-1, HIDDEN)
    indices = torch.cat([(hidden @ w[0]).topk(1).indices, (hidden[:, :1] * 10).long() % 4], -1)
    keys, slots = indices.reshape(-1).sort()
    out = grouped(hidden[slots // 2], w[1], ends_of(keys, 4)) @ w[2][0]
    return put_back(out, slots, "index_put").view(-1, 2, HIDDEN).sum(1).view(x.shape)


def to_more_experts(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Indices of eight features, counted as those of four experts: the higher ones are dropped from the end."""
    hidden = x.reshape(-1, HIDDEN)
    keys, slots = hidden.topk(2).indices.reshape(-1).sort()
    out = grouped(hidden[slots // 2], w[1], ends_of(keys, 4)) @ w[2][0]
    return put_back(out, slots, "index_put").view(-1, 2, HIDDEN).sum(1).view(x.shape)


def in_sorted_order(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Never put back: row i of the result is of another token."""
    hidden = x.reshape(-1, HIDDEN)
    keys, slots = (hidden @ w[0]).topk(1).indices.reshape(-1).sort()
    return (grouped(hidden[slots], w[1], ends_of(keys, 4)) @ w[2][0]).view(x.shape)


def with_places(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What is added follows from where a row has been sorted to, so from all other tokens."""
    hidden = x.reshape(-1, HIDDEN)
    keys, slots = (hidden @ w[0]).topk(1).indices.reshape(-1).sort()
    rows = hidden[slots] + torch.arange(slots.shape[0], dtype=x.dtype)[:, None] / 10
    out = grouped(rows, w[1], ends_of(keys, 4)) @ w[2][0]
    return put_back(out, slots, "index_put").view(x.shape)


def by_other_keys(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Sorted by one choice, multiplied in the groups of another."""
    hidden = x.reshape(-1, HIDDEN)
    slots = (hidden @ w[0]).topk(1).indices.reshape(-1).sort().indices
    others = (-(hidden @ w[0])).topk(1).indices.reshape(-1)
    out = grouped(hidden[slots], w[1], ends_of(others, 4)) @ w[2][0]
    return put_back(out, slots, "index_put").view(x.shape)


def with_a_capacity(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """An expert takes its first five tokens; later ones are dropped."""
    hidden = x.reshape(-1, HIDDEN)
    indices = (hidden @ w[0]).topk(1).indices
    before = torch.nn.functional.one_hot(indices[:, 0], 4).cumsum(0)
    taken = before.gather(1, indices) <= 5
    keys, slots = indices.reshape(-1).sort()
    out = grouped(hidden[slots], w[1], ends_of(keys, 4)) @ w[2][0]
    return (put_back(out, slots, "index_put") * taken).view(x.shape)


def mixed_along_places(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Adds adjacent rows in sorted order."""
    hidden = x.reshape(-1, HIDDEN)
    keys, slots = (hidden @ w[0]).topk(1).indices.reshape(-1).sort()
    out = grouped(hidden[slots].cumsum(0), w[1], ends_of(keys, 4)) @ w[2][0]
    return put_back(out, slots, "index_put").view(x.shape)


def paired_places(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Two neighbours are added up before they are put back, as if they were of one token."""
    hidden = x.reshape(-1, HIDDEN)
    keys, slots = (hidden @ w[0]).topk(2).indices.reshape(-1).sort()
    out = grouped(hidden[slots // 2], w[1], ends_of(keys, 4)) @ w[2][0]
    out = (out.view(-1, 2, HIDDEN).sum(1, keepdim=True) + out.view(-1, 2, HIDDEN)).view(-1, HIDDEN)
    return put_back(out, slots, "index_put").view(-1, 2, HIDDEN).sum(1).view(x.shape)


def put_elsewhere(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Put back by another permutation: a reversal of all tokens."""
    hidden = x.reshape(-1, HIDDEN)
    keys, slots = (hidden @ w[0]).topk(1).indices.reshape(-1).sort()
    out = grouped(hidden[slots], w[1], ends_of(keys, 4)) @ w[2][0]
    order = torch.arange(slots.shape[0] - 1, -1, -1)
    return out[torch.empty_like(slots).index_put((slots,), order)].view(x.shape)


@pytest.mark.parametrize(
    ("mixing", "reason"),
    [
        (by_number, "outside of the groups"),
        (by_number_beside_indices, "outside of the groups"),
        (to_more_experts, "below 8, but there are 4 groups"),
        (without_a_mask, "below 5, but there are 4 groups"),
        (with_another_mask, "below 5, but there are 4 groups"),
        (in_sorted_order, "does not read .* place by place"),
        (with_places, "does not read .* place by place"),
        (by_other_keys, "does not multiply sorted rows by the groups"),
        (mixed_along_places, "accumulates along it"),
        (paired_places, "does not read .* place by place"),
        (put_elsewhere, "index_put"),
    ],
)
def test_mixtures_that_are_not_proved_row_wise_stay_out_of_loops(mixing: Mixing, reason: str) -> None:
    gm = traced(mixing, Routing())
    refused = outline_experts(copy_graph(gm))
    assert len(refused) == 2
    for why in refused.values():
        assert re.search(reason, why), why
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert in_loops(rewritten) == 0 and outside(rewritten) == outside(gm) > 0
    assert set(refused.values()) <= set(report.left_out.values())
    given = (example(2, 17), *weights(Routing()))
    torch.testing.assert_close(rewritten(*given)[0], gm(*given)[0], rtol=0, atol=1e-10)


def test_experts_with_a_capacity_are_in_loops_and_the_capacity_is_not() -> None:
    """Experts are row-wise. Which slots are dropped depends on all earlier tokens."""
    gm = traced(with_a_capacity, Routing())
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert (in_loops(rewritten), outside(rewritten)) == (2, 0)
    assert any("cumsum" in name for name in report.left_out)
    given = (example(2, 17), *weights(Routing()))
    torch.testing.assert_close(rewritten(*given)[0], gm(*given)[0], rtol=0, atol=1e-10)


def test_a_row_of_nan_does_not_change_other_rows() -> None:
    """The experts of a row of NaN are unspecified."""
    routing = Routing()
    gm = traced(lambda x, w: mixture(x, w, routing), routing)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    x = example(2, 17)
    x[0, 3] = torch.nan
    first = trace(lambda x, *w: (x + mixture(x, w, routing),), x, *weights(routing))(x, *weights(routing))[0]
    assert first.isnan().any(-1).sum() == 1
    expected, actual = gm(x, *weights(routing))[0], rewritten(x, *weights(routing))[0]
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-10)
    assert torch.equal(actual.isnan(), expected.isnan())


# Regions


def outlined() -> tuple[fx.GraphModule, fx.GraphModule]:
    routing = Routing()
    gm = traced(lambda x, w: mixture(x, w, routing), routing)
    changed = copy_graph(gm)
    assert outline_experts(changed) == {}
    return gm, changed


def test_the_width_of_a_region_does_not_depend_on_the_captured_sizes() -> None:
    """Also with a symbolic number of tokens. The rows per loop are chosen by this width."""
    routing = Routing()
    found = []
    for dynamic in (False, True):
        changed = copy_graph(traced(lambda x, w: mixture(x, w, routing), routing, tokens=40, dynamic=dynamic))
        assert outline_experts(changed) == {}
        (call, region), *_ = regions(changed.graph)
        found.append((region.rows, region.widest, region.facts.work(call)))
    assert found[0] == found[1]
    assert found[0][0] == 2 * 40 and found[0][1] == routing.k * max(HIDDEN, INNER) * torch.float64.itemsize


def test_a_region_runs_on_any_number_of_rows_and_can_be_inlined() -> None:
    """A region computes the same as its members, and inlining restores them."""
    gm, changed = outlined()
    given = (example(2, 17), *weights(Routing()))
    found = list(regions(changed.graph))
    assert len(found) == 2
    assert not outside(changed)
    assert not any(node.target is torch.ops.aten.sort.default for node in changed.graph.nodes)
    changed.recompile()
    torch.testing.assert_close(changed(*given)[0], gm(*given)[0], rtol=0, atol=1e-12)
    inline_regions(changed)
    changed.recompile()
    assert outside(changed) == 4
    assert all("val" in node.meta for node in changed.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(changed(*given)[0], gm(*given)[0], rtol=0, atol=0)


def test_products_in_a_region_count_as_work() -> None:
    """N rows are multiplied with two matrices each."""
    _, changed = outlined()
    for node, region in regions(changed.graph):
        assert region.facts.work(node) == 2 * (2 * 17 * 2) * HIDDEN * INNER


def counts(keys: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For a loss that balances the experts."""
    return (ends_of(keys, 4),)


def marks(keys: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Written to with two indices at once, and divided by a tensor: nothing that is known, and nothing that fails."""
    return torch.zeros(len(slots), 4).index_put((slots, keys), torch.ones(len(slots))), slots // (keys + 1)


@pytest.mark.parametrize("others", [counts, marks])
def test_members_with_other_readers_are_kept(others: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """A second output keeps the sort in the graph. The experts are still in a loop."""

    def run(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x + torch.softmax(x @ x.mT, -1) @ x
        x = x + torch.relu(x @ w[-1]) @ w[-1].mT
        hidden = x.reshape(-1, HIDDEN)
        keys, slots = (hidden @ w[0]).topk(1).indices.reshape(-1).sort()
        out = put_back(grouped(hidden[slots], w[1], ends_of(keys, 4)) @ w[2][0], slots, "index_put")
        return x + out.view(x.shape), *others(keys, slots)

    gm = trace(run, example(2, 17), *weights(Routing()))
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    assert in_loops(rewritten) == 1
    given = (example(2, 17), *weights(Routing()))
    for actual, expected in zip(rewritten(*given), gm(*given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_experts_of_the_last_layer_run_on_the_needed_row_only() -> None:
    """One row of the last layer is needed, so its experts multiply one row."""
    routing = Routing()
    run = model(lambda x, w: mixture(x, w, routing))
    gm = trace(lambda x, *w: (run(x, *w)[0][:, -1:],), example(2, 17), *weights(routing))
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    assert (in_loops(rewritten), outside(rewritten)) == (2, 2)
    rows = {node.meta["val"].shape[0] for node in rewritten.graph.nodes if is_grouped_product(node)}
    assert rows == {2 * routing.k}
    given = (example(2, 17), *weights(routing))
    torch.testing.assert_close(rewritten(*given)[0], gm(*given)[0], rtol=0, atol=1e-10)
    assert not any(node.target is operator.getitem and not node.users for node in rewritten.graph.nodes)


def test_scope_mlp_puts_experts_in_loops() -> None:
    """A loop stores one row per token, not one per slot."""
    routing = Routing()
    gm = traced(lambda x, w: mixture(x, w, routing), routing)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm), scope="mlp")
    assert (in_loops(rewritten), outside(rewritten)) == (4, 0)
    made = [module.loop for _, module in loop_nodes(rewritten) if any(map(is_grouped_product, module.body.graph.nodes))]
    assert [output.type.shape[0] * output.type.shape[1] for loop in made for output in loop.stored] == [34 * HIDDEN] * 2
    given = (example(2, 17), *weights(routing))
    torch.testing.assert_close(rewritten(*given)[0], gm(*given)[0], rtol=0, atol=1e-10)
