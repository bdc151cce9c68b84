"""The passes as one list: ATen graph in, the same graph with loops over mini-sequences out."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mom_compile.report import DECODE_STEP, PREFILL, SCORING, PassReport, Report
from mom_compile.report.reasons import Reason
from mom_compile.torch_compat.inductor import is_called
from mom_passes.attention.flex import flex_attentions, outline_flex
from mom_passes.attention.form import attention_form
from mom_passes.attention.reads import source_of
from mom_passes.graph.claimed_layouts import correct_strides
from mom_passes.graph.drop_empty_parts import drop_empty_parts
from mom_passes.graph.edit import compute_device, copy_graph
from mom_passes.graph.known_symbols import substitute_known_symbols
from mom_passes.graph.meta import meta_value
from mom_passes.graph.real_results import check_result_strides
from mom_passes.graph.sizes import count_hint, hint, is_one
from mom_passes.graph.values import operands, tensors_of, value_of
from mom_passes.graph.whole_slices import drop_whole_slices_of
from mom_passes.graph.writes import read_after_write
from mom_passes.host.chosen import fetch_used_parts
from mom_passes.host.drop_layout_copies import drop_layout_copies
from mom_passes.host.kv_extended import extend_in_place, lay_out_for_growth
from mom_passes.host.kv_offload import KVOffload, kv_offload
from mom_passes.host.kv_values import KVValues, find_kv
from mom_passes.host.weights import weights_arrive, whole_weights
from mom_passes.loops.demands import DemandGraph, Kind, build_demands
from mom_passes.loops.insert import insert_loops
from mom_passes.loops.loop import RowLimit, loops
from mom_passes.loops.stages import Stages, plan_stages
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.rows import LAID_OUT
from mom_passes.ops.scored import SCORED
from mom_passes.ops.spans import SPANS
from mom_passes.ops.transfers import FETCH_CHOSEN, FETCH_ROWS
from mom_passes.program.in_place import take_over_storage
from mom_passes.program.layers import by_layers
from mom_passes.program.overlap import overlap
from mom_passes.program.own_rows import own_rows
from mom_passes.program.rewritten import Rewritten
from mom_passes.program.slots import reuse_slots
from mom_passes.rules import facts, has_own_rule
from mom_passes.rules.work import products
from mom_passes.source_lines import source_line
from mom_passes.tokens.causal_convolutions import causal_convolutions
from mom_passes.tokens.demanded_rows import demanded_rows
from mom_passes.tokens.dims import TokenDims, analyse_token_dims
from mom_passes.tokens.experts import outline_experts
from mom_passes.tokens.mlp_scope import mlp_only
from mom_passes.tokens.picked_rows import picked_rows
from mom_passes.tokens.region import inline_regions, regions
from mom_passes.tokens.scored import outline_scores, scores_in_blocks
from mom_passes.verify import Contract, verify

EMBEDDING = torch.ops.aten.embedding.default

log = logging.getLogger(__name__)


class NotWorthwhile(Exception):
    """Loops gain nothing, for `reason`.

    `rewritten` is the graph without loops, cut by layers, or None where stock Inductor compiles it as a whole.
    """

    rewritten: Rewritten | None = None

    def __init__(self, reason: Reason | str) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass
class State:
    """What one step hands to the next."""

    gm: fx.GraphModule
    static_inputs: Collection[str]
    limit: RowLimit
    report: Report
    scope: str = "layer"
    kv_on_host: bool = False
    kv: KVValues | None = None
    offload: KVOffload | None = None
    #: The waits for weights that arrive from the host.
    weights: tuple[fx.Node, ...] = ()
    dims: TokenDims | None = None
    #: How many sequences the graph was captured with.
    sequences: int = 1
    demands: DemandGraph | None = None
    stages: Stages | None = None
    #: Why rows that were sorted cannot be cut, by their sort's name.
    together: dict[str, str] = field(default_factory=dict)
    contract: Contract | None = None
    #: Loop bodies that hold to the laws: no pass changes one.
    sound: set[fx.GraphModule] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where the graph computes: the first accelerator among its inputs, else the CPU."""
        return compute_device(self.gm)


Step = Callable[[State], str]


def flex_attention_as_one(state: State) -> str:
    """FlexAttention, which is called with graphs of its own, as one operator each."""
    return f"{outline_flex(state.gm)} calls"


