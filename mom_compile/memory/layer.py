"""What the loops of a graph compute, as far as the rows of their mini-sequences depend on it.

Terms
-----
layer      What most of the graph's loops compute: the heads of their attention, the weights they multiply with.
sequences  How many rows of a product a loop has for each of its own rows: the sequences of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.memory.device import Layer
from mom_passes.graph.sizes import expr, product
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import COUNT, TensorType, WholeIn
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.program.memory import Memory
from mom_passes.program.rewritten import Rewritten
from mom_passes.rules.registry import facts

_INDICES = (torch.int64, torch.int32, torch.bool)


@dataclass(frozen=True)
class Work:
    """What the loops of a graph compute: the `layer` of most loops (None: none multiplies with weights), and the
    `sequences` of each loop by its node, in the sizes of the graph."""

    layer: Layer | None
    sequences: Mapping[fx.Node, sympy.Expr]


def work_of(rewritten: Rewritten, static: Collection[str]) -> Work:
    """Return what a graph's loops compute; `static` names its parameters and buffers."""
    weights = _weights(rewritten.gm, static)
    found = {n: _of_loop(m.loop, n, weights, rewritten.memory) for n, m in loop_nodes(rewritten.gm)}
    multiplying = [(layer, sequences) for layer, sequences in found.values() if layer.products]
    # A loop that multiplies with no weights has rows of as many sequences as the others.
    several = Counter(sequences for _, sequences in multiplying).most_common(1)
    of_others = several[0][0] if several else sympy.S.One
    sequences = {node: own if layer.products else of_others for node, (layer, own) in found.items()}
    counts = Counter(layer for layer, _ in multiplying)
    # Of layers that are equally frequent, the one that computes most.
    return Work(max(counts, key=lambda one: (counts[one], one.parameters), default=None), sequences)


def in_words(layer: Layer) -> str:
    """Return a description of a layer for reports."""
    heads = f"{layer.heads} heads and " if layer.heads else ""
    several = f", {layer.sequences} sequences" if layer.sequences > 1 else ""
    return f"{heads}{layer.parameters / 1e6:.0f} million weights a layer{several}"


def _of_loop(loop: Loop, node: fx.Node, weights: Collection[fx.Node], memory: Memory) -> tuple[Layer, sympy.Expr]:
    """Return what the body of a loop computes, and its sequences. `weights` are values of the graph that are made of
    parameters alone."""
    given = list(loop.body.graph.find_nodes(op="placeholder"))[2:]
    bound = zip(given, loop.inputs, loop.bind(node), strict=True)
    whole = {own for own, port, outer in bound if isinstance(port, WholeIn) and outer in weights}
    heads, products, sequences, others = 0, [], set(), 0
    for inner in loop.body.graph.nodes:
        if inner.target is MOM_ATTENTION:
            heads = memory.number(inner.args[0].meta["type"].shape[1])
        elif inner.op == "call_function" and whole.issuperset(inner.all_input_nodes):
            whole.add(inner)  # made of weights alone, such as a transposed matrix
        for matrix in _matrices(inner, whole):
            *rows, outputs = inner.meta["type"].shape
            weights_of, columns = memory.number(product(matrix.shape)), memory.number(outputs)
            experts = memory.number(matrix.shape[0]) if len(matrix.shape) == 3 and loop.spread > 1 else 1
            chosen = max(1, round(experts / loop.spread))
            products.extend([(weights_of // experts // columns, columns)] * chosen)
            others += weights_of // experts * (experts - chosen)
            sequences.add(expr(product(rows)).xreplace({COUNT: sympy.S.One}))
    # Experts' products have several rows for each row of a loop: the fewest are those of the other products.
    several = min(sequences, key=memory.number, default=sympy.S.One)
    return Layer(heads, tuple(sorted(products)), memory.number(several), others), several


def _matrices(node: fx.Node, whole: Collection[fx.Node]) -> list[TensorType]:
    """Return the weights that a node multiplies its rows with. An embedding looks rows up and has none."""
    type = node.meta.get("type")
    if node.op != "call_function" or facts(node).recompute or not isinstance(type, TensorType) or len(type.shape) < 2:
        return []
    types = {given: given.meta.get("type") for given in node.all_input_nodes}
    tensors = {given: one for given, one in types.items() if isinstance(one, TensorType) and len(one.shape) > 1}
    rows = [one for given, one in tensors.items() if given not in whole and one.dtype not in _INDICES]
    if not rows or expr(type.shape[-1]).has(COUNT):
        return []
    return [one for given, one in tensors.items() if given in whole]


def _weights(gm: fx.GraphModule, static: Collection[str]) -> set[fx.Node]:
    """Return the values that are made of parameters, buffers and constants alone."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        read: list[Any] = node.all_input_nodes
        own = node.name in static if node.op == "placeholder" else node.op == "get_attr"
        if own or (node.op == "call_function" and read and all(one in found for one in read)):
            found.add(node)
    return found
