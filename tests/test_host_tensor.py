"""A host tensor works wherever a tensor works, and writes to it persist."""

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
    """Counts copies of a whole host tensor to the device."""
    calls: list[int] = []
    original = HostTensor.fetch

    def fetch(self):
        calls.append(1)
        return original(self)

    monkeypatch.setattr(HostTensor, "fetch", fetch)
    return calls


def test_a_host_tensor_has_the_metadata_of_its_device_tensor(host):
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
def test_any_operator_returns_the_result_of_a_device_tensor(host, call):
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
def test_views_and_selected_batch_entries_stay_on_the_host(host, call, monkeypatch):
    counted = fetches(monkeypatch)
    result = call(host)
    assert isinstance(result, HostTensor)
    assert counted == []
    torch.testing.assert_close(result.fetch(), call(plain()), rtol=0, atol=0)


def test_repr_shows_the_values(host):
    assert "119." in repr(host)
    assert "HostTensor" in str(host)


def test_numpy_and_lists(host):
    assert host.tolist() == plain().tolist()
    assert (host.numpy() == plain().numpy()).all()
    assert host[0, 0, 0, 1].item() == 1.0


def test_pickle_and_torch_save_restore_a_host_tensor(host):
    for loaded in (pickle.loads(pickle.dumps(host)), _saved_and_loaded(host)):
        assert isinstance(loaded, HostTensor)
        torch.testing.assert_close(loaded.fetch(), plain(), rtol=0, atol=0)
        assert store_of(loaded.host) is not store_of(host.host)


def _saved_and_loaded(host):
    buffer = io.BytesIO()
    torch.save(host, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_deep_copy_is_independent(host):
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
def test_writes_persist(host, write):
    expected = plain()
    write(expected)
    write(host)
    torch.testing.assert_close(host.fetch(), expected, rtol=0, atol=0)


def test_copying_it_to_a_plain_tensor_does_not_change_it(host):
    target = torch.zeros(2, 3, 5, 4)
    target.copy_(host)
    target += host
    torch.testing.assert_close(target, 2 * plain(), rtol=0, atol=0)
    torch.testing.assert_close(host.fetch(), plain(), rtol=0, atol=0)


# --- states of one cache ---


def append(host: HostTensor, rows: torch.Tensor, first: int = 0) -> HostTensor:
    (longer,) = Append(2, CPU, Placement())([host.host, rows, first])
    return longer


def test_appending_keeps_the_shorter_state_and_moves_no_row(host):
    before = engine_for(CPU).traffic.on_host
    longer = append(host, plain(2))
    assert longer.host.data_ptr() == host.host.data_ptr()
    torch.testing.assert_close(longer.fetch(), torch.cat([plain(), plain(2)], 2), rtol=0, atol=0)
    torch.testing.assert_close(host.fetch(), plain(), rtol=0, atol=0)
    assert engine_for(CPU).traffic.on_host == before


def test_two_continuations_of_one_state_are_independent(host):
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
def test_a_cropped_state_grows_in_place_once_the_longer_one_is_deleted(crop):
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


def test_a_cropped_state_does_not_overwrite_the_longer_one(host):
    longer = append(host[..., :-2, :], plain(1))
    torch.testing.assert_close(host.fetch(), plain(), rtol=0, atol=0)
    torch.testing.assert_close(longer.fetch(), torch.cat([plain()[:, :, :3], plain(1)], 2), rtol=0, atol=0)


def test_a_rearranged_cache_can_be_appended_to():
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
    longer = append(host, plain(1))  # would be a fork if the result of the first append were alive
    torch.testing.assert_close(append(host, plain(new), first).fetch(), expected, rtol=0, atol=0)
    del longer


def test_a_long_run_with_a_window_holds_only_a_few_windows():
    expected = plain(8)
    host = on_host(expected, CPU)
    for step in range(200):
        row = torch.full((2, 3, 1, 4), float(step))
        host = append(host, row, 1)
        expected = torch.cat([expected, row], 2)[:, :, 1:]
        assert store_of(host.host).used_bytes <= 5 * 8 * 96
    torch.testing.assert_close(host.fetch(), expected, rtol=0, atol=0)


def test_a_cropped_or_moved_window_shows_and_holds_only_its_rows():
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
    assert store_of(host.host).region.low > 0  # not copied: the rows before were released
    part = host[..., 1000:1100, :]
    del host
    gc.collect()
    assert host_memory().memory - before <= 1.2 * shown * 100 / length + 64 * 1024
    torch.testing.assert_close(part.fetch(), expected[:, :, 1000:1100], rtol=0, atol=0)


def test_a_host_tensor_rebuilt_by_a_graph_holds_its_rows(host):
    inner, meta = host.__tensor_flatten__()
    again = HostTensor.__tensor_unflatten__({name: getattr(host, name) for name in inner}, meta, None, None)
    assert again.lease is host.lease


def test_many_small_caches_take_little_more_memory_than_their_rows():
    gc.collect()
    before = host_memory()
    hosts = [on_host(plain(), CPU) for _ in range(100)]
    held = host_memory()
    assert held.rows - before.rows == 100 * plain().nbytes
    assert held.memory - before.memory <= 100 * 64 * 1024
    assert len(hosts) == held.stores - before.stores


def test_rows_that_outgrow_their_addresses_move_to_twice_as_many(monkeypatch):
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


def test_writing_rows_of_another_state_raises(host):
    longer = append(host, plain(1))
    with pytest.raises(RuntimeError, match=r"another tensor also shows.*clone\(\)"):
        longer[:, :, 0].zero_()
    with pytest.raises(RuntimeError, match="another tensor also shows"):
        host.zero_()
    longer[:, :, 5:].zero_()  # rows of the longer one only
    del longer
    host.zero_()
    assert host.fetch().sum() == 0


def test_a_write_waits_for_a_running_copy():
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


def test_deleted_tensors_hold_no_memory():
    gc.collect()
    before = host_memory()
    host = on_host(plain(), CPU)
    for _ in range(20):
        host = append(host.index_select(0, torch.tensor([1, 0])), torch.zeros(2, 3, 1, 4))
    del host
    gc.collect()
    assert host_memory() == before
