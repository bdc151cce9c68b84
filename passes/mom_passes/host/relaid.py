"""Replace a value by an equal one with other strides."""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.graph.edit import fake_value
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import all_same
from mom_passes.graph.strides import viewable
from mom_passes.graph.values import input_node, value_of
from mom_passes.ops.transfers import COPIES
from mom_passes.rules.work import matmul_work

aten = torch.ops.aten


def replace_relaid(old: fx.Node, new: fx.Node) -> None:
    """Replace `old` by `new` and recompute the strides of all values computed from it."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    changed = {new}
    for node in new.graph.nodes:
        if node.op != "call_function" or changed.isdisjoint(node.all_input_nodes):
            continue
        before = meta_value(node)
        if node.target in COPIES or matmul_work(node) or not isinstance(before, torch.Tensor):
            continue  # the strides of a product's result do not depend on its operands
        _relay(node)
        if not all_same(before.stride(), value_of(node).stride()):
            changed.add(node)


def _relay(node: fx.Node) -> None:
    """Recompute the value of a node whose operand has new strides. A view that they do not allow becomes a copy.

    Fake tensors do not raise: `view` on a fake tensor succeeds for any strides, by a copy.
    """
    if node.target is aten.view.default:
        source = value_of(input_node(node))
        if not viewable(source.shape, source.stride(), value_of(node).shape):
            node.target = aten.reshape.default
    node.meta["val"] = fake_value(node)
