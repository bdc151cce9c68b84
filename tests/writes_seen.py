"""How tensors lie to each other: which of them a write to one changes, and how many bytes they hold together."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def writes_seen(values: Sequence[torch.Tensor]) -> list[bool]:
    """Of each ordered pair of different tensors, whether a write to the first is seen in the second.

    Their contents are overwritten.
    """
    found = []
    for i, written in enumerate(values):
        for j, other in enumerate(values):
            if i != j:
                other.zero_()
                written.fill_(1)
                found.append(bool(other.any()))
    return found


def bytes_held(values: Sequence[torch.Tensor]) -> int:
    """Of all storages that they are in, each counted once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    return sum(storages.values())
