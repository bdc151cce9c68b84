"""Steps of a program that are neither compiled nor copies: an operator as it is, or a value that is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

aggregate: Any = fx.node.map_aggregate


@dataclass(frozen=True)
class Argument:
    """The step's argument of this number."""

    number: int


@dataclass(frozen=True)
class OperatorCall:
    """Calls `target`. Where an `Argument` stands in `args` and `kwargs`, the step's argument is passed."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(node: fx.Node) -> OperatorCall:
        """A node's call, on the values of its distinct inputs."""
        number = {given: Argument(i) for i, given in enumerate(node.all_input_nodes)}

        def told(value: Any) -> Any:
            return number[value] if isinstance(value, fx.Node) else value

        args, kwargs = aggregate((node.args, node.kwargs), told)
        return OperatorCall(node.target, args, dict(kwargs))  # type: ignore[arg-type]

    def __call__(self, arguments: list[Any]) -> tuple[Any]:
        def given(value: Any) -> Any:
            return arguments[value.number] if isinstance(value, Argument) else value

        args, kwargs = aggregate((self.args, self.kwargs), given)
        return (self.target(*args, **kwargs),)


@dataclass(frozen=True)
class Constant:
    """What is part of the graph's module, or what a carry begins with."""

    value: Any

    def __call__(self, arguments: list[Any]) -> tuple[Any]:
        return (self.value,)
