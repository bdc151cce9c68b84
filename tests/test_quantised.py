"""Weights of fewer bits: rows are rows, and a weight is dequantised once for a prefill, not for every mini-sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mom_compile
from tests.models import TinyDecoder, ids

pytestmark = pytest.mark.usefixtures("fresh")

aten, prims = torch.ops.aten, torch.ops.prims


class Int8(nn.Module):
    """A linear layer of int8 weights with a scale for each row, as torchao's weight-only configurations compute it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.data.abs().amax(1) / 127
        self.register_buffer("weight", (linear.weight.data / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class ScaledAfter(Int8):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class ScaledBefore(Int8):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale[:, None])


class RowsToo(Int8):
    """Activations in int8 as well, with a scale for each token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        product = torch._int_mm((rows / scale).round().to(torch.int8), self.weight.t())
        return (product.to(x.dtype) * scale * self.scale).view(*x.shape[:-1], -1)


def quantised(module: Any, kind: type[Int8]) -> Any:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            quantised(child, kind)
    return module.eval()


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("kind", [ScaledAfter, ScaledBefore, RowsToo])
def test_a_quantised_decoder_is_exact(kind: type[Int8]) -> None:
    """Every product is in a loop, at two lengths."""
    model = quantised(TinyDecoder(layers=2), kind).double()
    compiled = torch.compile(model, backend="mom", options={"mini_seq_len": 32, "strict": True})
    for tokens in (100, 131):
        x = ids(2, tokens)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-10)
    for report in mom_compile.reports():
        products = sum(count for stage in report.stages for name, count in stage.operators.items() if "mm" in name)
        assert products == 2 * 6 + 1
        assert not report.left_out


@pytest.mark.parametrize(("kind", "made"), [(ScaledAfter, True), (ScaledBefore, True), (RowsToo, False)])
def test_weights_are_dequantised_once_and_explain_says_what_that_takes(kind: type[Int8], made: bool) -> None:
    model = quantised(TinyDecoder(layers=2), kind)
    report = mom_compile.explain(model, ids(1, 300), options={"mini_seq_len": 64})[0]
    casts = (prims.convert_element_type.default, aten._to_copy.default)
    assert report.graph is not None
    outside = [node for node in report.graph.graph.nodes if node.target in casts and node.args[0].op == "placeholder"]
    assert len(outside) == (2 * 6 + 1 if made else 0)
    for stage in report.stages:
        # Of the weights of one layer, in float32: k and v, or all that lie between two attentions.
        assert (stage.made_once > 0) is made
        assert stage.made_once <= (6 + 3 * 3 + 2) * 32 * 32 * 4
    assert ("made once before it" in str(report)) is made
