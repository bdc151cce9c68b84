"""Which values of a graph are keys and values that a cache keeps. An analysis: by structure, never by name.

Terms
-----
full      What an attention reads whole: all of the keys, or of the values, that it may see.
kept      What of it leaves the graph for the cache: all rows, or the last ones (a sliding window).
past      The host tensor it was made from, `full = cat([fetch(past), new])`; None where there was none.
layer     Keys and values that one attention reads first; they are numbered in the order of their attentions.

    for each output of the graph:
        full = what it is a slice of the last rows of, or the output itself
        it is a key or value if, through views and copies, an attention reads it whole

An attention is `mom.attention`, a loop that holds one, or the two batched products that an attention is written as.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from passes.demands import VIEWS, seen_through_views
from passes.host_ops import FETCH
from passes.mini_sequence import MiniSequence
from passes.rules import Dim
from passes.rules.arguments import argument
from passes.sizes import Size, count_hint, expr, hint, same

aten = torch.ops.aten

MOM_ATTENTION = torch.ops.mom.attention.default

COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten._unsafe_view.default, aten.reshape.default})
PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default, aten.matmul.default})


@dataclass(frozen=True)
class KeyOrValue:
    """One of them. `dim` is the dimension of its tokens, `first` the number of its first row that is kept.

    `outputs` are the positions of what is kept among the graph's outputs; `new` the rows a past is extended by.
    """

    full: fx.Node
    kept: fx.Node
    outputs: tuple[int, ...]
    dim: int
    first: Size
    layer: int
    past: fx.Node | None = None
    new: fx.Node | None = None

    @property
    def bytes(self) -> int:
        """Of what is kept, at the captured sizes."""
        value = self.kept.meta["val"]
        return count_hint(value.shape) * value.element_size()

    @property
    def bytes_per_token(self) -> int:
        return self.bytes // max(1, hint(self.kept.meta["val"].shape[self.dim]))


@dataclass(frozen=True)
class KVValues:
    """What was found, layer by layer, and what was left on the device, by name, with the reason."""

    found: tuple[KeyOrValue, ...]
    left_out: dict[str, str]


def find_kv(gm: fx.GraphModule) -> KVValues:
    """The keys and values that leave a graph. Nothing is changed."""
    output = next(iter(reversed(gm.graph.nodes)))
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    where: dict[fx.Node, list[int]] = {}
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else ()
    for i, node in enumerate(returned):
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor):
            where.setdefault(node, []).append(i)
    left_out = _updated_in_place(gm)
    found = []
    for kept, outputs in where.items():
        full, reader = _read_whole(gm, kept)
        if reader is None:
            continue
        dim = _token_dim(gm, full)
        if dim is None:
            left_out[kept.name] = "which of its dimensions holds the tokens cannot be told"
            continue
        found.append((position[reader], position[full], full, kept, tuple(outputs), dim))
    layers = _number(list(gm.graph.nodes), sorted({at for at, *_ in found}))
    values = [_record(layers[at], full, kept, outputs, dim) for at, _, full, kept, outputs, dim in sorted(found)]
    return KVValues(tuple(values), left_out)


def _number(nodes: list[fx.Node], readers: list[int]) -> dict[int, int]:
    """Layers by the positions of their readers: two products, one over keys and then one over values, are one layer."""
    layers: dict[int, int] = {}
    alone = False
    for at in readers:
        product = nodes[at].target in PRODUCTS
        paired = product and alone
        layers[at] = max(layers.values(), default=-1) + (not paired)
        alone = product and not paired
    return layers


def _record(layer: int, full: fx.Node, kept: fx.Node, outputs: tuple[int, ...], dim: int) -> KeyOrValue:
    rows = expr(full.meta["val"].shape[dim]) - expr(kept.meta["val"].shape[dim])
    past, new = _past(full)
    return KeyOrValue(full, kept, outputs, dim, int(rows) if rows.is_Integer else rows, layer, past, new)


def _read_whole(gm: fx.GraphModule, kept: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The full value of an output, and the first attention that reads it whole."""
    candidates = [kept]
    if kept.target is aten.slice.Tensor and _last_rows(kept):
        candidates.append(kept.args[0])  # type: ignore[arg-type]
    for full in candidates:
        if full.op != "placeholder" and full.meta["val"].dim() >= 3:
            reader = min(_attentions(gm, full), default=None)
            if reader is not None:
                return full, reader
    return kept, None


