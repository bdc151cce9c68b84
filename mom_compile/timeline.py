"""A memory timeline: the expected device memory of a program after each step, and the measured memory.

    with measured_steps() as measured:
        model(...)
    report.plot("memory.png", measured)

Terms
-----
moment   The expected memory of one step: the storages that exist throughout it, and its own scratch.
measured The live bytes when a step has returned, above those before the program ran. Compare them with the storages: a
         step's scratch has been freed by then.
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
    """Live bytes when a step had returned, above those at the start."""

    name: str
    bytes: int


#: One number for each step of a program, or the result of `measured_steps`.
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
    """Return what was measured of this program, one number per step; of several runs, the last.

    Raises `ValueError` if it was not measured.
    """
    names, bare = [moment.step.name for moment in memory.moments], [m for m in measured if isinstance(m, int)]
    if len(bare) == len(measured):
        if len(bare) != len(names):
            raise ValueError(f"measured has {len(bare)} numbers, but the program has {len(names)} steps")
        return bare
    steps = [m for m in measured if isinstance(m, StepBytes)]
    for start in range(len(steps) - len(names), -1, -1):
        run = steps[start : start + len(names)]
        if [step.name for step in run] == names:
            return [step.bytes for step in run]
    raise ValueError(f"no run of this program was measured: its {len(names)} steps are not among the {len(steps)}")


def draw_timeline(memory: Memory, path: Path, measured: Measured | None = None) -> None:
    """Draw one bar per step that computes or moves data: storages below, scratch on top, in MiB at the captured sizes.
    Measured bytes are a line.

    Raises `ImportError` without matplotlib, `ValueError` for measurements of another program.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("Report.plot requires matplotlib: pip install matplotlib") from error
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