def move_fetches_to_whole_weights(state: State) -> str:
    """Weights on the host are fetched once each, as they lie there, and seen otherwise on the device."""
    return f"{whole_weights(state.gm)} weights on the host"


def hold_real_layouts(state: State) -> str:
    """Strides of views are those of what they are views of: what is compiled for them relies on it."""
    return f"{correct_strides(state.gm)} values claimed others"


def drop_whole_slices(state: State) -> str:
    """A slice that keeps everything is what it is cut from: a window's cache, as long as the prompt is shorter."""
    return f"{drop_whole_slices_of(state.gm)} slices"


def empty_parts_left_out(state: State) -> str:
    """Remove parts without elements from concatenations, such as an empty past."""
    return f"{drop_empty_parts(state.gm)} empty parts"


def canonical_attention(state: State) -> str:
    """One attention operator with grouped heads and proven masks: one rule, one kernel, K/V at their own width."""
    before = len(state.gm.graph.nodes)
    state.gm = attention_form(state.gm)
    return f"{before} -> {len(state.gm.graph.nodes)} nodes"


def experts_as_regions(state: State) -> str:
    """Mixtures of experts as one operator each, of which every token's rows are its own."""
    state.together = outline_experts(state.gm)
    return f"{sum(1 for _ in regions(state.gm.graph))} mixtures of experts"


def convolutions_as_one(state: State) -> str:
    """Causal convolutions, whichever way they are padded, as one operator that reads rows ahead of its own."""
    replaced = causal_convolutions(state.gm)
    return f"{len(replaced)} convolutions and states, {correct_strides(state.gm, replaced)} values laid out otherwise"


def scores_as_one(state: State) -> str:
    """What is asked of logits, a token at a time, as one operator that goes over the vocabulary in blocks."""
    refused = outline_scores(state.gm)
    found = len(state.gm.graph.find_nodes(op="call_function", target=SCORED))
    reasons = "".join(f"; {name} is not: {why}" for name, why in refused.items())
    return f"{found} heads{reasons}"


def results_as_claimed(state: State) -> str:
    """Copy results of called operators that may have other strides than their fake kernels claim."""
    held = check_result_strides(state.gm, _is_doubtful)
    return f"{held} results held, {correct_strides(state.gm) if held else 0} values laid out otherwise"


def _is_doubtful(target: Any) -> bool:
    """Whether an operator may return other strides than it claims: Inductor calls it, and no test here covers it."""
    return is_called(target) and target.namespace != "mom" and not has_own_rule(target)


def lay_out_keys_and_values(state: State) -> str:
    """Keys and values are laid out token by token, as products write them, and not head by head as in eager mode: so
    they leave for the host, and so they grow in place on the device."""
    less = drop_layout_copies(state.gm)
    laid_out = 0 if state.kv_on_host else lay_out_for_growth(state.gm, state.static_inputs)
    return f"{less} copies less, {laid_out} laid out to grow"


def find_keys_and_values(state: State) -> str:
    """Which outputs a cache keeps, told by what attentions read: loops will hide that."""
    state.kv = find_kv(state.gm)
    state.report.keys_and_values = state.kv.read.union(value.full.name for value in state.kv.found)
    whole = [value for value in state.kv.found if value.kept is value.full]
    state.report.growing = tuple((output, value.dim) for value in whole for output in value.outputs)
    if _is_decode_step(state.gm):
        state.report.kind = DECODE_STEP
    elif state.kv.read:
        state.report.kind = PREFILL
    return f"{len(state.kv.found)} keys and values, {len(state.kv.left_out)} that stay"


def find_tokens(state: State) -> str:
    """Which dimension of each value is the token dimension."""
    dims = _token_dims(state)
    if dims is None and _is_decode_step(state.gm):
        raise NotWorthwhile(Reason.ONE_TOKEN)
    if dims is None:
        raise NotWorthwhile(_why_no_tokens(state.gm))
    before = value_of(dims.seed).shape[: dims.seed_dim.index]
    # Behind a front the channels may stand before the tokens: `[B, C, S]`.
    state.sequences = count_hint(before if dims.seed.op == "placeholder" else before[:1])
    if isinstance(dims.length, int) and state.limit.fits(dims.length, state.sequences):
        raise NotWorthwhile(in_one(dims.length, state.limit.rows))
    state.dims = dims
    state.report.token_dimension = f"{dims.seed_dim} of {dims.seed.name}, {dims.length} (now {hint(dims.length)})"
    return f"{len(dims.rowwise)} row-wise values, {len(dims.mixing)} mixing operators, {dims.barriers} barriers"


