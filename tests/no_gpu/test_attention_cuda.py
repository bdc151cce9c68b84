"""`mom::attention` on CUDA without a GPU: its results, the PyTorch operators that it calls, and its allocations.

computes    on CPU tensors, with stand-ins that do what the documentation of PyTorch's kernels states, and require it
calls       on meta tensors: every operator checks its arguments against its schema in this PyTorch
allocates   on meta tensors, at the size of a prefill of 147,456 tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings

from mom_compile.runtime.attention import cuda
from mom_compile.runtime.attention import rows as attention_rows
from mom_compile.runtime.attention.cuda import attention_cuda
from mom_compile.runtime.attention.rows import BLOCK_BYTES
from mom_passes.ops.attention import AttentionCall, as_operator, attention_reference
from tests.no_gpu.attention import Calls, kernels_of_pytorch, on_device
from tests.test_attention_kernels import (
    TOLERANCE,
    Case,
    cases,
    conditioned,
    in_float64,
    in_windows,
    with_keys_in_windows,
)

HALF = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def ampere() -> Iterator[None]:
    """A device for which cuDNN is not preferred; `test_attention_cudnn` covers the others."""
    with pytest.MonkeyPatch.context() as patch:
        on_device(patch, (8, 0))
        yield


# --- computes ---


def assert_matches_definition(case: Case, dtype: torch.dtype, block_bytes: int = BLOCK_BYTES) -> None:
    call = replace(case, dtype=dtype).call()
    with pytest.MonkeyPatch.context() as patch:
        kernels_of_pytorch(patch)
        patch.setattr(attention_rows, "BLOCK_BYTES", block_bytes)
        patch.setattr(attention_rows, "FEWEST_ROWS", 3)
        result = attention_cuda(call)
    expected = attention_reference(in_float64(call))
    assert result.dtype == dtype and result.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("block_bytes", [1, BLOCK_BYTES])
@pytest.mark.parametrize("dtype", DTYPES)
@given(cases())
@settings(max_examples=40, deadline=None)
def test_matches_its_definition(block_bytes: int, dtype: torch.dtype, case: Case) -> None:
    assert_matches_definition(case, dtype, block_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(conditioned())
@settings(max_examples=40, deadline=None)
def test_conditions_on_keys_equal_masks(dtype: torch.dtype, case: Case) -> None:
    assert_matches_definition(case, dtype)


@given(conditioned())
@settings(max_examples=40, deadline=None)
def test_conditions_on_keys_equal_masks_in_our_kernel(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_device(patch, (8, 0), tiles=True)
        assert_matches_definition(case, torch.bfloat16)


@pytest.mark.parametrize("tiles", [False, True], ids=["kernels of PyTorch", "our kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(in_windows())
@settings(max_examples=40, deadline=None)
def test_keys_in_the_windows_suffice(dtype: torch.dtype, tiles: bool, case: Case) -> None:
    call = replace(case, dtype=dtype).call()
    with pytest.MonkeyPatch.context() as patch:
        on_device(patch, (8, 0), tiles=tiles)
        kernels_of_pytorch(patch)
        result = as_operator(attention_cuda)(*vars(with_keys_in_windows(call)).values())
    expected = attention_reference(in_float64(call))
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def padded(dtype: torch.dtype, pads: tuple[int, ...], softcap: float | None = None) -> AttentionCall:
    q, k = torch.empty(2, 4, 8, 64, dtype=dtype), torch.empty(2, 2, 64, 64, dtype=dtype)
    keys = torch.arange(64) >= torch.tensor(pads)[:, None]
    spans = torch.ops.mom.spans.default(keys, None, None)
    return AttentionCall(q, k, k, None, 56, True, 0.1, keys=keys, spans=spans, softcap=softcap)


@pytest.mark.parametrize(
    ("call", "own"),
    [
        (padded(HALF, (3, 9)), True),
        (padded(HALF, (3, 3)), False),  # one range for the batch: flash, on those keys
        (padded(torch.float32, (3, 9)), True),
        (padded(torch.float64, (3, 9)), False),
        (padded(HALF, (3, 3), softcap=30.0), True),
        (replace(padded(HALF, (3, 9)), spans=None), True),
        (replace(padded(torch.float32, (3, 9)), spans=None), False),
        (replace(padded(HALF, (3, 9)), keys=None, spans=None, mask=torch.ones(8, 64, dtype=torch.bool)), True),
        (replace(padded(HALF, (3, 9)), keys=None, spans=None), False),
    ],
)
@pytest.mark.parametrize("tiles", [False, True])
def test_our_kernel_is_chosen_for_the_right_calls(
    call: AttentionCall, own: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Triton: soft caps in any dtype, ranges of keys per batch entry, other masks in half precision."""
    on_device(monkeypatch, (8, 0), tiles=tiles)
    kernels_of_pytorch(monkeypatch)
    seen: list[AttentionCall] = []
    monkeypatch.setattr(cuda, "attention_in_tiles", lambda call: seen.append(call) or attention_reference(call))
    attention_cuda(call)
    assert bool(seen) == (own and tiles)


