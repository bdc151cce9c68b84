"""Which values of a graph are keys and values that a cache keeps. An analysis by structure, not by name.

Terms
-----
full      All keys (or values) that an attention reads, or the value that they are computed from.
kept      The rows of `full` that leave the graph for the cache: all, or the last ones (a sliding window).
past      The host tensor that `full` extends, `full = cat([fetch(past), new])`; None if there is none.
layer     Keys and values that one attention reads first, numbered in the order of the attentions.
grows     The value is an input with rows added to it, `cat([input, new])`.

    for each output of the graph:
        full = the operand of the slice of last rows that it is, or the output itself
        it is a key or value if an attention reads it directly, or reads rows computed from its rows, and
            it grows or only keys and values of that attention are computed from it    (latents; not hidden states)
        it stays if the caller owns its storage: allocated for all tokens and written by position

In the graph with loops the same values are found by their positions among the outputs (`located`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from mom_passes.attention.reads import Attention, Read, attention_reads, attentions, read_of
from mom_passes.graph.aliasing import is_mutation
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, all_same, expr, hint, same
from mom_passes.graph.values import bytes_of, input_node, is_tensor, operands, returned_values, value_of
from mom_passes.host.kv_remade import kept_in_another_form
from mom_passes.ops.transfers import FETCH
from mom_passes.rules.views import seen_through_views

aten = torch.ops.aten

#: Functional writes of rows into a buffer, their first argument -> the name of the argument with the rows.
WRITES = {
    aten.index_put.default: "values",
    aten.index_copy.default: "source",
    aten.slice_scatter.default: "src",
    aten.select_scatter.default: "src",
    aten.scatter.src: "src",
    aten.copy.default: "src",
}

STATIC = "the cache allocates room for all tokens ahead and writes into it by position (a static cache)"
FOLDED = "its tokens share a dimension with something else"
UNREAD = "it grows like a cache, and no attention of this graph reads it as keys or values"


@dataclass(frozen=True)
class KeyOrValue:
    """A key or value that leaves the graph.

    dim        the token dimension
    first      number of the first row that is kept
    outputs    positions of `kept` among the graph's outputs
    new        the rows that extend `past`
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
        """Bytes of `kept`, at the captured sizes."""
        return bytes_of(self.kept)

    @property
    def bytes_per_token(self) -> int:
        return self.bytes // max(1, hint(value_of(self.kept).shape[self.dim]))


@dataclass(frozen=True)
class LeftOut:
    """A value that stays on the device, with the reason: an output by its position, or an input that is written to."""

    node: fx.Node
    output: int | None
    reason: str


@dataclass(frozen=True)
class KVValues:
    """The keys and values found, layer by layer, and the values left on the device. `read` has the names of all values
    that an attention reads directly, cached or not."""

    found: tuple[KeyOrValue, ...]
    left_out: tuple[LeftOut, ...]
    read: frozenset[str] = frozenset()


def find_kv(gm: fx.GraphModule) -> KVValues:
    """The keys and values that leave a graph without loops. The graph is not changed."""
    return _Finder(gm).find()


class _Finder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.attentions = {attention.node: attention for attention in attentions(gm)}
        self.reads = attention_reads(gm)
        self.returned = returned_values(gm.graph)

    def find(self) -> KVValues:
        places: dict[fx.Node, list[int]] = {}
        for i, node in enumerate(self.returned):
            if isinstance(node, fx.Node) and isinstance(meta_value(node), torch.Tensor):
                places.setdefault(node, []).append(i)
        found: list[tuple[fx.Node, fx.Node, Read]] = []
        reasons: dict[fx.Node, str] = {}
        for kept in places:
            full, read = self._read(kept)
            reason = self._why_not(kept, full, read)
            if reason is not None:
                reasons[kept] = reason
            elif read is not None:
                found.append((full, kept, read))
        made = kept_in_another_form(places, self.reads, [full for full, _, _ in found])
        itself = {kept for _, kept, _ in found}
        left_out = [LeftOut(n, places[n][0], why) for n, why in {**made, **reasons}.items() if n not in itself]
        left_out += self._updated_in_place()
        readers = sorted({read.layer for _, _, read in found}, key=self.position.__getitem__)
        layers = {reader: layer for layer, reader in enumerate(readers)}
        found.sort(key=lambda one: (layers[one[2].layer], self.position[one[0]]))
        values = [_record(full, kept, tuple(places[kept]), r.dim.index, layers[r.layer]) for full, kept, r in found]
        read_itself = frozenset(node.name for node, read in self.reads.items() if read.itself)
        return KVValues(tuple(values), tuple(left_out), read_itself)

    def _read(self, kept: fx.Node) -> tuple[fx.Node, Read | None]:
        """The full value of an output, and how an attention reads it if its rows are keys or values."""
        candidates = [kept]
        if kept.target is aten.slice.Tensor:
            candidates.insert(0, argument(kept, "self"))
        for full in candidates:
            if full.op == "placeholder" or value_of(full).dim() < 3:
                continue
            read = read_of(full, self.reads)
            if full is not kept and (read is None or not _last_rows(kept, read.dim.index)):
                continue
            if read is not None and (read.itself or _grows(full) or self._only_keys(full, kept)):
                return full, read
        return kept, None

    def _why_not(self, kept: fx.Node, full: fx.Node, read: Read | None) -> str | None:
        """The reason why a cache's output stays, or None."""
        buffer = _written_into(kept)
        if buffer is not None and (read is not None or self._holds_keys(kept)):
            return STATIC
        if read is None:
            grown = argument(kept, "self") if kept.target is aten.slice.Tensor and _keeps_the_end(kept) else kept
            return UNREAD if _grows(grown) and not _is_as_long_as_past(kept, grown) else None
        return None if read.dim.plain else FOLDED

    def _holds_keys(self, node: fx.Node) -> bool:
        """Whether an attention reads a buffer, before or after a write to it, or the rows that are written."""
        values = [node]
        while node.target in WRITES:
            values.append(argument(node, WRITES[node.target]))
            node = argument(node, "self")
            values.append(node)
        reads = [read_of(value, self.reads) for value in values]
        return any(read is not None and read.itself for read in reads)

    def _only_keys(self, full: fx.Node, kept: fx.Node) -> bool:
        """Whether only keys and values of one layer's attention are computed from a value."""
        layers: set[fx.Node] = set()
        pending, seen = [full], {full}
        while pending:
            value = pending.pop()
            for user in value.users:
                attention = self.attentions.get(user)
                if attention is not None and _as_key_or_value(attention, value):
                    layers.add(attention.layer)
                elif user.op == "output":
                    if value not in (full, kept):
                        return False
                elif is_mutation(user) or user.op != "call_function":
                    return False
                elif is_tensor(user) and user not in seen:
                    seen.add(user)
                    pending.append(user)
        return len(layers) == 1

    def _updated_in_place(self) -> list[LeftOut]:
        """Inputs that the caller allocates as caches and to which the graph writes keys or values."""
        found = []
        for node in self.gm.graph.nodes:
            written = node.args[0] if node.target is aten.copy_.default else None
            if written is not None and written.op == "placeholder" and self._holds_keys(node.args[1]):
                found.append(LeftOut(written, None, STATIC))
        return found


