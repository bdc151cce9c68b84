"""Run operators that write into host tensors in host memory.

operator                        implementation
--------                        --------------
h.mul_(x)                       on h's rows
torch.add(x, y, out=h)          computed separately, then copied to h's rows: `out` may be resized, rows may not
torch._foreach_zero_([h, x])    on h's rows and a copy of x, which is copied back
h.unsqueeze_(0), h.resize_(3)   refused
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mom_compile.runtime.host.store import without_base
from mom_compile.runtime.host.tensor_points import refusal
from mom_compile.torch_compat.tensors import packet_of, schema_of, tree_map

aten = torch.ops.aten

#: Returns a host tensor's rows, ready to be read and written; None for other values.
RowsOf = Callable[[Any], torch.Tensor | None]


def returns_view(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def mutated(schema: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operator writes, with lists flattened."""
    written: list[Any] = []
    for i, argument in enumerate(schema.arguments):
        if _is_written(argument):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += value if isinstance(value, (list, tuple)) else [value]
    return written


def refuse_new_shape(func: Any, args: Any, kwargs: Any, is_host: Callable[[Any], bool]) -> Any:
    """Refuse operators that change sizes, strides or storage of a host tensor in place."""
    target = args[0]
    if func is aten.detach_.default:
        return target
    name = packet_of(func).__name__
    if is_host(target):
        functional = getattr(aten, name.rstrip("_"), None)
        overloads = functional.overloads() if functional is not None else ()
        views = any(returns_view(schema_of(getattr(functional, one))) for one in overloads)
        raise refusal(f"{name}()", f"Use tensor.{name.rstrip('_')}(), which returns a new tensor" if views else _COPY)
    if packet_of(func) is aten.set_:
        raise refusal("set_() to the same memory", _COPY)
    # Only the size of a host tensor is read, as by resize_as_.
    return func(*tree_map(lambda v: torch.empty_like(v) if is_host(v) else v, args), **kwargs)


_COPY = "Use tensor.fetch(), a copy on its device"


def write(func: Any, args: Any, kwargs: Any, rows_of: RowsOf) -> Any:
    """Run an operator whose written arguments are in host memory. Returns the operator's result."""
    schema = schema_of(func)
    used: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def instead(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in used:
            rows = rows_of(value)
            used[id(value)] = (value, value.cpu() if rows is None else without_base(rows))
        return used[id(value)][1]

    outs = {a.name: kwargs.get(a.name) for a in schema.arguments if _is_written(a) and a.kwarg_only}
    # `out` arguments are written here first: they may also be operands, and may have another size.
    made = {name: torch.empty(0, dtype=out.dtype) for name, out in outs.items() if isinstance(out, torch.Tensor)}
    results = func(*tree_map(instead, args), **{**tree_map(instead, kwargs), **made})
    for written in mutated(schema, args, {name: value for name, value in kwargs.items() if name not in made}):
        if isinstance(written, torch.Tensor):
            _copy_back(func, written, used[id(written)][1], rows_of)
    for name, result in made.items():
        _copy_back(func, kwargs[name], result, rows_of)
    return _returns(schema, results, args, kwargs)


def _copy_back(func: Any, original: torch.Tensor, result: torch.Tensor, rows_of: RowsOf) -> None:
    rows = rows_of(original)
    if rows is None:
        if original is not result:
            original.resize_(result.shape).copy_(result)
    elif rows.shape != result.shape:
        raise refusal(f"{func}: a result of shape {list(result.shape)} in place of {list(rows.shape)}", _COPY)
    elif not rows.is_set_to(result):
        rows.copy_(result)


def _returns(schema: Any, results: Any, args: Any, kwargs: Any) -> Any:
    if len(schema.returns) == 0:
        return None
    several = isinstance(results, tuple)
    given = tuple(
        _returned(schema, declared, result, args, kwargs)
        for declared, result in zip(schema.returns, results if several else (results,), strict=True)
    )
    return given if several else given[0]


def _returned(schema: Any, declared: Any, result: Any, args: Any, kwargs: Any) -> Any:
    """Return the written argument if the operator returns it; else the result, on the device."""
    if declared.alias_info is not None and declared.alias_info.is_write:
        for i, argument in enumerate(schema.arguments):
            if _is_written(argument) and argument.alias_info.before_set == declared.alias_info.before_set:
                return args[i] if i < len(args) else kwargs[argument.name]
    device = next(value.device for value in mutated(schema, args, kwargs) if isinstance(value, torch.Tensor))
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, result)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