# --- calls and allocates ---

TOKENS, ROWS, HEADS, GROUPS, CHANNELS = 147_456, 1024, 32, 8, 128


@dataclass(frozen=True)
class Attention:
    """The last rows of a prefill."""

    dtype: torch.dtype
    #: The PyTorch operator that must be called; None where products and softmax are.
    kernel: str | None
    window: int | None = None
    masked: bool = False
    padded: bool = False
    is_causal: bool = True
    channels: int = CHANNELS

    def call(self) -> AttentionCall:
        def tensor(heads: int, tokens: int) -> torch.Tensor:
            return torch.empty(1, tokens, heads, self.channels, device="meta", dtype=self.dtype).transpose(1, 2)

        query, key, value = tensor(HEADS, ROWS), tensor(GROUPS, TOKENS), tensor(GROUPS, TOKENS)
        mask = torch.empty(1, 1, ROWS, TOKENS, device="meta", dtype=torch.bool) if self.masked else None
        keys = torch.empty(1, TOKENS, device="meta", dtype=torch.bool) if self.padded else None
        return AttentionCall(
            query, key, value, mask, TOKENS - ROWS, self.is_causal, self.channels**-0.5, self.window, keys=keys
        )


FLASH, EFFICIENT = "_flash_attention_forward", "_efficient_attention_forward"
ATTENTIONS = {
    "causal, half": Attention(HALF, FLASH),
    "window, half": Attention(HALF, FLASH, window=4096),
    "not causal, half": Attention(HALF, FLASH, is_causal=False),
    "head of 512, half": Attention(HALF, EFFICIENT, channels=512),
    "causal, float32": Attention(torch.float32, EFFICIENT),
    "not causal, float32": Attention(torch.float32, EFFICIENT, is_causal=False),
    "window, float32": Attention(torch.float32, EFFICIENT, window=4096),
    "mask, half": Attention(HALF, EFFICIENT, masked=True, is_causal=False),
    "mask, float32": Attention(torch.float32, EFFICIENT, masked=True),
    "padding with holes, half": Attention(HALF, EFFICIENT, padded=True),
    "float64": Attention(torch.float64, None),
    "head of 12, half": Attention(HALF, None, channels=12),
}


def calls_of(attention: Attention) -> Calls:
    with torch.no_grad():
        call = attention.call()
        with Calls() as calls:
            result = attention_cuda(call)
    assert result.shape == call.query.shape and result.transpose(1, 2).is_contiguous()
    return calls


@pytest.mark.parametrize("name", ATTENTIONS)
def test_pytorch_operators_accept_the_arguments(name: str) -> None:
    """A wrong argument raises: operators check their schema on meta tensors too."""
    attention = ATTENTIONS[name]
    called = {kernel for kernel in calls_of(attention).names if "attention" in kernel}
    assert called == ({attention.kernel} if attention.kernel else set())


@pytest.mark.parametrize("name", [name for name, attention in ATTENTIONS.items() if attention.kernel])
def test_keys_and_values_are_not_copied_and_masks_are_short(name: str) -> None:
    """Allocations are at most as large as the query's rows, or a block of a mask."""
    attention = ATTENTIONS[name]
    rows = ROWS * HEADS * attention.channels * attention.dtype.itemsize
    calls = calls_of(attention)
    assert calls.largest <= max(rows, 2 * BLOCK_BYTES), calls.largest_by
    assert calls.largest < GROUPS * TOKENS * attention.channels * attention.dtype.itemsize / 4
