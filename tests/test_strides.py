"""The question that `view` asks of strides, against `view` itself."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_passes.graph.strides import viewable


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
def test_it_says_what_view_does(question):
    tensor, shape = question
    try:
        tensor.view(shape)
        allowed = True
    except RuntimeError:
        allowed = False
    assert viewable(tensor.shape, tensor.stride(), shape) is allowed
