"""Memory of eager mode, operator by operator: the model is called on tensors without data.

Every storage is counted from the operator that creates it until Python releases its last reference. On an H200, eager
mode peaked at 2376.1 MiB for 8 layers of Llama-3-8B's shape and 16,384 tokens, and at 9504.5 MiB for 65,536
(`benchmarks/results/h200-2026-11-28.json`). The count is 2376.1 and 9504.5 MiB (a test). Workspaces of kernels are not
counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from mom_compile.planning.prefill import prefill_arguments
from mom_compile.stand_ins import called_without_data, on_stand_ins
from mom_compile.torch_compat.distributed import any_sharded
from mom_compile.torch_compat.tensors import TorchDispatchMode, tree_map


def eager_timeline(model: nn.Module, batch_size: int, seq_len: int) -> list[int]:
    """Return the bytes above weights and inputs after each operator of a prefill with default cache and last logits."""
    given = prefill_arguments(batch_size, seq_len)
    with torch.no_grad(), on_stand_ins(model, given) as (args, kwargs), _Live() as live:
        model.forward(*args, **kwargs)
    return live.timeline


class _Live(TorchDispatchMode):
    """Counts living storages that operators created."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.timeline: list[int] = []
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any_sharded(types):
            return NotImplemented  # the DTensor then dispatches its operators on local tensors to this mode
        tree_map(self._given, (args, kwargs or {}))
        out = called_without_data(func, args, kwargs or {})
        tree_map(self._made, out)
        self.timeline.append(self.bytes)
        return out

    def _given(self, value: Any) -> None:
        """Exclude storages of weights, inputs and their views."""
        if isinstance(value, torch.Tensor):
            self._known.add(value.untyped_storage())

    def _made(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self._known:
            self._known.add(storage)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.bytes -= size
