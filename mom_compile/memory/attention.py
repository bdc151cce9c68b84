"""Bytes that `mom::attention` takes of a CUDA device itself, besides its operands and its result.

Terms
-----
R, T    Rows of the query, in a loop those of a mini-sequence; keys.

    logsumexp           B x H x R numbers in float32: every kernel returns them; sinks take `SINKS` times that in
                        addition
    another layout      the result once more, where the kernel's layout is not the one the operator promises
    parts               attention in parts (`runtime/attention/cudnn.py`), for one entry of the batch: the result in
                        float32, another part's result, and `SUMS` times its logsumexp during the merge
    bias                with a mask or a condition: `BIASES` blocks of it, as computed, converted and aligned, each of
                        `BLOCK_BYTES`, or of `FEWEST_ROWS` rows if those are larger
    capped scores       one such block of scores in float32, and keys and values in float32 (`Way.MATH`)

This is an upper bound, derived from `runtime/attention/`. No GPU has confirmed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.runtime.attention.cudnn import BLOCK, ROWS
from mom_compile.runtime.attention.rows import BLOCK_BYTES, FEWEST_ROWS
from mom_compile.runtime.attention.ways import HALF
from mom_passes.graph.arguments import argument
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr, product
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import COUNT, START
from mom_passes.program.program import Compute, LoopStep, Program

ATTENTION = torch.ops.mom.attention.default
BIASES = 3
#: Those of both parts and of their union, and two shares.
SUMS = 5
#: The share of the keys, which is computed from a difference.
SINKS = 2


def most_of_attention(program: Program) -> sympy.Expr:
    """Return the most bytes that one attention of a program takes itself, in the sizes of its graph."""
    return sympy.Max(0, *dict.fromkeys(own_bytes(node, loop) for node, loop in _attentions(program)), evaluate=False)


def _attentions(program: Program) -> Iterator[tuple[fx.Node, Loop | None]]:
    """Iterate over attentions, each with the loop that it is in."""
    for step in program.steps:
        loop = step.loop if isinstance(step, LoopStep) else None
        nodes: Iterable[fx.Node] = step.nodes if isinstance(step, Compute) else ()
        yield from ((node, loop) for node in (loop.body.graph.nodes if loop else nodes) if node.target is ATTENTION)


def own_bytes(node: fx.Node, loop: Loop | None) -> sympy.Expr:
    """Return the bytes that an attention takes itself; in a loop, with the loop's rows."""
    query, key, value, mask = (_type(operand) for operand in node.args[:4])
    batch, heads, length, _ = (expr(size) for size in query.shape)
    size = query.dtype.itemsize
    result = batch * heads * length * expr(value.shape[-1]) * size
    sums = 1 if argument(node, "sinks") is None else 1 + SINKS
    own = sums * batch * heads * length * torch.float32.itemsize + result
    if _may_be_in_parts(node, loop):
        own = sympy.Max(own, _bytes_of_parts(query, value), evaluate=False)
    conditions = any(argument(node, name) is not None for name in ("keys", "segments", "positions"))
    if mask is not None or conditions:
        repeats = expr(product(mask.shape[:-2])) if mask is not None else sympy.S.One
        repeats = sympy.Max(repeats, batch) if conditions else repeats
        own += BIASES * sympy.Max(BLOCK_BYTES, FEWEST_ROWS * repeats * expr(key.shape[2]) * size)
    if argument(node, "softcap") is not None:
        own += _bytes_of_products(query, key, value)
    return own if loop is None else own.xreplace({COUNT: sympy.Integer(loop.rows), START: expr(loop.length)})


def _bytes_of_products(query: Any, key: Any, value: Any) -> sympy.Expr:
    wide = torch.float32.itemsize
    scores = FEWEST_ROWS * expr(product(query.shape[:2])) * expr(key.shape[2]) * wide
    copies = expr(product(key.shape)) + expr(product(value.shape))
    return sympy.Max(BLOCK_BYTES, scores) + (wide * copies if query.dtype in HALF else 0)


def _may_be_in_parts(node: fx.Node, loop: Loop | None) -> bool:
    """Return whether `runtime/attention/ways.py` may choose attention in parts on some device."""
    query, mask, start, is_causal = _type(node.args[0]), node.args[3], node.args[4], node.args[5]
    if mask is not None or not is_causal or query.dtype not in HALF:
        return False
    rows = query.shape[2] if loop is None else loop.rows
    alone = query.shape[-1] != _type(node.args[2]).shape[-1]  # then also if no keys precede the rows
    far = alone or not isinstance(start, int) or start >= BLOCK
    return far and (not isinstance(rows, int) or rows % ROWS == 0)


def _bytes_of_parts(query: Any, value: Any) -> sympy.Expr:
    wide = torch.float32.itemsize
    return expr(product(query.shape[1:3])) * (expr(value.shape[-1]) * (wide + query.dtype.itemsize) + SUMS * wide)


def _type(operand: Any) -> Any:
    """Return the shape and dtype of an operand, in a graph or in a body."""
    return operand.meta.get("type", meta_value(operand)) if isinstance(operand, fx.Node) else None
