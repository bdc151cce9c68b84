"""How many rows the loops of a program have, by what it holds at full length: the rule, without a graph."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import mom_compile
from mom_compile.config import parse_options
from mom_compile.memory.decide import decide
from mom_compile.memory.device import BLOCK_ROWS, CountedRows, DeviceRows, GpuRows, Layer, cpu_rows, rows_for
from mom_compile.memory.devices import DEVICES
from mom_compile.memory.model import Model
from mom_compile.memory.row_rule import SHARE, rows_of_steps
from mom_compile.pipeline import NotWorthwhile, run_pipeline
from mom_passes.loops.loop import FEWEST_OF_A_SEQUENCE, FEWEST_ROWS, Loop, RowLimit, loops
from mom_passes.loops.ports import COUNT
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import LoopStep, Place, Storage
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.test_properties import parameter_names
from tests.test_rows import LLAMA_8B
from tests.tracing import reported, trace

BATCH, TOKENS = sympy.symbols("batch tokens", integer=True, positive=True)
KIB, MIB = 1 << 10, 1 << 20
CPU = cpu_rows(1)


def loop(length: Any, widest: int = 1, spread: float = 1) -> Loop:
    return Loop(0, length, FEWEST_ROWS, (), (), fx.GraphModule(torch.nn.Module(), fx.Graph()), widest, spread)


def program(full: Any, *made: tuple[Loop, Any], hints: Any = None) -> tuple[Memory, dict[Loop, fx.Node]]:
    """With so many bytes at full length, and of each loop what a mini-sequence of `COUNT` rows holds."""
    graph, moments, nodes = fx.Graph(), [], {}
    for one, scratch in made:
        node = nodes[one] = graph.placeholder("loop")
        alive = (Storage(node, sympy.sympify(full), Place.DEVICE),)
        moments.append(Moment(LoopStep(node, one, ()), alive, sympy.sympify(scratch), one.rows, sympy.S.Zero))
    return Memory(tuple(moments), hints or {}), nodes


def rows_at(memory: Memory, device: DeviceRows, sequences: Any, sizes: Any = None) -> dict[Loop, int]:
    """Of each loop at other sizes than the captured ones, or at those."""
    model, numbers = Model.of(memory, sequences)
    known = {**memory.hints, **(sizes or {})}
    found = rows_of_steps(model, device, tuple(int(known[symbol]) for symbol in model.symbols))
    steps = {m.step.node: m.step.loop for m in memory.moments if isinstance(m.step, LoopStep)}
    return {steps[node]: found[number] for node, number in numbers.items()}


def rows(device: DeviceRows, length: int, per_row: int, full: int, sequences: int = 1, **of: Any) -> int:
    """Of the only loop of a program."""
    one = loop(length, **of)
    memory, nodes = program(full, (one, COUNT * per_row))
    return rows_at(memory, device, {nodes[one]: sympy.Integer(sequences)})[one]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(512, 256), (1000, 334), (2048, 256), (8192, 274), (16_384, 547), (65_536, 1024)]
)
def test_rows_grow_with_what_lives_at_full_length_between_those_that_are_efficient_and_those_that_help(
    tokens: int, expected: int
) -> None:
    """8 KiB of a token at full length, 24 KiB of a row of a mini-sequence: a layer of `benchmarks.cpu`."""
    assert rows(CPU, tokens, 24 * KIB, tokens * 8 * KIB) == expected


@settings(max_examples=30)
@given(st.integers(16, 1 << 20), st.integers(1, 1 << 24), st.integers(0, 1 << 40), st.integers(1, 64))
def test_what_a_mini_sequence_holds_is_a_small_share_or_its_rows_are_as_few_as_there_may_be(
    length: int, per_row: int, full: int, sequences: int
) -> None:
    found, bounds = rows(CPU, length, per_row, full, sequences), CPU.bounds(sequences)
    low = max(FEWEST_OF_A_SEQUENCE, math.ceil(CPU.fewest / sequences))
    high = max(CPU.each, math.ceil(CPU.most / sequences))
    assert (bounds.fewest, bounds.most) == (low, high)
    assert low <= found <= 2 * max(high, length) and found > 1
    # Evened out, they are less than twice as many as the share has room for: two of these would not be efficient.
    assert found < 2 * max(bounds.efficient, SHARE * full / per_row)
    assert length // found * found + found - 1 >= length


@settings(max_examples=30)
@given(st.integers(16, 1 << 16), st.integers(16, 1 << 16))
def test_mini_sequences_are_nearly_as_long_as_each_other(length: int, full: int) -> None:
    """The last one lacks at most as many rows as there are mini-sequences: each of them is rounded up."""
    count = rows(CPU, length, 1, full)
    assert (length % count or count) >= min(length, count - math.ceil(length / count))


def test_all_sequences_of_a_batch_count_but_none_has_a_single_row() -> None:
    assert rows(CPU, 256, 4 * 24 * KIB, 4 * 256 * 8 * KIB, sequences=4) == CPU.efficient // 4
    assert rows(CPU, 64, 512 * 24 * KIB, 512 * 64 * 8 * KIB, sequences=512) == CPU.each


def test_rows_so_wide_that_they_are_the_larger_part_are_as_few_as_there_may_be() -> None:
    """Logits over a large vocabulary, of a long text: of a short one they are not much."""
    assert rows(CPU, 65_536, 2 * MIB, 65_536 * 4 * KIB) == FEWEST_ROWS
    assert rows(CPU, 8192, 2 * MIB, 8192 * 48 * KIB) == 196
    assert rows(CPU, 1024, 2 * MIB, 1024 * 4 * KIB) == CPU.efficient


GPU = GpuRows(DEVICES["H100"], LLAMA_8B, 300)


@pytest.mark.parametrize("tokens", [1, 4096, 16_384, 65_536, 147_456, 1_000_000])
def test_a_layer_has_the_rows_of_its_rule_on_a_gpu_however_little_lives_at_full_length(tokens: int) -> None:
    """Without a cache: the residual stream, keys and values of a layer; 72 KiB for each row of a mini-sequence, of
    which the widest value has as much as the layer's products make."""
    row, full = 72 * KIB, tokens * 12 * KIB
    assert rows(GPU, tokens, row, full, widest=4 * 14_336) == rows_for(DEVICES["H100"], LLAMA_8B) == 4096
    assert rows(GPU, tokens, row, full, sequences=8, widest=8 * 4 * 14_336) == 512