def located(gm: fx.GraphModule, kv: KVValues) -> KVValues:
    """The same keys and values in the rewritten graph, found by their positions among its outputs."""
    outputs = returned_values(gm.graph)
    inputs = {node.name: node for node in gm.graph.nodes if node.op == "placeholder"}

    def again(value: KeyOrValue) -> KeyOrValue:
        kept = outputs[value.outputs[0]]
        assert isinstance(kept, fx.Node)
        if value.kept is not value.full and kept.target is aten.slice.Tensor and _last_rows(kept, value.dim):
            return _record(argument(kept, "self"), kept, value.outputs, value.dim, value.layer)
        return _record(kept, kept, value.outputs, value.dim, value.layer)

    def left(value: LeftOut) -> LeftOut:
        node = inputs[value.node.name] if value.output is None else outputs[value.output]
        assert isinstance(node, fx.Node)
        return replace(value, node=node)

    return KVValues(tuple(again(value) for value in kv.found), tuple(left(value) for value in kv.left_out))


def _record(full: fx.Node, kept: fx.Node, outputs: tuple[int, ...], dim: int, layer: int) -> KeyOrValue:
    rows = expr(value_of(full).shape[dim]) - expr(value_of(kept).shape[dim])
    past, new = _past(full)
    return KeyOrValue(full, kept, outputs, dim, int(rows) if rows.is_Integer else rows, layer, past, new)


def _last_rows(node: fx.Node, dim: int) -> bool:
    """Whether a slice along `dim` takes the last rows of its operand, with step one."""
    return axis(argument(node, "dim"), value_of(node).dim()) == dim and _keeps_the_end(node)


def _keeps_the_end(node: fx.Node) -> bool:
    """Whether a slice ends where its operand ends, with step one."""
    source, dim = meta_value(argument(node, "self")), argument(node, "dim")
    end, step = argument(node, "end"), argument(node, "step")
    end = meta_value(end) if isinstance(end, fx.Node) else end
    size = source.shape[dim]
    return step == 1 and (end is None or same(end, size) or (isinstance(end, int) and end >= 1 << 62))


def _past(full: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    if full.target is not aten.cat.default:
        return None, None
    parts = argument(full, "tensors")
    if len(parts) == 2 and parts[0].target is FETCH:
        return parts[0].args[0], parts[1]
    return None, None


def _grows(full: fx.Node) -> bool:
    if full.target is not aten.cat.default or len(argument(full, "tensors")) != 2:
        return False
    old = argument(full, "tensors")[0]
    old = seen_through_views(old.args[0] if old.target is FETCH else old)
    return old.op == "placeholder"


def _is_as_long_as_past(kept: fx.Node, grown: fx.Node) -> bool:
    """Whether as many rows are kept as there were: a convolution's state, say."""
    return all_same(value_of(argument(grown, "tensors")[0]).shape, value_of(kept).shape)


def _written_into(node: fx.Node) -> fx.Node | None:
    """The buffer, a constant or an input, that a chain of functional writes begins with; None for any other value."""
    if node.target not in WRITES:
        return None
    while node.target in WRITES:
        node = seen_through_views(input_node(node))
    constant = node.op == "call_function" and not any(is_tensor(operand) for operand in node.all_input_nodes)
    return node if constant or node.op == "placeholder" else None


def _as_key_or_value(attention: Attention, value: fx.Node) -> bool:
    """Whether an attention reads a value only as keys or values."""
    return operands(attention.node).count(value) == sum(operand is value for operand, _ in attention.read)
