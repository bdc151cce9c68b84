"""Strides: the storage order of dimensions, and whether a tensor can be viewed in another shape.

    group the dimensions from the last: a group is contiguous
    a view exists if every group is a product of consecutive sizes of the new shape
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mom_passes.graph.sizes import Size, hint, is_one, product, same


def storage_order(value: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the outermost in storage to the innermost. Those of size one, whose strides mean nothing, come
    first."""
    steps = [hint(s) if hint(n) > 1 else 0 for s, n in zip(value.stride(), value.shape, strict=True)]
    return tuple(sorted(range(len(steps)), key=lambda i: (steps[i] > 0, -steps[i])))


def is_dense_in(value: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether a value is dense in this order of its dimensions, for all sizes. Strides of size-one dimensions are
    ignored."""
    step: Size = 1
    for size, stride in ((value.shape[i], value.stride(i)) for i in reversed(order)):
        if not (is_one(size) or same(stride, step)):
            return False
        step = product([step, size])
    return True


def viewable(shape: Sequence[Size], strides: Sequence[Size], new_shape: Sequence[Size]) -> bool:
    """Whether `tensor.view(new_shape)` is possible, at the captured sizes."""
    sizes, steps, wanted = ([hint(one) for one in ones] for ones in (shape, strides, new_shape))
    if 0 in sizes:
        return True
    for group in _groups(sizes, steps):
        made = 1
        while wanted and (made < group or wanted[-1] == 1):
            made *= wanted.pop()
        if made != group:
            return False
    return all(size == 1 for size in wanted)


def _groups(sizes: Sequence[int], steps: Sequence[int]) -> list[int]:
    """The numbers of elements of the contiguous groups of dimensions, the last first."""
    groups: list[int] = []
    expected = None
    for size, step in reversed(list(zip(sizes, steps, strict=True))):
        if size == 1:
            continue
        if step == expected:
            groups[-1] *= size
        else:
            groups.append(size)
        expected = step * size
    return groups or [1]
