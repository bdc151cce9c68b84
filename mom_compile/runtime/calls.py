"""Program steps that are neither compiled nor copies: an operator call, or a constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

aggregate: Any = fx.node.map_aggregate


@dataclass(frozen=True)
class Argument:
    """A reference to a step's argument by index."""

    number: int


def numbered(node: fx.Node, numbers: Mapping[fx.Node, int]) -> Any:
    """Return a node's positional and keyword arguments, with an `Argument` in place of each node."""

    def number(value: Any) -> Any:
        return Argument(numbers[value]) if isinstance(value, fx.Node) else value

    return aggregate((node.args, node.kwargs), number)


def filled(arguments: Any, values: Sequence[Any]) -> Any:
    """Replace each `Argument` in the result of `numbered` by its value."""

    def fill(value: Any) -> Any:
        return values[value.number] if isinstance(value, Argument) else value

    return aggregate(arguments, fill)


@dataclass(frozen=True)
class OperatorCall:
    """Calls `target`, with the step's arguments in place of each `Argument` in `args` and `kwargs`."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(node: fx.Node) -> OperatorCall:
        """Return a node's call as a function of its distinct inputs."""
        args, kwargs = numbered(node, {given: i for i, given in enumerate(node.all_input_nodes)})
        return OperatorCall(node.target, args, dict(kwargs))  # type: ignore[arg-type]

    def __call__(self, arguments: list[Any]) -> tuple[Any]:
        args = [_filled_one(value, arguments) for value in self.args]
        kwargs = {name: _filled_one(value, arguments) for name, value in self.kwargs.items()}
        return (self.target(*args, **kwargs),)


def _filled_one(value: Any, arguments: Sequence[Any]) -> Any:
    """`filled` for one argument. Most are tensors and numbers, and `aggregate` takes longer than a view."""
    if type(value) is Argument:
        return arguments[value.number]
    return filled(value, arguments) if isinstance(value, (tuple, list, dict)) else value


@dataclass(frozen=True)
class Constant:
    """An attribute of the graph's module, or the first value of a carry."""

    value: Any

    def __call__(self, arguments: list[Any]) -> tuple[Any]:
        return (self.value,)
