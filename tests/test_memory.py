"""What operators between loops hold: small graphs counted by hand, and a real model measured."""

from __future__ import annotations

import functools

import pytest
import sympy
import torch
import transformers

from benchmarks.measure import peak_bytes, watch_cpu
from mom_compile import explain, reports
from mom_passes.program.memory import memory
from mom_passes.program.program import Compute
from mom_passes.program.schedule import schedule
from tests.models import tiny
from tests.tracing import trace

#: Bytes of the `[64, 16]` product of the graphs below, in float32.
PRODUCT = 64 * 16 * 4


def held(function, *inputs):
    return memory(schedule(trace(function, torch.randn(64, 16), torch.randn(16, 16), *inputs))).most(Compute)


def test_a_product_a_sort_and_its_indices_are_held():
    assert held(lambda x, w: (x @ w).sort(0).values) == PRODUCT + (PRODUCT + 2 * PRODUCT)


def test_what_is_dead_is_not():
    assert held(lambda x, w: ((x @ w) @ w) @ w) == 2 * PRODUCT
    def three_in_a_row(x, w):
        kept = x.sum()
        return ((x @ w) @ w) @ w, kept

    assert held(three_in_a_row) == 2 * PRODUCT + 4


def test_pointwise_work_and_gathers_are_computed_where_they_are_read():
    rows = torch.arange(64).flip(0)
    assert held(lambda x, w, rows: ((x @ w)[rows].exp() * 2 + 1).sum(), rows) == PRODUCT + 4


def test_what_they_are_made_of_lives_as_long():
    def made_late(x, w):
        late = (x @ w).exp()
        other = (w @ w).sort(0).values  # 1024 bytes, sorted values, and indices twice as large
        return late.sum() + other.sum()

    assert held(made_late) >= PRODUCT + 4 * 1024


@pytest.mark.parametrize("before", [lambda x: x.exp(), lambda x: x[torch.arange(64)], lambda x: x.exp().view(64, 16)])
def test_a_product_needs_its_operands_in_memory(before):
    assert held(lambda x, w: before(x) @ w) == 2 * PRODUCT


def test_a_pointwise_result_goes_where_its_operand_dies():
    assert held(lambda x, w: (x @ w).exp()) == PRODUCT
    assert held(lambda x, w: (x @ w, (x @ w).exp())) >= 2 * PRODUCT


def test_one_by_one_every_result_is_held_until_it_is_read():
    def function(x, w):
        return (x @ w).exp().sin().sum()

    program = schedule(trace(function, torch.randn(64, 16), torch.randn(16, 16)))
    assert memory(program).most(Compute) == PRODUCT + 4
    assert memory(program, fused=False).most(Compute) == 2 * PRODUCT


def test_views_inputs_and_what_is_returned_as_a_view_count_once():
    assert held(lambda x, w: x.t()) == 0
    assert held(lambda x, w: ((x @ w).view(8, 8, 16).transpose(0, 1), x.view(-1))) == PRODUCT


def mixture():
    return tiny(
        "Qwen3Moe", hidden_size=64, head_dim=16, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=1, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_the_expected_peak_between_loops_is_what_is_measured(monkeypatch):
    """Experts that could not be shown to be row-wise run on all tokens at once, sorted, between two loops."""
    monkeypatch.setattr("mom_compile.pipeline.outline_experts", lambda gm: {})
    watch_cpu()
    model, ids = mixture(), torch.randint(3, 64, (1, 1000))
    model.compile(backend="mom", options={"mini_seq_len": 64, "strict": True})
    with torch.no_grad():
        call = functools.partial(model, input_ids=ids, logits_to_keep=1)
        call()
        measured = peak_bytes(call).peak
    report = reports()[-1]
    assert report.floor_bytes + report.iteration_bytes < 0.5 * measured
    assert 0.7 * measured <= report.expected_peak_bytes <= 1.4 * measured


def test_the_peak_of_a_dense_model_is_expected_in_its_loops():
    model = tiny("Llama", num_hidden_layers=3)
    report = explain(model, input_ids=torch.randint(3, 64, (1, 500)), logits_to_keep=1, options={"mini_seq_len": 64})[0]
    assert 0 < report.straight_bytes < report.expected_peak_bytes
    assert report.floor_bytes < report.expected_peak_bytes <= report.floor_bytes + report.iteration_bytes


WIDE = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "max_position_embeddings": 2048}
GROUPED = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 1024}
SHAPES = {
    "Llama": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 32},
    "GPTNeoX": {**WIDE, "intermediate_size": 1024},
    "GPT2": {"n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 2048},
    "Gemma3Text": {**GROUPED, "head_dim": 32, "sliding_window": 128, "sliding_window_pattern": 3},
    "Phi": {**WIDE, "intermediate_size": 1024},
    "OPT": {**WIDE, "ffn_dim": 1024, "word_embed_proj_dim": 256},
    "Qwen3Moe": {
        **GROUPED, "head_dim": 32, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", [f if f == "Llama" else pytest.param(f, marks=pytest.mark.slow) for f in SHAPES])
@pytest.mark.parametrize("kv_offload", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("fresh")
def test_the_expected_peak_is_what_is_measured(family, kv_offload):
    """At two lengths, and at the second by the expression that was found at the first."""
    watch_cpu()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPES[family], vocab_size=1000, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    fast = torch.compile(model, backend="mom", dynamic=True, options={"kv_offload": kv_offload, "strict": True})
    for tokens in (800, 1400):
        call = functools.partial(fast, input_ids=torch.randint(3, 1000, (1, tokens)), use_cache=True, logits_to_keep=1)
        with torch.no_grad():
            call()
            measured = peak_bytes(call).peak
        memory = reports()[0].memory
        lengths = [s for s in memory.peak.free_symbols if memory.hints.get(s) == 800]
        expected = memory.number(memory.peak, dict.fromkeys(lengths, sympy.Integer(tokens)))
        assert 0.95 * measured <= expected <= 1.05 * measured
    assert len(reports()) == 1

