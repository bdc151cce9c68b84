"""Queries of a fused projection get a product of their own, so that they are not stored for all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from mom_passes.loops.loop import loop_nodes
from mom_passes.tokens.separate_queries import separate_queries
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

HIDDEN, HEADS, CHANNELS, TOKENS = 8, 4, 2, 19


def weights(features: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (features, HIDDEN), (features,), (HIDDEN, HIDDEN)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) / 3 for shape in shapes)


def in_slices(p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Phi-3: grouped heads, slices of the features."""
    q, k, v = p[..., :HIDDEN], p[..., HIDDEN : HIDDEN + 4], p[..., HIDDEN + 4 :]
    return tuple(one.view(*p.shape[:2], -1, CHANNELS).transpose(1, 2) for one in (q, k, v))


def in_a_split(p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """GPT-2."""
    return tuple(one.view(*p.shape[:2], HEADS, CHANNELS).transpose(1, 2) for one in p.split(HIDDEN, dim=2))


def in_uneven_parts(p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Falcon's multi-query attention."""
    parts = p.split([HIDDEN, CHANNELS, CHANNELS], dim=2)
    return tuple(one.view(*p.shape[:2], -1, CHANNELS).transpose(1, 2) for one in parts)


def unbound(p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Vision towers."""
    return p.view(*p.shape[:2], 3, HEADS, CHANNELS).permute(2, 0, 3, 1, 4).unbind(0)


def selected(p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows = p.view(*p.shape[:2], 3, HEADS, CHANNELS)
    return tuple(rows[:, :, i].transpose(1, 2) for i in range(3))


def interleaved(p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """BLOOM: queries, keys and values of one head side by side."""
    rows = p.view(*p.shape[:2], HEADS, 3, CHANNELS)
    return tuple(rows[..., i, :].transpose(1, 2) for i in range(3))


def layer(parts: Callable[..., tuple[torch.Tensor, ...]], *, bias: bool) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, fused: torch.Tensor, offset: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = parts(F.linear(torch.tanh(x), fused, offset if bias else None))
            k, v = (one.repeat_interleave(HEADS // one.shape[1], 1) for one in (k, v))
            rows = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
            x = x + rows @ out
        return x

    return run


def traced(parts: Any, features: int, *, bias: bool) -> tuple[fx.GraphModule, list[Any]]:
    x = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [x, *weights(features)]
    return trace(layer(parts, bias=bias), *inputs), inputs


FORMS = {
    "slices": (in_slices, 16), "split": (in_a_split, 24), "uneven": (in_uneven_parts, 12), "unbind": (unbound, 24),
    "select": (selected, 24),
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_loops_store_keys_and_values_but_no_queries(form: str, bias: bool) -> None:
    parts, features = FORMS[form]
    gm, inputs = traced(parts, features, bias=bias)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    torch.testing.assert_close(rewritten(*inputs), gm(*inputs), rtol=0, atol=1e-10)
    stored = [[output.type.shape for output in module.loop.stored] for _, module in loop_nodes(rewritten)]
    assert [len(shapes) for shapes in stored] == [2, 3, 1]  # keys and values; the same and hidden states; the result


def test_a_product_keeps_what_only_a_copy_could_separate() -> None:
    gm, inputs = traced(interleaved, 24, bias=True)
    assert separate_queries(gm) is gm
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    torch.testing.assert_close(rewritten(*inputs), gm(*inputs), rtol=0, atol=1e-10)


def test_products_of_a_gated_mlp_stay_together() -> None:
    """Both halves are read by the same rows: two products would be slower."""

    def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, rows = (x @ up).chunk(2, dim=-1)
        return x + (F.silu(gate) * rows) @ down

    x = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    gm = trace(mlp, x, torch.randn(HIDDEN, 32, dtype=torch.float64), torch.randn(16, HIDDEN, dtype=torch.float64))
    assert separate_queries(gm) is gm


def test_a_product_that_is_a_result_too_stays() -> None:
    def run(x: torch.Tensor, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p = x @ fused
        q, k, v = in_a_split(p)
        return F.scaled_dot_product_attention(q, k, v), p

    x = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    gm = trace(run, x, torch.randn(HIDDEN, 3 * HIDDEN, dtype=torch.float64))
    assert separate_queries(gm) is gm
