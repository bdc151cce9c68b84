"""How many and which layers stay on the device for a budget."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from mom_compile import backend, explain
from mom_compile.config import Options, parse_options
from mom_compile.memory import decide as deciding
from mom_compile.memory.attention import ATTENTION, BIASES, most_of_attention
from mom_compile.memory.choice import Budget, Choice, Stays
from mom_compile.memory.decide import Decision, decide
from mom_compile.memory.device import LEAST_MARGIN, MARGIN_SHARE, available_bytes
from mom_compile.memory.model import Model, static_bytes
from mom_compile.memory.row_rule import rows_of_steps
from mom_compile.runtime.attention.rows import BLOCK_BYTES, FEWEST_ROWS
from mom_passes.graph.size_values import function_of
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import Call, Place, Storage, Why
from mom_passes.program.rewritten import Rewritten
from tests.models import tiny

numbers = st.integers(0, 1 << 40)
CUDA = torch.device("cuda", 0)


BATCH, TOKENS = sympy.symbols("batch tokens", integer=True, positive=True)
NODE = fx.Graph().placeholder("x")
NOTHING = Call(NODE, Why.VIEW)


def choice(budget: int, weights: int, layers: int, *moments: sympy.Expr) -> Choice:
    """The choice for a program with these bytes at each moment."""
    made = tuple(Moment(NOTHING, (Storage(NODE, sympy.sympify(size), Place.DEVICE),), sympy.S.Zero) for size in moments)
    model, _ = Model.of(Memory(made, {}))
    nothing = function_of(0, model.symbols)
    return Choice(model, None, weights, nothing, Budget(budget), layers, nothing)


def stay(choice: Choice, sizes: tuple[int, ...], layer: int) -> list[int]:
    return [i for i in range(choice.layers) if choice.stays(i, sizes, layer)]


@given(
    *(numbers, numbers, numbers, st.integers(0, 1 << 16), st.integers(1, 100)),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 30),
    st.sampled_from([1, 3]),
)
def test_resident_layers_are_as_many_as_fit(budget, weights, iteration, per_token, layers, tokens, layer, batch):
    decides = choice(budget, weights, layers, 5 * BATCH, BATCH * (iteration + TOKENS * per_token))
    sizes = dict(zip((BATCH, TOKENS), (batch, tokens), strict=True))
    resident = len(stay(decides, tuple(sizes[symbol] for symbol in decides.model.symbols), layer))
    needed = weights + max(5 * batch, batch * (iteration + tokens * per_token))
    assert resident == 0 or needed + resident * layer <= budget
    assert resident == layers or needed + (resident + 1) * layer > budget


@given(st.integers(1, 100), st.integers(0, 100))
def test_resident_layers_are_spread_evenly(layers, resident):
    kept = stay(choice(resident, 0, layers, 0), (), 1)
    assert len(kept) == min(resident, layers)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_three_times_the_captured_batch_leaves_room_for_fewer_layers():
    decides = choice(100, 10, 8, BATCH * (2 + TOKENS))
    assert decides.resident_layers((1, 10), 20) == 3
    assert decides.resident_layers((3, 10), 60) == 0
    last = Stays(decides, layer=7, layer_bytes=2, own_bytes=1)
    assert [last((batch, 10), 10 * batch) for batch in (1, 3)] == [True, False]


def test_another_moment_may_be_the_peak_of_a_longer_prompt():
    """The highest moment changes with the sizes, which a line through the captured peak would miss."""
    rows = sympy.ceiling(TOKENS / sympy.ceiling(TOKENS / 4))
    decides = choice(1000, 0, 10, 100 + TOKENS, TOKENS**2 - rows)
    assert decides.model.symbols == (TOKENS,)
    assert [decides.at((tokens,)).needed for tokens in (4, 5, 20, 30)] == [104, 105, 396, 896]
    assert [decides.resident_layers((tokens,), 100) for tokens in (4, 20, 30)] == [8, 6, 1]


def test_a_graph_with_constant_sizes_needs_a_number():
    decides = choice(100, 0, 10, 40, 70)
    assert decides.model.symbols == () and decides.resident_layers((), 10) == 3


def test_footprint_bytes_equal_the_peak_of_the_program():
    model, x = tiny("Llama", num_hidden_layers=3), torch.randint(3, 64, (2, 300))
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    options = {"mini_seq_len": 64, "kv_offload": True}
    memory = explain(model, input_ids=x, use_cache=True, logits_to_keep=1, options=options)[0].memory
    model, _ = Model.of(memory)
    for scale in (1, 2, 7):
        sizes = tuple(scale * int(memory.hints[symbol]) - (scale == 7) for symbol in model.symbols)
        named = {symbol: sympy.Integer(size) for symbol, size in zip(model.symbols, sizes, strict=True)}
        needed = model.bytes(sizes, rows_of_steps(model, None, sizes))
        assert len(sizes) == 2 and needed == memory.number(memory.peak, named)


# --- available memory of a simulated CUDA device ---

GIB = 1 << 30


def device_of(monkeypatch: pytest.MonkeyPatch, total: int, others: int, allocated: int, cached: int) -> None:
    """A device of `total` bytes: other processes use `others`, the rest is used by tensors and PyTorch's cache."""
    free = total - others - allocated - cached
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocated + cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)


