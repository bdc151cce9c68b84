"""A graph with an empty input runs in loops; an empty past is no past."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mom_compile import reports
from mom_passes.graph.arguments import aten
from tests.programs import HEADS, HIDDEN, STEPS, Weights, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

W = weights_of(torch.float64)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (HEADS, HIDDEN // HEADS)).transpose(1, 2)


def layer(x: torch.Tensor, past: torch.Tensor, w: Weights = W) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.cat([past, heads(x @ w.square)], 2)
    rows = torch.arange(x.shape[1])[:, None] + past.shape[2]
    seen = torch.arange(keys.shape[2])[None] <= rows
    y = F.scaled_dot_product_attention(heads(x), keys, keys, attn_mask=seen)
    return STEPS["mlp"](x + y.transpose(1, 2).flatten(2), w), keys


def prefill(x: torch.Tensor, past: list[torch.Tensor], w: Weights = W) -> tuple[torch.Tensor, list[torch.Tensor]]:
    kept = []
    for one in past:
        x, keys = layer(x, one, w)
        kept.append(keys)
    return x, kept


def inputs(tokens: int, past: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(tokens + past)
    pasts = [torch.randn(2, 2, past, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    return torch.randn(2, tokens, HIDDEN, generator=generator, dtype=torch.float64), pasts


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("kv_offload", [False, True])
def test_a_cache_that_was_cropped_to_nothing(kv_offload: bool) -> None:
    fast = torch.compile(prefill, backend="mom", options={"mini_seq_len": 8, "strict": True, "kv_offload": kv_offload})
    with torch.no_grad():
        for tokens, past in ((40, 0), (61, 9), (33, 0)):
            x, pasts = inputs(tokens, past)
            found, kept = fast(x, pasts)
            expected, expected_kept = prefill(x, pasts)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close([one.clone() for one in kept], expected_kept, rtol=1e-9, atol=1e-9)
            # Rows behind a past are written behind it; an empty past is nobody's storage.
            assert kv_offload or past or not any(a.data_ptr() == b.data_ptr() for a, b in zip(kept, pasts, strict=True))
    assert all(report.stages and not report.work_outside for report in reports())
    assert not kv_offload or all(len(report.on_host) == 2 for report in reports())


def test_keys_behind_no_past_are_made_in_the_loops() -> None:
    def run(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return prefill(x, [first, second], Weights(*weights))[0]

    x, pasts = inputs(40, 0)
    gm = trace(run, x, *pasts, *W)
    rewritten, report = rewrite(gm, 8, parameter_names(gm)[2:])
    torch.testing.assert_close(rewritten(x, *pasts, *W), gm(x, *pasts, *W), rtol=0, atol=1e-10)
    assert report.stages and not report.left_out
    assert not rewritten.graph.find_nodes(op="call_function", target=aten.cat.default)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("shape", [(0, 40), (2, 0)], ids=["no sequence", "no token"])
def test_nothing_to_compute_is_right(shape: tuple[int, int]) -> None:
    x = torch.zeros(*shape, HIDDEN, dtype=torch.float64)
    pasts = [torch.zeros(shape[0], 2, 9, 4, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        found, _ = torch.compile(prefill, backend="mom", options={"mini_seq_len": 8, "strict": True})(x, pasts)
    assert found.shape == x.shape
