"""Compute sine and cosine once per row, not once per head.

Inductor recomputes a pointwise value in each of its readers. The rotary embedding of queries and keys reads the cosines
of positions, the same ones in every head, so that each cosine would be computed once per head.

Before:  q * cos(angles)[:, None]           one kernel: a cosine for every channel of every head
After:   c = cos(angles)                    a kernel of rows and channels alone, which stores them
         q * c[:, None]

The criterion: a value whose computation has a sine or cosine for each of its elements is stored if a larger value
reads it. Such a value has the rows of a mini-sequence and no heads.

This is done on GPUs only, where float32 sine is slow for angles as large as positions; the gain was never measured. On
a CPU there is no difference: 2 layers of the shape of `benchmarks.cpu` took 1.02, 1.01 and 0.98 times as long
(S = 4096 twice, and 8192; medians of pairs).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from mom_compile.torch_compat.inductor import mark_stored
from mom_passes.graph.aliasing import aliased_operand, base_of
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint
from mom_passes.graph.values import is_pointwise

aten = torch.ops.aten

#: Types of devices where values are stored.
WORTHWHILE_ON = ("cuda",)
#: Operators with tens of operations per element; in float32 more for arguments as large as positions.
EXPENSIVE = {aten.cos.default, aten.sin.default, aten.tan.default}


def is_worthwhile(devices: Iterable[torch.device]) -> bool:
    return any(device.type in WORTHWHILE_ON for device in devices)


def store_once(graph: fx.Graph) -> list[fx.Node]:
    """Mark the values that Inductor is to store, and return them. `meta["val"]` has the sizes."""
    expensive: set[fx.Node] = set()
    stored: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.target in EXPENSIVE:
            expensive.add(node)
        elif _is_pointwise(node):
            read = [given for given in node.all_input_nodes if given in expensive]
            smaller = [given for given in read if _elements(given) < _elements(node)]
            stored |= dict.fromkeys(map(base_of, smaller))
            if len(read) > len(smaller):
                expensive.add(node)
    for node in stored:
        mark_stored(node)
    return list(stored)


def _is_pointwise(node: fx.Node) -> bool:
    """Return whether each element is computed from one element of each operand. Views count as pointwise."""
    if node.op != "call_function" or not isinstance(meta_value(node), torch.Tensor):
        return False
    return is_pointwise(node) or node.target is aten.cat.default or aliased_operand(node) is not None


def _elements(node: fx.Node) -> int:
    value = meta_value(node)
    return count_hint(value.shape) if isinstance(value, torch.Tensor) else 0
