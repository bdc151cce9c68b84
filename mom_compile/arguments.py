"""Which arguments a model takes, by signatures, also through wrappers.

Terms
-----
wrapper   A module or function that computes what another one computes, from the same arguments.
open      A signature with `**kwargs`, which does not show where these are passed.

    takes(model, "position_ids")   True: named; False: neither named nor open; None: unknown from signatures
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mom_compile.torch_compat.dynamo import compiled_from

#: Wrappers that run the module on this process's share of a batch, or a part of the batch on each of several devices.
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
#: Wrappers that pass on all arguments but must not be bypassed, by the attribute that holds the inner callable: FSDP
#: gathers weights, and accelerate's hooks move them.
_PASS_ALL_ON = ("_fsdp_wrapped_module", "_old_forward")


def unwrapped(model: Any) -> Any:
    """Return the innermost model of `torch.compile`, `DataParallel` and `DistributedDataParallel` wrappers, nested in
    any order. It can be called in place of the wrapper."""
    inner = model.module if isinstance(model, _PARALLEL) else compiled_from(model)
    return model if inner is None else unwrapped(inner)


def takes(model: Callable[..., Any], name: str) -> bool | None:
    """Whether a module or function takes an argument by name; None if signatures do not show it."""
    model = unwrapped(model)
    named = _named_in(model.forward if isinstance(model, nn.Module) else model, name)
    inner = _inner_of(model) if named is None else None
    return named if inner is None else takes(inner, name)


def names(module: nn.Module, name: str) -> bool:
    """Whether the `forward` of a module's class names an argument. A replaced `module.forward` does not count."""
    return _named_in(type(module).forward, name) is True


def name_of(model: Callable[..., Any]) -> str:
    """Return the name of a module or function for messages."""
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


def _inner_of(model: Any) -> Any:
    """Return the callable to which a wrapper passes all arguments, or None."""
    held = {**vars(model), **model._modules} if isinstance(model, nn.Module) else {}
    return next((held[attribute] for attribute in _PASS_ALL_ON if held.get(attribute) is not None), None)


def _named_in(function: Callable[..., Any], name: str) -> bool | None:
    """Whether a function's signature names an argument; None if it is open or missing. `inspect` follows `__wrapped__`.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    found = parameters.get(name)
    if found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY):
        return True
    return None if any(one.kind is one.VAR_KEYWORD for one in parameters.values()) else False
