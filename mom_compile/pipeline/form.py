"""The steps that bring a captured graph into the form that tokens and loops are looked for in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mom_compile.report.facts import DECODE_STEP, ENCODER, GRAPH, PREFILL, Facts
from mom_compile.torch_compat.inductor import is_called
from mom_passes.attention.flex import FlexAttention, flex_attentions, outline_flex
from mom_passes.attention.form import attention_form
from mom_passes.graph.arguments import argument
from mom_passes.graph.claimed_layouts import correct_strides
from mom_passes.graph.collectives import gathers_of_columns, outline_collectives
from mom_passes.graph.drop_empty_parts import drop_empty_parts
from mom_passes.graph.meta import meta_value
from mom_passes.graph.real_results import check_result_strides
from mom_passes.graph.share_counts import share_counts
from mom_passes.graph.sizes import is_one
from mom_passes.graph.values import operands, value_of
from mom_passes.graph.whole_slices import drop_whole_slices_of
from mom_passes.host.drop_layout_copies import drop_layout_copies
from mom_passes.host.kv_extended import lay_out_for_growth
from mom_passes.host.kv_values import KVValues, find_kv
from mom_passes.host.weights import whole_weights
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.scored import SCORED
from mom_passes.rules import has_own_rule
from mom_passes.tokens.causal_convolutions import causal_convolutions
from mom_passes.tokens.experts import outline_experts
from mom_passes.tokens.masked_rows import masked_rows
from mom_passes.tokens.patch_products import patch_products
from mom_passes.tokens.region import regions
from mom_passes.tokens.scored import outline_scores

EMBEDDING = torch.ops.aten.embedding.default


@dataclass
class State:
    """A graph that steps edit. `static_inputs` names parameters and buffers."""

    gm: fx.GraphModule
    static_inputs: Collection[str]
    kv_on_host: bool = False
    #: Why rows that were sorted cannot be cut, by the name of their sort.
    sorted_whole: Mapping[str, str] = field(default_factory=dict)


Step = Callable[[State], str]


def flex_attention_as_one(state: State) -> str:
    """Outline each call of FlexAttention, which has graphs as arguments, as one operator."""
    return f"{outline_flex(state.gm)} calls"


def move_fetches_to_whole_weights(state: State) -> str:
    """Fetch each weight on the host once, in its layout there, and take its views on the device."""
    return f"{whole_weights(state.gm)} weights on the host"


def collectives_as_one(state: State) -> str:
    """Make each collective and its wait one operator."""
    return f"{outline_collectives(state.gm)} collectives, {gathers_of_columns(state.gm)} gather columns"


def masked_writes_as_gathers(state: State) -> str:
    """Make each write of rows where a mask is true row-wise, such as image embeddings among those of text."""
    replaced = masked_rows(state.gm)
    return f"{len(replaced)} masked writes, {correct_strides(state.gm, replaced)} values laid out otherwise"


def hold_real_layouts(state: State) -> str:
    """Give views the strides that follow from their base: code that is compiled for them relies on these."""
    return f"{correct_strides(state.gm)} values claimed others"


def drop_whole_slices(state: State) -> str:
    """Drop slices that keep everything, such as a window's cache while the prompt is shorter."""
    return f"{drop_whole_slices_of(state.gm)} slices"


def empty_parts_left_out(state: State) -> str:
    """Remove parts without elements from concatenations, such as an empty past."""
    return f"{drop_empty_parts(state.gm)} empty parts"


def counts_once(state: State) -> str:
    """Share positions, sequence numbers and masks that several layers derive."""
    return f"{share_counts(state.gm)} nodes less"


def canonical_attention(state: State) -> str:
    """Make one attention operator with grouped heads and proven masks: one rule, one kernel, K/V at their own width."""
    before = len(state.gm.graph.nodes)
    state.gm = attention_form(state.gm)
    return f"{before} -> {len(state.gm.graph.nodes)} nodes"


def experts_as_regions(state: State) -> str:
    """Outline each mixture of experts as one row-wise operator."""
    state.sorted_whole = outline_experts(state.gm)
    return f"{sum(1 for _ in regions(state.gm.graph))} mixtures of experts"


def convolutions_as_one(state: State) -> str:
    """Make each causal convolution one operator that reads rows ahead of its own, and its state one operator."""
    replaced = causal_convolutions(state.gm)
    return f"{len(replaced)} convolutions and states, {correct_strides(state.gm, replaced)} values laid out otherwise"


