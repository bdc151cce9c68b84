"""The plumbing of `benchmarks.gpu`, which has not run on a GPU: what it asks for, how long it takes, what it keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import gpu, measure
from benchmarks.models import SHAPES

LLAMA = SHAPES["llama-3-8b"]


def test_the_cache_is_kept_unless_it_is_said_otherwise() -> None:
    """Without one, stock Inductor would be measured with a mask of tokens x tokens."""
    assert gpu.parse([]).cache is True
    assert gpu.parse(["--no-cache"]).cache is False


@pytest.mark.parametrize("kv", [True, False])
@pytest.mark.parametrize("tests", [True, False])
def test_the_parts_take_no_more_than_the_budget_and_prefill_most_of_it(tests: bool, kv: bool) -> None:
    parts = gpu.limits(570, tests=tests, kv=kv)
    assert sum(parts.values()) == pytest.approx(570)
    assert parts["prefill"] == max(parts.values())
    assert (parts["tests"] > 0, parts["kv"] > 0) == (tests, kv)


@pytest.mark.parametrize("budget", [300, 570, 1200, 3600])
def test_the_kv_part_is_expected_to_finish_within_its_own_limit(budget: float) -> None:
    """Two workers, each of which prefills several times, makes the model and compiles."""
    limit = gpu.limits(budget, tests=True, kv=True)["kv"]
    tokens = gpu.kv_tokens(LLAMA, 32, 128 * 1024, limit)
    took = gpu.KV_REST + gpu.KV_PREFILLS * gpu.prefill_seconds(LLAMA, 32, tokens)
    assert tokens == 0 or 2 * took <= limit
    assert tokens == {300: 0, 570: 32 * 1024, 1200: 64 * 1024, 3600: 128 * 1024}[budget]
    assert gpu.kv_tokens(LLAMA, 32, 16 * 1024, limit) <= 16 * 1024


def test_an_eight_billion_prefill_is_some_fourteen_teraflops_for_a_thousand_tokens() -> None:
    assert gpu.prefill_seconds(LLAMA, 32, 1000) * gpu.EXPECTED_FLOPS == pytest.approx(14.2e12, rel=0.02)


class Compiling(RuntimeError):
    """As compilers wrap what they meet."""


def wrapped(cause: BaseException, message: str) -> Compiling:
    try:
        try:
            raise cause
        except BaseException as inner:
            raise Compiling(message) from inner
    except Compiling as error:
        return error


OUT = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.25 GiB.\nmore of it")


@pytest.mark.parametrize(
    "error",
    [
        OUT,
        wrapped(OUT, "backend='inductor' raised"),
        wrapped(wrapped(OUT, "InductorError"), "backend='mom' raised"),
        Compiling("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.25 GiB."),
    ],
    ids=["itself", "wrapped", "wrapped twice", "in a message alone"],
)
def test_out_of_memory_is_known_however_it_is_wrapped(error: Exception) -> None:
    reason = gpu.out_of_memory(error)
    assert reason is not None and reason.startswith("out of memory: ") and reason.endswith("20.25 GiB.")


def test_another_error_is_not_taken_for_it() -> None:
    assert gpu.out_of_memory(wrapped(ValueError("a size"), "backend='mom' raised")) is None


def cells(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line[5:]) for line in capsys.readouterr().out.splitlines() if line.startswith("@row ")]


SPEC = {
    "backend": "eager", "device": "cpu", "shape": "narrow", "layers": 1, "sizes": [32, 64], "repeats": 1, "cache": True
}  # fmt: skip


def test_running_out_of_memory_while_compiling_is_a_record_and_the_next_length_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = measure.seconds
    failing = [wrapped(OUT, "backend='mom' raised")]

    def first_fails(fn: Any, device: str = "cpu") -> float:
        if failing:
            raise failing.pop()
        return seconds(fn, device)

    monkeypatch.setattr(measure, "seconds", first_fails)
    gpu.worker(SPEC)
    first, second = cells(capsys)
    assert first == {"backend": "eager", "tokens": 32, "error": "out of memory: " + str(OUT).splitlines()[0]}
    assert second["tokens"] == 64 and second["peak"] > 0 and "error" not in second
    assert "out of memory" in gpu.show(first) and "peak" in gpu.show(second)


def test_any_other_error_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise ValueError("a size")

    monkeypatch.setattr(gpu, "measure_cell", wrong)
    with pytest.raises(ValueError, match="a size"):
        gpu.worker(SPEC)


def test_what_the_allocator_had_is_reported_where_there_is_one() -> None:
    cell = {"backend": "mom", "tokens": 64, "peak": 3 << 20, "first": 1.0, "seconds": [0.5], "reserved": 9 << 20}
    assert "9 MiB reserved" in gpu.show(cell)
    assert "reserved" not in gpu.show({**cell, "reserved": None})
