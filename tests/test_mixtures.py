"""Real mixtures of experts: prefill and decode equal eager, and every product of an expert is in a loop."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.measure import peak_bytes, watch_cpu
from mom_compile import reports
from tests.models import MIXTURES, prompt, small_model, sweep
from tests.test_models import compile_for_test, kept, run

#: What multiplies with an expert's matrices: rows in groups, or each token with each expert's.
PRODUCTS = ("grouped_mm", "bmm")
#: These compute routing or attention in float32 whatever the model's dtype, so float64 is exact to float32 only.
ROUTED_IN_FLOAT32 = {"DeepseekV3", "DeepseekV2", "Glm4Moe", "Llama4Text", "Ernie4_5_Moe"}


def products(report) -> int:
    return sum(
        count for stage in report.stages for name, count in stage.operators.items() if any(p in name for p in PRODUCTS)
    )


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", sweep(MIXTURES, quick={"Mixtral", "GptOss", "DeepseekV3", "Llama4Text"}))
def test_a_mixture_is_exact_in_float64(family, cache):
    """A padded batch; the first length is compiled as fixed, the second makes it dynamic; with a cache, a step each."""
    model = small_model(family, torch.float64)
    compile_for_test(model)
    for tokens in (37, 50):
        inputs = prompt(3, tokens, padded=True)
        before = len(reports())
        wanted, actual = run(model, inputs, False, cache), run(model, inputs, True, cache)
        report = reports()[before]
        assert report.fallback is None, report.fallback
        assert products(report) >= 2 * 2, str(report)
        assert not any("mm" in name or "sort" in name for name in report.left_out), report.left_out
        bound = 1e-6 if family in ROUTED_IN_FLOAT32 else 1e-10
        for ours, eager in zip(actual, wanted, strict=True):
            ours, eager = kept(ours, inputs), kept(eager, inputs)
            torch.testing.assert_close(ours, eager, rtol=0, atol=bound * float(eager.abs().max()))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mixture_compiled_for_two_lengths(dtype):
    """With Inductor, in float32 and in bfloat16, whose grouped product is PyTorch's own; one body for both layers."""
    watch_cpu()
    model = small_model("Mixtral", dtype, num_hidden_layers=3, intermediate_size=256)
    compile_for_test(model, mini_seq_len=64)
    for tokens in (400, 700):
        inputs = prompt(1, tokens)
        with torch.no_grad():
            expected = model.forward(**inputs, logits_to_keep=1).logits
            actual = model(**inputs, logits_to_keep=1).logits
        bound = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound * float(expected.abs().max()))
    report = reports()[-1]
    assert not report.eager_pieces and not report.left_out
    assert report.bodies_shared >= 1
    with torch.no_grad():
        measured = peak_bytes(functools.partial(model, **inputs, logits_to_keep=1)).peak
        eager = peak_bytes(functools.partial(model.forward, **inputs, logits_to_keep=1)).peak
    assert measured < 0.6 * eager