def _why_no_tokens(gm: fx.GraphModule) -> str:
    """The reason why a graph has no token dimension."""
    results = [v for node in next(iter(reversed(gm.graph.nodes))).all_input_nodes for v in tensors_of(node)]
    if results and all(0 in filter(lambda size: isinstance(size, int), value.shape) for value in results):
        return "every result is empty: there is nothing to cut"
    return "no value has a dimension that carries the matmul work from its rows to the outputs' rows"


def in_one(tokens: int, rows: int) -> str:
    """Why so many tokens are not cut."""
    return f"its {tokens} tokens fit in one mini-sequence of {rows}"


def _scores_tokens(state: State, in_loops: Collection[fx.Node]) -> bool:
    """Whether no cache is kept, and logits of every token are read in blocks or made in the loops, by a product as wide
    as the vocabulary."""
    assert state.kv is not None
    embeddings = [node for node in state.gm.graph.nodes if node.target is EMBEDDING]
    # Of tokens, that is of ids that are given: positions are counted in the graph.
    given = [node for node in embeddings if source_of(node.args[1]).op == "placeholder"]
    vocabularies = {hint(value_of(node.args[0]).shape[0]) for node in given}
    cached = state.kv.found or state.kv.left_out
    made = (hint(value.shape[-1]) for node in in_loops for value in tensors_of(node))
    return not cached and (any(node.target is SCORED for node in in_loops) or not vocabularies.isdisjoint(made))


def _token_dims(state: State) -> TokenDims | None:
    static = {n for n in state.gm.graph.nodes if n.op == "placeholder" and n.name in state.static_inputs}
    # In a decode step, and behind narrowed rows, what an input's tokens do not reach has none.
    inside = state.dims.seed.op != "placeholder" if state.dims is not None else not _is_decode_step(state.gm)
    return analyse_token_dims(state.gm, static_inputs=static, inside=inside)


def _is_decode_step(gm: fx.GraphModule) -> bool:
    """Whether one token of each sequence is computed: what attends says so, or what is embedded."""
    values: dict[object, list[torch.Tensor]] = {MOM_ATTENTION: [], EMBEDDING: []}
    for node in gm.graph.nodes:
        if node.target in values:
            values[node.target].append(meta_value(node.args[node.target is EMBEDDING]))
    values[MOM_ATTENTION] += [value_of(operands(node)[0]) for node in flex_attentions(gm)]
    tokens = [query.shape[2] for query in values[MOM_ATTENTION]]
    tokens = tokens or [indices.shape[-1] for indices in values[EMBEDDING] if indices.dim()]
    return bool(tokens) and all(is_one(count) for count in tokens)


def rows_on_demand(state: State) -> str:
    """Slices along the tokens move up: the last layer runs on the rows that somebody needs."""
    assert state.dims is not None
    return _narrowed(state, demanded_rows(state.gm, state.dims), "every row is needed", "that somebody needs")


def picks_on_demand(state: State) -> str:
    """Rows picked by an index tensor likewise: the last layer runs on them alone."""
    assert state.dims is not None
    return _narrowed(state, picked_rows(state.gm, state.dims), "no pick has moved", "that are picked")


def _narrowed(state: State, gm: fx.GraphModule, nothing: str, which: str) -> str:
    """Go on with a graph in which fewer rows are computed, if it is another."""
    if gm is state.gm:
        return nothing
    state.gm = gm
    state.dims = _token_dims(state)
    if state.dims is None:
        raise NotWorthwhile(f"nearly all work is on the few rows {which}")
    return f"{len(state.dims.rowwise)} row-wise values are left"


def mlp_alone(state: State) -> str:
    """With scope="mlp": only MLPs and the LM head stay row-wise, as in the MOM paper."""
    assert state.dims is not None
    if state.scope != "mlp":
        return "not asked for"
    state.dims = mlp_only(state.gm, state.dims)
    return f"{len(state.dims.rowwise)} row-wise values are left"


