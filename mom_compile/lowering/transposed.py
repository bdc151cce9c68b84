"""Matrices that a loop's body reads transposed alone are handed to it so: they are turned once, not in every iteration.

Before:  def body(start, count, x_rows, w): wt = permute(w, [1, 0]); y = mm(x_rows, wt); ...       a view for each
After:   def body(start, count, x_rows, w): y = mm(x_rows, w); ...                                 loop(x, w.t())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from mom_compile.lowering.pieces import Template, TensorTemplate

aten = torch.ops.aten


def turn_once(
    graph: fx.Graph, templates: Sequence[Template], candidates: Sequence[bool]
) -> tuple[list[Template], list[bool]]:
    """Take the transposes out of a body, in place: what its inputs are then, and which of them are turned.

    `templates` are those of the placeholders, of which `candidates` are the same in every iteration.
    """
    inputs = graph.find_nodes(op="placeholder")
    turned = [may and _is_read_turned(node) for node, may in zip(inputs, candidates, strict=True)]
    for node, turns in zip(inputs, turned, strict=True):
        for view in list(node.users) if turns else ():
            view.replace_all_uses_with(node)
            graph.erase_node(view)
    return [_turned(t) if turns else t for t, turns in zip(templates, turned, strict=True)], turned


def _is_read_turned(node: fx.Node) -> bool:
    turns = (aten.t.default, aten.permute.default)
    return bool(node.users) and all(
        user.target in turns and list(user.args[1:]) in ([], [[1, 0]]) and not user.kwargs for user in node.users
    )


def _turned(template: Template) -> Template:
    assert isinstance(template, TensorTemplate)
    return replace(template, shape=template.shape[::-1], stride=template.stride[::-1])
