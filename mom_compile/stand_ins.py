"""Calls on tensors without data: they can be traced, and code between graphs runs, but nothing is computed.

Terms
-----
stand-in   A fake tensor (sizes, strides, dtype and a device, no data) in place of a real or meta tensor. On the meta
           device itself, graphs would differ: attention is decomposed, and Inductor drops values without data.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mom_compile.torch_compat.distributed import is_sharded, local_part, with_local_part
from mom_compile.torch_compat.tensors import FakeCopyMode, FakeTensorMode, tree_any, tree_map
from mom_passes.torch_compat import is_wrapper

#: Types of arguments that are passed on as they are, since they are not written to.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)
_GROUPED_MM = torch.ops.aten._grouped_mm.default


def is_on_meta(model: Callable[..., Any], arguments: Any) -> bool:
    """Whether a module, or the module of a bound method, has parameters, buffers or arguments on the meta device."""
    module = _module_of(model)
    held = [] if module is None else [*module.parameters(), *module.buffers()]
    return module is not None and tree_any(_is_meta, (held, arguments))


def called_without_data(operator: Any, args: Any, kwargs: Any) -> Any:
    """Return an operator's result for stand-ins. The meta kernel of grouped products only supports bfloat16; the real
    one also supports other dtypes."""
    dtype = args[0].dtype if operator is _GROUPED_MM else torch.bfloat16
    if dtype is torch.bfloat16:
        return operator(*args, **kwargs)

    def halved(value: Any) -> Any:
        return value.bfloat16() if _is_tensor(value) and value.dtype == dtype else value

    halves = tree_map(halved, (args, kwargs))
    return operator(*halves[0], **halves[1]).to(dtype)


@contextlib.contextmanager
def on_stand_ins(model: Callable[..., Any], arguments: Any, *, plain: bool = False) -> Iterator[Any]:
    """Within this context, the module (or that of a bound method) holds stand-ins. Yields the arguments as stand-ins.

    On exit the module gets its attributes back. Arguments are not changed: objects other than tensors, such as a cache,
    are copied.

    Stand-ins of meta tensors are on the GPU if there is one, else on the CPU. With `plain`, stand-ins of wrapper
    subclasses (weights on the host, quantised weights) are plain tensors of the same sizes and dtype; without it, a
    tensor whose storage cannot be read is an error. Passes on errors of copying an argument.
    """
    module = _module_of(model)
    parts = [] if module is None else list(module.modules())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = _StandIns(mode, plain)
    owners: list[dict[str, Any]] = [o for part in parts for o in (part._parameters, part._buffers, vars(part))]  # type: ignore[list-item]
    before = [(owner, dict(owner)) for owner in owners]
    with mode:
        try:
            for owner, held in before:
                owner.update({name: stand_in(value) for name, value in held.items() if _is_tensor(value)})
            yield tree_map(stand_in.of_argument, arguments)
        finally:
            for owner, held in before:
                owner.clear()
                owner.update(held)


class _StandIns:
    """Creates stand-ins, one per tensor."""

    def __init__(self, mode: FakeTensorMode, plain: bool) -> None:
        self.mode, self.plain = mode, plain
        self.made: dict[int, torch.Tensor] = {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        if id(value) not in self.made:
            self.made[id(value)] = self._make(value)
        return self.made[id(value)]

    def of_argument(self, value: Any) -> Any:
        if _is_tensor(value):
            return self(value)
        if isinstance(value, _PLAIN) or callable(value):
            return value
        with FakeCopyMode(self.mode):
            return copy.deepcopy(value)

    def _make(self, value: torch.Tensor) -> torch.Tensor:
        if value.is_meta and is_sharded(value):
            return with_local_part(value, self._make(local_part(value)))  # type: ignore[no-any-return]
        if not value.is_meta and not (self.plain and is_wrapper(value)):
            return self.mode.from_tensor(value, static_shapes=True)
        device = self.device if value.is_meta else value.device
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return nn.Parameter(fake, requires_grad=False) if isinstance(value, nn.Parameter) else fake


def _module_of(model: Callable[..., Any]) -> nn.Module | None:
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta
