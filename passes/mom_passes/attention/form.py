"""Rewrite every attention to `mom.attention`, with grouped heads, a proved mask structure and a start position.

Terms
-----
SDPA        PyTorch's attention operators: one for each kernel, with different arguments and outputs.
products    An attention as two batched products with a softmax between them, as models with sinks write it.
grouped     Keys and values with fewer heads than the query; query head `h` of H uses key head `h // (H / G)`.
repeat_kv   Models repeat grouped keys and values for all query heads before SDPA: H / G times the memory.

    for node in graph:
        if node is SDPA, deterministic, and only its result is used, or the second of two products:
            key, value = the operands of repeat_kv, if both were repeated identically
            mask, start, is_causal, window, keys, ... = the proved structure of the mask (`mask_structure`)
            node -> mom.attention(query, key, value, mask, start, is_causal, scale, window, keys, ..., sinks)

Any other attention is left as it is and computed on the full sequence.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mom_passes.attention.key_vectors import KeyVectors
from mom_passes.attention.mask_form import MaskForm
from mom_passes.attention.mask_structure import MaskAnalysis
from mom_passes.attention.products import attention_of_products
from mom_passes.attention.repeated_heads import without_repeats
from mom_passes.graph.arguments import argument
from mom_passes.graph.edit import fake_value, size_node, strides_differ
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import all_same, same
from mom_passes.graph.values import value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules.attention import SDPA
from mom_passes.torch_compat import schema_of

aten = torch.ops.aten


def attention_form(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite SDPA operators and attentions by products to `mom.attention`, in place.

    Before::

        keys    = view(clone(expand(unsqueeze(k, 2), [B, G, n, S, D])), [B, G * n, S, D])
        values  = view(clone(expand(unsqueeze(v, 2), [B, G, n, S, D])), [B, G * n, S, D])
        sdpa    = _scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, True)
        result  = sdpa[0]

    After::

        result  = mom.attention(q, k, v, None, 0, True, 1 / sqrt(D))
    """
    masks, vectors = MaskAnalysis(), KeyVectors(gm.graph)
    for node in list(gm.graph.nodes):
        call = None
        if node.target in SDPA:
            call = _read(node, masks)
        elif node.target is aten.bmm.default:
            call = _read_products(node, masks)
        if call is not None:
            _rewrite(vectors, node, call)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


@dataclass(frozen=True)
class _Call:
    """An attention's operands; `results` are the nodes that it replaces."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float | None
    results: list[fx.Node]
    window: int | None = None
    form: MaskForm | None = None
    sinks: fx.Node | None = None
    softcap: float | None = None


def _read(node: fx.Node, masks: MaskAnalysis) -> _Call | None:
    """The attention of an SDPA operator, or None where `mom.attention` would give another result."""
    given = _arguments(node)
    random = given["dropout_p"] != 0 or given.get("dropout_mask") is not None
    if random or given.get("return_debug_mask") or not _only_result_used(node):
        return None
    query, key, value = given["query"], given["key"], given["value"]
    shape = value_of(query).shape
    channels = shape[-1]
    if len(shape) != 4:
        return None
    # SDPA's causal mask is aligned to the upper left corner, a sequence's to the lower right: equal if it is square.
    if given["is_causal"] and not same(shape[2], value_of(key).shape[2]):
        return None
    name = SDPA[node.target]
    mask = given[name] if name is not None else None
    # With a boolean mask, a row without visible keys is zero, as with all kernels but cuDNN, which ignores such a mask.
    if mask is not None and "cudnn" in str(node.target):
        mask = masks.boolean(mask)
    # The math kernel adds a boolean mask as numbers.
    if mask is not None and value_of(mask).dtype == torch.bool and "math" in str(node.target):
        return None
    scale = given["scale"]
    if scale is None and isinstance(channels, int):
        scale = channels**-0.5
    results = [user for user in node.users if user.args[1] == 0]
    return _with_proven_mask(_Call(query, key, value, mask, bool(given["is_causal"]), scale, results), masks)


def _read_products(node: fx.Node, masks: MaskAnalysis) -> _Call | None:
    found = attention_of_products(node)
    if found is None:
        return None
    query, key, value = found.query, found.key, found.value
    call = _Call(query, key, value, found.mask, False, found.scale, found.results)
    call = replace(call, sinks=found.sinks, softcap=found.softcap)
    return _with_proven_mask(call, masks)


def _with_proven_mask(call: _Call, masks: MaskAnalysis) -> _Call:
    """The call with the proved part of its mask as other arguments, and without the mask if that is all of it."""
    if call.mask is None:
        return call
    # With sinks, keys masked by a finite number have no weight. Without, a row that it masks entirely sees all of them.
    hidden = call.sinks is not None
    form, shape = masks.form(call.mask, hidden), value_of(call.mask).shape
    rows, keys = value_of(call.query).shape[2], value_of(call.key).shape[2]
    if form is None or not same(shape[-1], keys) or not (same(shape[-2], rows) or _of_keys_alone(form)):
        return replace(call, mask=_slim(call.mask, masks, hidden))
    if call.is_causal and form.start != 0:  # causal twice, from different positions
        return replace(call, mask=_slim(call.mask, masks, hidden))
    mask = None if form.exact else _slim(call.mask, masks, hidden)
    return replace(call, mask=mask, is_causal=call.is_causal or form.causal, window=form.window, form=form)


def _of_keys_alone(form: MaskForm) -> bool:
    return not form.causal and form.segments is None and form.positions is None


def _slim(mask: fx.Node, masks: MaskAnalysis, hidden: bool) -> fx.Node:
    """An equivalent smaller mask: boolean instead of 0 and -inf, without padding or expansion."""
    while True:
        source: Any = masks.condition(mask, hidden=hidden) or _unpadded(mask)
        if source is None and mask.target is aten.expand.default:
            source = mask.args[0]
        if source is None or value_of(source).dim() != 4:
            return mask
        mask = source


def _unpadded(mask: fx.Node) -> fx.Node | None:
    """The source of a mask that was padded at the end of its last dimension, for alignment, and sliced back."""
    if mask.target is not aten.slice.Tensor or argument(mask, "start") not in (0, None) or argument(mask, "step") != 1:
        return None
    padded = mask.args[0]
    if not isinstance(padded, fx.Node) or padded.target is not aten.constant_pad_nd.default:
        return None
    source, pad = argument(padded, "self"), argument(padded, "pad")
    unpadded = all_same(value_of(source).shape, value_of(mask).shape)
    return source if unpadded and len(pad) == 2 and pad[0] == 0 else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, with defaults."""
    return {a.name: argument(node, a.name) for a in schema_of(node.target).arguments}


