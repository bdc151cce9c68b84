"""The plumbing of `benchmarks.gpu`, which has not run on a GPU: what it asks for, how long it takes, what it keeps."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, gpu, measure
from benchmarks.gpu import GIB, PARTS, K, Part
from benchmarks.methods import Setup
from benchmarks.results_file import Results
from benchmarks.workers import WorkerFailed

LLAMA = Setup("llama-3-8b", 32, 144 * K, dtype="bfloat16", device="cuda")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "gpu.json", measure.machine())


def test_the_first_run_of_ten_minutes_has_ours_beside_stock_at_the_papers_length(results: Results) -> None:
    """Even on the slowest device meant, and with the tests before it."""
    left = 570 * 5 / 6
    first, second = PARTS[:2]
    assert (first.method, second.method) == ("mom", "inductor")
    for part in (first, second):
        assert gpu.due(part, LLAMA, results, 1e9) == part.lengths
        left -= gpu.EXPECTED_REST
    assert gpu.due(first, LLAMA, results, left)[:2] == (16 * K, 64 * K)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.method}-{part.memory}")
def test_a_length_that_would_not_be_done_waits_for_the_next_run(part: Part, results: Results) -> None:
    *_, last = part.lengths
    needed = gpu.EXPECTED_REST + sum(gpu.expected_seconds(replace(LLAMA, tokens=n)) for n in part.lengths)
    assert gpu.due(part, LLAMA, results, needed + 1) == part.lengths
    assert last not in gpu.due(part, LLAMA, results, needed - 1)
    assert gpu.due(part, LLAMA, results, gpu.EXPECTED_REST) == ()


def test_what_is_known_is_not_measured_again(results: Results) -> None:
    part = PARTS[0]
    results.keep(part.key(16 * K), {"method": "mom", "error": "out of memory"})
    assert gpu.due(part, LLAMA, results, 1e9) == part.lengths[1:]


def test_the_parts_do_not_measure_one_thing_twice() -> None:
    keys = [part.key(tokens) for part in PARTS for tokens in part.lengths]
    assert len(set(keys)) == len(keys)
    assert {"mom", "inductor", "eager", "mlp", "chunked", "chunked-offload", "offload", "prefill-only", "mom-host"} == {
        part.method for part in PARTS
    }
    assert {part.memory for part in PARTS} == {None, 24 * GIB, 80 * GIB}


def test_no_gpu_test_is_left_out() -> None:
    folder = Path(__file__).parent
    marked = {file.name for file in folder.rglob("test_*.py") if f"mark.{'gpu'}" in file.read_text()}
    assert marked == {Path(name).name for name in gpu.GPU_TESTS}


class Fake:
    """A worker of which every length takes no time, but for those that fail."""

    failing: int = 0
    asked: list[dict[str, Any]]

    def __init__(self, module: str, spec: dict[str, Any], **_: Any) -> None:
        self.left = list(spec["lengths"])
        type(self).asked.append(spec)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def row(self) -> dict[str, Any]:
        tokens = self.left.pop(0)
        if tokens == self.failing:
            raise WorkerFailed("benchmarks.cells: exit status 1")
        return {"tokens": tokens, "peak": 1 << 20, "reserved": None, "first": 1.0, "seconds": [0.5]}


def test_a_process_that_fails_is_a_result_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    monkeypatch.setattr(Fake, "asked", [], raising=False)
    monkeypatch.setattr(Fake, "failing", 64 * K)
    monkeypatch.setattr(gpu, "Worker", Fake)
    results.data["rates"] = {"flops": 1.0, "bandwidth": 1.0}
    options = gpu.parse(["--skip-tests", "--budget", "1e9", "--methods", "mom", "mom-host"])
    gpu.run(options, results)
    first = PARTS[0]
    assert "exit status 1" in results.cells[first.key(64 * K)]["error"]
    assert first.key(144 * K) not in results.cells, "what was not tried is not told of"
    capped = Part("mom-host", (), 80 * GIB)
    assert results.cells[capped.key(455 * K)]["setup"]["tokens"] == 455 * K
    assert {spec["method"] for spec in Fake.asked} == {"mom", "mom-host"}


def test_a_long_prompt_is_prefilled_once_after_its_graphs_are_compiled(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    monkeypatch.setattr(Fake, "asked", [], raising=False)
    monkeypatch.setattr(gpu, "Worker", Fake)
    rows = list(gpu.run_part(Part("mom", (455 * K,)), LLAMA, (455 * K,), 1e9))
    assert [row["tokens"] for row in rows] == [455 * K]
    (spec,) = Fake.asked
    assert spec["lengths"] == [*gpu.SHORT, 455 * K] and spec["once"] <= 455 * K


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
    reason = measure.out_of_memory(error)
    assert reason is not None and reason.startswith("out of memory: ") and reason.endswith("20.25 GiB.")


def test_another_error_is_not_taken_for_it() -> None:
    assert measure.out_of_memory(wrapped(ValueError("a size"), "backend='mom' raised")) is None


SPEC = {
    "method": "eager", "setup": {"shape": "narrow", "layers": 1, "tokens": 64}, "lengths": [32, 64], "repeats": 1,
    "steps": 0, "limit": None,
}  # fmt: skip


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line[5:]) for line in capsys.readouterr().out.splitlines() if line.startswith("@row ")]


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
    monkeypatch.setattr("sys.stdin", io.StringIO())
    cells.worker(dict(SPEC))
    first, second = rows_of(capsys)
    assert first == {"method": "eager", "tokens": 32, "error": "out of memory: " + str(OUT).splitlines()[0]}
    assert second["tokens"] == 64 and second["peak"] > 0 and "error" not in second


def test_from_a_length_on_one_call_is_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    cells.worker({**SPEC, "once": 64})
    short, long = rows_of(capsys)
    assert short["first"] > 0 and len(short["seconds"]) == 1
    assert long["first"] is None and len(long["seconds"]) == 1 and long["peak"] > short["peak"]


def test_any_other_error_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise ValueError("a size")

    monkeypatch.setattr(cells, "figures", wrong)
    with pytest.raises(ValueError, match="a size"):
        cells.worker(dict(SPEC))


def test_what_the_allocator_had_is_shown_where_there_is_one() -> None:
    row: dict[str, Any] = {"method": "mom", "setup": {"tokens": 64}, "memory": 24 * GIB, "peak": 3 << 20}
    row |= {"first": 1.0, "seconds": [0.5], "reserved": 9 << 20}
    assert "9 MiB reserved" in gpu.show(row) and "in 24 GiB" in gpu.show(row)
    assert "reserved" not in gpu.show({**row, "reserved": None})
    assert "out of memory" in gpu.show({**row, "error": "out of memory: so much"})