def test_a_prompt_of_less_than_one_and_a_half_mini_sequences_is_one_on_a_gpu() -> None:
    found = [rows(GPU, tokens, 72 * KIB, MIB, widest=4 * 14_336) for tokens in (4097, 6143, 6144)]
    assert found == [4096 + BLOCK_ROWS, 6144, 4096]


def test_values_wider_than_the_layers_have_few_rows_on_a_gpu_in_whole_blocks() -> None:
    """Logits of Llama 3 in float32: as many as 128 MiB hold, and of a long text no more than all at full length."""
    widest = 4 * 128_256
    assert rows(GPU, 4096, 2 * widest, 4096 * 12 * KIB, widest=widest) == 2 * BLOCK_ROWS
    assert rows(GPU, 65_536, 2 * widest, 65_536 * KIB, widest=widest) == BLOCK_ROWS


def test_a_loop_with_experts_has_rows_in_whole_blocks_on_a_gpu() -> None:
    """Mixtral 8x7B on an A100: more than the rule of its layer says."""
    layer = Layer(32, ((4096, 4096), *[(4096, 28_672), (14_336, 4096)] * 2), others=6 * 3 * 4096 * 14_336)
    gpu = GpuRows(DEVICES["A100"], layer, 600)
    assert gpu.bounds(1).most < 2400
    assert rows(gpu, 100_000, 72 * KIB, MIB, widest=2 * 2 * 28_672, spread=4) == 2400 // BLOCK_ROWS * BLOCK_ROWS


@pytest.mark.parametrize(
    ("experts", "chosen", "inner", "hidden", "expected"),
    [
        (8, 2, 14336, 4096, 1200),  # Mixtral 8x7B: 300 rows to each of 8 products
        (128, 8, 768, 2048, 4800),  # Qwen3 30B-A3B
        (32, 4, 2880, 2880, 2400),  # GPT-OSS 20B
        (256, 8, 2048, 7168, 4681),  # DeepSeek V3: bytes end it, 146 rows to a product
    ],
)
def test_a_loop_with_experts_has_rows_for_each_of_their_products(
    experts: int, chosen: int, inner: int, hidden: int, expected: int
) -> None:
    """In bf16. The widest value is a token's gate and up projections, or its hidden states, for every expert chosen."""
    widest, spread = 2 * chosen * max(2 * inner, hidden), experts / chosen
    device = CountedRows(128, 256, 1024, 32, 300)
    assert rows(device, 100_000, widest, MIB, widest=widest, spread=spread) == expected
    # A quarter of the tokens at most, and four sequences have four times the rows.
    assert rows(device, 2048, widest, MIB, widest=widest, spread=spread) == 512
    if expected == 1200:
        assert rows(device, 100_000, 4 * widest, MIB, 4, widest=4 * widest, spread=spread) == 300


