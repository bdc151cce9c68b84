"""Chunk rules of recurrences over tokens: rows in order, with the state as a carry.

    gated_delta_rule(q, k, v, g, beta, state)[rows]  =  gated_delta_rule(q[rows], ..., state after the rows before)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from mom_passes.graph.arguments import argument
from mom_passes.graph.meta import typed_value
from mom_passes.graph.sizes import expr, hint
from mom_passes.graph.values import value_of
from mom_passes.ops import scan_references as references
from mom_passes.ops import scans
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import recurrence_claim
from mom_passes.rules.needs import Dim
from mom_passes.rules.registry import register

BATCH = 0


@dataclass(frozen=True)
class Scan:
    """The operands of a recurrence with rows, the index of their token dimension, and the costs of a call.

    products    multiply-adds per row and batch entry
    workspace   entries of the values that the reference allocates in addition to its results
    """

    rows: tuple[str, ...]
    tokens: int
    products: Callable[[fx.Node], int]
    workspace: Callable[[fx.Node], sympy.Expr]


def _shape(node: fx.Node, name: str) -> list[sympy.Expr]:
    return [expr(size) for size in typed_value(argument(node, name)).shape]


def _hints(node: fx.Node, name: str) -> list[int]:
    return [hint(size) for size in value_of(argument(node, name)).shape]


def _delta_products(node: fx.Node) -> int:
    """Products in a chunk (two of keys, one with values, a triangular solve) and three with the state."""
    (*_, heads, width), (*_, keys) = _hints(node, "value"), _hints(node, "key")
    return heads * (references.CHUNK * (2 * keys + width) + references.CHUNK * (keys + width) // 2 + 3 * keys * width)


def _mamba2_products(node: fx.Node) -> int:
    (*_, heads, width), (*_, groups, entries) = _hints(node, "x"), _hints(node, "B")
    return groups * references.CHUNK * entries + heads * (references.CHUNK * width + 2 * width * entries)


def _selective_products(node: fx.Node) -> int:
    return 3 * math.prod(_hints(node, "A"))


def _linear_products(node: fx.Node) -> int:
    return _hints(node, "b")[-1]


def _delta_workspace(node: fx.Node) -> sympy.Expr:
    (batch, rows, heads, width), keys = _shape(node, "value"), _shape(node, "key")[-1]
    at_once = _rows_at_once(rows, batch * heads * references.CHUNK**2)
    return batch * at_once * heads * (2 * references.CHUNK + 7 * keys + 4 * width)


def _kda_workspace(node: fx.Node) -> sympy.Expr:
    (batch, rows, heads, width), keys = _shape(node, "value"), _shape(node, "key")[-1]
    widest = sympy.Max(references.CHUNK, references.SUBCHUNK * keys)
    at_once = _rows_at_once(rows, batch * heads * references.CHUNK * widest)
    return batch * at_once * heads * (2 * references.CHUNK + 18 * keys + 4 * width)


def _mamba2_workspace(node: fx.Node) -> sympy.Expr:
    (batch, rows, heads, width), (*_, groups, entries) = _shape(node, "x"), _shape(node, "B")
    at_once = _rows_at_once(rows, batch * heads * references.CHUNK**2)
    by_row = heads * (references.CHUNK + 4 * width) + groups * (references.CHUNK + 2 * entries)
    return batch * (at_once * by_row + heads * width * entries)


def _rows_at_once(rows: sympy.Expr, entries_per_chunk: sympy.Expr) -> sympy.Expr:
    """Rows of the chunks that the reference computes at a time: some full chunks, or what is less than one."""
    chunks = sympy.Max(1, sympy.floor(references.WORKSPACE / entries_per_chunk))
    full = references.CHUNK * sympy.Min(chunks, sympy.floor(rows / references.CHUNK))
    return sympy.Max(full, sympy.Min(rows, references.CHUNK))


def _selective_workspace(node: fx.Node) -> sympy.Expr:
    (batch, width, rows), (_, entries) = _shape(node, "x"), _shape(node, "A")
    return 2 * _state_rows(rows, batch * width * entries)


def _linear_workspace(node: fx.Node) -> sympy.Expr:
    batch, rows, width = _shape(node, "b")
    return 2 * _state_rows(rows, batch * width)


def _state_rows(rows: sympy.Expr, state: sympy.Expr) -> sympy.Expr:
    """Entries of the states of the rows that the reference computes at a time."""
    return state * sympy.Min(rows, references.ROWS)


_DELTA = ("query", "key", "value", "decay", "beta")
SCANS: dict[Any, Scan] = {
    scans.GATED_DELTA_RULE: Scan(_DELTA, 1, _delta_products, _delta_workspace),
    scans.KDA: Scan(_DELTA, 1, _delta_products, _kda_workspace),
    scans.MAMBA2_SCAN: Scan(("x", "dt", "B", "C"), 1, _mamba2_products, _mamba2_workspace),
    scans.SELECTIVE_SCAN: Scan(("x", "dt", "B", "C"), 2, _selective_products, _selective_workspace),
    scans.LINEAR_RECURRENCE: Scan(("a", "b"), 1, _linear_products, _linear_workspace),
}


def scan_work(node: fx.Node) -> int:
    """Return the multiply-adds of a recurrence at the captured sizes."""
    scan = SCANS[node.target]
    shape = _hints(node, scan.rows[0])
    return shape[BATCH] * shape[scan.tokens] * scan.products(node)


def scan_workspace(node: fx.Node, device: str) -> sympy.Expr:
    """Return the bytes that the reference allocates in addition to its results."""
    scan = SCANS[node.target]
    return scan.workspace(node) * references.state_dtype(typed_value(argument(node, scan.rows[0]))).itemsize


@register(*SCANS, recompute=False, work=scan_work, scratch=scan_workspace)
def scan(node: fx.Node, dim: Dim) -> Claim:
    facts = SCANS[node.target]
    return recurrence_claim(node, dim, facts.rows, facts.tokens, "only tokens and batch entries are split")
