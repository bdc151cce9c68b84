"""Checks of what is registered: operator overloads, their keys in the table, and the signature of rules."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Collection
from typing import Any

import torch

OVERLOAD = type(torch.ops.aten.add.Tensor)
_PACKET = type(torch.ops.aten.add)
EXAMPLE = "pass torch.ops.mylib.scale_rows.default, say, for an operator mylib::scale_rows"


def key_of(target: Any) -> Any:
    """Return the key of an operator in the table: the overload, or `str(overload)` for a target given by name."""
    if not isinstance(target, str):
        return target
    name = target.replace("::", ".")
    return name if name.count(".") == 2 else f"{name}.default"


def _check_target(target: Any) -> None:
    """Raise `TypeError` if a target is neither an operator overload nor the name of one."""
    named = isinstance(target, str) and re.fullmatch(r"\w+::\w+(\.\w+)?", target)
    if isinstance(target, OVERLOAD) or target is operator.getitem or named:
        return
    if isinstance(target, _PACKET):
        packet: Any = target
        names = ", ".join(f"torch.ops.{packet}.{name}" for name in packet.overloads())
        raise TypeError(f"torch.ops.{target} is a packet of overloads; register one or more of {names}")
    raise TypeError(f"a chunk rule needs operator overloads, and {target!r} is none; {EXAMPLE}")


def check_targets(targets: Collection[Any]) -> None:
    """Raise `TypeError` if there is no target, or one is neither an operator overload nor the name of one."""
    if not targets:
        raise TypeError(f"a chunk rule needs at least one operator overload; {EXAMPLE}")
    for target in targets:
        _check_target(target)


def check_rule(rule: Any) -> None:
    """Raise `TypeError` if a rule cannot be called with a node and a dim. Its result is checked at every call."""
    if not callable(rule):
        raise TypeError(f"a chunk rule is a function of a node and a dim, and {rule!r} cannot be called")
    try:
        signature = inspect.signature(rule)
    except ValueError:  # some built-in functions have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"a chunk rule is called with a node and a dim; {rule!r} takes {signature}") from error


def overload_of(name: str) -> Any:
    """Return the operator overload whose `str` is `name`, or None."""
    namespace, operator_name, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), operator_name, None), overload, None)
