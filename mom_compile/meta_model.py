"""A model on the meta device as it would be on a real one: it can be traced, and neither computes nor takes memory.

Terms
-----
stand-in   A fake tensor (sizes, strides, dtype and a device, no data) in place of a meta tensor. On meta itself a
           graph is another one: attention is decomposed, and Inductor drops what has no data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mom_compile.torch_compat import FakeTensorMode, tree_any, tree_map


def is_on_meta(model: Callable[..., Any], arguments: Any) -> bool:
    """Whether a module, or the module of a bound method, has parameters, buffers or arguments on the meta device."""
    module = _module_of(model)
    held = [] if module is None else [*module.parameters(), *module.buffers()]
    return module is not None and tree_any(_is_meta, (held, arguments))


@contextlib.contextmanager
def on_a_real_device(model: Callable[..., Any], arguments: Any) -> Iterator[Any]:
    """While it lasts, the module holds stand-ins; gives the arguments with stand-ins in them.

    They are on the GPU where there is one, else on the CPU.
    """
    module = _module_of(model)
    assert module is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made: dict[int, torch.Tensor] = {}

    def stand_in(value: Any) -> Any:
        if not _is_meta(value):
            return value
        if id(value) not in made:
            made[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return made[id(value)]

    before = [(owner, name, value) for part in module.modules() for owner, name, value in _held(part)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            for owner, name, value in before:
                fake = stand_in(value)
                owner[name] = nn.Parameter(fake, requires_grad=False) if isinstance(value, nn.Parameter) else fake
            yield tree_map(stand_in, arguments)
        finally:
            for owner, name, value in before:
                owner[name] = value


def _held(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """The meta tensors of one module, each with the dictionary that it is in."""
    for owner in (module._parameters, module._buffers, vars(module)):
        for name, value in list(owner.items()):
            if _is_meta(value):
                yield owner, name, value  # type: ignore[misc]


def _module_of(model: Callable[..., Any]) -> nn.Module | None:
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta
