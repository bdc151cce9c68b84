"""What `mom::attention` takes of a CUDA device for itself, beside its operands and its result.

Terms
-----
R, T    Rows of the query, in a loop those of a mini-sequence; keys.

    logsumexp           B x H x R numbers in float32: every kernel returns them
    another layout      the result once more, where the kernel's is not what the operator promises
    bias                where there is a mask or a condition: `BIASES` blocks of it, as it is made, converted and
                        aligned, each of `BLOCK_BYTES`, or of `FEWEST_ROWS` rows where those are more

This is a bound, read off `runtime/attention/cuda.py`; no GPU has confirmed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.runtime.attention.rows import BLOCK_BYTES, FEWEST_ROWS
from mom_passes.graph.sizes import expr, product
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import COUNT, START
from mom_passes.program.program import Compute, LoopStep, Program

ATTENTION = torch.ops.mom.attention.default
BIASES = 3


def most_of_attention(program: Program) -> sympy.Expr:
    """The most bytes that one attention of a program takes for itself, in the sizes of its graph."""
    return sympy.Max(0, *dict.fromkeys(_own_bytes(node, loop) for node, loop in _attentions(program)), evaluate=False)


def _attentions(program: Program) -> Iterator[tuple[fx.Node, Loop | None]]:
    """Each with the loop that it is in."""
    for step in program.steps:
        loop = step.loop if isinstance(step, LoopStep) else None
        nodes: Iterable[fx.Node] = step.nodes if isinstance(step, Compute) else ()
        yield from ((node, loop) for node in (loop.body.graph.nodes if loop else nodes) if node.target is ATTENTION)


def _own_bytes(node: fx.Node, loop: Loop | None) -> sympy.Expr:
    query, key, value, mask = (_type(argument) for argument in node.args[:4])
    batch, heads, length, _ = (expr(size) for size in query.shape)
    size = query.dtype.itemsize
    result = batch * heads * length * expr(value.shape[-1]) * size
    own = batch * heads * length * torch.float32.itemsize + result
    conditions = [argument for argument in node.args[8:11] if argument is not None]
    if mask is not None or conditions:
        repeats = expr(product(mask.shape[:-2])) if mask is not None else sympy.S.One
        repeats = sympy.Max(repeats, batch) if conditions else repeats
        own += BIASES * sympy.Max(BLOCK_BYTES, FEWEST_ROWS * repeats * expr(key.shape[2]) * size)
    return own if loop is None else own.xreplace({COUNT: sympy.Integer(loop.rows), START: expr(loop.length)})


def _type(argument: Any) -> Any:
    """Shape and dtype of an operand, in a graph or in a body."""
    return argument.meta.get("type", argument.meta.get("val")) if isinstance(argument, fx.Node) else None
