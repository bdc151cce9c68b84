"""FlexAttention as one operator: `flex_attention` with its two graphs inside the call's target.

Terms
-----
own graphs   `score_mod` maps a score and its indices (batch entry, head, query, key) to a score, `mask_mod` maps
             indices to a boolean. A captured graph passes them as attributes. Tensors and sizes that they capture are
             further arguments, so every value that is read is an argument.
block mask   Which blocks of keys each block of queries reads, as index tensors, preceded by the lengths of queries and
             keys.

Before:  score = get_attr sdpa_score0; mask = get_attr sdpa_mask0
         out = flex_attention(q, k, v, score, (S, S, counts, .., 128, 128, mask), scale, options, captured, captured)
After:   out = FlexAttention(score, mask)(q, k, v, None, (None, None, counts, .., 128, 128, None), scale, ...)

Inductor compiles it between loops, after `restore_flex_attention`. It is not cut along the queries: the block mask and
the graphs' indices count from the first query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import aten
from mom_passes.graph.edit import attribute, copy_graph, fake_mode, fake_value
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, hint, same
from mom_passes.graph.structure import Structured, lines_of
from mom_passes.graph.values import value_of
from mom_passes.rules import Claim, Described, Dim, OperatorFacts
from mom_passes.rules.attention import BATCH, CHANNELS, HEADS, QUERY
from mom_passes.rules.factories import checked
from mom_passes.torch_compat import FLEX_ATTENTION

#: Positions of the score graph and the block mask, and the number of arguments. A block mask ends with its graph.
_SCORE, _MASK, _ARGUMENTS = 3, 4, 9

_WHY = {
    BATCH: "its score and mask functions take the index of the batch entry",
    HEADS: "its score and mask functions take the index of the head",
    QUERY: "FlexAttention reads queries, keys and values whole: its block mask counts queries from the first",
    CHANNELS: "a fused attention needs all channels of a head",
}


class FlexAttention(Described, Structured):
    """`flex_attention(query [B, H, S, D], key [B, G, T, D], value [B, G, T, Dv], None, block mask, scale, ...)`.

    Returns `[B, H, S, Dv]` in the query's layout, the log-sum-exp and the highest score of each query.
    """

    def __init__(self, score: fx.GraphModule, mask: fx.GraphModule) -> None:
        self.__name__ = self.__qualname__ = "flex_attention"  # FX names a call by these
        self.score, self.mask, self.counted_in = _own(score), _own(mask), _counted_in(mask)
        graphs = (*lines_of(self.score.graph, self.score), *lines_of(self.mask.graph, self.mask))
        self.structure = f"flex_attention {self.counted_in} {{{'; '.join(graphs)}}}"
        self.facts = OperatorFacts(_refuse, recompute=False, work=_work, apart=(BATCH, HEADS))

    def __str__(self) -> str:
        return "flex_attention"

    def __call__(self, query: Any, key: Any, value: Any, _: None, block_mask: tuple[Any, ...], *others: Any) -> Any:
        block_mask = _mask_of(block_mask, (query, key), lambda value: value.shape[2], self.mask)
        return FLEX_ATTENTION(query, key, value, self.score, block_mask, *others)


def _own(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph without recorded values, which would keep the symbols of its capture alive."""
    copied = copy_graph(gm)
    for node in copied.graph.nodes:
        node.meta = {}
    return copied


def _counted_in(gm: fx.GraphModule) -> torch.dtype:
    """The dtype of the indices that a graph takes."""
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][3]
    return value_of(last).dtype


def _mask_of(block_mask: tuple[Any, ...], of: tuple[Any, Any], length: Callable[[Any], Any], graph: Any) -> Any:
    """A block mask with its graph, and with the lengths of queries and keys where these are None."""
    first = (length(value) if given is None else given for given, value in zip(block_mask[:2], of, strict=True))
    return (*first, *block_mask[2:-1], graph)


def _refuse(node: fx.Node, dim: Dim) -> Claim:
    raise CannotChunk(node, dim, _WHY.get(checked(node, dim).index, "it is a dimension of its own"))


def _work(node: fx.Node) -> int:
    """Multiply-adds of both products, masked blocks included."""
    operands: Any = node.args
    query, key = meta_value(operands[0]), meta_value(operands[1])
    return count_hint(query.shape) * hint(key.shape[-2]) * 2


