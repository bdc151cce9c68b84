"""The yardstick: a known pattern of allocations has a known peak."""

from __future__ import annotations

import threading

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import MIB


def floats(mib: float) -> torch.Tensor:
    return torch.empty(int(mib * MIB) // 4)


def test_peak_is_the_highest_sum_not_the_total() -> None:
    def fn() -> torch.Tensor:
        first = floats(4)
        second = floats(2)
        del first
        third = floats(3)
        del second
        return third

    report = measure.peak_bytes(fn)
    assert report.peak == 6 * MIB
    assert report.kept == 3 * MIB


def test_what_was_live_before_does_not_count() -> None:
    weights = floats(8)
    assert measure.peak_bytes(lambda: weights.neg_()).peak == 0
    assert measure.peak_bytes(lambda: weights.neg()).peak == 8 * MIB


def test_memory_released_inside_makes_room() -> None:
    measure.watch_cpu()
    held = [floats(8)]

    def fn() -> torch.Tensor:
        held.clear()
        return floats(6)

    report = measure.peak_bytes(fn)
    assert report.peak == 0
    assert report.kept == -2 * MIB


def test_temporaries_inside_an_operator_count() -> None:
    matrix = torch.randn(512, 512)  # 1 MiB
    report = measure.peak_bytes(lambda: matrix.cumsum(0).sort(0))
    # The sum, the sorted values and their int64 indices, at least.
    assert report.peak >= 4 * MIB


def test_other_threads_count() -> None:
    def fn() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: kept.append(floats(5)))
        thread.start()
        thread.join()
        return kept

    assert measure.peak_bytes(fn).peak == 5 * MIB


def test_compiled_code_counts() -> None:
    @torch.compile(backend="inductor")
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ x) @ x

    x = torch.randn(512, 512)
    fn(x)
    report = measure.peak_bytes(lambda: fn(x))
    assert 1 * MIB < report.peak <= 3 * MIB
    assert report.kept == 1 * MIB


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="knows cpu and cuda"):
        measure.peak_bytes(lambda: None, device="meta")


@pytest.mark.gpu
def test_peak_on_cuda() -> None:
    def fn() -> torch.Tensor:
        first = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        second = torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
        del first
        return second

    report = measure.peak_bytes(fn, device="cuda")
    assert (report.peak, report.kept) == (6 * MIB, 2 * MIB)


def test_alternate_takes_turns() -> None:
    order: list[str] = []
    times = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert "".join(order) == "abbaab"
    assert [len(times["a"]), len(times["b"])] == [3, 3]


def test_median_ratio_ignores_an_outlier() -> None:
    assert measure.median_ratio({"a": [1.0, 1.0, 50.0], "b": [2.0, 2.0, 2.0]}, "a", "b") == 0.5


def test_the_stamp_names_versions_and_no_host() -> None:
    import platform

    stamp = measure.machine()
    assert stamp["torch"] == torch.__version__
    assert platform.node() not in [str(value) for value in stamp.values()]
    assert stamp["date"] in measure.describe_machine(stamp)


def test_a_view_shows_its_rows_and_holds_all_of_what_it_is_a_view_of() -> None:
    whole = floats(2)
    assert measure.shown_and_held([whole[: len(whole) // 4], whole[-8:]]) == (MIB // 2 + 32, 2 * MIB)
