"""The steps from the token dimension to loops. Each returns a frozen fact; a graph that they change is a new one."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mom_compile.pipeline.form import EMBEDDING, State, facts_of, is_decode_step
from mom_compile.pipeline.packing import NO_PACKING, Packing, keep_packed
from mom_compile.pipeline.run import Runner
from mom_compile.report.facts import ENCODER, PREFILL, SCORING, Facts
from mom_compile.report.reasons import Reason
from mom_passes.attention.reads import source_of
from mom_passes.graph.sizes import Size, count_hint, hint
from mom_passes.graph.values import operands, tensors_of, value_of
from mom_passes.host.kv_values import KVValues
from mom_passes.loops.demands import build_demands
from mom_passes.loops.insert import insert_loops
from mom_passes.loops.instances import DemandGraph, Kind
from mom_passes.loops.loop import RowLimit, loops
from mom_passes.loops.stages import Stages, plan_stages
from mom_passes.ops.rows import LAID_OUT
from mom_passes.ops.scored import SCORED
from mom_passes.ops.spans import SPANS
from mom_passes.ops.transfers import FETCH_ROWS
from mom_passes.rules import facts as facts_of_operator
from mom_passes.rules.work import matmul_work, products
from mom_passes.source_lines import source_lines
from mom_passes.tokens.demanded_rows import demanded_rows
from mom_passes.tokens.dims import TokenDims, analyse_token_dims
from mom_passes.tokens.last_rows import last_rows
from mom_passes.tokens.mlp_scope import mlp_only
from mom_passes.tokens.picked_rows import picked_rows
from mom_passes.tokens.separate_queries import separate_queries
from mom_passes.tokens.window_keys import window_keys


class NotWorthwhile(Exception):
    """Loops gain nothing, for `reason`; `gm` is the graph that was reached, if it is not the given one."""

    def __init__(self, reason: Reason | str, gm: fx.GraphModule | None = None) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.gm = gm


@dataclass(frozen=True)
class Tokens:
    """A graph with its token dimensions. It was captured with so many `sequences`."""

    gm: fx.GraphModule
    dims: TokenDims
    sequences: int


@dataclass(frozen=True)
class Looped:
    """A graph with loops, and the multiply-adds of its products: all of them, and those outside loops by name.
    `in_loops` are the products of the graph without loops that are now in one."""

    gm: fx.GraphModule
    work: int
    work_outside: Mapping[str, int]
    in_loops: tuple[fx.Node, ...]


@dataclass(frozen=True)
class WithoutLoops:
    """A graph that loops do not help, and the reason. `untouched`: no pass works on it at all."""

    gm: fx.GraphModule
    facts: Facts
    reason: str
    untouched: bool = False


@dataclass(frozen=True)
class WithLoops:
    """A graph with loops. `before` is the same graph without them, `formed` the one from before rows were narrowed,
    which computes so many tokens. `packing` are the packed sequences that its loops hold, and those that they do
    not."""

    gm: fx.GraphModule
    facts: Facts
    before: fx.GraphModule
    formed: WithoutLoops
    lengths: tuple[Size, ...]
    packing: Packing = NO_PACKING

    def without(self, tokens: int) -> WithoutLoops:
        """Return the graph without loops, where `tokens` tokens are one mini-sequence."""
        known = [length for length in self.lengths if isinstance(length, int) and length <= tokens]
        if len(known) == len(self.lengths):
            return replace(self.formed, reason=in_one(max(known), tokens))
        return WithoutLoops(self.before, self.facts, in_one(tokens, tokens))


def make_loops(
    state: State,
    kv: KVValues,
    limit: RowLimit,
    scope: str,
    loop_products: int,
    runner: Runner,
    inputs: Sequence[Any] | None = None,
) -> WithLoops | WithoutLoops:
    """Put every stage's rows into loops, or say why not. The graph of `state` stays as it is. `inputs` are those of a
    call, if they are known: the loops hold its packed sequences."""
    take, static = runner.take, state.static_inputs
    graph, facts = state.gm, facts_of(state.gm, kv)
    formed = WithoutLoops(graph, facts, "")
    try:
        tokens = take(find_tokens, graph, static, limit)
        lengths, facts = tokens.dims.lengths, replace(facts, token_dimension=_dimension(tokens.dims))
        tokens = take(queries_apart, tokens, static)
        tokens = take(rows_on_demand, tokens, static)
        tokens = take(picks_on_demand, tokens, static)
        tokens = take(mlp_alone, tokens, scope)
        tokens = take(windows_by_rows, tokens, limit)
        packing = take(packed_in_loops, tokens, limit, inputs)
        graph = tokens.gm
        demands = take(follow_demands, tokens)
        left_out = _left_out(demands, tokens.dims)
        reasons = {_named(n): state.sorted_whole.get(n.name, tokens.dims.mixing[n]) for n in left_out}
        facts = replace(facts, left_out=reasons, source_lines=source_lines({_named(n): n for n in left_out}))
        stages = take(cut_stages, demands, loop_products)
        if stages.last_is_largest:
            tokens = take(last_rows_in_loops, tokens, static)
            if tokens.gm is not graph:
                graph = tokens.gm
                demands = take(follow_demands, tokens)
                stages = take(cut_stages, demands, loop_products)
        looped = take(loops_over_mini_sequences, tokens, stages, limit, packing.unbroken)
        facts = replace(facts, work=looped.work, work_outside=looped.work_outside)
        if facts.kind in (PREFILL, ENCODER) and _scores_tokens(graph, kv, looped.in_loops):
            facts = replace(facts, kind=SCORING)
        made = [loop for _, loop in loops(looped.gm)]
        known = [loop.length for loop in made if isinstance(loop.length, int)]
        if len(known) == len(made) and all(_fits(limit, tokens.dims, one, tokens.sequences) for one in known):
            raise NotWorthwhile(in_one(max(hint(loop.length) for loop in made), made[0].rows))
    except NotWorthwhile as found:
        return WithoutLoops(found.gm or graph, facts, found.reason)
    return WithLoops(looped.gm, facts, graph, formed, lengths, packing)


def find_tokens(gm: fx.GraphModule, static: Collection[str], limit: RowLimit) -> tuple[Tokens, str]:
    """Find the token dimension of each value."""
    # In a decode step, a value that an input's tokens do not reach has none.
    dims = _token_dims(gm, static, inside=not is_decode_step(gm))
    if dims is None and is_decode_step(gm):
        raise NotWorthwhile(Reason.ONE_TOKEN)
    if dims is None:
        raise NotWorthwhile(_why_no_tokens(gm))
    before = value_of(dims.seed).shape[: dims.seed_dim.index]
    # Inside a graph the channels may stand before the tokens: `[B, C, S]`.
    sequences = count_hint(before if dims.seed.op == "placeholder" else before[:1])
    if all(isinstance(length, int) and _fits(limit, dims, length, sequences) for length in dims.lengths):
        raise NotWorthwhile(in_one(max(map(hint, dims.lengths)), limit.rows))
    counts = f"{len(dims.rowwise)} row-wise values, {len(dims.mixing)} mixing operators, {dims.barriers} barriers"
    return Tokens(gm, dims, sequences), counts


def _fits(limit: RowLimit, dims: TokenDims, length: int, sequences: int) -> bool:
    return limit.fits(length * dims.group_of(length), sequences)


def _dimension(dims: TokenDims) -> str:
    seeds = (dims, *dims.others)
    return "; ".join(f"{one.seed_dim} of {one.seed.name}, {one.length} (now {hint(one.length)})" for one in seeds)


def _why_no_tokens(gm: fx.GraphModule) -> str:
    """Return the reason why a graph has no token dimension."""
    results = [v for node in next(iter(reversed(gm.graph.nodes))).all_input_nodes for v in tensors_of(node)]
    if results and all(0 in filter(lambda size: isinstance(size, int), value.shape) for value in results):
        return "every result is empty: there is nothing to cut"
    if not any(map(matmul_work, gm.graph.nodes)):
        return "it has no matrix product or attention"
    return "no value has a dimension that carries the matmul work from its rows to the outputs' rows"


def in_one(tokens: int, rows: int) -> str:
    """Return why so many tokens are not cut."""
    return f"its {tokens} tokens fit in one mini-sequence of {rows}"


def _token_dims(gm: fx.GraphModule, static: Collection[str], inside: bool) -> TokenDims | None:
    parameters = {n for n in gm.graph.nodes if n.op == "placeholder" and n.name in static}
    return analyse_token_dims(gm, static_inputs=parameters, inside=inside)


def queries_apart(tokens: Tokens, static: Collection[str]) -> tuple[Tokens, str]:
    """Compute queries by products of their own, so that they are not stored for all tokens."""
    gm = separate_queries(tokens.gm)
    return _narrowed(tokens, gm, static, "no product has queries and keys", "that are queries")


def rows_on_demand(tokens: Tokens, static: Collection[str]) -> tuple[Tokens, str]:
    """Move slices along the tokens up: the last layer runs on the rows that are read."""
    gm = demanded_rows(tokens.gm, tokens.dims)
    return _narrowed(tokens, gm, static, "every row is needed", "that are read")


def picks_on_demand(tokens: Tokens, static: Collection[str]) -> tuple[Tokens, str]:
    """Move picks of rows by an index tensor up: the last layer runs on these rows."""
    gm = picked_rows(tokens.gm, tokens.dims)
    return _narrowed(tokens, gm, static, "no pick has moved", "that are picked")


def _narrowed(
    tokens: Tokens, gm: fx.GraphModule, static: Collection[str], nothing: str, which: str
) -> tuple[Tokens, str]:
    """Return the tokens of a graph that computes fewer rows, if it is another one."""
    if gm is tokens.gm:
        return tokens, nothing
    seeds = (tokens.dims, *tokens.dims.others)
    dims = _token_dims(gm, static, inside=any(one.seed.op != "placeholder" for one in seeds))
    if dims is None:
        raise NotWorthwhile(f"nearly all work is on the few rows {which}", gm)
    return replace(tokens, gm=gm, dims=dims), f"{len(dims.rowwise)} row-wise values are left"


def last_rows_in_loops(tokens: Tokens, static: Collection[str]) -> tuple[Tokens, str]:
    """Compute the last few rows of a value in the loop that computes all of them.

    The last loop then differs from those of other layers, which otherwise share its code. So this is for graphs whose
    last loop has more than the others at full length.
    """
    gm = last_rows(tokens.gm, tokens.dims)
    return _narrowed(tokens, gm, static, "no last rows are read", "that are read")


def mlp_alone(tokens: Tokens, scope: str) -> tuple[Tokens, str]:
    """With scope="mlp", keep only MLPs and the LM head row-wise, as in the MOM paper."""
    if scope != "mlp":
        return tokens, "not asked for"
    dims = mlp_only(tokens.gm, tokens.dims)
    return replace(tokens, dims=dims), f"{len(dims.rowwise)} row-wise values are left"


def windows_by_rows(tokens: Tokens, limit: RowLimit) -> tuple[Tokens, str]:
    """Choose the window layers that are no barriers: each mini-sequence gets the keys and values ahead of its own."""
    found = window_keys(tokens.gm, tokens.dims, limit.rows)
    counts = f"{len(found.by_rows)} window layers by rows, {len(found.last_queries)} of the last queries"
    return replace(tokens, dims=found.dims), f"{counts}, {found.barriers} stay barriers"


def packed_in_loops(tokens: Tokens, limit: RowLimit, inputs: Sequence[Any] | None) -> tuple[Packing, str]:
    """Keep attentions to packed sequences inside loops where a mini-sequence can hold the sequences of a call."""
    return keep_packed(tokens.gm, tokens.dims, limit.rows, inputs)


def follow_demands(tokens: Tokens) -> tuple[DemandGraph, str]:
    """Find which rows of each value are read, from the outputs back."""
    demands = build_demands(tokens.gm, tokens.dims)
    return demands, f"{len(demands.order)} instances"


def _left_out(demands: DemandGraph, dims: TokenDims) -> list[fx.Node]:
    """Return the operators with tokens that run on the full sequence."""
    whole = {i.node for i, kind in demands.kinds.items() if kind is Kind.WHOLE}
    return [
        node
        for node in dims.mixing
        if node in whole
        and node.target not in (operator.getitem, SPANS, FETCH_ROWS, LAID_OUT)
        and not _reduces_an_input(node, dims)
    ]


def _reduces_an_input(node: fx.Node, dims: TokenDims) -> bool:
    """Return whether a node reduces a value that is as cheap as an input, such as an assertion on ids."""
    return facts_of_operator(node).fold is not None and dims.worked.isdisjoint(operands(node))


def _named(node: fx.Node) -> str:
    return f"{node.target} ({node.name})"


def cut_stages(demands: DemandGraph, loop_products: int) -> tuple[Stages, str]:
    """Cut stages between barriers, and choose by min-cut the few values that live at full length between them."""
    stages = plan_stages(demands, loop_products)
    stored = sum(len(plan.stored) for plan in stages.plans)
    if not stored:
        raise NotWorthwhile("no value would be computed in a loop")
    return stages, f"{len(stages.plans)} stages, {stored} values at full length"


def loops_over_mini_sequences(
    tokens: Tokens, stages: Stages, limit: RowLimit, unbroken: int
) -> tuple[Looped, str]:
    """Put the rows of every stage into one loop."""
    gm, multiplying = tokens.gm, products(tokens.gm.graph)
    looped = insert_loops(gm, stages, limit=limit, unbroken=unbroken, group_of=tokens.dims.group_of)
    outside = products(looped.graph)
    names = {node.name for node in outside}
    found = Looped(
        looped,
        sum(multiplying.values()),
        {_named(node): work for node, work in outside.items()},
        tuple(node for node in multiplying if node.name not in names),
    )
    return found, f"{len(gm.graph.nodes)} -> {len(looped.graph.nodes)} nodes"


def _scores_tokens(gm: fx.GraphModule, kv: KVValues, in_loops: Collection[fx.Node]) -> bool:
    """Return whether no cache is kept, and the loops read logits of every token in blocks or make them, by a product as
    wide as the vocabulary."""
    embeddings = [node for node in gm.graph.nodes if node.target is EMBEDDING]
    # Of given ids alone: positions are counted in the graph.
    given = [node for node in embeddings if source_of(node.args[1]).op == "placeholder"]
    vocabularies = {hint(value_of(node.args[0]).shape[0]) for node in given}
    made = (hint(value.shape[-1]) for node in in_loops for value in tensors_of(node))
    scored = any(node.target is SCORED for node in in_loops) or not vocabularies.isdisjoint(made)
    return not (kv.found or kv.left_out) and scored
