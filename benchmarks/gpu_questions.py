"""A process that answers one question about a GPU, for `benchmarks.gpu`. Each figure is a row as soon as it is known.

Terms
-----
host    seconds until a call has returned, before the device is synchronised
wall    seconds until the device has finished, too. If `host` is as long, the device waits for its host

Rows of a prefill and of decode steps:

    first                       of a length: seconds of the first call, compilation included
    host, wall                  of a later call, or of a decode step (`step`; `masked`: with an attention mask)
    peak, reserved              bytes above weights and inputs, and bytes that the allocator had reserved
    kernels, launches           of one call: names, counts and milliseconds of the longest kernels, and the number of
                                launches. A profiler is active then, so its times are separate
    error                       why a length or a step has no figure; the others stay
    rates                       rates of the device
    report                      what mom did to the model
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import measure, models, physical, workers
from benchmarks.methods import Setup

Row = dict[str, Any]
#: Timed calls of each kind.
PREFILLS, STEPS, MASKED_STEPS = 3, 14, 8
#: Number of kernels to list, the longest first, and characters of their names.
NAMED, NAME = 14, 60
#: Bytes that are copied to measure the link.
COPIED = 1 << 30


@dataclass(frozen=True)
class Question:
    """A question: `kind` is "rates", "decode", "prefill", "host" or "weights"; `seconds` is its limit."""

    name: str
    asks: str
    kind: str
    method: str = "mom"
    seconds: float = 120
    cudnn: bool = True
    rows: int | str = "auto"


QUESTIONS = (
    Question("rates", "what the device reaches", "rates", "eager", 60),
    Question("decode eager", "is decode mended?", "decode", "eager", 70),
    Question("decode mom", "is decode mended?", "decode"),
    Question("decode mom, cuDNN off", "is decode mended?", "decode", cudnn=False),
    Question("prefill mom", "prefill beside eager mode and stock; host or device bound; which kernels", "prefill"),
    Question("prefill eager", "prefill beside eager mode and stock", "prefill", "eager", 70),
    Question("prefill inductor", "prefill beside eager mode and stock", "prefill", "inductor"),
    Question("prefill mom, 1024 rows", "rows of `auto` beside fixed ones", "prefill", rows=1024),
    Question("prefill mom, 2048 rows", "rows of `auto` beside fixed ones", "prefill", rows=2048),
    Question("host", "the cache on the host", "host"),
    Question("weights", "the weights on the host", "weights"),
    Question("decode inductor", "is decode mended?", "decode", "inductor"),
)


def answer(question: Question, setup: Setup, lengths: list[int]) -> None:
    """Emit the rows of a question at these lengths. Decode steps follow the first length only."""
    if question.kind == "rates":
        workers.row({"rates": rates(setup.device, setup.dtype)})
        return
    if setup.device == "cpu":
        measure.watch_cpu()
    if not question.cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    workers.step("model")
    model = prepared(question, setup, max(lengths))
    for number, tokens in enumerate(lengths):
        call = partial(models.prefill, model, models.tokens(model, tokens).to(setup.device), cache=True)
        if question.kind != "decode":
            _or_why_not({"tokens": tokens}, partial(prefills, call, setup.device, tokens))
        if number == 0 and question.kind != "prefill":
            _or_why_not({"tokens": tokens, "step": None}, partial(steps, model, call, setup.device))
    if question.method == "mom":
        reports()


def prepared(question: Question, setup: Setup, longest: int) -> Any:
    """Return the model, compiled by the question's method."""
    dtype = getattr(torch, setup.dtype)
    made_on = "cpu" if question.kind == "weights" else setup.device
    places = longest + STEPS + MASKED_STEPS + 64
    model = models.llama(setup.shape, setup.layers, dtype=dtype, device=made_on, seq=places)
    if question.kind == "weights":
        import mom_compile
        from mom_compile.weights.offload import least_budget

        began = time.perf_counter()
        mom_compile.offload_weights(model, setup.device, memory_budget=least_budget(model))
        workers.row({"offload_weights": time.perf_counter() - began})
    if question.method == "mom":
        options = {"kv_offload": question.kind == "host", "strict": True, "mini_seq_len": question.rows}
        model.compile(backend="mom", options=options)
    elif question.method != "eager":
        model.compile(backend=question.method)
    return model


