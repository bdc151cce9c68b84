"""How many layers stay on the device for a budget, and which."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mom_compile.config import parse_bytes, parse_options
from mom_compile.memory.residency import Residency, Stays

numbers = st.integers(0, 1 << 40)


def stay(residency: Residency, tokens: int, layer: int, batch: float = 1) -> list[int]:
    return [i for i in range(residency.layers) if residency.stays(i, tokens, layer, batch)]


@given(
    st.builds(Residency, numbers, numbers, numbers, st.integers(0, 1 << 16), st.integers(1, 100)),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 30),
    st.sampled_from([0.5, 1, 3]),
)
def test_what_stays_fits_and_one_more_would_not(residency, tokens, layer, batch):
    resident, budget, layers = len(stay(residency, tokens, layer, batch)), residency.budget, residency.layers
    needed = residency.weights + batch * (residency.iteration + tokens * residency.per_token)
    assert resident == 0 or needed + resident * layer <= budget
    assert resident == layers or needed + (resident + 1) * layer > budget


@given(st.integers(1, 100), st.integers(0, 100))
def test_layers_that_stay_are_spread_evenly(layers, resident):
    kept = stay(Residency(resident, 0, 0, 0, layers), 1, 1)
    assert len(kept) == min(resident, layers)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_three_times_the_captured_batch_leaves_room_for_fewer_layers():
    residency = Residency(budget=100, weights=10, iteration=2, per_token=1, layers=8)
    assert residency.resident_layers(10, 20) == 3
    assert residency.resident_layers(10, 60, batch=3) == 0
    last = Stays(residency, layer=7, layer_bytes=2, own_bytes=1)
    assert [last(10, 10, 10 * batch) for batch in (1, 3)] == [True, False]


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
