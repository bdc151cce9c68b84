"""A memory timeline: what a program is expected to take on the device, step by step."""

from __future__ import annotations

import importlib
from pathlib import Path

from mom_passes.program.memory import Memory
from mom_passes.program.program import LoopStep

MIB = 1 << 20


def draw_timeline(memory: Memory, path: Path) -> None:
    """One bar for each step that computes or moves: storages below, scratch on top, in MiB at the captured sizes.

    Raises `ImportError` without matplotlib.
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
    loops = [i for i, moment in enumerate(memory.moments) if isinstance(moment.step, LoopStep)]
    axes.set_xticks(loops, [memory.moments[i].step.name for i in loops], rotation=90, fontsize=6)
    axes.set_ylabel("MiB above the inputs")
    axes.set_title(f"expected peak {max(total):.1f} MiB")
    axes.legend()
    figure.savefig(path)
