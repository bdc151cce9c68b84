"""Patches that are convolved one by one are rows of a matrix product, and computed in loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mom_passes.loops.loop import loop_nodes
from mom_passes.tokens.patch_products import patch_products
from tests.programs import ATTENTION, HEADS, HIDDEN, STEPS, Weights, weights_of
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


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("image", [(10, 6), (4, 6, 4)], ids=["image", "video"])
def test_patches_of_an_image_are_gathered_in_the_loop(image: tuple[int, ...], batch: int) -> None:
    """No value has all patches as rows."""
    kernel = (2,) * len(image)

    def tower(pixels: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        weight = w.up.t().reshape(HIDDEN, 3, -1)[..., : 2 ** len(image)].reshape(HIDDEN, 3, *kernel)
        x = CONVOLUTIONS[len(image) + 2](pixels, weight, w.bias, stride=2).flatten(2).mT
        x = x + w.table[: x.shape[1]]
        return STEPS["mlp"](x + ATTENTION["full"](x, w), w)

    pixels, weights = torch.randn(batch, 3, *image, dtype=torch.float64), weights_of(torch.float64)
    gm = trace(tower, pixels, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert not report.left_out and not report.work_outside
    assert len(loop_nodes(rewritten)) == 2
    rows = math.prod(size // 2 for size in image)
    stored = [out.type.shape for _, loop in loop_nodes(rewritten) for out in loop.loop.outputs]
    assert report.tokens == rows and all(shape[-1] == HIDDEN or HEADS in shape for shape in stored)
    torch.testing.assert_close(rewritten(pixels, *weights), tower(pixels, *weights), rtol=0, atol=1e-10)


def test_patches_of_an_image_with_channels_last() -> None:
    def flat(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(pixels, weight, stride=2).flatten(2)

    pixels = torch.randn(2, 3, 8, 6).to(memory_format=torch.channels_last)
    weight = torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last)
    gm = trace(flat, pixels, weight)
    (claimed,) = (node.args[0].meta["val"].stride() for node in gm.graph.nodes if node.op == "output")
    (made,) = patch_products(gm)
    assert made.meta["val"].stride() == claimed
    torch.testing.assert_close(gm(pixels, weight), flat(pixels, weight), rtol=1e-5, atol=1e-5)


def test_patches_of_one_image_of_a_list_are_gathered_in_the_loop() -> None:
    """As Pixtral takes its images apart."""

    def tower(pixels: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        images = F.conv2d(pixels, w.square[:, :4].reshape(-1, 1, 2, 2), stride=2)
        x = torch.cat([image.flatten(1).mT for image in images])[None]
        return STEPS["mlp"](x + ATTENTION["full"](x, w), w)

    pixels, weights = torch.randn(1, 1, 10, 10, dtype=torch.float64), weights_of(torch.float64)
    gm = trace(tower, pixels, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert not report.left_out and not report.work_outside and report.tokens == 25
    torch.testing.assert_close(rewritten(pixels, *weights), tower(pixels, *weights), rtol=0, atol=1e-10)


def test_patches_and_a_token_of_the_class_run_in_loops() -> None:
    def tower(pixels: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        x = F.conv2d(pixels, w.square[:, :4].reshape(-1, 1, 2, 2), w.bias, stride=2).flatten(2).mT
        x = torch.cat([w.table[:1].expand(x.shape[0], 1, -1), x], 1)
        return STEPS["mlp"](x + ATTENTION["full"](x, w), w)

    pixels, weights = torch.randn(2, 1, 10, 10, dtype=torch.float64), weights_of(torch.float64)
    gm = trace(tower, pixels, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert not report.work_outside
    torch.testing.assert_close(rewritten(pixels, *weights), tower(pixels, *weights), rtol=0, atol=1e-10)


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
        ((3, 2, 4, 4), (5, 2, 2, 2), {"stride": 1}),
        ((3, 2, 5, 4), (5, 2, 2, 2), {"stride": 2}),
        ((3, 2, 4, 4), (5, 2, 4, 4), {"padding": 1}),
        ((3, 2, 4, 4), (4, 1, 4, 4), {"groups": 2}),
        ((1, 2, 4, 4), (5, 2, 4, 4), {}),
    ],
    ids=["not flattened", "overlap", "a rest", "padded", "groups", "one entry"],
)
def test_other_convolutions_stay(x: tuple[int, ...], weight: tuple[int, ...], given: dict[str, int]) -> None:
    flat = 1 if x[-1] // given.get("stride", 9) == 2 and x[-2] % 2 == 0 else 2
    gm = trace(lambda x, w: F.conv2d(x, w, **given).flatten(flat), torch.randn(x), torch.randn(weight))
    assert not patch_products(gm)
