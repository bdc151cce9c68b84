"""Weights of fewer bits: rows are rows, and a weight is dequantised once for a prefill, not for every mini-sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mom_compile
from mom_passes.errors import CannotChunk
from mom_passes.rules import All, Dim, Rows, claim_for
from tests.models import TinyDecoder, ids
from tests.quantised_operators import INSTALLED, NF4, packed
from tests.rule_law import Call, node_of

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


class FourBits(nn.Module):
    """Weights of four bits by the operator that bitsandbytes calls."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = list(linear.weight.shape)
        weight, scale = packed(linear.weight.data)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.bitsandbytes.gemm_4bit(x, self.weight, self.shape, self.scale, 32, "nf4")


class FourBitsOfAnyRows(FourBits):
    """Likewise on a CPU with products of bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = torch.tensor(NF4)
        return torch.ops.bitsandbytes.gemv_4bit(x, self.weight, self.shape, self.scale, code, 32)


class Int8Rows(Int8):
    """`RowsToo` by the operators that bitsandbytes calls, without a threshold for outliers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.scale = self.scale * 127

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(x.reshape(-1, x.shape[-1]).half())
        product = torch.ops.bitsandbytes.int8_scaled_mm(rows, self.weight, scale, self.scale, dtype=x.dtype)
        return product.reshape(*x.shape[:-1], -1)


class FourBitsPacked(nn.Module):
    """Weights of four bits by PyTorch's own operator for a CPU, which GPTQModel calls."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes = ((linear.weight.data.clamp(-0.2, 0.2) + 0.2) / 0.4 * 15).round().int()
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scale", torch.full((linear.in_features // 32, linear.out_features, 2), 0.02))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, 32, self.scale)
        return out.reshape(*x.shape[:-1], -1)


def quantised(module: Any, kind: type[nn.Module]) -> Any:
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
    assert ("made once before it" in report.details()) is made


PRODUCTS = ("gemm_4bit", "gemv_4bit", "int8_scaled_mm", "_weight_int4pack_mm_for_cpu")


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("kind", [FourBits, FourBitsOfAnyRows, Int8Rows, FourBitsPacked])
def test_operators_that_take_quantised_weights_are_in_loops(kind: type[nn.Module]) -> None:
    """At two lengths, of several sequences: what is multiplied is counted as such, and none of it is outside."""
    model = quantised(TinyDecoder(layers=2, vocabulary=96), kind)
    compiled = torch.compile(model, backend="mom", options={"mini_seq_len": 32, "strict": True})
    for tokens in (100, 131):
        x = ids(2, tokens)
        with torch.no_grad():
            # bfloat16 rounds what float32 adds up otherwise.
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0.05 if kind is FourBitsOfAnyRows else 1e-5)
    for report in mom_compile.reports():
        found = [n for stage in report.stages for name, n in stage.operators.items() if name.endswith(PRODUCTS)]
        assert sum(found) == 2 * 6 + 1
        assert report.work > 0
        assert not report.work_outside
        assert not report.left_out


def test_what_is_not_row_wise_is_refused_by_name() -> None:
    ops, x = torch.ops.bitsandbytes, torch.rand(6, 64).half()
    with pytest.raises(CannotChunk, match="looks for outliers in all rows"):
        claim_for(node_of(Call(ops.int8_vectorwise_quant.default, (x, 6.0))), Dim(0))
    with pytest.raises(CannotChunk, match="one scale for all its rows"):
        claim_for(node_of(Call(ops.int8_vectorwise_quant.default, (x,))), Dim(1))
    weight, scale = packed(torch.rand(32, 64) - 0.5)
    node = node_of(Call(ops.gemm_4bit.default, (x.float(), weight, [32, 64], scale, 32, "nf4")))
    assert claim_for(node, Dim(0)).needs == (Rows(Dim(0)), All(), All())
    with pytest.raises(CannotChunk, match="columns are those of packed weights"):
        claim_for(node, Dim(1))


def of_the_package(module: Any, kind: str) -> Any:
    import bitsandbytes.nn as layers

    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Linear):
            of_the_package(child, kind)
            continue
        sizes = {"input_features": child.in_features, "output_features": child.out_features, "bias": False}
        if kind == "int8":
            new = layers.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=0.0)
        else:
            new = layers.Linear4bit(**sizes, quant_type=kind, compute_dtype=torch.float32)
            new.support_avx512bf16_for_cpu = False  # that one is less exact, and there are CPUs that have none
        new.load_state_dict(child.state_dict(), strict=False)
        setattr(module, name, new.to("cpu"))
    return module.eval()


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_layers_of_bitsandbytes(kind: str) -> None:
    model, x = of_the_package(TinyDecoder(layers=2, width=128), kind), ids(2, 100)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="mom", options={"mini_seq_len": 32, "strict": True})
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    (report,) = mom_compile.reports()
    found = [n for stage in report.stages for name, n in stage.operators.items() if name.endswith(PRODUCTS)]
    assert sum(found) == 2 * 6 + 1
    assert not report.work_outside
