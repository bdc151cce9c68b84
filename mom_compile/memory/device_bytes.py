"""Bytes of a device: what there is of it, and what of it a graph's own inputs take."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import sympy
import torch
from torch import fx

from mom_compile.config import Options
from mom_passes.graph.aliasing import views_of
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, expr, product
from mom_passes.ops.transfers import ARRIVING

#: Of a device, what is left to what nobody counts: one part in so many, but not less than that many bytes. The
#: allocator rounds up and its segments have holes, cuBLAS keeps a workspace for each stream, and kernels are loaded.
MARGIN_SHARE, LEAST_MARGIN = 32, 256 << 20


def available_bytes(device: torch.device, weights: int) -> int:
    """What a graph may use of a CUDA device for everything, `weights` that are there already included:

        free + (reserved - allocated) + weights - margin

    What PyTorch has reserved and not handed out is as good as free. What it has handed out is not: beside our weights
    that is other models, other caches and the caller's tensors.
    """
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached + weights - max(LEAST_MARGIN, total // MARGIN_SHARE))


def budget_of(options: Options, device: torch.device, weights: int) -> int:
    """Bytes of the device for everything: those asked for, or those that are to be had."""
    return available_bytes(device, weights) if options.budget_bytes is None else options.budget_bytes


def static_bytes(gm: fx.GraphModule, static: Collection[str], device: torch.device) -> int:
    """Parameters and buffers on the device."""
    values = [meta_value(node) for node in _on(device, gm) if node.name in static]
    return sum(count_hint(value.shape) * value.element_size() for value in values)


def input_bytes(gm: fx.GraphModule, static: Collection[str], device: torch.device) -> dict[fx.Node, sympy.Expr]:
    """Bytes of each other input on the device, in the sizes of the graph."""
    values = {node: meta_value(node) for node in _on(device, gm) if node.name not in static}
    return {node: expr(product(value.shape)) * value.element_size() for node, value in values.items()}


def _on(device: torch.device, gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Inputs on the device. What is read by transfers alone, in whatever view, is on the host, though a CPU's is that,
    too."""
    for node in gm.graph.nodes:
        value = meta_value(node)
        is_there = node.op == "placeholder" and isinstance(value, torch.Tensor) and value.device == device
        if is_there and not _is_on_host(node):
            yield node


def _is_on_host(node: fx.Node) -> bool:
    views = views_of(node)
    readers = {user for view in views for user in view.users} - views
    return bool(readers) and all(reader.target in ARRIVING for reader in readers)
