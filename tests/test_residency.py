"""How many layers stay on the device for a budget, and which."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from mom_compile import explain
from mom_compile.config import parse_bytes, parse_options
from mom_compile.memory.residency import Needed, Residency, Stays
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import Call, Place, Storage, Why
from tests.models import tiny

numbers = st.integers(0, 1 << 40)


BATCH, TOKENS = sympy.symbols("batch tokens", integer=True, positive=True)
NODE = fx.Graph().placeholder("x")
NOTHING = Call(NODE, Why.VIEW)


def residency(budget: int, weights: int, layers: int, *moments: sympy.Expr) -> Residency:
    """For a program whose moments take so many bytes."""
    made = tuple(Moment(NOTHING, (Storage(NODE, sympy.sympify(size), Place.DEVICE),), sympy.S.Zero) for size in moments)
    return Residency(budget, weights, Needed.by(Memory(made, {})), layers)


def stay(residency: Residency, sizes: tuple[int, ...], layer: int) -> list[int]:
    return [i for i in range(residency.layers) if residency.stays(i, sizes, layer)]


@given(
    *(numbers, numbers, numbers, st.integers(0, 1 << 16), st.integers(1, 100)),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 30),
    st.sampled_from([1, 3]),
)
def test_what_stays_fits_and_one_more_would_not(budget, weights, iteration, per_token, layers, tokens, layer, batch):
    decides = residency(budget, weights, layers, 5 * BATCH, BATCH * (iteration + TOKENS * per_token))
    sizes = dict(zip((BATCH, TOKENS), (batch, tokens), strict=True))
    resident = len(stay(decides, tuple(sizes[symbol] for symbol in decides.needed.symbols), layer))
    needed = weights + max(5 * batch, batch * (iteration + tokens * per_token))
    assert resident == 0 or needed + resident * layer <= budget
    assert resident == layers or needed + (resident + 1) * layer > budget


@given(st.integers(1, 100), st.integers(0, 100))
def test_layers_that_stay_are_spread_evenly(layers, resident):
    kept = stay(residency(resident, 0, layers, 0), (), 1)
    assert len(kept) == min(resident, layers)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_three_times_the_captured_batch_leaves_room_for_fewer_layers():
    decides = residency(100, 10, 8, BATCH * (2 + TOKENS))
    assert decides.resident_layers((1, 10), 20) == 3
    assert decides.resident_layers((3, 10), 60) == 0
    last = Stays(decides, layer=7, layer_bytes=2, own_bytes=1)
    assert [last((batch, 10), 10 * batch) for batch in (1, 3)] == [True, False]


def test_another_moment_may_be_the_peak_of_a_longer_prompt():
    """What is highest changes with the sizes, which no line through the captured peak tells."""
    rows = sympy.ceiling(TOKENS / sympy.ceiling(TOKENS / 4))
    decides = residency(1000, 0, 10, 100 + TOKENS, TOKENS**2 - rows)
    assert decides.needed.symbols == (TOKENS,)
    assert [decides.needed.bytes((tokens,)) for tokens in (4, 5, 20, 30)] == [104, 105, 396, 896]
    assert [decides.resident_layers((tokens,), 100) for tokens in (4, 20, 30)] == [8, 6, 1]


def test_a_graph_whose_sizes_were_captured_as_numbers_needs_a_number():
    decides = residency(100, 0, 10, 40, 70)
    assert decides.needed.symbols == () and decides.resident_layers((), 10) == 3


@pytest.mark.usefixtures("fresh")
def test_what_a_model_needs_is_the_peak_that_its_program_says():
    model, x = tiny("Llama", num_hidden_layers=3), torch.randint(3, 64, (2, 300))
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    options = {"mini_seq_len": 64, "kv_offload": True}
    memory = explain(model, input_ids=x, use_cache=True, logits_to_keep=1, options=options)[0].memory
    needed = Needed.by(memory)
    for scale in (1, 2, 7):
        sizes = tuple(scale * int(memory.hints[symbol]) - (scale == 7) for symbol in needed.symbols)
        named = {symbol: sympy.Integer(size) for symbol, size in zip(needed.symbols, sizes, strict=True)}
        assert len(sizes) == 2 and needed.bytes(sizes) == memory.number(memory.peak, named)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("1.5 MiB", 3 << 19), ("7 kb", 7000), ("12", 12), (5, 5), ("80gb", 80 * 10**9)],
)
def test_bytes_are_read_from_numbers_and_texts(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["", "GiB", "-3GiB", "3 XiB", "1e9", 0, -1, True, 2.5, None, [1]])
def test_what_is_no_amount_of_bytes_is_refused(bad):
    with pytest.raises(ValueError, match=r"memory_budget=.*24GiB"):
        parse_bytes(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_offload": 1}, r"kv_offload=1 is not valid; it is one of True, False, 'auto', 'disk'"),
        ({"kv_offload": "host"}, r"kv_offload='host' is not valid"),
        ({"kv_offload": "disk"}, r"needs kv_dir"),
        ({"kv_offload": "disk", "kv_dir": "/nowhere/at/all"}, r"is not a folder"),
        ({"kv_offload": True, "kv_dir": "/tmp"}, r"kv_dir is for kv_offload='disk'"),
        ({"memory_budget": "much"}, r"memory_budget='much'"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        parse_options(options)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        parse_options({"kv_offload": "disk", "kv_dir": str(tmp_path)})