def follow_demands(state: State) -> str:
    """Who needs which rows of what, from the outputs back."""
    assert state.dims is not None
    state.demands = build_demands(state.gm, state.dims)
    whole = {i.node for i, kind in state.demands.kinds.items() if kind is Kind.WHOLE}
    left_out = [
        n
        for n in state.dims.mixing
        if n in whole
        and n.target not in (operator.getitem, SPANS, FETCH_ROWS, LAID_OUT)
        and not _reduces_an_input(n, state.dims)
    ]
    state.report.left_out = {_named(n): state.together.get(n.name, state.dims.mixing[n]) for n in left_out}
    state.report.locate({_named(n): source_line(n) for n in left_out})
    return f"{len(state.demands.order)} instances"


def _reduces_an_input(node: fx.Node, dims: TokenDims) -> bool:
    """Whether a node is a reduction of what is as cheap as an input: what is asserted of ids, say."""
    return facts(node).fold is not None and dims.worked.isdisjoint(operands(node))


def _named(node: fx.Node) -> str:
    return f"{node.target} ({node.name})"


def cut_stages(state: State) -> str:
    """Stages between barriers, and by min-cut the few values that live at full length between them."""
    assert state.demands is not None
    state.stages = plan_stages(state.demands)
    stored = sum(len(plan.stored) for plan in state.stages.plans)
    if not stored:
        raise NotWorthwhile("no value would be computed in a loop")
    return f"{len(state.stages.plans)} stages, {stored} values at full length"


def loops_over_mini_sequences(state: State) -> str:
    """Every stage's rows in one loop."""
    assert state.stages is not None
    before = len(state.gm.graph.nodes)
    multiplying = products(state.gm.graph)
    state.report.work = sum(multiplying.values())
    looped = insert_loops(state.gm, state.stages, limit=state.limit)
    outside = products(looped.graph)
    state.report.work_outside = {_named(node): work for node, work in outside.items()}
    left = {node.name for node in outside}
    if state.report.kind == PREFILL and _scores_tokens(state, [n for n in multiplying if n.name not in left]):
        state.report.kind = SCORING
    made = [loop for _, loop in loops(looped)]
    if all(isinstance(loop.length, int) and state.limit.fits(loop.length, state.sequences) for loop in made):
        raise NotWorthwhile(in_one(max(loop.length for loop in made), made[0].rows))  # type: ignore[type-var, arg-type]
    state.gm = looped
    return f"{before} -> {len(state.gm.graph.nodes)} nodes"


def only_what_is_needed(state: State) -> str:
    """Of weights on the host: matrices of the experts that are chosen, rows that are looked up."""
    return f"of {fetch_used_parts(state.gm)} weights on the host a part arrives"


def regions_put_back(state: State) -> str:
    """What was outlined and is in no loop is computed as it was."""
    return f"{inline_regions(state.gm)} regions"


def keys_and_values_to_host(state: State) -> str:
    """What the cache keeps leaves for the host behind its stage, and comes back for its attention."""
    if state.kv is not None:
        state.report.locate({value.node.name: source_line(value.node) for value in state.kv.left_out})
    state.offload = kv_offload(state.gm, state.device, start=state.kv_on_host, kv=state.kv)
    state.report.describe_kv(state.offload)
    return f"{len(state.offload.leaving)} values leave, {state.offload.arriving} arrive"


def cache_grows_in_place(state: State) -> str:
    """Keys and values that stay on the device get their new rows in the storage of the old ones."""
    extended = 0 if state.kv is None else extend_in_place(state.gm, state.kv, state.static_inputs)
    return f"{extended} keys and values"


def weights_for_their_stretch(state: State) -> str:
    """Weights on the host arrive before the loop, or the stretch between two attentions, that reads them."""
    state.weights = weights_arrive(state.gm)
    return f"{len(state.weights)} weights arrive"


def copies_one_layer_ahead(state: State) -> str:
    """What comes to the device begins to do so while the layer before computes."""
    return f"{overlap(state.gm, state.weights)} layers arrive"


def weights_in_place_of_others(state: State) -> str:
    """What arrives lies where a weight was that nobody reads any more."""
    return f"{reuse_slots(state.gm, state.weights)} of {len(state.weights)} weights take another's place"


def rows_of_their_own(state: State) -> str:
    """Parts of a value that leave, a window of a cache say, are copied, so that the rest of it can go."""
    state.report.own_rows = list(own_rows(state.gm))
    return f"{len(state.report.own_rows)} parts"


