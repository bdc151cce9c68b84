"""Rows of a tensor: taking them along any dim and putting them back."""

from __future__ import annotations

import pytest
import torch

from mom_passes.rules import Dim
from mom_passes.rules.slicing import length, put, take


@pytest.mark.parametrize("dim", [Dim(0), Dim(1), Dim(2), Dim(1, outer=2), Dim(1, inner=3), Dim(1, outer=2, inner=3)])
def test_put_undoes_take(dim: Dim) -> None:
    whole = torch.arange(3 * 24 * 2).reshape(3, 24, 2)
    rows = length(whole, dim)
    copy = torch.zeros_like(whole)
    for start, stop in ((0, 1), (1, rows)):
        put(copy, dim, start, take(whole, dim, start, stop - start))
    assert torch.equal(copy, whole)


def test_put_touches_no_other_rows() -> None:
    full = torch.zeros(12, 2)
    put(full, Dim(0, outer=2, inner=2), 1, torch.ones(4, 2))
    assert full[:, 0].tolist() == [0, 0, 1, 1, 0, 0] * 2


def test_rows_of_a_folded_dimension() -> None:
    batch_times_tokens = torch.arange(10).reshape(2, 5).flatten()
    assert take(batch_times_tokens, Dim(0, outer=2), 1, 2).tolist() == [1, 2, 6, 7]
    tokens_times_choices = torch.arange(10)
    assert take(tokens_times_choices, Dim(0, inner=2), 1, 2).tolist() == [2, 3, 4, 5]


def test_put_writes_through_a_view_that_is_not_contiguous() -> None:
    full = torch.zeros(3, 8).t()
    put(full, Dim(0, outer=2), 1, torch.ones(4, 3))
    assert full[:, 0].tolist() == [0, 1, 1, 0] * 2


def test_taking_plain_rows_copies_nothing() -> None:
    whole = torch.zeros(4, 3)
    take(whole, Dim(0), 1, 2).fill_(1)
    assert whole[:, 0].tolist() == [0, 1, 1, 0]