def _graphs_of(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The score and mask attributes of a call of flex_attention; None for any other call."""
    if node.target is not FLEX_ATTENTION or len(node.args) != _ARGUMENTS:
        return None
    args: Any = node.args
    score, mask = args[_SCORE], args[_MASK][-1]
    return (score, mask) if _is_graph(gm, score) and _is_graph(gm, mask) else None


def _is_graph(gm: fx.GraphModule, node: Any) -> bool:
    reads = isinstance(node, fx.Node) and node.op == "get_attr"
    return reads and isinstance(attribute(gm, str(node.target)), fx.GraphModule)


def is_read_by_flex_alone(gm: fx.GraphModule, graph: fx.Node) -> bool:
    """Whether only calls of flex_attention read an attribute, as their score or mask."""
    return all(graph in (_graphs_of(gm, user) or ()) for user in graph.users)


def outline_flex(gm: fx.GraphModule) -> int:
    """Replace calls of flex_attention by calls of `FlexAttention`, in place. Return their number."""
    count = 0
    known: dict[tuple[str, str], FlexAttention] = {}
    for node in list(gm.graph.nodes):
        graphs = _graphs_of(gm, node)
        if graphs is None:
            continue
        count += 1
        names = (str(graphs[0].target), str(graphs[1].target))
        if names not in known:
            known[names] = FlexAttention(*(attribute(gm, name) for name in names))
        args: Any = node.args
        query, key, value, _, block_mask, *others = args
        lengths = (value_of(query).shape[2], value_of(key).shape[2])
        own = [None if _is(n, size) else n for n, size in zip(block_mask[:2], lengths, strict=True)]
        node.target = known[names]
        node.args = (query, key, value, None, (*own, *block_mask[2:-1], None), *others)
        for graph in dict.fromkeys(graphs):
            if not graph.users:
                gm.graph.erase_node(graph)
    if count:
        gm.recompile()
    return count


def _is(given: Any, size: Any) -> bool:
    return same(meta_value(given) if isinstance(given, fx.Node) else given, size)


def flex_attentions(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The calls of `FlexAttention`."""
    return (node for node in gm.graph.nodes if isinstance(node.target, FlexAttention))


def restore_flex_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Restore the calls of flex_attention that Inductor compiles, with the graphs as attributes, in place."""
    found = list(flex_attentions(gm))
    for i, node in enumerate(found):
        call: Any = node.target
        args: Any = node.args
        query, key, value, _, block_mask, scale, options, of_score, of_mask = args
        number = _number(query, call.counted_in)
        place = [number] * 4
        with gm.graph.inserting_before(node):
            score = _attribute(gm, f"score_{i}", call.score, [_number(query, value_of(query).dtype), *place, *of_score])
            mask = _attribute(gm, f"mask_{i}", call.mask, [*place, *of_mask])
            block_mask = _mask_of(block_mask, (query, key), _length, mask)
        node.args = (query, key, value, score, block_mask, scale, options, of_score, of_mask)
        node.target = FLEX_ATTENTION
    if found:
        gm.recompile()
    return gm


def _number(query: fx.Node, dtype: torch.dtype) -> torch.Tensor:
    with fake_mode(query.graph):
        return torch.empty((), dtype=dtype, device=value_of(query).device)


def _attribute(gm: fx.GraphModule, name: str, graph: fx.GraphModule, given: list[Any]) -> fx.Node:
    """Add a graph as an attribute, with values recorded for the arguments `given`: numbers, and captured nodes."""
    copied = copy_graph(graph)
    values = iter(given)
    for node in copied.graph.nodes:
        if node.op == "placeholder":
            value = next(values)
            node.meta["val"] = meta_value(value) if isinstance(value, fx.Node) else value
        elif node.op == "get_attr":
            node.meta["val"] = attribute(copied, str(node.target))
        elif node.op == "call_function":
            node.meta["val"] = fake_value(node)
    setattr(gm, name, copied)
    return gm.graph.get_attr(name)


def _length(value: fx.Node) -> Any:
    """The number of queries or keys: an int, or a node that reads it off."""
    size: Any = value_of(value).shape[2]
    if isinstance(size, int):
        return size
    node = value.graph.call_function(aten.sym_size.int, (value, 2))
    node.meta["val"] = size
    return node
