"""What a loop stores is written to its place by whoever computes it: products too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import linear, scaled_dot_product_attention

INTO = "torch.ops.mom.product_into.default("
OPTIONS = {"mini_seq_len": 8, "strict": True}
HIDDEN, HEADS = 16, 2


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def layer(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, read: bool = False) -> torch.Tensor:
    """Keys are computed behind their product; values are a product, `read` once more where they are made."""
    v = linear(x, w[2], bias)
    q, k = linear(x, w[0]), linear(torch.tanh(x + v) if read else x, w[1]).sin()
    out = scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
    return x + linear(out.transpose(1, 2).flatten(2), w[0])


def run(function: Callable[..., torch.Tensor], *inputs: Any) -> str:
    """The code, whose results are those of the function."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="mom", options=OPTIONS)
    with torch.no_grad():
        result, code = run_and_get_code(compiled, *inputs)
        torch.testing.assert_close(result, function(*inputs), rtol=1e-12, atol=1e-12)
    return "\n".join(text.split("def call")[1].split("def get_args")[0] for text in code)


def given(batch: int, tokens: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, HIDDEN, generator=random, dtype=torch.float64)
    return x, torch.randn(3, HIDDEN, HIDDEN, generator=random, dtype=torch.float64) / 4


@pytest.mark.parametrize("biased", [False, True])
def test_values_are_written_by_their_product(biased: bool) -> None:
    x, w = given(1)
    code = run(layer, x, w, torch.randn(HIDDEN, dtype=x.dtype) if biased else None)
    assert code.count(INTO) == 1
    (call,) = (line for line in code.splitlines() if INTO in line)
    assert call.rstrip().endswith("_place)")
    assert (f"{INTO}None" in call) != biased


def test_what_the_body_reads_is_not_written_away() -> None:
    assert INTO not in run(layer, *given(1), None, True)


def test_rows_of_several_sequences_are_no_matrix_of_one_place() -> None:
    assert INTO not in run(layer, *given(3))


def test_the_operator_is_sound() -> None:
    left, right, place = torch.randn(5, 4), torch.randn(4, 6), torch.empty(9, 6)[2:7]
    torch.library.opcheck(torch.ops.mom.product_into.default, (None, left, right, place))
    torch.library.opcheck(torch.ops.mom.product_into.default, (torch.randn(6), left, right.t().contiguous().t(), place))
