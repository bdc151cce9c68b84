"""Prefill with a model that is divided among ranks: what each rank holds, and how much communication is hidden.

    torchrun --nproc-per-node 2 -m examples.tensor_parallel                    a small random Llama, gloo ranks on a CPU
    torchrun --nproc-per-node 2 -m examples.tensor_parallel --model DIR        another model, NCCL where there are GPUs

    model = AutoModelForCausalLM.from_pretrained(DIR, tp_plan="auto")
    model.compile(backend="mom")

Each rank runs the prefill with stock Inductor, with mom without overlap, and with mom. Peaks are exact: bytes that the
prefill allocates above weights and inputs, the results included. `--delay` adds milliseconds to each collective of a
loop, as a slower link would, and not to those of stock Inductor; `--delay 0` compares the times of all. On a GPU
the host does not wait for a collective, so the waiting times are not measured there. The CUDA path has never run.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import mom_compile
from benchmarks import measure
from mom_compile.report.units import in_units
from mom_compile.runtime import parted

#: Calls that are timed, after one that compiles and one whose peak is measured.
TIMED = 5


@dataclass(frozen=True)
class Measured:
    """What one rank measured of one way to run.

    Attributes
    ----------
    peak, expected
        Bytes of a prefill above weights and inputs; None where nothing is expected.
    seconds, waited
        Median seconds of a prefill, and of them those in which the rank waited for collectives of loops.
    summary
        The line of the report on collectives.
    difference
        The largest difference of the last logits from eager mode's, relative to the largest logit.
    """

    peak: int
    expected: int | None
    seconds: float
    waited: float
    summary: str
    difference: float


def small_checkpoint(folder: Path, layers: int = 4, width: int = 512) -> None:
    """Save a Llama with random weights."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": width // 8, "vocab_size": 16 * width}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 1 << 17}
    config = transformers.LlamaConfig(**sizes, **heads, **tokens)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def load(folder: Path) -> Any:
    """Return this rank's part of a checkpoint."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `tp_plan` has another place from transformers 5.18 on
        return transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype="auto").eval()


def local_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the parameters that this rank holds."""
    local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in local)


def measure_ways(model: Any, ids: torch.Tensor, ways: Sequence[str], delay: float) -> dict[str, Measured]:
    """Measure each way to prefill on this rank; all ranks call it together."""
    with torch.no_grad():
        expected = last_logits(model, ids)
        return {way: _measure(model, ids, way, expected, delay) for way in ways}


def _measure(model: Any, ids: torch.Tensor, way: str, expected: torch.Tensor, delay: float) -> Measured:
    torch._dynamo.reset()
    if way == "inductor":
        model.compile(backend="inductor")
    else:
        model.compile(backend="mom", options={"overlap_collectives": way == "mom"})
    found = last_logits(model, ids)
    difference = float((found - expected).abs().max() / expected.abs().max())
    peak = measure.peak_bytes(lambda: model(ids, logits_to_keep=1), ids.device).peak
    seconds, waited = [], []
    for _ in range(TIMED):
        dist.barrier()
        before = parted.WAITED.seconds
        with slower_link(delay):
            seconds.append(measure.seconds(lambda: model(ids, logits_to_keep=1), ids.device))
        waited.append(parted.WAITED.seconds - before)
    reports = mom_compile.reports()
    report = reports[0] if reports else None
    summary = str(report.communication) if report is not None and report.communication is not None else ""
    planned = report.expected_peak_bytes if report is not None and report.stages else None
    return Measured(peak, planned, statistics.median(seconds), statistics.median(waited), summary, difference)


def last_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids, logits_to_keep=1).logits
    return (found.full_tensor() if hasattr(found, "full_tensor") else found).float()


@contextlib.contextmanager
def slower_link(delay: float) -> Iterator[None]:
    """Let each collective of a loop take `delay` seconds longer."""
    begin, wait, ready = parted.begin_collective, parted.wait_for_collective, {}

    def begun(*arguments: Any) -> torch.Tensor:
        result = begin(*arguments)
        ready[id(result)] = time.perf_counter() + delay
        return result

    def waited(result: torch.Tensor) -> torch.Tensor:
        time.sleep(max(0.0, ready.pop(id(result)) - time.perf_counter()))
        return wait(result)

    patch: Callable[..., Any] = mock.patch.object
    with patch(parted, "begin_collective", begun), patch(parted, "wait_for_collective", waited):
        yield


def table(ranks: Sequence[tuple[int, dict[str, Measured]]], tokens: int, delay: float) -> str:
    """Return what the ranks measured as text. `ranks` has the bytes of weights and the measurements of each."""
    lines = [f"prefill of {tokens} tokens on {len(ranks)} ranks", ""]
    lines.append(f"{'rank':<6}{'weights':>10}  {'way':<20}{'peak':>10}{'expected':>10}{'time':>9}{'waited':>9}")
    for rank, (weights, ways) in enumerate(ranks):
        for number, (way, found) in enumerate(ways.items()):
            first = f"{rank:<6}{in_units(weights):>10}  " if number == 0 else " " * 18
            expected = "" if found.expected is None else in_units(found.expected)
            times = f"{found.seconds * 1e3:>6.0f} ms{found.waited * 1e3:>6.0f} ms"
            lines.append(f"{first}{way:<20}{in_units(found.peak):>10}{expected:>10}{times}")
    lines.append("")
    for rank, (_, ways) in enumerate(ranks):
        without, overlapped = ways["mom, no overlap"], ways["mom"]
        if without.waited > 0:
            hidden = 1 - overlapped.waited / without.waited
            lines.append(f"rank {rank}: {hidden:.0%} of the waiting is hidden by the next mini-sequence")
    lines += [ranks[0][1]["mom"].summary]
    if delay:
        lines.append(f"each collective of a loop took {delay * 1e3:g} ms longer than this machine needs, not stock's")
    worst = max(found.difference for _, ways in ranks for found in ways.values())
    return "\n".join([*lines, f"largest difference of the logits from eager mode: {worst:.1e} of the largest logit"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node 2 -m examples.tensor_parallel")
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint; default: a small random Llama")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--delay", type=float, default=2.0, help="milliseconds added to each collective of a loop")
    options = parser.parse_args(arguments)
    if not dist.is_torchelastic_launched():
        print(f"start it by {parser.prog}, which starts one process for each rank", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        measure.watch_cpu()
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, device = dist.get_rank(), "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as own:
        shared = [str(options.model or own)]
        if options.model is None and rank == 0:
            small_checkpoint(Path(own))
        dist.broadcast_object_list(shared)
        model = load(Path(shared[0]))
        dist.barrier()
    ids = torch.randint(3, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    ways = ("inductor", "mom, no overlap", "mom")
    found = (local_bytes(model), measure_ways(model, ids.to(device), ways, options.delay / 1e3))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if rank == 0:
        print(table(ranks, options.tokens, options.delay / 1e3))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
