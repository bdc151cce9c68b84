"""What a piece assumes of its inputs.

Terms
-----
template   The assumption about one input: a size, or a tensor's dtype, device, sizes and strides, as expressions in the
           symbols of the piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch


@dataclass(frozen=True)
class SizeTemplate:
    value: sympy.Expr


@dataclass(frozen=True)
class TensorTemplate:
    shape: tuple[sympy.Expr, ...]
    stride: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    device: torch.device


Template = SizeTemplate | TensorTemplate


@dataclass(frozen=True)
class SymbolFacts:
    """The example value of a symbol and its least value."""

    hint: int
    minimum: int


def expressions(template: Template) -> Sequence[sympy.Expr]:
    """Return all sizes and strides of a template."""
    if isinstance(template, SizeTemplate):
        return [template.value]
    return [*template.shape, *template.stride]


def substitute(template: Template, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Template:
    """Return a template with other symbols."""
    if isinstance(template, SizeTemplate):
        return SizeTemplate(template.value.xreplace(names))
    shape = tuple(s.xreplace(names) for s in template.shape)
    stride = tuple(s.xreplace(names) for s in template.stride)
    return TensorTemplate(shape, stride, template.dtype, template.device)
