"""Models that write their attention as products, since it has sinks (GPT-OSS) or caps its scores (Gemma 2): compiled
they are what they are in eager mode, and hold no scores."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families import family_model
from mom_compile import explain, reports
from tests.models import prompt, small_model
from tests.test_models import compile_for_test

#: What a prefill of the benchmarks' model with 2800 tokens and its cache took while attention was two products.
BEFORE = 101_197_324


def model_of(family):
    torch.manual_seed(0)
    model = small_model(family)
    for layer in model.model.layers if family == "GptOss" else ():
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    compile_for_test(model)
    return model


def steps(forward, inputs, count=3):
    """The last logits of a prefill and of the steps after it, each with the token that is likeliest."""
    cache, ids, mask, logits = None, inputs["input_ids"], inputs.get("attention_mask"), []
    for _ in range(count):
        given = {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            out = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **given)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(ids)], 1)
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize(
    ("family", "batch", "tokens", "padded"),
    [
        ("GptOss", 1, 1, False), ("GptOss", 3, 50, True),
        pytest.param("Gemma2", 3, 50, True, marks=pytest.mark.slow),
        *(pytest.param("GptOss", 1, tokens, False, marks=pytest.mark.slow) for tokens in (2, 37)),
    ],
)  # fmt: skip
def test_it_generates_what_eager_mode_generates(family, batch, tokens, padded):
    """Greedily, by layers that see a window of 16 tokens and everything in turn."""
    model, inputs = model_of(family), prompt(batch, tokens, padded)
    ours, eager = steps(model, inputs), steps(model.forward, inputs)
    torch.testing.assert_close(ours, eager, rtol=0, atol=2e-5 * float(eager.abs().max()))
    assert torch.equal(ours.argmax(-1), eager.argmax(-1))
    prefill = reports()[0]
    assert bool(prefill.stages) == (tokens > 8)
    assert any("mom.attention" in stage.operators for stage in prefill.stages) == (tokens > 8)
    assert not any("aten.bmm" in stage.operators for stage in prefill.stages)


def test_it_takes_less_than_half_of_what_products_took():
    ids = torch.randint(3, 1000, (1, 2800))
    (report,) = explain(family_model("GptOss"), input_ids=ids, use_cache=True, logits_to_keep=1)
    assert sum(stage.operators.get("mom.attention", 0) for stage in report.stages) == 2
    assert report.expected_peak_bytes <= BEFORE / 2
