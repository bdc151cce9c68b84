"""A node's value (a tensor, several, or a size), its operands, and what a graph returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint
from mom_passes.torch_compat import schema_of


def input_node(node: fx.Node, index: int = 0) -> fx.Node:
    """The node that is passed as positional argument `index`."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node), f"argument {index} of {node.name} is not a node"
    return argument


def operand_chain(node: fx.Node, through: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """A node, its first operand, the first operand of that, and so on while `through` holds for the last."""
    chain = [node]
    while through(chain[-1]):
        chain.append(input_node(chain[-1]))
    return chain


def returned_values(graph: fx.Graph) -> tuple[Any, ...]:
    """The nodes and constants that a graph returns, in order."""
    values = graph.output_node().args[0]
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def return_values(graph: fx.Graph, values: Sequence[Any]) -> None:
    """Let a graph return these values, in the container that it has."""
    output = graph.output_node()
    kind = list if isinstance(output.args[0], list) else tuple
    output.args = (kind(values),)


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node, in order of args, then kwargs, duplicates included."""
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        if is_tensor(arg):
            found.append(arg)
        return arg

    fx.map_arg((node.args, node.kwargs), visit)
    return found


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor or a tuple of tensors (not a size or a number)."""
    value = meta_value(node)
    return isinstance(value, (torch.Tensor, tuple, list))


def value_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node."""
    value = meta_value(node)
    assert isinstance(value, torch.Tensor), f"{node.name} is not a single tensor"
    return value


def rank_of(node: fx.Node) -> int:
    """The number of dimensions of a node's tensor."""
    return int(value_of(node).dim())


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a size: a number that is known, or a SymInt."""
    return isinstance(meta_value(node), (int, torch.SymInt))


def bytes_of(node: fx.Node) -> int:
    """Bytes of a tensor, at the captured sizes."""
    value = meta_value(node)
    return count_hint(value.shape) * int(value.element_size())


def derived_from(root: fx.Node, through: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes reached from the readers of `root` by readers for which `through` holds."""
    found: set[fx.Node] = set()
    pending = [root]
    while pending:
        readers = {user for user in pending.pop().users if user not in found and through(user)}
        found |= readers
        pending += readers
    return found


def returns_a_tensor(node: fx.Node) -> bool:
    """Whether an operator's schema returns a tensor."""
    schema = schema_of(node.target)
    return schema is not None and any(isinstance(returned.type, torch.TensorType) for returned in schema.returns)


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator is elementwise, by PyTorch's tags. `_to_copy` is, and has no tag."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target is torch.ops.aten._to_copy.default


def returns_nothing(node: fx.Node) -> bool:
    """Whether an operator is called for its effect alone (an assertion or a message): it returns nothing and writes to
    no argument."""
    schema = schema_of(node.target) if node.op == "call_function" else None
    return schema is not None and not (schema.returns or schema.is_mutable)


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The tensors of a node: one, several, or none."""
    value = meta_value(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in values if isinstance(one, torch.Tensor)]
