"""Collectives of a process group as functions that wait: `mom::all_reduce` and others.

A captured graph has two operators for each collective: one that begins it, and `wait_tensor`. Between them the result
has no defined content, so no pass may store it or compute it again. Each operator here is both, with a result that may
be read. The runtime of a loop takes them apart again (`mom_compile.runtime.parted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.ops.library import define, implement
from mom_passes.torch_compat import begin_collective, rank_in, wait_for_collective

ALL_REDUCE = define("all_reduce(Tensor rows, str reduction, str group) -> Tensor")
"""The sum, or another reduction, of `rows` of all ranks of a group; of the shape and dtype of `rows`."""

ALL_GATHER = define("all_gather(Tensor rows, int ranks, str group) -> Tensor")
"""`rows` of all `ranks` of a group, in the order of the ranks along dimension 0: `[N, ...] -> [ranks * N, ...]`."""

REDUCE_SCATTER = define("reduce_scatter(Tensor rows, str reduction, int ranks, str group) -> Tensor")
"""This rank's part, along dimension 0, of a reduction over a group: `[ranks * N, ...] -> [N, ...]`."""

GATHER_COLUMNS = define("gather_columns(Tensor rows, int ranks, str group) -> Tensor")
"""The columns of `rows` of all ranks, next to each other in the order of the ranks: `[.., N] -> [.., ranks * N]`.

In a captured graph, an `all_gather` along dimension 0, a `split` and a `cat`.
"""

FIRST_COLUMN = define("first_column(Tensor matrix, str group) -> Tensor")
"""The first of all ranks' columns that this rank has, if each has as many as `matrix` `[K, N]`: `rank * N`.

An int64 tensor without dimensions on the matrix's device. A graph with this operator is the same on all ranks.
"""

#: The operator that begins each collective, by its name in `_c10d_functional`. Its arguments are the same.
BEGINS = {
    ALL_REDUCE: "all_reduce",
    ALL_GATHER: "all_gather_into_tensor",
    REDUCE_SCATTER: "reduce_scatter_tensor",
}
COLLECTIVES = frozenset({*BEGINS, GATHER_COLUMNS})


def has_collectives(nodes: Iterable[fx.Node]) -> bool:
    """Return whether one of some nodes is a collective."""
    return any(node.target in COLLECTIVES for node in nodes)


def group_of(args: Sequence[Any]) -> str:
    """Return the name of the group from the positional arguments of a collective."""
    return str(args[-1])


def _reference(name: str) -> Callable[..., torch.Tensor]:
    def run(rows: torch.Tensor, *others: Any) -> torch.Tensor:
        return wait_for_collective(begin_collective(name, rows, *others))

    return run


def _same(rows: torch.Tensor, reduction: str, group: str) -> torch.Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


def _gathered(rows: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    return torch.empty((rows.shape[0] * ranks, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)


def _scattered(rows: torch.Tensor, reduction: str, ranks: int, group: str) -> torch.Tensor:
    return torch.empty((rows.shape[0] // ranks, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)


def _gather_columns(rows: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    return torch.cat(ALL_GATHER(rows, ranks, group).chunk(ranks), -1)


def _more_columns(rows: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    return torch.empty((*rows.shape[:-1], rows.shape[-1] * ranks), dtype=rows.dtype, device=rows.device)


def _first_column(matrix: torch.Tensor, group: str) -> torch.Tensor:
    return torch.full((), rank_in(group) * matrix.shape[1], dtype=torch.int64, device=matrix.device)


def _a_number(matrix: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=matrix.device)


implement(GATHER_COLUMNS, _gather_columns, _more_columns)
implement(FIRST_COLUMN, _first_column, _a_number)

_FAKES: dict[Any, Callable[..., torch.Tensor]] = {
    ALL_REDUCE: _same,
    ALL_GATHER: _gathered,
    REDUCE_SCATTER: _scattered,
}
for _operator, _fake in _FAKES.items():
    implement(_operator, _reference(BEGINS[_operator]), _fake)
