"""Process groups by the names that captured graphs have for them.

name      A functional collective has the name of its group as an argument. Only a private function resolves it.
store     The key-value store that the ranks of a group share. PyTorch prefixes its keys with the group's name.
timeout   How long a collective waits for other ranks: an option of the group's backend for a type of device.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch

from mom_compile.torch_compat.errors import UserError


def process_group(name: str) -> Any:
    """Return the process group that a functional collective names.

    Raises
    ------
    UserError
        If there is none: it was destroyed, or `torch.distributed` was not initialised in this process.
    """
    try:
        return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except Exception as error:
        raise UserError(
            f"a compiled graph communicates in the process group {name!r}, which this process does not have: "
            f"{str(error).splitlines()[0]}. Call torch.distributed.init_process_group first; after a group was "
            "destroyed, load the model and compile it again"
        ) from error


def store_of(group: Any) -> Any:
    """Return the key-value store that all ranks of a group share."""
    return group.get_group_store()


def timeout_of(group: Any) -> datetime.timedelta:
    """Return how long a collective of a group waits for other ranks."""
    for device in ("cpu", "cuda"):
        try:
            found = group._get_backend(torch.device(device)).options._timeout
        except Exception:  # the group has no backend for this device, or one without options
            continue
        assert isinstance(found, datetime.timedelta)
        return found
    return torch.distributed.constants.default_pg_timeout
