"""Sine and cosine once for each row, not once for each head that reads them.

Inductor computes a pointwise value again wherever it is read. Cosines of positions are read by the rotation of queries
and keys, in which every head reads the same ones: they would be computed as often as there are heads.

Before:  q * cos(angles)[:, None]           one kernel: a cosine for every channel of every head
After:   c = cos(angles)                    a kernel of rows and channels alone, which stores them
         q * c[:, None]

Told by structure: a value that has a sine or cosine for each of its elements is stored where something larger reads it.
It has the rows of a mini-sequence, and no heads.

On GPUs alone, whose float32 sine is slow for angles as large as positions are; that was never measured. On a CPU it
makes no difference: 2 layers of the shape of `benchmarks.cpu` took 1.02, 1.01 and 0.98 times as long (S = 4096 twice,
and 8192; medians of pairs).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from mom_compile.torch_compat import mark_stored
from mom_passes.graph.aliasing import aliased_operand, base_of
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint
from mom_passes.graph.values import is_pointwise

aten = torch.ops.aten

#: Types of devices where it is done.
WORTHWHILE_ON = ("cuda",)
#: What takes tens of operations for an element, and in float32 more for large arguments, as positions are.
DEAR = {aten.cos.default, aten.sin.default, aten.tan.default}


def is_worthwhile(devices: Iterable[torch.device]) -> bool:
    return any(device.type in WORTHWHILE_ON for device in devices)


def store_once(graph: fx.Graph) -> list[fx.Node]:
    """Mark what Inductor is to store; `meta["val"]` says sizes. Nothing is computed otherwise."""
    dear: set[fx.Node] = set()
    stored: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.target in DEAR:
            dear.add(node)
        elif _is_pointwise(node):
            read = [given for given in node.all_input_nodes if given in dear]
            smaller = [given for given in read if _elements(given) < _elements(node)]
            stored |= dict.fromkeys(map(base_of, smaller))
            if len(read) > len(smaller):
                dear.add(node)
    for node in stored:
        mark_stored(node)
    return list(stored)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether every element is computed from one of each operand; views count."""
    if node.op != "call_function" or not isinstance(meta_value(node), torch.Tensor):
        return False
    return is_pointwise(node) or node.target is aten.cat.default or aliased_operand(node) is not None


def _elements(node: fx.Node) -> int:
    value = meta_value(node)
    return count_hint(value.shape) if isinstance(value, torch.Tensor) else 0
