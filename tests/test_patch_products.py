"""Patches that are convolved one by one are rows of a matrix product, and computed in loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mom_passes.loops.loop import loop_nodes
from mom_passes.tokens.patch_products import patch_products
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

aten = torch.ops.aten
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_patches_of_a_video_are_rows(has_bias: bool, dynamic: bool) -> None:
    """Patches `[N, C * T * P * P]`, as Qwen2-VL's processor returns them."""

    def tower(patches: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        kernel = torch.cat([w.up, w.down.t()], 1).t()[:HIDDEN].reshape(HIDDEN, 3, 2, 2, 2)
        x = F.conv3d(patches.view(-1, 3, 2, 2, 2), kernel, w.bias if has_bias else None, stride=2).view(1, -1, HIDDEN)
        return STEPS["mlp"](STEPS["causal"](x, w), w)

    patches, weights = torch.randn(22, 24, dtype=torch.float64), weights_of(torch.float64)
    gm = trace(tower, patches, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, 8, parameter_names(gm))
    assert not report.left_out and not report.work_outside
    assert len(loop_nodes(rewritten)) == 2
    torch.testing.assert_close(rewritten(patches, *weights), tower(patches, *weights), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", CONVOLUTIONS)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "channels last"])
def test_entries_of_any_rank_and_layout(rank: int, transposed: bool) -> None:
    size = (2, *range(2, rank))
    x, weight = torch.randn(7, *size), torch.randn(5, *size)
    if transposed:
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    gm = trace(lambda x, weight: CONVOLUTIONS[rank](x, weight, stride=3).relu(), x, weight)
    assert len(patch_products(gm)) == 1
    assert not gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
    expected = CONVOLUTIONS[rank](x, weight, stride=3).relu()
    torch.testing.assert_close(gm(x, weight), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "given"),
    [
        ((3, 2, 4, 4), (5, 2, 2, 2), {"stride": 2}),
        ((3, 2, 4, 4), (5, 2, 4, 4), {"padding": 1}),
        ((3, 2, 4, 4), (4, 1, 4, 4), {"groups": 2}),
        ((1, 2, 4, 4), (5, 2, 4, 4), {}),
    ],
    ids=["several positions", "padded", "groups", "one entry"],
)
def test_other_convolutions_stay(x: tuple[int, ...], weight: tuple[int, ...], given: dict[str, int]) -> None:
    gm = trace(lambda x, w: F.conv2d(x, w, **given), torch.randn(x), torch.randn(weight))
    assert not patch_products(gm)
