"""Which arguments a model takes, according to signatures. Wrappers are looked through.

Terms
-----
wrapper   A module or function that computes what another one computes, from the same arguments.
open      A signature is open if it has `**kwargs`: it does not say where they go.

    takes(model, "position_ids")   True: named; False: neither named nor open; None: signatures do not say
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mom_compile.torch_compat.dynamo import compiled_from

#: Wrappers that run the module on this process's share of a batch, or a part of the batch on each of several devices.
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
#: Wrappers that pass all arguments on but cannot be left out, by the attribute that holds the inner callable: FSDP
#: gathers weights, and accelerate's hooks move them.
_PASS_ALL_ON = ("_fsdp_wrapped_module", "_old_forward")


def unwrapped(model: Any) -> Any:
    """The innermost model of `torch.compile(model)`, `DataParallel(model)` and `DistributedDataParallel(model)`, nested
    in any order. It can be called in place of the wrapper."""
    inner = model.module if isinstance(model, _PARALLEL) else compiled_from(model)
    return model if inner is None else unwrapped(inner)


def takes(model: Callable[..., Any], name: str) -> bool | None:
    """Whether a module or a function takes an argument by name; None where signatures do not say."""
    model = unwrapped(model)
    named = _named_in(model.forward if isinstance(model, nn.Module) else model, name)
    inner = _inner_of(model) if named is None else None
    return named if inner is None else takes(inner, name)


def names(module: nn.Module, name: str) -> bool:
    """Whether the `forward` of a module's class names an argument. A replaced `module.forward` does not count."""
    return _named_in(type(module).forward, name) is True


def name_of(model: Callable[..., Any]) -> str:
    """The name of a module or a function in a message."""
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


def _inner_of(model: Any) -> Any:
    """The callable to which a wrapper passes all arguments; None if the model is not such a wrapper."""
    held = {**vars(model), **model._modules} if isinstance(model, nn.Module) else {}
    return next((held[attribute] for attribute in _PASS_ALL_ON if held.get(attribute) is not None), None)


def _named_in(function: Callable[..., Any], name: str) -> bool | None:
    """Whether a function's signature names an argument; None if it is open or does not exist. `inspect` follows
    `__wrapped__`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    found = parameters.get(name)
    if found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY):
        return True
    return None if any(one.kind is one.VAR_KEYWORD for one in parameters.values()) else False
