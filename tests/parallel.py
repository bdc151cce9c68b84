"""A decoder whose heads, MLPs and vocabulary are divided among the ranks of the default group, without DTensor."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

from tests.models import Layer, Norm, TinyDecoder


def reduced(x: torch.Tensor, group: Any = None) -> torch.Tensor:
    return funcol.all_reduce(x, "sum", group or dist.group.WORLD)


class Reduced(nn.Module):
    """A rank's columns of a matrix, and the sum of all ranks' products."""

    def __init__(self, whole: nn.Linear, rank: int, ranks: int) -> None:
        super().__init__()
        self.own = _linear(whole.weight.chunk(ranks, 1)[rank])
        self.group = dist.group.WORLD

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reduced(self.own(x), self.group)


def parallel_layer(whole: Layer, rank: int, ranks: int) -> Layer:
    """Return a rank's part of a layer: an all-reduce after the attention and one after the MLP."""
    own: Any = copy.deepcopy(whole)
    own.q, own.gate, own.up = (_rows(one, rank, ranks) for one in (whole.q, whole.gate, whole.up))
    own.o, own.down = (Reduced(one, rank, ranks) for one in (whole.o, whole.down))
    keys, values = whole.kv.weight.chunk(2)
    own.kv = _linear(torch.cat([keys.chunk(ranks)[rank], values.chunk(ranks)[rank]]))
    return own  # type: ignore[no-any-return]


class ParallelDecoder(nn.Module):
    """A rank's part of a `TinyDecoder`. The logits are gathered."""

    def __init__(self, whole: TinyDecoder, rank: int, ranks: int) -> None:
        super().__init__()
        self.embed, self.norm = whole.embed, whole.norm
        self.group, self.ranks = dist.group.WORLD, ranks
        self.layers = nn.ModuleList(parallel_layer(layer, rank, ranks) for layer in whole.layers)  # type: ignore[arg-type]
        self.head = _rows(whole.head, rank, ranks)

    def forward(self, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        # Gathered along dimension 0, as DTensor does: PyTorch 2.11 breaks the graph in a gather along another one.
        parts = funcol.all_gather_tensor(self.head(self.norm(x)[:, -keep:]), 0, self.group).chunk(self.ranks)
        return torch.cat(parts, -1)


class ParallelNorms(nn.Module):
    """Row-wise work around two all-reduces and a running sum over tokens: `[B, S, H]` to `[B, S, H]`.

    `sums`: where the running sum is taken, before the first all-reduce or across it.
    """

    def __init__(self, width: int = 16, sums: str = "before") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.sums = Norm(width), sums

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.sums == "before":
            y = y.cumsum(1)
        y = reduced(y)
        if self.sums == "after":
            y = y.cumsum(1)
        return reduced(self.second(self.norm(y))) + x


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.detach().clone())
    return made


def _rows(whole: nn.Linear, rank: int, ranks: int) -> nn.Linear:
    return _linear(whole.weight.chunk(ranks, 0)[rank])