def patches_as_rows(state: State) -> str:
    """Make each convolution with one position per entry, such as a patch of a video, a product with a row per entry."""
    replaced = patch_products(state.gm)
    return f"{len(replaced)} convolutions, {correct_strides(state.gm, replaced)} values laid out otherwise"


def scores_as_one(state: State) -> str:
    """Outline token-wise functions of logits as one operator that goes over the vocabulary in blocks."""
    refused = outline_scores(state.gm)
    found = len(state.gm.graph.find_nodes(op="call_function", target=SCORED))
    reasons = "".join(f"; {name} is not: {why}" for name, why in refused.items())
    return f"{found} heads{reasons}"


def results_as_claimed(state: State) -> str:
    """Copy results of called operators that may have other strides than their fake kernels claim."""
    held = check_result_strides(state.gm, _is_doubtful)
    return f"{held} results held, {correct_strides(state.gm) if held else 0} values laid out otherwise"


def _is_doubtful(target: Any) -> bool:
    """Return whether an operator may return other strides than it claims: Inductor calls it, and no test covers it."""
    return is_called(target) and target.namespace != "mom" and not has_own_rule(target)


def lay_out_keys_and_values(state: State) -> str:
    """Lay keys and values out token by token, as products write them, and not head by head as in eager mode. So they
    are copied to the host in whole rows, and grow in place on the device."""
    less = drop_layout_copies(state.gm)
    laid_out = 0 if state.kv_on_host else lay_out_for_growth(state.gm, state.static_inputs)
    return f"{less} copies less, {laid_out} laid out to grow"


def lay_out_to_grow(state: State) -> str:
    """Lay out the keys and values of a graph without loops that stay after all."""
    return f"{lay_out_for_growth(state.gm, state.static_inputs)} laid out to grow"


#: The steps, in order.
TO_FORM: tuple[Step, ...] = (
    flex_attention_as_one,
    move_fetches_to_whole_weights,
    collectives_as_one,
    masked_writes_as_gathers,
    hold_real_layouts,
    drop_whole_slices,
    empty_parts_left_out,
    counts_once,
    canonical_attention,
    convolutions_as_one,
    patches_as_rows,
    experts_as_regions,
    scores_as_one,
    results_as_claimed,
    lay_out_keys_and_values,
)


def find_keys_and_values(state: State) -> tuple[KVValues, str]:
    """Find the outputs that a cache keeps, by what attentions read. Loops would hide that."""
    kv = find_kv(state.gm)
    return kv, f"{len(kv.found)} keys and values, {len(kv.left_out)} that stay"


def facts_of(gm: fx.GraphModule, kv: KVValues) -> Facts:
    """Return what a graph in this form says of itself."""
    whole = [value for value in kv.found if value.kept is value.full]
    return Facts(
        kind_of(gm, kv),
        kv.read.union(value.full.name for value in kv.found),
        tuple((output, value.dim) for value in whole for output in value.outputs),
    )


def kind_of(gm: fx.GraphModule, kv: KVValues) -> str:
    """Return what a graph in this form is for, by its attentions and the keys and values that a cache keeps."""
    if is_decode_step(gm):
        return DECODE_STEP
    if kv.found or kv.left_out or any(map(_is_causal, gm.graph.nodes)):
        return PREFILL
    return ENCODER if kv.read else GRAPH


def _is_causal(node: fx.Node) -> bool:
    """Return whether a node is an attention to earlier tokens only, or one of which that is not known."""
    if node.target is not MOM_ATTENTION:
        return isinstance(node.target, FlexAttention)
    return bool(argument(node, "is_causal")) or argument(node, "positions") is not None


def is_decode_step(gm: fx.GraphModule) -> bool:
    """Return whether one token of each sequence is computed: by the queries of attentions, or else by the embedded
    ids."""
    values: dict[object, list[torch.Tensor]] = {MOM_ATTENTION: [], EMBEDDING: []}
    for node in gm.graph.nodes:
        if node.target in values:
            values[node.target].append(meta_value(node.args[node.target is EMBEDDING]))
    values[MOM_ATTENTION] += [value_of(operands(node)[0]) for node in flex_attentions(gm)]
    tokens = [query.shape[2] for query in values[MOM_ATTENTION]]
    tokens = tokens or [indices.shape[-1] for indices in values[EMBEDDING] if indices.dim()]
    return bool(tokens) and all(is_one(count) for count in tokens)
