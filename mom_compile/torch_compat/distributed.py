"""A process group of one process that stands for many, and tensors that are sharded among its ranks.

fake_pg    registers the backend "fake": collectives return at once and move nothing. PyTorch's own tests use it.

Nothing is imported from `torch.distributed` until a group is needed: a build of PyTorch may have none.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def has_default_group() -> bool:
    """Whether this process has a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def stand_in_group(ranks: int) -> Iterator[None]:
    """Within this context, the process is rank 0 of a default process group of `ranks`, without other processes.

    There must be no default group, and there is none afterwards. The group has the same name each time, so that a mesh
    made in one context is valid in another.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def mesh_of(ranks: int) -> Any:
    """Return a device mesh of all ranks of the default group."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.distributed.init_device_mesh(device, (ranks,), mesh_dim_names=("tp",))


def is_sharded(value: Any) -> bool:
    """Whether a value is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def any_sharded(types: Iterable[type]) -> bool:
    """Whether one of the types is that of a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in types)


def local_part(value: Any) -> Any:
    """Return this rank's part of a `DTensor`."""
    return value.to_local().detach()


def with_local_part(value: Any, local: torch.Tensor) -> Any:
    """Return a `DTensor` like `value` whose part on this rank is `local`."""
    made = type(value).from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made