@pytest.mark.parametrize(
    ("others", "allocated", "cached", "may_be_used"),
    [
        (0, 16, 0, 80),  # only our weights: all of it
        (0, 16, 30, 80),  # PyTorch's cache counts as free
        (0, 46, 0, 50),  # other tensors of this process do not
        (20, 46, 10, 30),  # nor does memory of other processes
    ],
)
def test_device_memory_available_to_a_graph(monkeypatch, others, allocated, cached, may_be_used):
    device_of(monkeypatch, 80 * GIB, others * GIB, allocated * GIB, cached * GIB)
    margin = 80 * GIB // MARGIN_SHARE
    assert available_bytes(CUDA, weights=16 * GIB) == may_be_used * GIB - margin


def test_a_small_device_keeps_a_margin_too(monkeypatch):
    device_of(monkeypatch, 2 * GIB, 0, GIB, 0)
    assert available_bytes(CUDA, weights=GIB) == 2 * GIB - LEAST_MARGIN


def rewritten_prefill(monkeypatch: pytest.MonkeyPatch) -> Rewritten:
    """For two sequences of 300 tokens, four heads of 8, in mini-sequences of at most 64."""
    found: list[Rewritten] = []

    def keep(rewritten: Rewritten, options: Options, static: Collection[str], device: torch.device) -> Decision:
        found.append(rewritten)
        return decide(rewritten, options, static, device)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "decide", keep)
        model = tiny("Llama", num_hidden_layers=3)
        model.compile(backend="mom", options={"mini_seq_len": 64, "kv_offload": True, "strict": True})
        with torch.no_grad():
            model(input_ids=torch.randint(3, 64, (2, 300)), use_cache=True, logits_to_keep=1)
    (rewritten,) = found
    return rewritten


@pytest.mark.usefixtures("eager_pieces")
def test_resident_layers_leave_room_for_weights_program_and_attention(monkeypatch):
    rewritten = rewritten_prefill(monkeypatch)
    device_of(monkeypatch, 8 * GIB, 0, 2 * GIB, GIB)
    monkeypatch.setattr(deciding, "static_bytes", lambda gm, static, device: GIB)
    options = {"mini_seq_len": 64, "kv_offload": "auto"}
    made = decide(rewritten, parse_options(options), (), CUDA).choice
    assert made is not None and made.budget is not None
    assert (made.weights, made.budget.bytes, made.budget.asked) == (GIB, 7 * GIB - LEAST_MARGIN, False)
    own = 2 * 4 * 64 * (8 + 1) * 4  # a mini-sequence's result once more, and its logsumexp
    assert made.at(()).needed == rewritten.memory.number(rewritten.memory.peak) + own
    asked = decide(rewritten, parse_options({**options, "memory_budget": "3GiB"}), (), CUDA).choice
    assert asked is not None and asked.budget == Budget(3 * GIB, asked=True)


def test_weights_on_other_devices_take_no_memory():
    graph = fx.Graph()
    for name, device in (("here", "meta"), ("there", "cpu"), ("input", "meta")):
        graph.placeholder(name).meta["val"] = torch.empty(10, device=device)
    graph.output(())
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert static_bytes(gm, {"here", "there"}, torch.device("meta")) == 40


@pytest.mark.parametrize(
    ("tokens", "mask", "keys", "blocks_of"),
    [
        (100, None, False, 0),
        (100, (2, 1, 1, 100), False, BLOCK_BYTES),
        (100, None, True, BLOCK_BYTES),
        (1 << 20, None, True, FEWEST_ROWS * 2 * (1 << 20) * 2),  # for two sequences, in bfloat16
        (1 << 20, (1, 4, 1, 1 << 20), True, FEWEST_ROWS * 4 * (1 << 20) * 2),
    ],
)
def test_scratch_memory_of_attention(tokens, mask, keys, blocks_of):
    graph = fx.Graph()

    def given(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    q, k, v = given("q", 2, 4, 50, 64), given("k", 2, 2, tokens, 64), given("v", 2, 2, tokens, 64)
    operands = [q, k, v, None if mask is None else given("mask", *mask), 0, True, 1.0, None]
    conditions = [given("keys", 2, tokens, dtype=torch.bool) if keys else None, None, None, None]
    result = graph.call_function(ATTENTION, (*operands, *conditions))
    result.meta["val"] = torch.empty(2, 4, 50, 64, dtype=torch.bfloat16, device="meta")
    graph.output((result,))
    rewritten = Rewritten.of(fx.GraphModule(torch.nn.Module(), graph))
    own = 2 * 4 * 50 * (4 + 2 * 64)
    assert rewritten.memory.number(most_of_attention(rewritten.plan)) == own + BIASES * blocks_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_offload": 1}, r"kv_offload=1 is not valid; it is one of True, False, 'auto', 'disk'"),
        ({"kv_offload": "host"}, r"kv_offload='host' is not valid"),
        ({"kv_offload": "disk"}, r"needs kv_dir"),
        ({"kv_offload": "disk", "kv_dir": "/nowhere/at/all"}, r"is not a folder"),
        ({"kv_offload": True, "kv_dir": "/tmp"}, r"kv_dir requires kv_offload='disk'"),
        ({"memory_budget": "much"}, r"memory_budget='much'"),
    ],
)
def test_invalid_options_raise_with_the_fault(options, message):
    with pytest.raises(ValueError, match=message):
        parse_options(options)


def test_an_unwritable_folder_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="is not writable"):
        parse_options({"kv_offload": "disk", "kv_dir": str(tmp_path)})
