"""An operator's arguments by their schema names instead of positions.

argument(node, "dim")                    what the node passes, or the schema's default
replace(target, args, kwargs, dim=0)     the same call with one argument changed
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from mom_passes.torch_compat import schema_of

aten = torch.ops.aten


prims = torch.ops.prims


def overloads(namespace: Any, names: str) -> list[Any]:
    """Operator overloads from text: `"abs add.Tensor"` is `abs.default` and `add.Tensor`. A typo is an error."""
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(namespace, packet), overload or "default"))
    return found


@cache
def arguments_of(target: Any) -> dict[str, tuple[int | None, Any]]:
    """Argument name -> (position, or None when keyword-only; default)."""
    return {
        argument.name: (None if argument.kwarg_only else position, argument.default_value)
        for position, argument in enumerate(schema_of(target).arguments)
    }


def argument(node: fx.Node, name: str) -> Any:
    """The value a call passes for an argument, or the schema's default."""
    return given(node.target, node.args, node.kwargs, name)


def argument_node(node: fx.Node, name: str) -> fx.Node:
    """The node that a call passes for an argument."""
    value = argument(node, name)
    assert isinstance(value, fx.Node), f"{name} of {node.name} is not a node"
    return value


def given(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The same for a call that is not a node yet."""
    position, default = arguments_of(target)[name]
    if position is not None and position < len(args):
        return args[position]
    return kwargs.get(name, default)


def has_argument(node: fx.Node, name: str) -> bool:
    return name in arguments_of(node.target)


def replace(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **values: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with some of the operator's arguments changed."""
    new_args, new_kwargs = list(args), dict(kwargs)
    for name, value in values.items():
        position, _ = arguments_of(target)[name]
        if position is not None and position < len(new_args):
            new_args[position] = value
        else:
            new_kwargs[name] = value
    return tuple(new_args), new_kwargs


def axis(index: int, rank: int) -> int:
    """A dimension counted from the front (a scalar counts as one-dimensional, as in PyTorch)."""
    return index % max(rank, 1)


def axes(index: Any, rank: int) -> list[int]:
    """Dimensions counted from the front, for an argument that is one index or a list of them."""
    return [axis(one, rank) for one in (index if isinstance(index, (list, tuple)) else [index])]
