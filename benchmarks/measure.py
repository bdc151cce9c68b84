"""Measurement of peak memory and time, for benchmarks, examples and tests.

Terms
    live       bytes of tensor storage that are allocated on one device
    peak       the highest `live` while a function runs, above that at its start. Weights and inputs exist by then, so
               it is the peak *above the weights*
    kept       what is still live when the function has returned (its result, a cache)

On the CPU a small allocator (`cpu_allocator.cpp`) in front of PyTorch's counts every allocation: exact, any thread, no
profiler. On CUDA it is `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("cpu_allocator.cpp")
_BUILD = Path(__file__).resolve().parent.parent / "build" / "measure"
MIB = 2**20


@dataclass(frozen=True)
class PeakReport:
    """Bytes above those that were live when the measured function started.

    `reserved` is the peak that PyTorch's allocator had reserved on the device, in total; None on a CPU.
    """

    peak: int
    kept: int
    device: str
    reserved: int | None = None

    def __str__(self) -> str:
        return f"peak {self.peak / MIB:.1f} MiB, kept {self.kept / MIB:.1f} MiB ({self.device})"


class _CpuCounter:
    """The counting allocator, installed for the lifetime of the process."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(_build_allocator()))
        library.live_bytes.restype = library.peak_bytes.restype = ctypes.c_int64
        library.install()
        self.live: Callable[[], int] = library.live_bytes
        self.peak: Callable[[], int] = library.peak_bytes
        self.reset_peak: Callable[[], None] = library.reset_peak
        library.set_limit.argtypes = [ctypes.c_int64]
        self.set_limit: Callable[[int], None] = library.set_limit


def _build_allocator() -> Path:
    """Compile the allocator against the headers of the running PyTorch, once."""
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target = _BUILD / f"cpu_allocator-{key}.so"
    if target.exists():
        return target
    _BUILD.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")  # several test workers may build at once
    command = [os.environ.get("CXX", "g++"), "-O2", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}"]
    command += [str(_SOURCE), "-o", str(unfinished), f"-L{root / 'lib'}", "-lc10"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as missing:
        raise RuntimeError(f"measuring CPU memory needs a C++ compiler: {command[0]} not found; set CXX") from missing
    except subprocess.CalledProcessError as failed:
        raise RuntimeError(f"the counting allocator did not compile:\n{failed.stderr}") from failed
    unfinished.replace(target)
    return target


@functools.cache
def _cpu_counter() -> _CpuCounter:
    return _CpuCounter()


def watch_cpu() -> None:
    """Start counting. Earlier allocations are not seen, so call it before the model is built."""
    _cpu_counter()


def live_bytes(device: str | torch.device = "cpu") -> int:
    """Return the bytes that are live now; on a CPU those allocated since `watch_cpu`."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _cpu_counter().live()


@contextmanager
def at_most(size: int | None, device: str | torch.device = "cpu") -> Iterator[None]:
    """Limit allocations to `size` bytes above what is live now; more raises `torch.OutOfMemoryError`.

    On CUDA the limit is on all that the allocator has reserved, as on a smaller card. None: no limit.
    """
    device = torch.device(device)
    if size is None:
        yield
    elif device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated(device) + size) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        counter = _cpu_counter()
        gc.collect()
        counter.set_limit(counter.live() + size)
        try:
            yield
        finally:
            counter.set_limit(-1)


def out_of_memory(error: BaseException) -> str | None:
    """Return what an error says about device memory if that is its cause, however often it was wrapped. A compiler's
    error has
    the cause in its chain or only in its message."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        lines = [line for line in str(cause).splitlines() if "out of memory" in line.lower()]
        if isinstance(cause, torch.OutOfMemoryError) or lines:
            return f"out of memory: {(lines or [type(cause).__name__])[0].strip()}"
        cause = cause.__cause__ or cause.__context__
    return None


def peak_bytes(fn: Callable[[], Any], device: str | torch.device = "cpu") -> PeakReport:
    """Run `fn` once and report its peak. Its result is alive at the end of the measurement, then dropped.

    On the CPU, memory that was allocated before the first call in this process is not known: releasing it inside `fn`
    does not lower the count. Call `watch_cpu` early where that matters.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_peak(fn, device)
    if device.type != "cpu":
        raise ValueError(f"peak_bytes knows cpu and cuda, not {device}")
    counter = _cpu_counter()
    gc.collect()
    counter.reset_peak()
    before = counter.live()
    result = fn()
    peak, after = counter.peak(), counter.live()
    del result
    return PeakReport(peak - before, after - before, str(device))


def _cuda_peak(fn: Callable[[], Any], device: torch.device) -> PeakReport:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = fn()
    torch.cuda.synchronize(device)
    peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    del result
    return PeakReport(peak - before, after - before, str(device), reserved)


def shown_and_held(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Return the bytes that tensors show, and the bytes of their storages: a view keeps its whole base."""
    tensors = list(tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(t.numel() * t.element_size() for t in tensors), sum(storages.values())


def seconds(fn: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Return the wall time of one call."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: str | torch.device = "cpu"
) -> dict[str, list[float]]:
    """Time each function `repeats` times in turn (A B A B ...), so that drift of the machine affects all equally.

    The order is reversed every other time, so that no function always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        names = list(functions)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            times[name].append(seconds(functions[name], device))
    return times


def median_ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the ratio of medians; below 1, `name` is faster."""
    return statistics.median(times[name]) / statistics.median(times[base])


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the model of the processor, never the host name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return versions, processor, threads and date of a measurement."""
    stamp: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "mom_compile": _installed("mom_compile"),
        "system": sys.platform,
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        stamp["gpu"] = torch.cuda.get_device_name()
        stamp["cuda"] = torch.version.cuda
    return stamp


def describe_machine(stamp: Mapping[str, Any] | None = None) -> str:
    """Return one line for a table."""
    stamp = machine() if stamp is None else stamp
    hardware = stamp.get("gpu") or f"{stamp['cpu']}, {stamp['cores']} cores, {stamp['threads']} threads"
    return (
        f"torch {stamp['torch']}, transformers {stamp['transformers']}, python {stamp['python']}; "
        f"{hardware}; {stamp['date']}"
    )
