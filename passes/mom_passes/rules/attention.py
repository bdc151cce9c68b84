"""Chunk rules of attention operators.

A query row needs its own mask row, all keys and all values. The two `All` needs make attention a barrier between
stages. A causal attention in a window that has the argument `first` needs the keys and values in the windows only
(`tokens/window_keys.py` chooses these calls). Batch entries are independent. Heads are independent unless several query
heads share a key head.

    attention(Q, K, V, mask)[rows]  =  attention(Q[rows], K, V, mask[rows])
    mom.attention(..., start)       ->  start + window.start: the position of the first query (in groups of tokens, the
                                        size of a group times as much)
    mom.attention(..., window=w, first)
                                    ->  keys and values need Rows(dim, before=w - 1); `first` becomes the position of
                                        the first of these, negative ahead of the sequence
    mom.attention(..., segments, spans, first)
                                    ->  keys and values need Rows(dim), and mini-sequences are cut between segments
                                        (`tokens/packed_keys.py` chooses these calls)
    per-key vectors                 All along the queries; Rows along the batch, if the vector has the batch dimension
    sinks                           Rows along the heads
    SDPA(is_causal=True)            refused along the queries: the operator takes no row offset
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, given, replace
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, hint, is_one, same
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules.arithmetic import add, mul
from mom_passes.rules.calls import claim
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import broadcast_need, checked, output_shape, outputs_of, shape_of
from mom_passes.rules.needs import All, Dim, Need, Output, Rows, Window
from mom_passes.rules.registry import register

BATCH, HEADS, QUERY, CHANNELS = range(4)
#: The number of `key` among the tensor operands of a call.
KEY_OPERAND = 1


def attention_work(node: fx.Node) -> int:
    """Multiply-adds of queries with keys and of attention weights with values."""
    query, key = meta_value(argument(node, "query")), meta_value(argument(node, "key"))
    return count_hint(query.shape) * hint(key.shape[-2]) * 2


_MASK_NAMES: dict[str, str | None] = {
    "_scaled_dot_product_flash_attention_for_cpu": "attn_mask",
    "_scaled_dot_product_flash_attention": None,
    "_scaled_dot_product_efficient_attention": "attn_bias",
    "_scaled_dot_product_cudnn_attention": "attn_bias",
    "_scaled_dot_product_fused_attention_overrideable": "attn_bias",
    "_scaled_dot_product_attention_math": "attn_mask",
}
#: SDPA operator of ATen -> the name of its mask argument, None if it takes no mask.
SDPA: dict[Any, str | None] = {
    getattr(aten, name).default: mask for name, mask in _MASK_NAMES.items() if hasattr(aten, name)
}

#: The SDPA operators with a chunk rule, for graphs in which they are not replaced by `mom.attention`.
WITH_RULE = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)

#: Pads its log-sum-exp to full tiles of queries, so the log-sum-exp of a slice is not a slice of the log-sum-exp.
PADDED = aten._scaled_dot_product_efficient_attention.default


def attention_needs(node: fx.Node, dim: Dim, mask_name: str | None) -> dict[str, Need]:
    """Return the needs of query, key, value and mask for rows of the result along `dim`."""
    if checked(node, dim).index == CHANNELS:
        raise CannotChunk(node, dim, "a fused attention needs all channels of a head")
    query, key = argument(node, "query"), argument(node, "key")
    if dim.index == HEADS and not same(shape_of(query)[HEADS], shape_of(key)[HEADS]):
        raise CannotChunk(node, dim, "several query heads share a key head")
    others = All() if dim.index == QUERY else Rows(dim)
    needs: dict[str, Need] = {"query": Rows(dim), "key": others, "value": others}
    mask = argument(node, mask_name) if mask_name is not None else None
    if mask is not None:
        # The mask's last dimension is keys and the result's is channels. `dim` is neither.
        needs[mask_name or ""] = broadcast_need(node, mask, output_shape(node), dim)
    return needs


@register(*WITH_RULE, recompute=False, work=attention_work)
def sdpa(node: fx.Node, dim: Dim) -> Claim:
    needs = attention_needs(node, dim, SDPA[node.target])
    if argument(node, "dropout_p") != 0:
        raise CannotChunk(node, dim, "dropout draws other random numbers for a slice than for the whole")
    if dim.index == QUERY and argument(node, "is_causal"):
        raise CannotChunk(node, dim, "causal rows need an offset, and this operator has no offset argument")
    return claim(node, needs, _sdpa_outputs(node, dim))


def _sdpa_outputs(node: fx.Node, dim: Dim) -> tuple[Output, ...]:
    """Return the outputs of a claim. Only the result and the log-sum-exp `[B, H, S]` have rows."""
    _, log_sum_exp, *others = outputs_of(node)
    without_rows = log_sum_exp is None or (dim.index == QUERY and node.target is PADDED)
    return (Rows(dim), None if without_rows else Rows(dim), *(None for _ in others))


#: Arguments of `mom.attention` with one value per key, `[B or 1, T]`, and the spans found in them.
PER_KEY = ("keys", "segments", "positions", "spans")


@register(MOM_ATTENTION, recompute=False, work=attention_work)
def mom_attention(node: fx.Node, dim: Dim) -> Claim:
    needs = {**attention_needs(node, dim, "mask"), **_per_key_needs(node, dim)}
    needs["sinks"] = Rows(dim.at(0)) if dim.index == HEADS else All()
    if dim.index != QUERY:
        return claim(node, needs)
    packed = keeps_to_segments(node)
    ahead = 0 if packed else rows_of_window(node)
    if ahead is not None:
        needs["key"] = needs["value"] = Rows(dim, ahead)
    placed = argument(node, "is_causal") or any(argument(node, name) is not None for name in ("segments", "positions"))
    if not is_one(dim.outer) and placed:
        raise CannotChunk(node, dim, "rows of a folded dimension are not one range of positions")

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not placed:
            return args, kwargs
        changes = {"start": add(given(node.target, args, kwargs, "start"), mul(window.start, dim.inner))}
        if ahead is not None:
            first = mul(window.first[KEY_OPERAND], dim.inner)
            changes["first"] = add(given(node.target, args, kwargs, "first"), first)
        return replace(node.target, args, kwargs, **changes)

    return dataclasses.replace(claim(node, needs, edit=edit), within="spans" if packed else None)


def keeps_to_segments(node: fx.Node) -> bool:
    """Return whether an attention reads only keys of its queries' own segments, so that mini-sequences of whole
    segments need no other keys: it has `first` and no window, and its queries are the same rows as its keys."""
    if any(argument(node, name) is None for name in ("first", "segments", "spans")):
        return False
    return argument(node, "window") is None and argument(node, "mask") is None and _has_rows_of_its_keys(node)


def _has_rows_of_its_keys(node: fx.Node) -> bool:
    start, query, key = argument(node, "start"), argument(node, "query"), argument(node, "key")
    aligned = isinstance(start, int) and start == argument(node, "first")
    return aligned and same(shape_of(query)[QUERY], shape_of(key)[QUERY])


def rows_of_window(node: fx.Node) -> int | None:
    """Return how many keys ahead of its own a row of a causal attention in a window reads, if the call has `first` and
    its queries are the same rows of the sequence as its keys; else None."""
    first, window = argument(node, "first"), argument(node, "window")
    if first is None or window is None or not argument(node, "is_causal"):
        return None
    return int(window) - 1 if _has_rows_of_its_keys(node) else None


def _per_key_needs(node: fx.Node, dim: Dim) -> dict[str, Need]:
    """Return the needs of the per-key arguments: `Rows` along the batch if the argument has the batch dimension."""
    batch = output_shape(node)[BATCH]
    found = {name: argument(node, name) for name in PER_KEY}
    own = {name for name, operand in found.items() if operand is not None and same(shape_of(operand)[BATCH], batch)}
    return {name: Rows(dim) if dim.index == BATCH and name in own else All() for name in PER_KEY}
