"""Sines and cosines that every head reads are computed once per row."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from mom_compile.lowering import once
from mom_compile.lowering.once import store_once
from tests.tracing import trace

aten = torch.ops.aten
Q, ANGLES = torch.randn(2, 4, 12, 8), torch.randn(2, 12, 8)


def marked(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[object]:
    return [node.target for node in store_once(trace(function, *inputs).graph)]


def rotated(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    cos, sin = (part.unsqueeze(1) for part in (angles.cos() * 0.5, angles.sin() * 0.5))
    return q * cos + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin


def in_pairs(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """As in GPT-J: each value is used for two channels."""
    return q * angles[..., :4].cos().repeat_interleave(2, -1).unsqueeze(1)


def one_head(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return q[:, 0] * angles.cos()


def of_products(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """A product's operand is stored anyway, and a value after the product contains no cosine."""
    return q * (angles.cos() @ angles.transpose(1, 2) @ angles).unsqueeze(1)


def cheap(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return q * (angles * 0.5 + 1).unsqueeze(1)


@pytest.mark.parametrize(
    ("function", "stored"),
    [(rotated, [aten.mul.Tensor, aten.mul.Tensor]), (one_head, []), (of_products, []), (cheap, [])],
)
def test_a_sine_is_stored_if_a_larger_value_reads_it(function, stored) -> None:
    assert marked(function, Q, ANGLES) == stored


def test_a_sine_for_pairs_of_channels_is_stored() -> None:
    assert marked(in_pairs, Q, ANGLES)


def attending(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Heads rotated by their positions, after a product."""
    rows, channels = x.shape[1], 8
    positions = torch.arange(rows, dtype=x.dtype)[:, None] * torch.arange(1, channels + 1, dtype=x.dtype) / channels
    q = (x @ w).view(x.shape[0], rows, -1, channels).transpose(1, 2)
    q = q * positions.cos() + q.flip(-1) * positions.sin()
    return torch.relu(q.transpose(1, 2).flatten(2) @ w.t())


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_loop_over_heads_computes_no_sine_where_storing_pays(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enabled for the CPU in this test, since its code can be read and run."""
    torch._dynamo.reset()
    monkeypatch.setattr(once, "WORTHWHILE_ON", (where,))
    x, w = torch.randn(2, 40, 16), torch.randn(16, 32)
    compiled = torch.compile(attending, backend="mom", options={"mini_seq_len": 16, "strict": True})
    settings = inductor_config.patch(fx_graph_cache=False)  # the mark is not in its keys
    with torch.no_grad(), settings, functorch_config.patch(enable_autograd_cache=False):
        result, code = run_and_get_code(compiled, x, w)
        torch.testing.assert_close(result, attending(x, w))
    (body,) = [text for text in code if "count" in text]
    nests = [part for part in re.split(r"for\(int64_t x0", body) if ".cos()" in part]
    assert len(nests) == 1
    # A loop over rows and channels, or also over sequences and heads.
    assert ("x2" in nests[0]) == (where != "cpu")
