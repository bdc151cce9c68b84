"""Pieces of a decode step as CUDA graphs, with a stub in place of the capture: this has never run on a GPU."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch

import mom_compile
from mom_compile.config import parse_options
from mom_compile.runtime import cuda_graphs
from mom_compile.runtime.cuda_graphs import MOST_MOVED, WARM_UP, Recorded, Replayed, may_be_recorded
from tests.models import ids, tiny

CPU = torch.device("cpu")


class Recorder:
    """Captures like CUDA: results are written to the same tensors each time, and inputs are read from the same ones."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.fails = False

    def __call__(self, run: Any, inputs: list[Any]) -> Recorded:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        results = tuple(torch.full_like(result, torch.nan) for result in run(list(inputs)))

        def replay() -> None:
            self.replayed += 1
            for own, result in zip(results, run(list(inputs)), strict=True):
                own.copy_(result)

        return Recorded(replay, tuple(inputs), results)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setitem(cuda_graphs.RECORDS, "cpu", found)
    return found


def piece(arguments: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A piece of a weight and another input. It empties its argument list, as pieces do."""
    weight, x = arguments
    arguments.clear()
    return x @ weight, x + 1


def replayed(copied: tuple[int, ...] = ()) -> Replayed:
    return Replayed(piece, CPU, (0,), copied)


def call(step: Replayed, weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = step([weight, x])
    for result, expected in zip(results, piece([weight, x]), strict=True):
        assert torch.equal(result, expected)
    return tuple(results)


def test_a_piece_is_captured_after_the_warm_up_and_replayed(recorder: Recorder) -> None:
    step, weight = replayed(), torch.randn(4, 4)
    for number in range(6):
        call(step, weight, torch.randn(2, 4))
        assert (recorder.recorded, recorder.replayed) == ((1, number - WARM_UP + 1) if number >= WARM_UP else (0, 0))


def test_written_weights_take_effect_and_moved_ones_are_recaptured(recorder: Recorder) -> None:
    step, weight = replayed(), torch.randn(4, 4)
    for _ in range(WARM_UP + 1):
        call(step, weight, torch.randn(2, 4))
    weight.mul_(2)
    call(step, weight, torch.randn(2, 4))
    assert recorder.recorded == 1
    call(step, weight.clone(), torch.randn(2, 4))
    assert recorder.recorded == 2


def test_results_are_valid_until_the_next_run_and_copied_ones_longer(recorder: Recorder) -> None:
    step, weight = replayed(copied=(1,)), torch.randn(4, 4)
    for _ in range(WARM_UP):
        call(step, weight, torch.randn(2, 4))
    x = torch.randn(2, 4)
    first, kept = call(step, weight, x)
    call(step, weight, torch.randn(2, 4))
    assert torch.equal(kept, x + 1) and not torch.equal(first, x @ weight)


def test_another_thread_runs_the_piece_itself(recorder: Recorder) -> None:
    step, weight = replayed(), torch.randn(4, 4)
    for _ in range(WARM_UP + 1):
        call(step, weight, torch.randn(2, 4))
    threads = [threading.Thread(target=call, args=(step, weight, torch.randn(2, 4))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.replayed == 1


def test_a_piece_that_cannot_be_captured_runs_directly(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    step, weight = replayed(), torch.randn(4, 4)
    recorder.fails = True
    for _ in range(WARM_UP + 3):
        call(step, weight, torch.randn(2, 4))
    assert step.off and caplog.text.count("cannot be captured") == 1


def test_pickling_omits_the_captured_graph(recorder: Recorder) -> None:
    step, weight = replayed((1,)), torch.randn(4, 4)
    for _ in range(WARM_UP + 1):
        call(step, weight, torch.randn(2, 4))
    again = pickle.loads(pickle.dumps(step))
    assert again.recorded is None and (again.fixed, again.copied) == ((0,), (1,))
    call(again, weight, torch.randn(2, 4))


def test_only_small_inputs_on_one_device_are_captured() -> None:
    small, large = ((1, 1, 8), torch.float32, CPU), ((MOST_MOVED,), torch.float32, CPU)
    assert may_be_recorded([large, small], {0}, CPU)
    assert not may_be_recorded([large, small], (), CPU)
    assert not may_be_recorded([small, None], {0}, CPU)
    assert not may_be_recorded([small], (), torch.device("cuda", 0))


def test_the_option() -> None:
    assert not parse_options({}).decode_cuda_graphs and parse_options({"decode_cuda_graphs": True}).decode_cuda_graphs
    with pytest.raises(ValueError, match="True or False"):
        parse_options({"decode_cuda_graphs": 1})


@pytest.mark.parametrize("asked", [True, False])
def test_decode_steps_are_captured_if_requested(
    asked: bool, recorder: Recorder, eager_pieces: None, stock_is_eager: None
) -> None:
    """Without a cache, so that every piece has the same shapes in each step. Logits kept by the caller stay valid."""
    model = tiny("Llama", num_hidden_layers=6)
    tokens = [ids(1, 1, seed) for seed in range(WARM_UP + 3)]
    with torch.no_grad():
        expected = [model(input_ids=token, use_cache=False).logits for token in tokens]
        model.compile(backend="mom", options={"strict": True, "decode_cuda_graphs": asked})
        actual = [model(input_ids=token, use_cache=False).logits for token in tokens]
    for ours, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5)
    (report,) = mom_compile.reports()
    assert report.layer_pieces == 7
    assert (recorder.recorded, recorder.replayed) == ((7, 7 * 3) if asked else (0, 0))