def _only_result_used(node: fx.Node) -> bool:
    """Whether nothing reads the other outputs (log-sum-exp, random state)."""
    return all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)


def _rewrite(vectors: KeyVectors, node: fx.Node, call: _Call) -> None:
    graph: fx.Graph = node.graph
    start: Any = 0
    named: dict[str, Any] = {}
    if call.form is not None:
        batch, _, tokens, _ = value_of(call.key).shape
        named |= vectors.arguments(call.form, (batch, tokens), before=node)
    if call.sinks is not None:
        named["sinks"] = call.sinks
    if call.softcap is not None:
        named["softcap"] = call.softcap
    with graph.inserting_before(node):
        if call.form is not None:
            start = size_node(graph, call.form.start, before=node)
        key, value = without_repeats(graph, call.key, call.value)
        args: tuple[Any, ...] = (call.query, key, value, call.mask, start, call.is_causal, call.scale)
        if call.window is not None:
            args = (*args, call.window)
        new = graph.call_function(MOM_ATTENTION, args, named)
        for result in call.results:
            new.meta = {**result.meta, "val": fake_value(new)}
            result.replace_all_uses_with(_in_layout(graph, new, result))
    # Dead code elimination keeps SDPA because it is tagged as random.
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)


def _in_layout(graph: fx.Graph, new: fx.Node, old: fx.Node) -> fx.Node:
    """The new result with the strides of the old one, on which later views may rely."""
    if not strides_differ(meta_value(old), meta_value(new)) or _relaid(new, old):
        return new
    copy = graph.call_function(aten.clone.default, (new,), {"memory_format": torch.contiguous_format})
    copy.meta = dict(old.meta)
    return copy


def _relaid(new: fx.Node, old: fx.Node) -> bool:
    """Whether the old result is only copied to the new result's layout. Removes that copy if so."""
    for user in old.users:
        copies = all(_makes_contiguous(u) for u in user.users)
        if user.target is not aten.permute.default or list(argument(user, "dims")) != [0, 2, 1, 3] or not copies:
            return False
    for user in old.users:
        user.meta["val"] = value_of(new).permute(0, 2, 1, 3)
        for copy in list(user.users):
            copy.replace_all_uses_with(user)
    return True


def _makes_contiguous(node: fx.Node) -> bool:
    return node.target is aten.clone.default and argument(node, "memory_format") == torch.contiguous_format
