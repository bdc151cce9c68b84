"""What a graph's loops compute, as far as the rows of their mini-sequences depend on it.

Terms
-----
layer      What most of the graph's loops compute: the heads of their attention, the weights they multiply with.
sequences  How many rows a loop has of each product for one of its own: the sequences of a batch.

What a layer wants of a GPU says `rows`, what any device wants `bounds`, and `choose_rows` what there is memory for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.memory.bounds import rows_on
from mom_compile.memory.choose_rows import RowRule
from mom_compile.memory.devices import Properties, device_of
from mom_compile.memory.rows import Layer, rows_for
from mom_passes.graph.sizes import expr, product
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import COUNT, TensorType, WholeIn
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.program.memory import Memory
from mom_passes.program.program import LoopStep, Step
from mom_passes.program.rewritten import Rewritten
from mom_passes.rules.registry import facts

_INDICES = (torch.int64, torch.int32, torch.bool)


def properties_of(device: torch.device) -> Properties | None:
    """Of a CUDA device, None of any other. Raises what CUDA raises where there is none."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Properties(found.name, found.multi_processor_count, found.major * 10 + found.minor)


@dataclass(frozen=True)
class _Computed:
    """What a loop computes; `sequences` in the sizes of its graph."""

    layer: Layer
    sequences: sympy.Expr


def row_rule(rewritten: Rewritten, type: str, gpu: Properties | None, static: Collection[str]) -> RowRule:
    """What a type of device, or a GPU, wants of a graph's loops; `static` names its parameters and buffers."""
    computed = _computed(rewritten, static)
    return RowRule(rows_on(type, gpu, _most(computed)), {node: one.sequences for node, one in computed.items()})


def with_rows(rewritten: Rewritten, rows: Mapping[fx.Node, int]) -> Rewritten:
    """The same program with other rows, by the loops' nodes. The graph's own modules stay as they are."""
    steps: dict[Step, LoopStep] = {}
    for step in rewritten.plan.steps:
        if isinstance(step, LoopStep):
            steps[step] = replace(step, loop=replace(step.loop, rows=rows[step.node]))
    found = rewritten.memory
    moments = tuple(
        replace(m, step=steps[m.step], rows=steps[m.step].loop.rows) if m.step in steps else m for m in found.moments
    )
    plan = replace(rewritten.plan, steps=tuple(steps.get(step, step) for step in rewritten.plan.steps))
    return replace(rewritten, plan=plan, memory=replace(found, moments=moments))


def settle_rows(rewritten: Rewritten, rows: Mapping[fx.Node, int]) -> Rewritten:
    """The same, and the graph's modules have these rows too."""
    settled = with_rows(rewritten, rows)
    made = {step.node: step.loop for step in settled.plan.steps if isinstance(step, LoopStep)}
    for node, module in loop_nodes(settled.gm):
        module.loop = made[node]
    return settled


def why(rewritten: Rewritten, gpu: Properties | None, static: Collection[str], rows: Collection[int]) -> str:
    """Why loops on a GPU have so many rows, for people; nothing where its rule has nothing to say."""
    layer = None if gpu is None else _most(_computed(rewritten, static))
    if gpu is None or layer is None:
        return ""
    device, whose = device_of(gpu)
    need = rows_for(device, layer)
    cut = ", fewer where values are wider than that" if any(0 < n < need for n in rows) else ""
    return f"{need} tokens at a time for {_in_words(layer)} on {whose}{cut} (never measured)"


def _in_words(layer: Layer) -> str:
    heads = f"{layer.heads} heads and " if layer.heads else ""
    several = f", {layer.sequences} sequences" if layer.sequences > 1 else ""
    return f"{heads}{layer.parameters / 1e6:.0f} million weights a layer{several}"


def _computed(rewritten: Rewritten, static: Collection[str]) -> dict[fx.Node, _Computed]:
    weights = _weights(rewritten.gm, static)
    nodes = loop_nodes(rewritten.gm)
    found = {node: _of_loop(module.loop, node, weights, rewritten.memory) for node, module in nodes}
    # A loop that multiplies with no weights has rows of as many sequences as the others.
    several = Counter(one.sequences for one in found.values() if one.layer.products).most_common(1)
    of_others = several[0][0] if several else sympy.S.One
    return {n: one if one.layer.products else replace(one, sequences=of_others) for n, one in found.items()}


def _most(computed: Mapping[fx.Node, _Computed]) -> Layer | None:
    """What most loops that multiply with weights compute, the one that computes most if there are as many of several;
    None where none does."""
    found = Counter(one.layer for one in computed.values() if one.layer.products)
    return max(found, key=lambda one: (found[one], one.parameters), default=None)


def _of_loop(loop: Loop, node: fx.Node, weights: Collection[fx.Node], memory: Memory) -> _Computed:
    """What the body of a loop computes; `weights` are values of the graph that are made of parameters alone."""
    given = list(loop.body.graph.find_nodes(op="placeholder"))[2:]
    bound = zip(given, loop.inputs, loop.bind(node), strict=True)
    whole = {own for own, port, outer in bound if isinstance(port, WholeIn) and outer in weights}
    heads, products, sequences, others = 0, [], set(), 0
    for inner in loop.body.graph.nodes:
        if inner.target is MOM_ATTENTION:
            heads = memory.number(inner.args[0].meta["type"].shape[1])
        elif inner.op == "call_function" and whole.issuperset(inner.all_input_nodes):
            whole.add(inner)  # what is made of weights alone, a transposed matrix say
        for matrix in _matrices(inner, whole):
            *rows, outputs = inner.meta["type"].shape
            weights_of, columns = memory.number(product(matrix.shape)), memory.number(outputs)
            experts = memory.number(matrix.shape[0]) if len(matrix.shape) == 3 and loop.spread > 1 else 1
            chosen = max(1, round(experts / loop.spread))
            products.extend([(weights_of // experts // columns, columns)] * chosen)
            others += weights_of // experts * (experts - chosen)
            sequences.add(expr(product(rows)).xreplace({COUNT: sympy.S.One}))
    # Experts' products have several rows for each row of a loop: the fewest are those of the others.
    several = min(sequences, key=memory.number, default=sympy.S.One)
    layer = Layer(heads, tuple(sorted(products)), memory.number(several), others)
    return _Computed(layer, several)


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