def test_rows_are_those_of_the_sizes_that_are_asked_for() -> None:
    """One program for all lengths and batches: a pure function of sizes, of each loop by its own scratch."""
    wide, narrow = loop(TOKENS), loop(TOKENS)
    full = BATCH * TOKENS * 8 * KIB
    hints = {BATCH: sympy.Integer(1), TOKENS: sympy.Integer(2048)}
    scratches = ((wide, BATCH * COUNT * 24 * KIB), (narrow, BATCH * COUNT * KIB))
    memory, nodes = program(full, *scratches, hints=hints)
    sequences = dict.fromkeys(nodes.values(), BATCH)
    found = [rows_at(memory, CPU, sequences, sizes) for sizes in (None, {TOKENS: 65_536}, {BATCH: 4, TOKENS: 256})]
    assert [one[wide] for one in found] == [256, 1024, 64]
    assert [one[narrow] for one in found] == [1024, 1024, 256]
    model, numbers = Model.of(memory, sequences)
    assert model.symbols == (BATCH, TOKENS)
    assert rows_of_steps(model, CPU, (4, 256))[numbers[nodes[wide]]] == 64
    # The peak is that of these rows, and of no others.
    assert model.bytes((1, 2048), (256, 1024)) == 2048 * 8 * KIB + 256 * 24 * KIB
    assert model.bytes((1, 2048), (128, 128)) == 2048 * 8 * KIB + 128 * 24 * KIB


def test_scores_are_as_wide_as_a_run_has_keys() -> None:
    """Captured with 1024 tokens, 64 heads in float32; with experts, as GPT-OSS has both in a body."""
    tokens = sympy.Integer(1024)
    for spread in (1, 8):
        one = loop(TOKENS, widest=64 * 4 * 1024, spread=spread)
        scratch = COUNT * (72 * KIB + 3 * 64 * 4 * TOKENS)
        memory, _ = program(TOKENS * 64 * MIB, (one, scratch), hints={TOKENS: tokens})
        short, long = (rows_at(memory, GPU, {}, {TOKENS: sympy.Integer(n)})[one] for n in (4096, 65_536))
        assert (short, long) == ((BLOCK_ROWS, BLOCK_ROWS) if spread == 1 else (512, BLOCK_ROWS))


def test_alike_layers_are_looked_at_once() -> None:
    layers = [loop(4096) for _ in range(80)]
    memory, nodes = program(MIB, *((one, COUNT * KIB) for one in layers))
    model, numbers = Model.of(memory)
    assert len(model.steps) == 1 and set(numbers) == set(nodes.values()) and set(numbers.values()) == {0}


# --- of graphs ---


def made(length: int, batch: int = 1, **options: Any) -> list[int]:
    """Rows of the loops of a small program that ends in the logits of a vocabulary."""
    weights = weights_of(torch.float64)

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
        w = Weights(*parameters)
        return (F.linear(STEPS["causal"](STEPS["linear"](x, w), w), w.table).log_softmax(-1).amax(-1),)

    gm = trace(function, torch.randn(batch, length, HIDDEN, dtype=torch.float64), *weights)
    static, parsed = parameter_names(gm), parse_options(options)
    rewritten, _ = reported(run_pipeline(gm, static_inputs=static, limit=parsed.limit("cpu")))
    decision = decide(rewritten, parsed, static, torch.device("cpu"))
    steps = [step.loop.rows for step in decision.program.plan.steps if isinstance(step, LoopStep)]
    assert decision.whole is not None or [one.rows for _, one in loops(decision.program.gm)] == steps
    return [] if decision.whole is not None else steps


def test_loops_of_a_graph_have_the_rows_that_the_rule_says() -> None:
    assert made(600) == [300, 300]
    assert made(600, mini_seq_len=100) == [100, 100]


def test_a_batch_of_short_sequences_is_cut_by_its_rows_in_all() -> None:
    assert made(64, batch=16) == [32, 32]


def test_threads_share_the_rows_of_a_product() -> None:
    assert [cpu_rows(threads).efficient for threads in (1, 2, 4, 64)] == [256, 512, 1024, 1024]
    few, many = (rows(cpu_rows(threads), 4096, 24 * KIB, 4096 * 8 * KIB) for threads in (1, 2))
    assert (few, many) == (256, 512)


def test_what_has_no_two_efficient_mini_sequences_is_left_whole() -> None:
    assert made(300) == []
    assert made(40, batch=8) == []
    with pytest.raises(NotWorthwhile, match="200 tokens fit in one mini-sequence of 128"):
        made(200)


def test_a_limit_says_what_is_not_cut() -> None:
    assert [RowLimit(8).fits(length) for length in (8, 9)] == [True, False]
    few = RowLimit(128, fewest=True)
    assert [few.fits(length) for length in (255, 256)] == [True, False]
    assert [few.fits(length, 32) for length in (15, 16)] == [True, False]
    assert all(small < large for small, large in pairwise([CPU.fewest, CPU.efficient, CPU.most]))


def test_logits_of_a_large_vocabulary_have_few_rows():
    """Of a short prompt, too: 256 rows would hold twice as much."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=262_144,
        max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    report = mom_compile.explain(model, torch.empty(1, 2048, dtype=torch.int64, device="meta"), use_cache=False)[0]
    widest = max(moment.rows for moment in report.memory.moments if moment.rows and moment.step.loop.widest >= 1 << 20)
    assert 128 <= widest < 150
