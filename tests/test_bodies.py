"""Work done once per loop and not per iteration: checking inputs and transposing weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from mom_compile.runtime.loop import CompiledLoop, _Cut

OPTIONS = {"mini_seq_len": 8, "strict": True}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


@pytest.fixture
def ran() -> tuple[list[tuple[CompiledLoop, list[Any]]], list[str], list[list[Any]]]:
    """The loops of a compiled MLP of 36 tokens with what they were given, its code, and what its body was given."""
    calls: list[tuple[CompiledLoop, list[Any]]] = []
    bodies: list[list[Any]] = []
    run = CompiledLoop.__call__

    def remember(loop: CompiledLoop, arguments: list[Any]) -> Any:
        calls.append((loop, list(arguments)))
        return run(loop, arguments)

    torch._dynamo.reset()
    model, x = Mlp(), torch.randn(2, 36, 16)
    compiled = torch.compile(model, backend="mom", options=OPTIONS)
    with torch.no_grad(), mock.patch.object(CompiledLoop, "__call__", remember):
        result, code = run_and_get_code(compiled, x)
        torch.testing.assert_close(result, model(x))
    (call,) = calls
    piece: Callable[[list[Any]], Any] = call[0].body

    def given(inputs: list[Any]) -> Any:
        bodies.append(list(inputs))
        return piece(inputs)

    object.__setattr__(call[0], "body", given)
    with torch.no_grad():
        run(call[0], list(call[1]))
    object.__setattr__(call[0], "body", piece)
    return calls, code, bodies


def test_weights_are_transposed_and_checked_once_per_loop(ran) -> None:
    ((loop, _),), code, bodies = ran
    assert len(loop.turned) == 2
    assert len(bodies) == 5
    shapes = ((16, 24), (24, 16))
    weights = [{id(v) for v in given if isinstance(v, torch.Tensor) and v.shape in shapes} for given in bodies]
    assert len(weights[0]) == 2
    assert all(found == weights[0] for found in weights)
    (body,) = [text for text in code if "count" in text]
    assert "assert_size_stride(" not in body.split("def call")[1]


def test_a_loop_checks_its_inputs_before_it_computes(ran) -> None:
    ((loop, arguments),), _, _ = ran
    at = next(i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor) and value.shape == (24, 16))
    wrong = list(arguments)
    wrong[at] = torch.randn(16, 24).t()
    with pytest.raises(AssertionError, match="stride"), torch.no_grad():
        loop(wrong)


def test_an_inductor_option_set_by_the_user_takes_precedence() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Mlp(), backend="mom", options={**OPTIONS, "inductor": {"size_asserts": True}})
    with torch.no_grad():
        _, code = run_and_get_code(compiled, torch.randn(2, 36, 16))
    (body,) = [text for text in code if "count" in text]
    assert "assert_size_stride(" in body.split("def call")[1]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_slice_in_a_body_equals_narrow(index: int) -> None:
    tensor = torch.arange(7 * 6 * 5).view(5, 6, 7).permute(2, 1, 0)[1:, :, 1:]
    cut = _Cut(tensor, index, tensor.shape[index])
    for start, count in ((0, 2), (2, 2), (1, 3), (0, 4)):
        rows, expected = cut.rows(start, count), tensor.narrow(index, start, count)
        assert rows.stride() == expected.stride() and torch.equal(rows, expected)
        assert rows.data_ptr() == expected.data_ptr()


def test_no_row_after_the_end_of_a_tensor_is_read() -> None:
    with pytest.raises(IndexError, match="fewer rows than the 7 of its loop"):
        _Cut(torch.empty(2, 6), 1, 7)
