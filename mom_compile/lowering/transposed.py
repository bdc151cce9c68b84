"""Weights that a loop body only reads transposed are transposed once, before the loop, not in every iteration.

Before:  def body(start, count, x_rows, w): wt = permute(w, [1, 0]); y = mm(x_rows, wt); ...       loop(x, w)
After:   def body(start, count, x_rows, w): y = mm(x_rows, w); ...                                 loop(x, w.t())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from mom_compile.lowering.templates import Template, TensorTemplate

aten = torch.ops.aten


def transpose_once(
    graph: fx.Graph, templates: Sequence[Template], candidates: Sequence[bool]
) -> tuple[list[Template], list[bool]]:
    """Remove transposes from a body, in place.

    Parameters
    ----------
    templates
        Of the placeholders.
    candidates
        Whether the placeholder has the same value in every iteration.

    Returns
    -------
    The new templates, and which placeholders are transposed now.
    """
    inputs = graph.find_nodes(op="placeholder")
    transposed = [may and _is_read_transposed(node) for node, may in zip(inputs, candidates, strict=True)]
    for node, transposes in zip(inputs, transposed, strict=True):
        for view in list(node.users) if transposes else ():
            view.replace_all_uses_with(node)
            graph.erase_node(view)
    return [_transposed(t) if now else t for t, now in zip(templates, transposed, strict=True)], transposed


def _is_read_transposed(node: fx.Node) -> bool:
    transposes = (aten.t.default, aten.permute.default)
    return bool(node.users) and all(
        user.target in transposes and list(user.args[1:]) in ([], [[1, 0]]) and not user.kwargs for user in node.users
    )


def _transposed(template: Template) -> Template:
    assert isinstance(template, TensorTemplate)
    return replace(template, shape=template.shape[::-1], stride=template.stride[::-1])
