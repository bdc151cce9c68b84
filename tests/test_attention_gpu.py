"""`mom::attention` on CUDA against its definition: conditions on keys, in every kernel that may compute them.

The tests of sinks, of soft caps and of our own kernel have not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mom_compile.runtime.attention.register  # noqa: F401  registers the kernels
from mom_compile.runtime.attention import tiles, ways
from mom_compile.runtime.attention.cudnn import BLOCK, ROWS
from mom_compile.runtime.attention.ways import Way, prefers_cudnn, way_of
from mom_passes.ops.attention import AttentionCall, attention_reference
from tests.test_attention_kernels import CONDITIONS, TOLERANCE, Case, in_float64, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("available", [False, True], ids=["kernels of PyTorch", "ours"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("conditions", ["", *CONDITIONS])
def test_conditions_on_keys_equal_masks(
    conditions: str, dtype: torch.dtype, window: int | None, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "AVAILABLE", available and tiles.AVAILABLE)
    check(Case(3, 2, 2, 50, 200, 64, 64, 100, True, window, None, (False,) * 4, "head-major", dtype, 0, conditions))


@pytest.mark.parametrize("mask", [None, "bool", "own dtype"])
@pytest.mark.parametrize(("rows", "start"), [(64, 0), (50, 100), (1, 149)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_grouped_heads_match_the_definition_in_prefill_and_decode(
    dtype: torch.dtype, group: int, rows: int, start: int, mask: str | None
) -> None:
    """The first mini-sequence, a later one and a decode step, as a cache stores keys and values."""
    broadcast = (False, True, False, False)
    sizes = (2, 2, group, rows, start + rows, 64, 64, start)
    check(Case(*sizes, True, None, mask, broadcast, "token-major", dtype, 0))


@pytest.mark.parametrize("mask", [None, "bool", "own dtype"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("rows", "start"), [(130, 0), (50, 3000), (1, 3000)])
@pytest.mark.parametrize("channels", [64, 24, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinks_and_capped_scores_match_the_definition(
    dtype: torch.dtype, channels: int, rows: int, start: int, sinks: bool, softcap: float | None, mask: str | None
) -> None:
    """In any kernel; a single row by split keys."""
    sizes = (2, 2, 4, rows, start + rows, channels, channels, start)
    case = Case(*sizes, True, None, mask, (False, True, False, False), "token-major", dtype, 0)
    check(replace(case, sinks=sinks, softcap=softcap))


@pytest.mark.parametrize(("batch", "groups", "group"), [(1, 2, 4), (2, 4, 1)])
@pytest.mark.parametrize(("rows", "start"), [(256, 3 * BLOCK), (128, BLOCK + 77), (130, BLOCK)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_after_many_keys_match_the_definition(
    dtype: torch.dtype, rows: int, start: int, batch: int, groups: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper and later, cuDNN reads these keys if it is recent; with 130 rows flash does."""
    monkeypatch.setattr(ways, "MIN_NUMBERS", 0)  # small, so that the definition takes little time
    sizes = (batch, groups, group, rows, start + rows + 9, 64, 64, start)
    case = Case(*sizes, True, None, None, (False,) * 4, "token-major", dtype, 0)
    check(case)
    way = way_of(on_device(case.call()))
    assert way is (Way.CUDNN if prefers_cudnn(torch.device("cuda")) and rows % ROWS == 0 else Way.FLASH)


def on_device(call: AttentionCall) -> AttentionCall:
    """The result of `mom.spans` stays on the host."""
    return replace(call, **{k: v.cuda() for k, v in vars(call).items() if torch.is_tensor(v) and k != "spans"})


def check(case: Case) -> None:
    call = case.call()
    result = run(on_device(call))
    assert result.transpose(1, 2).is_contiguous()
    tolerance, expected = TOLERANCE[case.dtype], attention_reference(in_float64(call))
    torch.testing.assert_close(result.double().cpu(), expected, atol=tolerance, rtol=tolerance)
