"""Chunk rules of pointwise operators.

Any dimension can be split. Operands broadcast: shapes are aligned at the last dimension, and a dimension of size 1 is
needed whole. No argument is a size, so no rule has an edit.

Operators that draw random numbers have no rule: a slice would get other numbers than the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument, aten, overloads, prims
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import value_of
from mom_passes.rules.factories import Origin, all_but, follows, pointwise_claim, shape_of
from mom_passes.rules.registry import Alias, register

UNARY = """
    abs acos acosh angle asin asinh atan atanh bitwise_not ceil conj_physical cos cosh deg2rad digamma erf erfc
    erfinv exp exp2 expm1 floor frac i0 isinf isnan isneginf isposinf lgamma log log10 log1p log2 logical_not
    logit nan_to_num neg positive rad2deg reciprocal round round.decimals rsqrt sgn sigmoid sign signbit sin
    sinc sinh special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri sqrt
    square tan tanh trunc
"""

ACTIVATIONS = """
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid_forward mish
    relu relu6 selu silu softplus softshrink threshold
"""

BINARY = """
    add.Tensor add.Scalar atan2 complex copysign.Tensor copysign.Scalar div.Tensor div.Scalar div.Tensor_mode
    div.Scalar_mode floor_divide floor_divide.Scalar fmax fmin fmod.Tensor fmod.Scalar gcd heaviside hypot lcm
    logaddexp logaddexp2 maximum minimum mul.Tensor mul.Scalar nextafter polar pow.Tensor_Tensor pow.Tensor_Scalar
    pow.Scalar remainder.Tensor remainder.Scalar remainder.Scalar_Tensor rsub.Tensor rsub.Scalar
    special_xlog1py special_zeta sub.Tensor sub.Scalar true_divide.Tensor xlogy.Tensor xlogy.Scalar_Other
    xlogy.Scalar_Self
"""

LOGICAL = """
    bitwise_and.Tensor bitwise_and.Scalar bitwise_and.Scalar_Tensor
    bitwise_or.Tensor bitwise_or.Scalar bitwise_or.Scalar_Tensor
    bitwise_xor.Tensor bitwise_xor.Scalar bitwise_xor.Scalar_Tensor
    bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar
    bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar
    logical_and logical_or logical_xor
    eq.Tensor eq.Scalar ge.Tensor ge.Scalar gt.Tensor gt.Scalar
    le.Tensor le.Scalar lt.Tensor lt.Scalar ne.Tensor ne.Scalar
"""

SEVERAL = """
    addcdiv addcmul clamp clamp.Tensor clamp_max clamp_max.Tensor clamp_min clamp_min.Tensor
    lerp.Scalar lerp.Tensor masked_fill.Scalar masked_fill.Tensor where.self
"""

FILLS = "copy fill.Scalar fill.Tensor"
COPIES = "clone lift_fresh_copy"
VIEWS = "alias detach"

#: Pointwise primitives. Their operands have the same shape, a special case of broadcasting.
PRIMITIVES = """
    abs acos acosh add asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil clone
    cos cosh device_put div eq erf erfc exp exp2 expm1 floor fmax fmin fmod ge gt hypot
    isfinite le lgamma log log10 log1p log2 lt maximum minimum mul ne neg pow reciprocal remainder round rsqrt
    sign signbit sin sinh sqrt sub tan tanh trunc where
"""

register(*overloads(aten, UNARY + ACTIVATIONS + BINARY + LOGICAL + SEVERAL + FILLS))(pointwise_claim)
register(aten._to_copy.default, prims.convert_element_type.default, alias=Alias.CAST)(pointwise_claim)
register(*overloads(aten, COPIES), alias=Alias.COPY)(pointwise_claim)
register(*overloads(aten, VIEWS), alias=Alias.VIEW)(pointwise_claim)
register(*overloads(prims, PRIMITIVES))(pointwise_claim)


@follows(aten.view.dtype)
def view_dtype(node: fx.Node) -> list[Origin]:
    """Reinterprets the bytes as another dtype: pointwise unless the element size changes."""
    operand: Any = argument(node, "self")
    value: torch.Tensor = meta_value(operand)
    rank = len(shape_of(operand))
    resized = value.element_size() != value_of(node).element_size()
    return all_but(rank, [rank - 1] if resized else [], "elements of another size regroup the last dimension")
