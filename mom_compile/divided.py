"""Models whose weights are divided among ranks: by tensor parallelism, or by FSDP.

A plan of transformers divides `q_proj`, `k_proj` and `v_proj` by rows and not by heads. With parts of heads, the model
itself raises later, in a `view` of its attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mom_compile.torch_compat.distributed import is_sharded
from mom_compile.torch_compat.errors import UserError

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether FSDP gathers the parameters of a module before each use."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def check_heads(model: Any) -> None:
    """Raise `ValueError` if ranks divide the heads of a model's attention into parts of heads."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        size = getattr(module, "head_dim", None)
        for projection in _PROJECTIONS if isinstance(size, int) and size > 0 else ():
            weight: Any = getattr(getattr(module, projection, None), "weight", None)
            if is_sharded(weight) and weight.to_local().shape[0] % size:
                heads = weight.shape[0] // size
                raise UserError(
                    f"{name}.{projection} has {heads} {'head' if heads == 1 else 'heads'} of {size} rows, which "
                    f"{weight.device_mesh.size()} ranks cannot divide: use a number of ranks that divides the heads of "
                    "queries, keys and values"
                )
