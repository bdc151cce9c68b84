"""Steps of a program that are neither compiled nor copies: an operator as it is, or a value that is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

aggregate: Any = fx.node.map_aggregate


@dataclass(frozen=True)
class Argument:
    """The value of this number: in a step, its argument."""

    number: int


def numbered(node: fx.Node, numbers: Mapping[fx.Node, int]) -> Any:
    """A node's arguments, positional and by keyword, with an `Argument` for each node among them."""

    def told(value: Any) -> Any:
        return Argument(numbers[value]) if isinstance(value, fx.Node) else value

    return aggregate((node.args, node.kwargs), told)


def filled(arguments: Any, values: Sequence[Any]) -> Any:
    """What `numbered` gave, with values in place of their numbers."""

    def given(value: Any) -> Any:
        return values[value.number] if isinstance(value, Argument) else value

    return aggregate(arguments, given)


@dataclass(frozen=True)
class OperatorCall:
    """Calls `target`. Where an `Argument` stands in `args` and `kwargs`, the step's argument is passed."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(node: fx.Node) -> OperatorCall:
        """A node's call, on the values of its distinct inputs."""
        args, kwargs = numbered(node, {given: i for i, given in enumerate(node.all_input_nodes)})
        return OperatorCall(node.target, args, dict(kwargs))  # type: ignore[arg-type]

    def __call__(self, arguments: list[Any]) -> tuple[Any]:
        args = [_given(value, arguments) for value in self.args]
        kwargs = {name: _given(value, arguments) for name, value in self.kwargs.items()}
        return (self.target(*args, **kwargs),)


def _given(value: Any, arguments: Sequence[Any]) -> Any:
    """The same of one argument. Most are tensors and numbers: going through all of them takes longer than a view."""
    if type(value) is Argument:
        return arguments[value.number]
    return filled(value, arguments) if isinstance(value, (tuple, list, dict)) else value


@dataclass(frozen=True)
class Constant:
    """What is part of the graph's module, or what a carry begins with."""

    value: Any

    def __call__(self, arguments: list[Any]) -> tuple[Any]:
        return (self.value,)
