"""Graphs of large models without weights, as they would be captured on CUDA.

Captured on the CPU with stand-ins for weights and inputs. Then the device of every tensor becomes `cuda:0`, and each
attention the operator that PyTorch chooses on that GPU. (Capturing on fake CUDA tensors needs a CUDA build: indexing
raises.)

    Hopper, data-center Blackwell   cuDNN first, in half precision, for heads of at most 128 channels; with or without a
                                    mask, also for one query. Assumes a recent cuDNN
    flash                           otherwise, without a mask, in half precision, with values as wide as keys
    efficient                       otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from mom_compile.capture import capture
from mom_compile.runtime.attention.ways import CUDNN_CAPABILITIES, HALF
from mom_compile.stand_ins import on_stand_ins
from mom_compile.torch_compat.dynamo import trace_whole, undisturbed
from mom_compile.torch_compat.inductor import mark_boxed
from mom_compile.torch_compat.tensors import tree_map
from mom_passes.graph.edit import fake_value
from tests.no_gpu.target import Gpu

aten = torch.ops.aten

CUDA = torch.device("cuda:0")
ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Graph:
    """The arguments of Inductor's `inner_compile`."""

    gm: fx.GraphModule
    example_inputs: list[Any]
    more: Mapping[str, Any]

    def on_cuda(self, gpu: Gpu) -> Graph:
        return Graph(graph_on_cuda(self.gm, gpu), [value_on_cuda(value) for value in self.example_inputs], self.more)


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
    """A fake tensor on the simulated device; any other value unchanged."""
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


def graph_on_cuda(gm: fx.GraphModule, gpu: Gpu) -> fx.GraphModule:
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
                _attention_on_cuda(node, gpu)
    gm.recompile()
    return gm


def _attention_on_cuda(node: fx.Node, gpu: Gpu) -> None:
    """The operator of that GPU instead of the CPU's. Its result keeps the layout that the graph's views rely on."""
    query, key, value, *others = node.args
    dropout, is_causal = [*others, *(0.0, False)[len(others) :]]
    mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
    assert all(isinstance(one, fx.Node) for one in (query, key, value))
    heads = [one.meta["val"] for one in (query, key, value)]  # type: ignore[union-attr]
    half = heads[0].dtype in HALF
    if half and (gpu.major, gpu.minor) in CUDNN_CAPABILITIES and all(head.shape[-1] <= 128 for head in heads):
        node.target = aten._scaled_dot_product_cudnn_attention.default
        node.args = (query, key, value, mask, False, dropout, is_causal)
    elif half and mask is None and heads[0].shape[-1] == heads[2].shape[-1]:
        node.target = aten._scaled_dot_product_flash_attention.default
        node.args = (query, key, value, dropout, is_causal)
    else:
        node.target = aten._scaled_dot_product_efficient_attention.default
        node.args = (query, key, value, mask, False, dropout, is_causal)
    node.kwargs = {"scale": scale}
    result, *_ = node.meta["val"]
    node.meta["val"] = (result, *fake_value(node)[1:])
