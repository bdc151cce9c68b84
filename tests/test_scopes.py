"""What runs in loops: whole layers, or MLPs and the LM head alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mom_compile
from mom_compile.pipeline import run_pipeline
from mom_compile.report import Report
from mom_passes.loops.loop import ExpertRows, RowLimit, loops
from tests.models import TinyDecoder, ids, prompt, small_model
from tests.programs import ATTENTION, HIDDEN, STEPS, Weights, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

pytestmark = pytest.mark.usefixtures("fresh")


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
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3Text", "Falcon"])
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
    assert len(stages) == 4
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


# --- how long mini-sequences are ---


def test_a_wide_value_makes_mini_sequences_shorter_and_never_starves_the_products():
    limit = RowLimit(1024, 1 << 20)
    assert [limit.rows_of(width) for width in (1, 1024, 2048, 4096, 1 << 20)] == [1024, 1024, 512, 256, 128]
    assert RowLimit(64, 1 << 20).rows_of(1 << 30) == 64
    assert RowLimit(1024).rows_of(1 << 40) == 1024


def test_a_short_prompt_has_shorter_mini_sequences_but_never_shorter_than_products_want():
    limit = RowLimit(512, 1 << 30, enough=256)
    lengths = (500, 512, 513, 2048, 2056, 3000, 4096, 100_000)
    assert [limit.rows_of(1, length=length) for length in lengths] == [512, 512, 256, 256, 257, 375, 512, 512]
    assert limit.rows_of(1 << 23, length=2048) == 128  # as short as one of its values asks
    assert RowLimit(512, 1 << 30, enough=1024).rows_of(1, length=2048) == 512  # never longer for it
    assert RowLimit(512, enough=256).rows_of(1, length=2048) == 512  # the user has said so


H100 = RowLimit(1024, 128 << 20, ExpertRows(300, 512 << 20))


@pytest.mark.parametrize(
    ("experts", "chosen", "inner", "hidden", "rows"),
    [
        (8, 2, 14336, 4096, 1200),  # Mixtral 8x7B: 300 rows to each of 8 products
        (128, 8, 768, 2048, 4800),  # Qwen3 30B-A3B
        (32, 4, 2880, 2880, 2400),  # GPT-OSS 20B
        (256, 8, 2048, 7168, 4681),  # DeepSeek V3: bytes end it, 146 rows to a product
    ],
)
def test_a_loop_with_experts_has_rows_for_each_of_their_products(experts, chosen, inner, hidden, rows):
    """In bf16. The widest value is a token's gate and up projections, or its hidden states, for every expert chosen."""
    widest = 2 * chosen * max(2 * inner, hidden)
    assert H100.rows_of(widest, spread=experts / chosen, length=100_000) == rows
    assert H100.rows_of(widest, spread=experts / chosen, length=2048) == 1024  # a quarter of the tokens, or as without
    assert RowLimit(64).rows_of(widest, spread=experts / chosen, length=100_000) == 64  # the user has said so


def test_the_loop_that_ends_in_logits_has_the_shorter_mini_sequences():
    weights = weights_of(torch.float64)

    def program(x, *parameters):
        w = Weights(*parameters)
        return (F.linear(STEPS["causal"](STEPS["linear"](x, w), w), w.table).log_softmax(-1).amax(-1),)

    x = torch.randn(1, 600, HIDDEN, dtype=torch.float64)
    gm = trace(program, x, *weights)
    limit = RowLimit(512, 512 * 16 * 8)
    rewritten = run_pipeline(gm, static_inputs=parameter_names(gm), limit=limit, report=Report())
    assert [loop.rows for _, loop in loops(rewritten.gm)] == [512, 128]


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
