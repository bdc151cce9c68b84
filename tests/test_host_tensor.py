"""A host tensor is usable wherever a tensor is, and what is written into it is not lost."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch

from mom_compile import HostTensor, host_memory
from mom_compile.runtime.copy_steps import Append, Offload
from mom_compile.runtime.host import store as host_storage
from mom_compile.runtime.host.engines import engine_for
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import store_of
from mom_compile.runtime.host.tensor import on_host

CPU = torch.device("cpu")


def plain(rows: int = 5) -> torch.Tensor:
    return torch.arange(2 * 3 * rows * 4, dtype=torch.float32).view(2, 3, rows, 4)


@pytest.fixture
def host() -> HostTensor:
    return on_host(plain(), CPU)


def fetches(monkeypatch) -> list[int]:
    """Counts how often all of a host tensor is brought to the device."""
    calls: list[int] = []
    original = HostTensor.fetch

    def fetch(self):
        calls.append(1)
        return original(self)

    monkeypatch.setattr(HostTensor, "fetch", fetch)
    return calls


def test_it_looks_like_the_tensor_it_stands_for(host):
    assert isinstance(host, torch.Tensor)
    assert (host.shape, host.dtype, host.device) == (plain().shape, torch.float32, CPU)
    assert host.shape[-2] == 5
    assert host.numel() == 120
    assert not host.requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t + 1,
        lambda t: torch.cat([t, t], dim=2),
        lambda t: t @ t.transpose(-1, -2),
        lambda t: t.sum(),
        lambda t: t.repeat(2, 1, 1, 1),
        lambda t: t.double(),
        lambda t: t.to(torch.bfloat16),
        lambda t: torch.where(t > 3, t, torch.zeros(())),
        lambda t: torch.nn.functional.scaled_dot_product_attention(t, t, t),
        lambda t: t.reshape(6, 5, 4),
        lambda t: t.contiguous(),
        lambda t: t.flatten(),
        lambda t: torch.stack([t, t]),
        lambda t: t.max(dim=2).values,
    ],
)
def test_any_operator_gives_what_it_would_give(host, call):
    torch.testing.assert_close(torch.as_tensor(call(host).cpu()), call(plain()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t[..., :-2, :],
        lambda t: t[:, :, 1:],
        lambda t: t[0],
        lambda t: t.transpose(1, 2),
        lambda t: t.detach(),
        lambda t: t.unsqueeze(0),
        lambda t: t.narrow(2, 1, 3),
        lambda t: t.index_select(0, torch.tensor([1, 0, 1])),
        lambda t: t[torch.tensor([1])],
        lambda t: t.repeat_interleave(3, dim=0),
        lambda t: t.clone(),
        lambda t: copy.deepcopy(t),
        lambda t: t.chunk(2, dim=0)[1],
        lambda t: t.expand(2, 3, 5, 4),
    ],
)
def test_views_and_choices_of_batch_entries_stay_on_the_host(host, call, monkeypatch):
    counted = fetches(monkeypatch)
    result = call(host)
    assert isinstance(result, HostTensor)
    assert counted == []
    torch.testing.assert_close(result.fetch(), call(plain()), rtol=0, atol=0)


def test_it_is_printed_with_its_values(host):
    assert "119." in repr(host)
    assert "HostTensor" in str(host)


def test_numpy_and_lists(host):
    assert host.tolist() == plain().tolist()
    assert (host.numpy() == plain().numpy()).all()
    assert host[0, 0, 0, 1].item() == 1.0


def test_it_survives_pickle_and_torch_save(host):
    for loaded in (pickle.loads(pickle.dumps(host)), _saved_and_loaded(host)):
        assert isinstance(loaded, HostTensor)
        torch.testing.assert_close(loaded.fetch(), plain(), rtol=0, atol=0)
        assert store_of(loaded.host) is not store_of(host.host)


def _saved_and_loaded(host):
    buffer = io.BytesIO()
    torch.save(host, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_deep_copy_is_its_own(host):
    twin = copy.deepcopy({"a": host, "b": host})
    assert twin["a"] is twin["b"]
    twin["a"].zero_()
    torch.testing.assert_close(host.fetch(), plain(), rtol=0, atol=0)
    assert twin["b"].fetch().sum() == 0


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.zero_(),
        lambda t: t.mul_(2),
        lambda t: t[:, :, 2].fill_(-1),
        lambda t: t.__setitem__((slice(None), slice(None), 1), torch.ones(4)),
        lambda t: t[..., :2, :].copy_(torch.ones(2, 3, 2, 4)),
        lambda t: t.index_fill_(2, torch.tensor([0]), 7.0),
        lambda t: torch.add(plain(), 1, out=t),
    ],
)
def test_what_is_written_into_it_is_there_afterwards(host, write):
    expected = plain()
    write(expected)
    write(host)
    torch.testing.assert_close(host.fetch(), expected, rtol=0, atol=0)


def test_reading_it_into_a_plain_tensor_leaves_it_as_it_is(host):
    target = torch.zeros(2, 3, 5, 4)
    target.copy_(host)
    target += host
    torch.testing.assert_close(target, 2 * plain(), rtol=0, atol=0)
    torch.testing.assert_close(host.fetch(), plain(), rtol=0, atol=0)


# --- states of one cache ---


def append(host: HostTensor, rows: torch.Tensor, first: int = 0) -> HostTensor:
    (longer,) = Append(2, CPU, Placement())([host.host, rows, first])
    return longer


def test_appending_leaves_the_shorter_state_as_it_was_and_moves_nothing(host):
    before = engine_for(CPU).traffic.on_host
    longer = append(host, plain(2))
    assert longer.host.data_ptr() == host.host.data_ptr()
    torch.testing.assert_close(longer.fetch(), torch.cat([plain(), plain(2)], 2), rtol=0, atol=0)
    torch.testing.assert_close(host.fetch(), plain(), rtol=0, atol=0)
    assert engine_for(CPU).traffic.on_host == before


def test_two_continuations_of_one_state_do_not_touch_each_other(host):
    one, other = append(host, plain(2)), append(host, -plain(1))
    torch.testing.assert_close(one.fetch(), torch.cat([plain(), plain(2)], 2), rtol=0, atol=0)
    torch.testing.assert_close(other.fetch(), torch.cat([plain(), -plain(1)], 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "crop",
    [
        lambda t: t[..., :-2, :],
        lambda t: t.narrow(2, 0, 3),
        lambda t: t.split([3, 2], 2)[0],
        lambda t: t.chunk(2, 2)[0],
    ],
)
def test_a_cropped_state_is_appended_to_in_place_once_the_longer_one_is_gone(crop):
    host = on_host(plain(), CPU)
    before = engine_for(CPU).traffic.on_host
    address = host.host.data_ptr()
    shorter = crop(host)
    del host
    gc.collect()
    longer = append(shorter, plain(1))
    torch.testing.assert_close(longer.fetch(), torch.cat([plain()[:, :, :3], plain(1)], 2), rtol=0, atol=0)
    assert longer.host.data_ptr() == address
    assert engine_for(CPU).traffic.on_host == before


def test_a_cropped_state_does_not_write_over_the_longer_one(host):
    longer = append(host[..., :-2, :], plain(1))
    torch.testing.assert_close(host.fetch(), plain(), rtol=0, atol=0)
    torch.testing.assert_close(longer.fetch(), torch.cat([plain()[:, :, :3], plain(1)], 2), rtol=0, atol=0)


def test_what_was_rearranged_can_be_appended_to():
    host = on_host(plain(), CPU)
    for choose in (
        lambda t: t.repeat_interleave(2, dim=0),
        lambda t: t[torch.tensor([1])],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        chosen = choose(host)
        rows = torch.ones(chosen.shape[0], 3, 1, 4)
        longer = append(chosen if isinstance(chosen, HostTensor) else on_host(chosen, CPU), rows)
        torch.testing.assert_close(longer.fetch(), torch.cat([choose(plain()), rows], 2), rtol=0, atol=0)


@pytest.mark.parametrize(("new", "first"), [(1, 1), (2, 2), (1, 6), (9, 9), (9, 12), (3, 5)])
def test_a_window_keeps_its_last_rows(host, new, first):
    expected = torch.cat([plain(), plain(new)], 2)[:, :, first:]
    torch.testing.assert_close(append(host, plain(new), first).fetch(), expected, rtol=0, atol=0)
    longer = append(host, plain(1))  # a fork: `host` has been continued already, if its result were alive
    torch.testing.assert_close(append(host, plain(new), first).fetch(), expected, rtol=0, atol=0)
    del longer


def test_a_long_run_of_a_window_holds_only_a_few_windows():
    expected = plain(8)
    host = on_host(expected, CPU)
    for step in range(200):
        row = torch.full((2, 3, 1, 4), float(step))
        host = append(host, row, 1)
        expected = torch.cat([expected, row], 2)[:, :, 1:]
        assert store_of(host.host).used_bytes <= 5 * 8 * 96
    torch.testing.assert_close(host.fetch(), expected, rtol=0, atol=0)


def test_a_window_that_was_cropped_or_moved_on_shows_and_holds_its_own_rows_alone():
    gc.collect()
    before = host_memory().memory
    length, new = 4096, 32
    expected = torch.randn(1, 2, length, 64)
    host = on_host(expected, CPU)
    shown = expected.nbytes
    for _ in range(400):
        rows = torch.randn(1, 2, new, 64)
        host = append(host, rows, new)
        expected = torch.cat([expected, rows], 2)[:, :, new:]
        assert host_memory().memory - before <= 1.2 * shown + 64 * 1024
    torch.testing.assert_close(host.fetch(), expected, rtol=0, atol=0)
    assert store_of(host.host).region.low > 0  # not moved: what was left behind was given back
    part = host[..., 1000:1100, :]
    del host
    gc.collect()
    assert host_memory().memory - before <= 1.2 * shown * 100 / length + 64 * 1024
    torch.testing.assert_close(part.fetch(), expected[:, :, 1000:1100], rtol=0, atol=0)


def test_a_host_tensor_that_a_graph_puts_together_again_holds_its_rows(host):
    inner, meta = host.__tensor_flatten__()
    again = HostTensor.__tensor_unflatten__({name: getattr(host, name) for name in inner}, meta, None, None)
    assert again.lease is host.lease


def test_many_small_caches_take_little_more_than_their_rows():
    gc.collect()
    before = host_memory()
    hosts = [on_host(plain(), CPU) for _ in range(100)]
    held = host_memory()
    assert held.rows - before.rows == 100 * plain().nbytes
    assert held.memory - before.memory <= 100 * 64 * 1024
    assert len(hosts) == held.stores - before.stores


def test_rows_that_outgrow_their_addresses_move_to_twice_as_many_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(host_storage, "RESERVED_ROWS", 4)
    expected = plain(3)
    host = on_host(expected, CPU)
    capacities = [store_of(host.host).capacity]
    for count in (1, 2, 1, 40, 1, 1, 100, 7):
        rows = torch.randn(2, 3, count, 4)
        host = append(host, rows)
        expected = torch.cat([expected, rows], 2)
        torch.testing.assert_close(host.fetch(), expected, rtol=0, atol=0)
        capacities.append(store_of(host.host).capacity)
    assert capacities == [6, 6, 6, 14, 94, 94, 94, 298, 298]


def test_writing_where_another_state_looks_is_refused(host):
    longer = append(host, plain(1))
    with pytest.raises(RuntimeError, match=r"another tensor shows too.*clone\(\)"):
        longer[:, :, 0].zero_()
    with pytest.raises(RuntimeError, match="another tensor shows too"):
        host.zero_()
    longer[:, :, 5:].zero_()  # rows that only the longer one has
    del longer
    host.zero_()
    assert host.fetch().sum() == 0


def test_a_write_waits_for_a_copy_that_still_runs():
    host = on_host(plain(), CPU)
    engine = engine_for(CPU)
    engine.delay = lambda: 0.05
    try:
        longer = append(host, plain(1))
        del host
        longer.zero_()
        assert longer.fetch().sum() == 0
    finally:
        engine.delay = None


def test_a_value_offloaded_in_parts_shows_its_last_rows():
    (window,) = Offload(2, CPU, Placement())([plain(), 3])
    torch.testing.assert_close(window.fetch(), plain()[:, :, 3:], rtol=0, atol=0)


def test_nothing_is_held_for_tensors_that_are_gone():
    gc.collect()
    before = host_memory()
    host = on_host(plain(), CPU)
    for _ in range(20):
        host = append(host.index_select(0, torch.tensor([1, 0])), torch.zeros(2, 3, 1, 4))
    del host
    gc.collect()
    assert host_memory() == before
