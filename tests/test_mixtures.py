"""Real mixtures of experts: prefill and decode equal eager, and every product of an expert is in a loop."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from benchmarks.measure import peak_bytes, watch_cpu
from mom_compile import reports
from tests.models import MIXTURES, prompt, small_model
from tests.test_models import STEPS_RUN_EAGERLY, compile_for_test, kept, run

#: What multiplies with an expert's matrices: rows in groups, or each token with each expert's.
PRODUCTS = ("grouped_mm", "bmm")
QUICK = {("Mixtral", False), ("GptOss", False)}
CASES = [
    pytest.param(family, cache, marks=[] if (family, cache) in QUICK else [pytest.mark.slow])
    for family in MIXTURES
    for cache in (True, False)
]
#: Nearly all compute in float32 how much of an expert a token takes, whatever the model's dtype.
ROUTED_IN_FLOAT32 = 1e-6
#: Their caches hold the states of a linear attention.
WITH_STATES = ("MiniMax",)


def products(report) -> int:
    return sum(
        count for stage in report.stages for name, count in stage.operators.items() if any(p in name for p in PRODUCTS)
    )


@contextlib.contextmanager
def expert_by_expert(model):
    """What eager mode calls for a grouped product knows no float64."""
    grouped = hasattr(model.config, "_experts_implementation") and type(model).__name__ != "Llama4ForCausalLM"
    if grouped:
        model.set_experts_implementation("eager")
    yield
    if grouped:
        model.set_experts_implementation("grouped_mm")


def outside(report, family: str = "") -> list[str]:
    """Of a mixture, what runs on the full sequence. The last layer's single row does, and what a linear attention sums
    up over the tokens for its cache."""
    product = "grouped" if family in WITH_STATES else "mm"
    return [name for name in report.left_out if "sort" in name or (product in name and "_rows" not in name)]


@pytest.mark.filterwarnings(*["ignore:Inductor could not compile a graph"] * STEPS_RUN_EAGERLY)
@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(("family", "cache"), CASES)
def test_a_mixture_is_exact_in_float64(family, cache):
    """A padded batch; the first length is compiled as fixed, the second makes it dynamic; with a cache, a step each."""
    # Of others the first layer has no experts, or layers differ.
    model = small_model(family, torch.float64, num_hidden_layers=2 if family in ("Mixtral", "GptOss") else 3)
    compile_for_test(model)
    for tokens in (37, 50):
        inputs = prompt(3, tokens, padded=True)
        with expert_by_expert(model):
            wanted = run(model, inputs, False, cache)
        before = len(reports())
        actual = run(model, inputs, True, cache)
        report = reports()[before]
        assert report.fallback is None, report.fallback
        assert products(report) >= 2 * 2, str(report)
        assert not outside(report, family), report.left_out
        for ours, eager in zip(actual, wanted, strict=True):
            ours, eager = kept(ours, inputs), kept(eager, inputs)
            torch.testing.assert_close(ours, eager, rtol=0, atol=ROUTED_IN_FLOAT32 * float(eager.abs().max()))


@pytest.mark.slow
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
    assert not report.eager_pieces and not outside(report)
    assert report.bodies_shared >= 1
    with torch.no_grad():
        measured = peak_bytes(functools.partial(model, **inputs, logits_to_keep=1)).peak
        eager = peak_bytes(functools.partial(model.forward, **inputs, logits_to_keep=1)).peak
    assert measured < 0.6 * eager