def prefills(call: Callable[[], Any], device: str, tokens: int) -> None:
    _, _, first = timed(call, device)
    workers.row({"tokens": tokens, "first": first})
    for _ in range(PREFILLS):
        _, host, wall = timed(call, device)
        workers.row({"tokens": tokens, "host": host, "wall": wall})
    report = measure.peak_bytes(call, device)
    workers.row({"tokens": tokens, "peak": report.peak, "kept": report.kept, "reserved": report.reserved})
    profiled(call, device, {"tokens": tokens})


def steps(model: Any, call: Callable[[], Any], device: str) -> None:
    """Measure decode steps after a prefill, without and with the mask of `generate()`."""
    (_, cache), _, first = timed(call, device)
    workers.row({"first": first})
    kept, token = models.keeping(cache, model), torch.full((1, 1), 7, device=device)

    @torch.no_grad()
    def step(mask: torch.Tensor | None = None) -> Any:
        return model(input_ids=token, attention_mask=mask, **kept, use_cache=True, logits_to_keep=1)

    for number in range(STEPS):
        _, host, wall = timed(step, device)
        workers.row({"step": number, "host": host, "wall": wall})
    profiled(step, device, {"step": STEPS})
    for number in range(MASKED_STEPS):
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long, device=device)
        _, host, wall = timed(partial(step, mask), device)
        workers.row({"step": number, "masked": True, "host": host, "wall": wall})


def timed(call: Callable[[], Any], device: str) -> tuple[Any, float, float]:
    """Return the result of a call, the seconds until it returned, and until the device finished."""
    wait(device)
    began = time.perf_counter()
    result = call()
    returned = time.perf_counter()
    wait(device)
    return result, returned - began, time.perf_counter() - began


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def profiled(call: Callable[[], Any], device: str, of: Row) -> None:
    """Emit the kernels of one call."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        call()
        wait(device)
    events = found.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    longest = sorted(events, key=lambda event: -getattr(event, key))[:NAMED]
    named = [(event.key[:NAME], event.count, round(getattr(event, key) / 1e3, 3)) for event in longest]
    workers.row({**of, "kernels": named, "launches": sum(e.count for e in events if "aunchKernel" in e.key)})


def rates(device: str, dtype: str) -> Row:
    """Measure FLOPS of a large product, and bytes per second of a copy on the device and from pinned memory."""
    found = asdict(physical.measure_rates(device, dtype))
    if device != "cpu":
        source = torch.empty(COPIED, dtype=torch.uint8).pin_memory()
        target = torch.empty(COPIED, dtype=torch.uint8, device=device)
        found["link"] = COPIED / min(measure.seconds(partial(target.copy_, source), device) for _ in range(3))
    return found


def reports() -> None:
    import mom_compile

    for report in mom_compile.reports():
        said = {"headline": report.headline, "fallback": report.fallback, "eager": report.eager_pieces}
        workers.row({"report": said | {"seconds": report.compile_seconds, "rows": report.rows}})


def _or_why_not(of: Row, measured: Callable[[], None]) -> None:
    """Emit rows; if memory runs out, a last row that says so."""
    try:
        measured()
    except Exception as error:
        reason = measure.out_of_memory(error)
        if reason is None:
            raise
        workers.row({**of, "error": reason})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def worker(spec: Row) -> None:
    answer(Question(**spec["question"]), Setup(**spec["setup"]), spec["lengths"])


if __name__ == "__main__":
    os.environ.setdefault("MOM_COMPILE_PROGRESS", "0")
    worker(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
