"""Graphs of large models without their weights, as CUDA would get them.

Captured on the CPU with stand-ins for weights and inputs, then every tensor is said to be on `cuda:0`, and attention is
the operator that PyTorch chooses there. (Capturing on fake CUDA tensors needs a CUDA build: indexing raises.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from mom_compile.capture import capture
from mom_compile.stand_ins import on_stand_ins
from mom_compile.torch_compat import mark_boxed, trace_whole, tree_map, undisturbed

aten = torch.ops.aten

CUDA = torch.device("cuda:0")
ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Graph:
    """What Inductor's `inner_compile` is called with."""

    gm: fx.GraphModule
    example_inputs: list[Any]
    more: Mapping[str, Any]

    def on_cuda(self) -> Graph:
        return Graph(graph_on_cuda(self.gm), [value_on_cuda(value) for value in self.example_inputs], self.more)


def graph_of(function: Callable[..., Any], inputs: Callable[[], dict[str, Any]]) -> Graph:
    """The one graph of `function(**inputs())`. The function's module may be on the meta device, and what `inputs` makes
    has no data either: nothing of a model's size is allocated."""
    found: list[Graph] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        found.append(Graph(gm, list(example_inputs), kwargs))
        return mark_boxed(lambda values: ())

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(gm, example_inputs, inner, {})

    with torch.no_grad(), undisturbed(), on_stand_ins(function, ()):
        broken = trace_whole(function, (), inputs(), backend)
    assert broken is None, broken
    (only,) = found
    assert all(isinstance(value, FakeTensor | int) for value in only.example_inputs)
    return only


def value_on_cuda(value: Any) -> Any:
    """A fake tensor on the device that is not there; anything else as it is."""
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


def graph_on_cuda(gm: fx.GraphModule) -> fx.GraphModule:
    """In place."""

    def moved(value: Any) -> Any:
        return CUDA if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(value_on_cuda, node.meta["val"])
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
            if node.target is ON_CPU:
                _attention_on_cuda(node)
    gm.recompile()
    return gm


def _attention_on_cuda(node: fx.Node) -> None:
    """Flash without a mask, the efficient kernel with one."""
    query, key, value, *others = node.args
    dropout, is_causal = [*others, *(0.0, False)[len(others) :]]
    mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
    if mask is None:
        node.target = aten._scaled_dot_product_flash_attention.default
        node.args, node.kwargs = (query, key, value, dropout, is_causal), {"scale": scale}
    else:
        node.target = aten._scaled_dot_product_efficient_attention.default
        node.args = (query, key, value, mask, False, dropout, is_causal)
        node.kwargs = {"scale": scale}