def residual_in_place(state: State) -> str:
    """What a stage stores takes over the storage of an operand that dies there: the residual stream lives once."""
    state.gm = take_over_storage(state.gm)
    taken = [o.name for _, loop in loops(state.gm) for o in loop.stored if o.over is not None]
    return f"{len(taken)} values in place of others"


#: What makes loops, and what then works on the graph with loops or, where they are not worthwhile, without.
TO_LOOPS: tuple[Step, ...] = (
    flex_attention_as_one,
    move_fetches_to_whole_weights,
    hold_real_layouts,
    drop_whole_slices,
    empty_parts_left_out,
    canonical_attention,
    convolutions_as_one,
    experts_as_regions,
    scores_as_one,
    results_as_claimed,
    lay_out_keys_and_values,
    find_keys_and_values,
    find_tokens,
    rows_on_demand,
    picks_on_demand,
    mlp_alone,
    follow_demands,
    cut_stages,
    loops_over_mini_sequences,
)
#: What only looks at the graph: there is nothing to verify behind it.
ANALYSES: frozenset[Step] = frozenset({find_keys_and_values, find_tokens, mlp_alone, follow_demands, cut_stages})
BETWEEN_LOOPS: tuple[Step, ...] = (
    only_what_is_needed,
    regions_put_back,
    keys_and_values_to_host,
    cache_grows_in_place,
    weights_for_their_stretch,
    copies_one_layer_ahead,
    weights_in_place_of_others,
)
#: What decides which storage a value has, once it is known what leaves: what is copied out of a value does not hold it.
STORAGE: tuple[Step, ...] = (rows_of_their_own, residual_in_place)


def run_pipeline(
    gm: fx.GraphModule,
    *,
    static_inputs: Collection[str],
    limit: RowLimit,
    report: Report,
    scope: str = "layer",
    kv_on_host: bool = False,
    skip: Collection[str] = (),
) -> Rewritten:
    """The rewritten graph and its program; `gm` is left as it was. Raises `NotWorthwhile` with the reason."""
    report.nodes = len(gm.graph.nodes)
    out_of_order = read_after_write(gm)
    if out_of_order is not None:
        raise NotWorthwhile(out_of_order)
    copied = copy_graph(gm)
    substitute_known_symbols(copied)
    state = State(copied, static_inputs, limit, report, scope, kv_on_host, contract=Contract.of(copied))
    no_loops: NotWorthwhile | None = None
    try:
        _run(TO_LOOPS, state, skip)
    except NotWorthwhile as decision:
        no_loops = decision
    _run(BETWEEN_LOOPS, state, skip)
    if no_loops is not None and not _is_rewritten(state):
        no_loops.rewritten = _by_layers(state, no_loops.reason, skip)
        raise no_loops
    _run(STORAGE, state, skip)
    log.debug("rewritten graph:\n%s", state.gm.code)
    return Rewritten.of(state.gm, None if no_loops is None else no_loops.reason, state.weights)


def _by_layers(state: State, no_loops: str, skip: Collection[str]) -> Rewritten | None:
    _run((rows_of_their_own,), state, skip)
    plan = by_layers(state.gm)
    return None if plan is None else Rewritten.planned(state.gm, plan, no_loops)


def _is_rewritten(state: State) -> bool:
    """Whether a graph without loops is another than the captured one in what matters: it reads weights on the host,
    moves keys and values there, or has logits in blocks."""
    fetches = any(node.target in (FETCH_ROWS, FETCH_CHOSEN) for node in state.gm.graph.nodes)
    return bool(state.offload or state.weights) or fetches or scores_in_blocks(state.gm.graph)


def for_stock(gm: fx.GraphModule, *, report: Report) -> fx.GraphModule:
    """A graph in which nothing else is worth rewriting: itself, or a copy of it with rows of their own."""
    if read_after_write(gm) is not None:
        return gm
    copied = copy_graph(gm)
    report.own_rows = list(own_rows(copied))
    verify(copied, Contract.of(gm))
    return copied if report.own_rows else gm


def _run(steps: Collection[Step], state: State, skip: Collection[str]) -> None:
    for step in steps:
        if step.__name__ in skip:
            continue
        began = time.perf_counter()
        change = step(state)
        if step not in ANALYSES:
            verify(state.gm, state.contract, known=state.sound)
        seconds = time.perf_counter() - began
        state.report.passes.append(PassReport(step.__name__, seconds, change))
        log.debug("%s: %.0f ms: %s", step.__name__, seconds * 1e3, change)
