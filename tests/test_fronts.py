"""A front that changes the number of rows is computed whole; the layers behind it run in loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mom_compile import reports
from mom_compile.pipeline import NotWorthwhile
from tests.programs import HIDDEN, STEPS, Weighted, Weights, folded, heads, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

Front = Callable[[torch.Tensor, Weights], torch.Tensor]


def strided(x: torch.Tensor, w: Weights) -> torch.Tensor:
    return F.conv1d(x.mT, w.square[..., None].expand(-1, -1, 3), w.bias, stride=2, padding=1).mT


def twice_strided(x: torch.Tensor, w: Weights) -> torch.Tensor:
    return strided(torch.tanh(strided(x, w)), w)


def stacked(x: torch.Tensor, w: Weights) -> torch.Tensor:
    return F.linear(x.reshape(x.shape[0], -1, 2 * HIDDEN), torch.cat([w.square, w.square], 1))


def patches(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A picture `[B, 1, 4, 2 * S]` in patches of 2 x 2, and a row for all of it."""
    picture = x.reshape(x.shape[0], 1, 4, -1)
    rows = F.conv2d(picture, w.square[:, :4].reshape(-1, 1, 2, 2), w.bias, stride=2).flatten(2).mT
    return torch.cat([w.table[:1].expand(x.shape[0], 1, -1), rows], 1)


FRONTS: dict[str, Front] = {
    "strided": strided,
    "twice strided": twice_strided,
    "stacked": stacked,
    "patches": patches,
    "pooled": lambda x, w: F.avg_pool1d(x.mT, 2).mT,
    "repeated": lambda x, w: x.repeat_interleave(2, 1),
    "every other row": lambda x, w: x[:, ::2],
}


def behind(front: Front, layers: int = 3) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        x = front(x, w)
        for _ in range(layers):
            x = STEPS["mlp"](STEPS["causal"](x, w), w)
        return x

    return run


def values(tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)


@pytest.mark.parametrize("tokens", [32, 16], ids=["", "as long as wide"])
@pytest.mark.parametrize("name", sorted(FRONTS))
def test_layers_behind_a_front_run_in_loops(name: str, tokens: int) -> None:
    weights, x = weights_of(torch.float64), values(tokens)
    gm = trace(behind(FRONTS[name]), x, *weights)
    rewritten, report = rewrite(gm, 3, parameter_names(gm))
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)
    assert len(report.stages) >= 3
    assert sum(report.work_outside.values()) <= report.work // 8, report.work_outside


def test_tokens_are_patches_and_no_lines_of_patches() -> None:
    """A mask `[B, 6, 8]` of the patches of a picture has lines of eight patches, and columns of six."""

    def run(picture: torch.Tensor, shown: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        rows = F.conv2d(picture[:, None], w.square[:, :4].reshape(-1, 1, 2, 2), w.bias, stride=2).flatten(2).mT
        x = rows + F.embedding(shown.flatten(1), w.table)
        for _ in range(2):
            seen = F.scaled_dot_product_attention(heads(x @ w.square), heads(x), heads(x + w.bias))
            x = STEPS["mlp"](x + folded(seen), w)
        return x

    weights, picture = weights_of(torch.float64), torch.randn(2, 12, 16, dtype=torch.float64)
    shown = torch.ones(2, 6, 8, dtype=torch.long)
    gm = trace(run, picture, shown, *weights)
    rewritten, report = rewrite(gm, 7, parameter_names(gm)[1:])
    torch.testing.assert_close(rewritten(picture, shown, *weights), gm(picture, shown, *weights), rtol=0, atol=1e-10)
    assert report.tokens == 48
    assert not report.work_outside


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("name", ["strided", "stacked", "pooled", "repeated"])
def test_so_they_do_for_all_lengths(name: str) -> None:
    model = Weighted(behind(FRONTS[name])).double()
    fast = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 4})
    with torch.no_grad():
        for tokens in (32, 46, 60):
            x = values(tokens)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)
    assert len(reports()) == 2 and all(len(report.stages) >= 3 for report in reports())


def test_compiled_layers_behind_a_front_are_right() -> None:
    model = Weighted(behind(strided, layers=1))
    fast = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 4})
    with torch.no_grad():
        x = values(32).float()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert reports()[-1].stages and not reports()[-1].eager_pieces


def test_features_are_no_rows_that_begin() -> None:
    """A single row has none that could be cut, however many channels, heads or classes begin behind it."""
    weights, x = weights_of(torch.float64), values(1)
    gm = trace(behind(lambda x, w: x), x, *weights)
    with pytest.raises(NotWorthwhile):
        rewrite(gm, 4, parameter_names(gm))
