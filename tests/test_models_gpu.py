"""Whole models on CUDA, small: as near to float64 as eager mode is. Each way that a model is used has a test.

What runs on a CUDA device is marked `gpu`; the same on a CPU, pieces run eagerly, shows that the tests themselves hold.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import mom_compile
from benchmarks.models import keeping
from benchmarks.without_codegen import pieces_run_eagerly, stock_runs_eagerly
from mom_compile.runtime.host.weight import HostWeight
from mom_compile.weights.offload import least_budget
from tests.models import SMALL, ids, prompt, small_model

OPTIONS = {"strict": True, "mini_seq_len": 64}
TOKENS, STEPS = 300, 6
#: Norms beside eager mode's: another order of sums, no other precision. In float32 eager mode may be nearer by chance.
AS_NEAR, FLOAT32 = 1.5, 1e-5


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)])
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu":
        with pieces_run_eagerly(), stock_runs_eagerly():
            yield request.param
    else:
        yield request.param


@torch.no_grad()
def said(model: Any, inputs: dict[str, torch.Tensor], steps: int = STEPS) -> torch.Tensor:
    """The last logits after a prompt and after each of some tokens that are given, `[steps + 1, B, vocabulary]`."""
    device, cache = model.device, DynamicCache()
    mask = inputs.get("attention_mask")
    given, logits, seen = inputs["input_ids"].to(device), [], 0
    for portion in given.split([given.shape[1] - steps, *[1] * steps], dim=1):
        seen += portion.shape[1]
        masked = {} if mask is None else {"attention_mask": mask[:, :seen].to(device)}
        output = model(input_ids=portion, **masked, **keeping(cache, model), logits_to_keep=1)
        logits.append(output.logits[:, -1].double().cpu())
    return torch.stack(logits)


def as_near(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    distance, eagers = ((logits - exact).norm() for logits in (ours, eager))
    what = f"{distance:.3g} from float64, eager mode {eagers:.3g}"
    assert distance <= max(AS_NEAR * eagers, FLOAT32 * exact.norm()), what


def in_float64(model: Any) -> Any:
    """A copy. Of experts each is multiplied by itself: there are no grouped products in float64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    return model


def check(model: Any, device: str, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    """A prompt and decode steps."""
    exact = said(in_float64(model), inputs)
    model = model.to(device)
    eager = said(model, inputs)
    model.compile(backend="mom", options={**OPTIONS, **options})
    as_near(said(model, inputs), eager, exact)
    assert any(report.stages for report in mom_compile.reports())


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_a_whole_model_in_bfloat16(family: str, device: str) -> None:
    check(small_model(family, torch.bfloat16), device, prompt(2, TOKENS + STEPS))


def test_experts(device: str) -> None:
    """In float32: rounded to bfloat16, a token may go to other experts."""
    check(small_model("Qwen3Moe"), device, prompt(2, TOKENS + STEPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinks(dtype: torch.dtype, device: str) -> None:
    """GPT-OSS: a number of each head beside the scores, and windows in every second layer."""
    few = {"num_local_experts": 1, "num_experts_per_tok": 1} if dtype == torch.bfloat16 else {}
    check(small_model("GptOss", dtype, **few), device, prompt(2, TOKENS + STEPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latent_attention(dtype: torch.dtype, device: str) -> None:
    """DeepSeek: keys wider than values."""
    dense = {"first_k_dense_replace": SMALL.layers} if dtype == torch.bfloat16 else {}
    check(small_model("DeepseekV3", dtype, **dense), device, prompt(2, TOKENS + STEPS))


@pytest.mark.parametrize("kv_offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_padding(dtype: torch.dtype, kv_offload: bool, device: str) -> None:
    check(small_model("Llama", dtype), device, prompt(3, TOKENS + STEPS, padded=True), kv_offload=kv_offload)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores(dtype: torch.dtype, device: str) -> None:
    model, text = small_model("Llama", dtype), ids(2, TOKENS, vocabulary=SMALL.vocabulary)

    def wanted(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=text.to(model.device)).logits[:, :-1].double().cpu()
        return logits.log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]

    exact = wanted(in_float64(model))
    model = model.to(device)
    eager = wanted(model)
    scores = mom_compile.token_log_probs(model, text.to(device), options=OPTIONS)
    as_near(scores.log_probs.double().cpu(), eager, exact)


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_weights_on_the_host(family: str, device: str) -> None:
    """Their addresses stay, each arrives in time, and those of experts too."""
    inputs = prompt(2, TOKENS + STEPS)
    model = small_model(family, torch.bfloat16 if family == "Llama" else torch.float32)
    exact = said(in_float64(model), inputs)
    eager = said(copy.deepcopy(model).to(device), inputs)
    mom_compile.offload_weights(model, device, memory_budget=least_budget(model))
    assert any(isinstance(value, HostWeight) for value in model.parameters())
    model.compile(backend="mom", options=OPTIONS)
    for _ in range(2):
        as_near(said(model, inputs), eager, exact)


@pytest.mark.parametrize("family", ["Llama", "GptOss", "DeepseekV3"])
def test_generation_ends_with_the_tokens_of_eager_mode(family: str, device: str) -> None:
    """In float32, where two tokens are hardly ever as likely as each other."""
    model, inputs = small_model(family).to(device), prompt(2, TOKENS)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    model.compile(backend="mom", options=OPTIONS)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False), expected)
