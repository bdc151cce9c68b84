"""Plot memory against context, one line for each way to run a model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from mom_compile.planning.subject import Subject
from mom_compile.planning.ways import Way
from mom_compile.report.units import in_units

GIB = 1 << 30
#: The number of lengths in the plot.
POINTS = 17
#: Ways with this prefix are drawn with thicker lines.
_OURS = "mom"


def draw(
    path: Path, subject: Subject, ways: Mapping[str, Way], batch_size: int, seq_len: int, memories: tuple[int, ...]
) -> None:
    """Write an image of peaks at lengths up to `seq_len`, with a line for each device memory in bytes.

    Raises `ImportError` without matplotlib, `ValueError` for an image format that it does not support.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("Plan.plot requires matplotlib: pip install matplotlib") from error
    lengths = [max(2, seq_len * i // (POINTS - 1)) for i in range(1, POINTS)]
    figure = figures.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    most = subject.weight_bytes / GIB
    for key, way in ways.items():
        peaks = [way.peak_bytes(length) / GIB for length in lengths]
        ours = key.startswith(_OURS)
        axes.plot(lengths, peaks, label=way.what, linewidth=2.2 if ours else 1.2, linestyle="-" if ours else "--")
        most = max(most, peaks[-1] if key != "inductor" else 0)
    for memory in memories:
        axes.axhline(memory / GIB, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(in_units(memory), (lengths[-1], memory / GIB), ha="right", va="bottom", color="grey", fontsize=8)
        most = max(most, memory / GIB)
    axes.set_xlim(0, seq_len)
    axes.set_ylim(0, 1.15 * most)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:.0f}k" if tokens else "0")
    axes.set_xlabel("context, in tokens")
    axes.set_ylabel("GiB on the device, including weights")
    several = "" if batch_size == 1 else f", {batch_size} sequences"
    axes.set_title(f"{subject.name} in {subject.dtype}: planned peak of a prefill{several}")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
