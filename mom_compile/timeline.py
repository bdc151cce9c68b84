"""A memory timeline: what a program is expected to take on the device, step by step, beside what it took.

    with measured_steps() as measured:
        model(...)
    report.plot("memory.png", measured)

Terms
-----
moment   What is expected of one step: the storages that exist throughout it, and its own scratch beside them.
measured What is live when a step has returned, above what was live before the program ran. That is to be compared with
         the storages: a step's scratch has come and gone by then.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mom_compile.runtime.program import Step, observing
from mom_passes.program.memory import Memory
from mom_passes.program.program import LoopStep

MIB = 1 << 20


@dataclass(frozen=True)
class StepBytes:
    """What was live when a step had returned, in bytes above what was live at the start."""

    name: str
    bytes: int


#: One number for each step of a program, or what `measured_steps` gives.
Measured = Sequence[int] | Sequence[StepBytes]


@contextlib.contextmanager
def measured_steps(live_bytes: Callable[[], int] | None = None) -> Iterator[list[StepBytes]]:
    """Context manager that records the live bytes after each step of every compiled program.

    Weights and inputs must exist when the context begins: sizes are relative to that moment. Pass the list to
    `Report.plot`.

    Parameters
    ----------
    live_bytes : callable, optional
        Returns the number of bytes that are live now. `None` takes `torch.cuda.memory_allocated` (never run on a GPU).
        PyTorch has no such counter on a CPU, so a CPU needs a function.

    Yields
    ------
    list of StepBytes
        Grows by one entry for each step, with the name of the step and the bytes above those at the start.

    Raises
    ------
    ValueError
        If `live_bytes` is `None` on a machine without CUDA.
    """
    if live_bytes is None:
        if not torch.cuda.is_available():
            raise ValueError("PyTorch does not count live bytes on a CPU: give a function, measured_steps(live_bytes)")
        live_bytes = torch.cuda.memory_allocated
    count, before, found = live_bytes, live_bytes(), list[StepBytes]()

    def note(step: Step, results: Sequence[Any]) -> None:
        found.append(StepBytes(step.name, count() - before))

    with observing(note):
        yield found


def of_program(memory: Memory, measured: Measured) -> list[int]:
    """What was measured of this program, one number for each of its steps: of several runs the last.

    Raises `ValueError` where nothing of it is.
    """
    names, bare = [moment.step.name for moment in memory.moments], [m for m in measured if isinstance(m, int)]
    if len(bare) == len(measured):
        if len(bare) != len(names):
            raise ValueError(f"measured has {len(bare)} numbers, and the program {len(names)} steps")
        return bare
    steps = [m for m in measured if isinstance(m, StepBytes)]
    for start in range(len(steps) - len(names), -1, -1):
        run = steps[start : start + len(names)]
        if [step.name for step in run] == names:
            return [step.bytes for step in run]
    raise ValueError(f"no run of this program was measured: among {len(steps)} steps its {len(names)} are not")


def draw_timeline(memory: Memory, path: Path, measured: Measured | None = None) -> None:
    """One bar for each step that computes or moves: storages below, scratch on top, in MiB at the captured sizes; and
    what was measured as a line.

    Raises `ImportError` without matplotlib, `ValueError` for what was measured of another program.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("Report.plot draws with matplotlib: pip install matplotlib") from error
    alive = [sum(memory.number(storage.bytes) for storage in moment.alive) / MIB for moment in memory.moments]
    total = [memory.number(moment.bytes) / MIB for moment in memory.moments]
    scratch = [most - held for most, held in zip(total, alive, strict=True)]
    figure = figures.Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(total))
    axes.bar(places, alive, width=1.0, label="full-length values and copies")
    axes.bar(places, scratch, width=1.0, bottom=alive, label="one mini-sequence, or a piece between loops")
    title = f"expected peak {max(total):.1f} MiB"
    if measured is not None:
        live = [size / MIB for size in of_program(memory, measured)]
        axes.plot(places, live, color="black", linewidth=1, marker=".", label="measured, after each step")
        title += f"; at most {max(live):.1f} MiB measured after a step, {max(alive):.1f} MiB expected"
    loops = [i for i, moment in enumerate(memory.moments) if isinstance(moment.step, LoopStep)]
    axes.set_xticks(loops, [memory.moments[i].step.name for i in loops], rotation=90, fontsize=6)
    axes.set_ylabel("MiB above the inputs")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path)
