"""Operators that Inductor decomposes and does not lower.

AOTAutograd decomposes the operators of a user's graph before the passes run. It does not see the operators that the
passes add. Inductor refuses a piece that has one it cannot lower, and the piece would run eagerly.

Before:  index = arange.start(0, n); y = index_select(x, 0, index)
After:   index = iota(n); y = index(x, [index])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mom_compile.torch_compat.decompositions import decomposition, is_only_decomposed
from mom_compile.torch_compat.tensors import FakeTensorMode
from mom_passes.graph.edit import attribute
from mom_passes.graph.meta import meta_value


def decompose(gm: fx.GraphModule, mode: FakeTensorMode) -> int:
    """Replace calls of such operators by their decompositions, in place.

    Parameters
    ----------
    gm
        A graph whose nodes have fake values of `mode` in `meta["val"]`.
    mode
        The mode of these values. Its shape environment gets the guards that a decomposition relies on.

    Returns
    -------
    int
        The number of calls that were replaced.
    """
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and is_only_decomposed(node.target)]
    for node in calls:
        _replace(gm, node, mode)
    if calls:
        gm.recompile()
    return len(calls)


def _replace(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> None:
    given = list(node.all_input_nodes)

    def call(*values: Any) -> Any:
        known = dict(zip(given, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    traced = decomposition(call, [meta_value(value) for value in given], mode)
    traced.graph.eliminate_dead_code()
    inputs = iter(given)
    env: dict[fx.Node, Any] = {}
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.map_arg(inner.args[0], env.__getitem__)
            else:
                env[inner] = gm.graph.node_copy(inner, env.__getitem__)
                if inner.op == "get_attr":
                    env[inner].target = _constant(gm, attribute(traced, str(inner.target)))
    _put_in_place(node, result)


def _constant(gm: fx.GraphModule, value: Any) -> str:
    """Add a constant of a decomposition to a graph and return its name."""
    name = f"_decomposed_{sum(known.startswith('_decomposed_') for known in vars(gm) | gm._buffers)}"
    if isinstance(value, torch.Tensor):
        gm.register_buffer(name, value)
    else:
        setattr(gm, name, value)
    return name


def _put_in_place(node: fx.Node, result: Any) -> None:
    """Replace a call in its readers, and erase it."""
    if isinstance(result, fx.Node):
        # Readers outside the piece rely on the strides that the call was captured with.
        if result not in node.all_input_nodes:
            result.meta["val"] = meta_value(node)
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
