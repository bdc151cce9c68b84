"""Decode steps, compiled for simulated GPUs, use our attention kernel, whichever operator PyTorch would choose.

On Hopper and data-center Blackwell PyTorch would choose cuDNN, also for one query. cuDNN makes a new plan for every
length (23 to 37 ms on an H100), and before 9.25.1 its results on a B200 are silently wrong for fewer than eight key
heads (pytorch#193893). Elsewhere, with a mask, PyTorch chooses the memory-efficient kernel, which takes keys repeated
for all heads and does not split them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.no_gpu import test_compiles
from tests.no_gpu.target import A100, B200, H100, RTX_4090, Gpu
from tests.no_gpu.test_compiles import ATTENTION, SHAPES, STOCKS, Case, compiled

GPUS = (A100, RTX_4090, H100, B200)
QUICK = {(H100, "llama", False)}
CASES = [
    pytest.param(gpu, shape, masked, marks=[] if (gpu, shape, masked) in QUICK else [pytest.mark.slow])
    for gpu in GPUS
    for shape in ("llama", "gemma3")
    for masked in (False, True)
]


@pytest.mark.parametrize(("gpu", "shape", "masked"), CASES)
def test_a_decode_step_calls_no_pytorch_attention(
    gpu: Gpu, shape: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mask that `generate()` always passes, and without."""
    inputs_of = test_compiles.inputs_of

    def with_a_mask(case: Case, model: Any) -> dict[str, Any]:
        inputs = inputs_of(case, model)
        return {**inputs, "attention_mask": torch.ones(1, case.tokens + 1, dtype=torch.long)} if masked else inputs

    monkeypatch.setattr(test_compiles, "inputs_of", with_a_mask)
    found = compiled(Case(shape, 16_384, gpu, "decode"), monkeypatch)
    assert not found.report.eager_pieces and not found.report.failed
    for piece, launches in found.launches.items():
        assert not launches.keys() & STOCKS, f"{piece}: {launches}"
    ours = sum(launches[ATTENTION] for launches in found.launches.values())
    assert 0 < ours <= SHAPES[shape]().num_hidden_layers  # identical layers share a piece
