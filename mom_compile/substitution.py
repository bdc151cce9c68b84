"""How Dynamo traces another function in place of one of a model file, for this backend only.

Dynamo knows a function by its object and traces its substitute for every backend. A substitute here asks
`is_for_this_backend()` while it is traced, and calls a copy of the original function otherwise.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mom_compile.torch_compat.dynamo import backend_of_trace

#: Set on the functions of this package that Dynamo calls as a backend.
MARK = "_traces_substitutes"


def traces_substitutes(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that Dynamo calls as a backend: its graphs have substitutes."""
    setattr(backend, MARK, True)
    return backend


@torch.compiler.assume_constant_result
def is_for_this_backend() -> bool:
    """Return whether the graph that Dynamo is tracing is for this backend. Dynamo runs this while it traces."""
    return bool(getattr(backend_of_trace(MARK), MARK, False))


def needs_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a result of the call would have a gradient."""
    values = [*args, *kwargs.values()]
    return torch.is_grad_enabled() and any(isinstance(one, torch.Tensor) and one.requires_grad for one in values)


def copy_of(function: types.FunctionType, names: Mapping[str, str] = types.MappingProxyType({})) -> types.FunctionType:
    """Return the same function as another object, which Dynamo does not know as substituted.

    It reads other globals, by `names`. Its globals are those of its file, which may be replaced.
    """
    code = function.__code__.replace(co_names=tuple(names.get(name, name) for name in function.__code__.co_names))
    copied = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def as_method(function: types.FunctionType) -> Callable[..., Any]:
    """Return a method that calls the function. Dynamo looks for a substitute of functions, not of methods."""

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method
