"""A budget that was asked for: rows and resident layers are chosen to keep it, or it is refused with what would do."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import mom_compile
from benchmarks.measure import peak_bytes, watch_cpu
from mom_compile import MemoryBudgetError
from mom_compile.lowering.storing import dumps, loads
from mom_compile.memory.choice import Budget, Choice, RowsOf
from mom_compile.memory.device import cpu_rows
from mom_compile.memory.model import TOKENS, Model, captured_tokens, in_tokens
from mom_compile.memory.refuse import last_that_fits
from mom_passes.graph.size_values import function_of
from mom_passes.loops.loop import FEWEST_ROWS
from mom_passes.loops.ports import COUNT
from tests.models import TinyDecoder, ids, small_model
from tests.test_choose_rows import KIB, loop, program

LENGTH = sympy.Symbol("length", integer=True, positive=True)
LAYERS, LAYER, FULL, ROW = 8, 2 * KIB, 8 * KIB, 24 * KIB


def choice(budget: int | None, *, weights: int = 0, asked: bool = True) -> tuple[Choice, int]:
    """For a program of layers with `FULL` bytes of a token at full length, beside keys and values of `LAYER` bytes of
    each of `LAYERS`, and `ROW` bytes of each row of a mini-sequence; and the number of its loop."""
    one = loop(LENGTH)
    memory, nodes = program(FULL * LENGTH, (one, ROW * COUNT))
    model, numbers = Model.of(memory)
    size = None if budget is None else Budget(budget, asked)
    layer = function_of(LAYER * LENGTH, model.symbols)
    inputs = function_of(8 * LENGTH, model.symbols)
    return Choice(model, cpu_rows(1), weights, inputs, size, LAYERS, layer, 0), numbers[nodes[one]]


def device_bytes(made: Choice, tokens: int) -> int:
    """What a run takes by its choice."""
    chosen = made.at((tokens,))
    return made.weights + 8 * tokens + chosen.needed + made.resident_layers((tokens,), LAYER * tokens) * LAYER * tokens


@settings(max_examples=30)
@given(st.integers(512, 1 << 16), st.integers(0, 1 << 33), st.integers(0, 1 << 30))
def test_what_is_chosen_keeps_the_budget_or_there_is_nothing_to_choose(tokens: int, budget: int, weights: int) -> None:
    made, number = choice(budget, weights=weights)
    free, _ = choice(None)
    least = weights + (8 + FULL) * tokens + FEWEST_ROWS * ROW
    assert made.smallest((tokens,)) == least
    if budget < least:
        with pytest.raises(MemoryBudgetError, match=f"the smallest budget is {least} bytes"):
            made.at((tokens,))
        return
    assert device_bytes(made, tokens) <= budget
    rows, best = made.at((tokens,)).rows[number], free.at((tokens,)).rows[number]
    assert FEWEST_ROWS <= rows <= best
    # Rows go before layers do: as many layers stay as with the fewest rows.
    resident = made.resident_layers((tokens,), LAYER * tokens)
    assert resident == min(LAYERS, (budget - least) // (LAYER * tokens))
    # And what the layers do not need is the rows'.
    assert rows == best or device_bytes(made, tokens) + ROW > budget


def test_a_budget_that_nobody_asked_for_is_never_refused() -> None:
    made, number = choice(1, weights=100, asked=False)
    assert made.at((4096,)).rows[number] == FEWEST_ROWS
    assert made.resident_layers((4096,), 1) == 0


def test_another_process_chooses_by_its_own_budget() -> None:
    made, number = choice(1 << 40)
    before = made.at((4096,)).rows[number]
    assert made.with_budget(made.smallest((4096,))).at((4096,)).rows[number] == FEWEST_ROWS < before
    assert made.at((4096,)).rows[number] == before


@settings(max_examples=30)
@given(st.integers(600, 1 << 15), st.integers(16, 1 << 15))
def test_the_longest_context_that_is_named_fits_and_one_token_more_does_not(tokens: int, fitting: int) -> None:
    exact, _ = choice(None)
    budget = exact.smallest((fitting,)) + 7
    made, _ = choice(budget)
    if fitting >= tokens:
        assert made.at((tokens,))
        return
    with pytest.raises(MemoryBudgetError) as refused:
        made.at((tokens,))
    named = int(re.search(r"room for (\d+) tokens", str(refused.value))[1])  # type: ignore[index]
    assert made.smallest((named,)) <= budget < made.smallest((named + 1,))


def test_nothing_is_said_of_a_longest_context_where_none_fits() -> None:
    made, _ = choice(10)
    with pytest.raises(MemoryBudgetError) as refused:
        made.at((600,))
    assert "room for" not in str(refused.value)
    assert last_that_fits(lambda tokens: False, 100) is None


def test_where_tokens_were_captured_as_a_number_what_is_said_of_fewer_never_says_too_little() -> None:
    graph = fx.Graph()
    for name, shape in (("stream", (1, 4000, 2048)), ("window", (1, 128, 64)), ("weight", (2048, 30))):
        graph.placeholder(name).meta["val"] = torch.empty(shape, device="meta")
    graph.output(())
    stream, window, _ = (node for node in graph.nodes if node.op == "placeholder")
    one = loop(4000)
    memory, _ = program(0, (one, COUNT * ROW))
    moment = memory.moments[0]
    storages = tuple(
        type(moment.alive[0])(node, sympy.Integer(node.meta["val"].nbytes), moment.alive[0].place)
        for node in (stream, window)
    )
    memory = type(memory)((type(moment)(moment.step, storages, moment.scratch, 128),), {})
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert captured_tokens(memory, gm, {"weight"}) == 4000
    assert captured_tokens(memory, gm, {"stream"}) is None  # a parameter has a dimension of that number
    longer = in_tokens(memory, 4000)
    model, _ = Model.of(longer)
    assert model.symbols == (TOKENS,)
    assert model.bytes((1000,), (128,)) == 1000 * 2048 * 4 + 128 * 64 * 4 + 128 * ROW
    zero = function_of(0, (TOKENS,))
    budget = Budget(1000 * 2048 * 4 + 128 * 64 * 4 + 128 * ROW, asked=True)
    of_tokens = Choice(model, cpu_rows(1), 0, zero, budget, 0, zero, 0)
    now, _ = Model.of(memory)
    nothing = function_of(0, ())
    made = Choice(now, cpu_rows(1), 0, nothing, budget, 0, nothing, None, of_tokens)
    with pytest.raises(MemoryBudgetError, match=r"a prompt of 4000 tokens.*room for 1000 tokens"):
        made.at(())


# --- what is measured ---

WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS_MEASURED = 1200


def prefill(model: Any, x: torch.Tensor, **options: Any) -> Callable[[], Any]:
    torch._dynamo.reset()
    model.compile(backend="mom", options=options)
    call = functools.partial(model, input_ids=x, use_cache=True, logits_to_keep=1)
    return torch.no_grad()(call)


def smallest(call: Callable[[], Any]) -> int:
    with pytest.raises(MemoryBudgetError, match="the smallest budget is") as refused:
        call()
    return int(re.search(r"the smallest budget is (\d+) bytes", str(refused.value))[1])  # type: ignore[index]


def weights_of_graphs(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters()) + model.model.rotary_emb.inv_freq.nbytes


@pytest.mark.parametrize("kv_offload", ["auto", pytest.param(False, marks=pytest.mark.slow)])
def test_the_smallest_budget_that_is_named_is_kept_and_one_byte_less_is_refused(kv_offload: bool | str) -> None:
    """By what is measured, weights and inputs included. Without `strict`: no fallback swallows it."""
    watch_cpu()
    model = small_model("Llama", torch.float32, num_hidden_layers=2, max_position_embeddings=2048, **WIDE)
    x = torch.randint(3, 64, (1, TOKENS_MEASURED))
    options = {"kv_offload": kv_offload}
    weights = weights_of_graphs(model)
    least = smallest(prefill(model, x, memory_budget=weights + 1000, **options))
    assert smallest(prefill(model, x, memory_budget=least - 1, **options)) == least
    call = prefill(model, x, memory_budget=least, **options)
    past = call().past_key_values
    assert all(isinstance(layer.keys, mom_compile.HostTensor) for layer in past.layers) == (kv_offload == "auto")
    assert {stage.mini_seq_len for stage in mom_compile.reports()[-1].stages} > {FEWEST_ROWS}
    del past
    taken = weights + x.nbytes + peak_bytes(call).peak
    assert 0.97 * least < taken <= least


@pytest.mark.slow
def test_one_graph_for_all_lengths_keeps_or_refuses_by_the_sizes_of_each_run() -> None:
    watch_cpu()
    model = small_model("Llama", torch.float32, num_hidden_layers=3, max_position_embeddings=4096, **WIDE)
    weights = weights_of_graphs(model)
    budget = weights + (5 << 20)
    x = torch.randint(3, 64, (1, 600))
    torch._dynamo.mark_dynamic(x, 1)
    call = prefill(model, x, memory_budget=budget)
    call()
    with torch.no_grad():
        for tokens in (600, 1200, 2000):
            at = functools.partial(model, input_ids=torch.randint(3, 64, (1, tokens)), use_cache=True, logits_to_keep=1)
            assert weights + 8 * tokens + peak_bytes(at).peak <= budget
        with pytest.raises(MemoryBudgetError, match="a prompt of 4000 tokens") as refused:
            model(input_ids=torch.randint(3, 64, (1, 4000)), use_cache=True, logits_to_keep=1)
        longest = int(re.search(r"room for (\d+) tokens", str(refused.value))[1])  # type: ignore[index]
        assert 2000 < longest < 4000
        model(input_ids=torch.randint(3, 64, (1, longest)), use_cache=True, logits_to_keep=1)
        with pytest.raises(MemoryBudgetError, match=rf"a prompt of {longest + 1} tokens.*room for {longest} tokens"):
            model(input_ids=torch.randint(3, 64, (1, longest + 1)), use_cache=True, logits_to_keep=1)
    (report,) = mom_compile.reports()
    assert not report.failed


def test_a_budget_below_the_weights_is_refused_when_a_graph_is_compiled() -> None:
    """Of a graph that would go to stock Inductor too."""
    model = TinyDecoder(layers=1).eval()
    compiled = torch.compile(model, backend="mom", options={"memory_budget": 5000})
    with torch.no_grad(), pytest.raises(ValueError, match=r"memory_budget=5000 bytes \(4.9 KiB\) is less than the wei"):
        compiled(ids(1, 7))


def test_explain_says_of_a_budget_that_it_cannot_be_kept_and_explains_all_the_same() -> None:
    found = mom_compile.explain(TinyDecoder(layers=2).eval(), ids(1, 600), options={"memory_budget": 200_000})
    assert "memory_budget=200000 bytes (195 KiB) cannot be kept for a prompt of 600 tokens" in str(found)
    assert found[0].stages and not found[0].failed
    assert "cannot be kept" not in str(mom_compile.explain(TinyDecoder(layers=2).eval(), ids(1, 600)))


def test_what_is_chosen_from_is_stored_with_a_program() -> None:
    made, number = choice(1 << 24)
    made.at((600,))
    read = loads(dumps(RowsOf(made, number)))
    assert [read((tokens,)) for tokens in (600, 1200)] == [RowsOf(made, number)((tokens,)) for tokens in (600, 1200)]


def test_a_budget_cuts_what_would_be_left_whole() -> None:
    """A prompt without two efficient mini-sequences."""
    model, x = TinyDecoder(layers=2, width=64).eval(), ids(1, 400)
    whole, cut = (mom_compile.explain(model, x, options=options)[0] for options in ({}, {"memory_budget": 1_000_000}))
    assert whole.no_loops == "its 400 tokens fit in one mini-sequence of 400"
    assert {stage.mini_seq_len for stage in cut.stages} >= {FEWEST_ROWS}
    assert "fewer for memory_budget" in str(cut)
