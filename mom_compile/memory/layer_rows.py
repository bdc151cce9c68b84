"""The rows of a graph's mini-sequences on a GPU: `rows` applied to what its loops compute and hold. NEVER MEASURED.

Terms
-----
layer    What most of the graph's loops compute: the heads of their attention, and the weights that they multiply with.
tenth    What a mini-sequence of one loop holds is at most a tenth of what lives at full length at the peak.

    need = rows_for(the GPU, the layer)                        for the graph
    rows = need, or as many as a tenth has room for            for each loop

Loops keep the rows that they have where the layer holds experts (see `RowLimit`) or multiplies with no weight. Of a
graph for all lengths nobody knows what will live at full length: it may be the longest, and the need alone counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mom_compile.memory.rows import Device, Layer, Properties, device_of, rows_for
from mom_passes.graph.sizes import expr, product
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import COUNT, TensorType, WholeIn
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import LoopStep
from mom_passes.program.rewritten import Rewritten
from mom_passes.rules.registry import facts

#: Rows between which a mini-sequence's bytes are compared: what does not grow with them is not theirs.
FEW, MANY = 1024, 2048

_INDICES = (torch.int64, torch.int32, torch.bool)


def properties_of(device: torch.device) -> Properties:
    """Of a CUDA device. Raises what CUDA raises where there is none."""
    found = torch.cuda.get_device_properties(device)
    return Properties(found.name, found.multi_processor_count, found.major * 10 + found.minor)


def with_rows_for(rewritten: Rewritten, gpu: Properties, static: Collection[str]) -> tuple[Rewritten, str]:
    """The same graph with the rows that the rule says, and why; `static` names its parameters and buffers."""
    found, memory = loop_nodes(rewritten.gm), rewritten.memory
    layer = _layer(rewritten, static)
    if layer is None:
        return rewritten, ""
    device, whose = device_of(gpu)
    need = rows_for(device, layer)
    full = max(sum(memory.number(storage.bytes) for storage in moment.alive) for moment in memory.moments)
    rows = {}
    for moment in memory.moments:
        if isinstance(moment.step, LoopStep) and moment.step.loop.spread == 1:
            rows[moment.step.loop] = _rows(device, layer, moment, memory, full)
    for _, module in found:
        module.loop = replace(module.loop, rows=rows.get(module.loop, module.loop.rows))
    fewer = ", fewer where they would hold more than a tenth of what lives at full length"
    cut = fewer if any(n < need for n in rows.values()) else ""
    why = f"{need} tokens at a time for {_in_words(layer)} on {whose}{cut} (never measured)"
    return Rewritten.of(rewritten.gm, rewritten.no_loops), why


def _rows(device: Device, layer: Layer, moment: Moment, memory: Memory, full: int) -> int:
    assert isinstance(moment.step, LoopStep)
    if not isinstance(moment.step.loop.length, int):
        return rows_for(device, layer)
    few, many = (memory.number(moment.scratch.xreplace({COUNT: n})) for n in (FEW, MANY))
    return rows_for(device, layer, row_bytes=(many - few) // (MANY - FEW), full_bytes=full)


def _in_words(layer: Layer) -> str:
    heads = f"{layer.heads} heads and " if layer.heads else ""
    several = f", {layer.sequences} sequences" if layer.sequences > 1 else ""
    return f"{heads}{layer.parameters / 1e6:.0f} million weights a layer{several}"


def _layer(rewritten: Rewritten, static: Collection[str]) -> Layer | None:
    """Of most loops, the one that computes most if there are as many of several; None where it is none for the rule."""
    weights = _weights(rewritten.gm, static)
    found: Counter[Layer] = Counter()
    experts: dict[Layer, bool] = {}
    for node, module in loop_nodes(rewritten.gm):
        layer = layer_of(module.loop, node, weights, rewritten.memory)
        found[layer] += 1
        experts[layer] = module.loop.spread > 1
    if not found:
        return None
    layer = max(found, key=lambda one: (found[one], one.parameters))
    return None if experts[layer] or not layer.products else layer


def layer_of(loop: Loop, node: fx.Node, weights: Collection[fx.Node], memory: Memory) -> Layer:
    """What the body of a loop computes; `weights` are values of the graph that are made of parameters alone."""
    given = list(loop.body.graph.find_nodes(op="placeholder"))[2:]
    bound = zip(given, loop.inputs, loop.bind(node), strict=True)
    whole = {own for own, port, outer in bound if isinstance(port, WholeIn) and outer in weights}
    heads, sequences, products = 0, 1, []
    for inner in loop.body.graph.nodes:
        if inner.target is MOM_ATTENTION:
            heads = memory.number(inner.args[0].meta["type"].shape[1])
        elif inner.op == "call_function" and whole.issuperset(inner.all_input_nodes):
            whole.add(inner)  # what is made of weights alone, a transposed matrix say
        for matrix in _matrices(inner, whole):
            *rows, outputs = inner.meta["type"].shape
            products.append((memory.number(product(matrix.shape)) // memory.number(outputs), memory.number(outputs)))
            sequences = max(sequences, memory.number(expr(product(rows)).xreplace({COUNT: 1})))
    return Layer(heads, tuple(sorted(products)), sequences)


def _matrices(node: fx.Node, whole: Collection[fx.Node]) -> list[TensorType]:
    """The weights that a node multiplies its rows with: an embedding, which looks rows up, has none."""
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
    """Values of parameters, buffers and constants alone."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        read: list[Any] = node.all_input_nodes
        own = node.name in static if node.op == "placeholder" else node.op == "get_attr"
        if own or (node.op == "call_function" and read and all(one in found for one in read)):
            found.add(node)
    return found
