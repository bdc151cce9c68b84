"""What runs in loops: whole layers, or MLPs and the LM head alone."""

from __future__ import annotations

import pytest
import torch

import mom_compile
from mom_passes.loops.loop import loops
from tests.models import TinyDecoder, ids, prompt, small_model, sweep
from tests.programs import ATTENTION, HIDDEN, STEPS, Weights, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace


def explained(model, *args, **options):
    return mom_compile.explain(model, *args, options={"mini_seq_len": 8, **options})[0]


def test_scope_mlp_loops_over_mlps_and_the_head_alone():
    report = explained(TinyDecoder(layers=3).eval(), ids(2, 37), scope="mlp")
    *layers, head = report.stages
    assert len(layers) == 3
    for stage in layers:
        # Gate, up and down; no attention, and only the MLP's result at full length.
        assert stage.operators["aten.mm"] == 3
        assert "mom.attention" not in stage.operators
        assert stage.bytes_per_token == (2 * 32 * 4,)
    assert head.operators["aten.mm"] == 1


def test_a_report_says_how_much_is_multiplied_and_what_of_it_outside_loops():
    """Of a layer's weights, and of attention: all in loops, or in scope="mlp" those of MLPs and the head alone."""
    tokens, width, vocabulary, layers = 2 * 37, 32, 64, 3
    attention = 2 * 2 * 4 * 37 * 37 * 8  # queries with keys and weights with values, in four heads of two sequences
    projections = tokens * width * (width + 32 + width)  # queries, keys and values of two heads, and what follows
    mlp, head = tokens * width * 3 * 3 * width, tokens * width * vocabulary
    whole, part = (explained(TinyDecoder(layers=layers).eval(), ids(2, 37), scope=s) for s in ("layer", "mlp"))
    assert whole.work == part.work == layers * (attention + projections + mlp) + head
    assert not whole.work_outside
    assert sum(part.work_outside.values()) == layers * (attention + projections)


def test_scope_mlp_computes_the_last_token_only_where_no_more_is_asked():
    report = explained(TinyDecoder(layers=3).eval(), ids(1, 37), 1, scope="mlp")
    assert len(report.stages) == 2


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("name", sweep(["Llama", "GPT2", "Gemma3Text", "Falcon"], quick=["GPT2", "Gemma3Text"]))
def test_scope_mlp_is_exact_for_real_families(name):
    model = small_model(name, torch.float64)
    inputs = prompt(2, 37, padded=True)
    compiled = torch.compile(model, backend="mom", options={"mini_seq_len": 8, "scope": "mlp", "strict": True})
    with torch.no_grad():
        expected = model(**inputs, use_cache=True).logits
        actual = compiled(**inputs, use_cache=True).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-10 * float(expected[real].abs().max()))
    stages = mom_compile.reports()[-1].stages
    assert len(stages) == 3
    assert not any("attention" in operator for stage in stages for operator in stage.operators)


@pytest.mark.parametrize(
    "steps", [["causal", "mlp", "eager", "mlp"], ["rope", "windowed", "mlp", "mlp", "grouped", "mlp"]]
)
def test_scope_mlp_keeps_the_meaning(steps):
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        for name in steps:
            x = STEPS[name](x, Weights(*parameters))
        return (x,)

    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    gm = trace(program, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm), scope="mlp")
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)
    assert len(report.stages) == steps.count("mlp")


# --- repeated keys ---


def test_keys_repeated_for_all_heads_cross_at_their_own_width():
    """Where the attention is not one the kernel knows, they are repeated inside the loop."""
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        w = Weights(*parameters)
        x = ATTENTION["causal"](x, w) @ w.square
        batch, tokens, _ = x.shape
        keys = (x @ w.up.t()[:, :4]).view(batch, tokens, 1, 4).transpose(1, 2)
        wide = keys[:, :, None].expand(-1, -1, 4, -1, -1).reshape(batch, 4, tokens, 4)
        query = (x @ w.up.t()[:, :16]).view(batch, tokens, 4, 4).transpose(1, 2)
        # Not a softmax: nothing but products.
        return ((torch.tanh(query @ wide.transpose(-1, -2)) @ wide).transpose(1, 2).reshape(batch, tokens, 16),)

    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    gm = trace(program, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)
    widths = {size for stage in report.stages[:-1] for size in stage.bytes_per_token}
    assert max(widths) == 2 * HIDDEN * 8  # the residual; keys take 2 * 4 * 8
    assert 2 * 4 * 8 in widths
    assert loops(rewritten)