def _last_rows(node: fx.Node) -> bool:
    """Whether a slice ends where its operand ends, without gaps."""
    source, dim = argument(node, "self").meta["val"], argument(node, "dim")
    end, step = argument(node, "end"), argument(node, "step")
    end = end.meta["val"] if isinstance(end, fx.Node) else end
    size = source.shape[dim]
    return step == 1 and (end is None or same(end, size) or (isinstance(end, int) and end >= 1 << 62))


def _attentions(gm: fx.GraphModule, full: fx.Node) -> Iterator[fx.Node]:
    """Attentions that read all of a value, or of what it is a view or a copy of, also through views and copies."""
    root = source_of(full)
    pending, seen = [root], {root}
    while pending:
        value = pending.pop()
        for user in value.users:
            if user.target in VIEWS or user.target in COPIES:
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
            elif value in read_whole(gm, user):
                yield user


def source_of(node: fx.Node) -> fx.Node:
    """What a node is a view or a copy of, through any number of both: heads repeated for a cache are still heads."""
    while True:
        node = seen_through_views(node)
        if node.target not in COPIES:
            return node
        node = node.args[0]  # type: ignore[assignment]


def read_whole(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    """What a node reads as keys or values are read, if it may be an attention; else nothing."""
    operands: Sequence[object] = ()
    if node.target is MOM_ATTENTION:
        operands = (argument(node, "key"), argument(node, "value"))
    elif "scaled_dot_product" in str(node.target):
        operands = node.args[1:3]
    elif node.target in PRODUCTS:
        operands = node.args[-1:]  # queries by keys, and what comes of it by values
    elif node.op == "call_module":
        loop = gm.get_submodule(str(node.target))
        assert isinstance(loop, MiniSequence)
        operands = node.args[len(node.args) - loop.spec.whole :]
    return tuple(operand for operand in operands if isinstance(operand, fx.Node))


def _token_dim(gm: fx.GraphModule, full: fx.Node) -> int | None:
    if full.target is aten.cat.default:
        return int(argument(full, "dim")) % int(full.meta["val"].dim())
    root = source_of(full)
    source = root.args[0] if root.target is operator.getitem else None
    if isinstance(source, fx.Node) and source.op == "call_module":
        loop = gm.get_submodule(str(source.target))
        assert isinstance(loop, MiniSequence)
        if root is not seen_through_views(full):
            return _only_dim_of_size(full, loop.spec.length)
        return _where_tokens_are(full, root, loop.spec.outputs[root.args[1]].dim, loop.spec.length)  # type: ignore[index]
    if any(user.target is MOM_ATTENTION or "scaled_dot_product" in str(user.target) for user in full.users):
        return 2
    # The products that an attention is written as contract over the channels, then over the tokens.
    return 2 if full.meta["val"].dim() == 4 else None


def _where_tokens_are(view: fx.Node, root: fx.Node, dim: Dim, length: Size) -> int | None:
    """The dimension of a view that has as many steps, and as long ones, as the tokens of what it is a view of."""
    value, base = view.meta["val"], root.meta["val"]
    step = hint(base.stride(dim.index)) * hint(dim.inner)
    sizes = list(zip(value.shape, value.stride(), strict=True))
    found = [i for i, (size, stride) in enumerate(sizes) if same(size, length) and hint(stride) == step]
    return found[0] if len(found) == 1 else None


def _only_dim_of_size(copy: fx.Node, length: Size) -> int | None:
    """A copy has strides of its own: its token dimension is told by its size, if that is no other dimension's too."""
    found = [i for i, size in enumerate(copy.meta["val"].shape) if same(size, length)]
    return found[0] if len(found) == 1 else None


def _past(full: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    if full.target is not aten.cat.default:
        return None, None
    parts = argument(full, "tensors")
    if len(parts) == 2 and parts[0].target is FETCH:
        return parts[0].args[0], parts[1]
    return None, None


def _updated_in_place(gm: fx.GraphModule) -> dict[str, str]:
    """Caches that their owner allocates: the graph writes into an input."""
    return {
        str(node.args[0]): "the cache is updated in place, in storage that belongs to its owner (a static cache)"
        for node in gm.graph.nodes
        if node.target is aten.copy_.default and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"
    }
