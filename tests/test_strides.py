"""`viewable` against `tensor.view`, and the correction of wrong recorded strides."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_passes.graph.claimed_layouts import correct_strides
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.strides import viewable
from mom_passes.verify import values_are_as_computed
from tests.captured import capture


@st.composite
def questions(draw):
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(sizes))))
    tensor = torch.empty_permuted(sizes, order)
    if draw(st.booleans()):
        tensor = tensor[..., : max(1, sizes[-1] - 1)]
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
    left, shape = math.prod(tensor.shape), []
    while left > 1 or draw(st.booleans()):
        size = draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
        shape.append(size)
        left //= size
    return tensor, shape


@given(questions())
@settings(max_examples=400, deadline=None)
def test_viewable_agrees_with_tensor_view(question):
    tensor, shape = question
    try:
        tensor.view(shape)
        allowed = True
    except RuntimeError:
        allowed = False
    assert viewable(tensor.shape, tensor.stride(), shape) is allowed


def test_wrong_strides_of_views_are_corrected():
    """Inductor's `remove_no_ops` removes a product with ones and gives its operand the recorded value of the result."""
    pairs = torch.randn(2, 17, 3, 8, dtype=torch.float64)

    def run(x):
        row = x[:, :, 1]
        row = row * torch.ones_like(row)
        spread = x[:, :1, 0].expand(-1, 17, -1)
        spread = spread + torch.zeros_like(spread)
        return row.view(34, 8) @ torch.ones(8, 8, dtype=x.dtype), row.mT, spread.mT

    gm = capture(run, x=pairs).gm
    wrong = values_are_as_computed(gm)
    assert wrong is not None and "select" in wrong
    fixed = copy_graph(gm)
    assert correct_strides(fixed) >= 2
    assert values_are_as_computed(fixed) is None
    assert values_are_as_computed(gm) == wrong  # the captured graph stays as it was
    assert correct_strides(fixed) == 0
