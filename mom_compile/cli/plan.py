"""`mom-compile plan CONFIG`: what a context takes in each way to run it, the longest that fits, and its time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mom_compile
from mom_compile.cli.inputs import BATCH_SIZE, BYTES, CONFIG, DTYPE, OPTION, TOKENS, backend_options, bad_input
from mom_compile.cli.printing import in_colour, progress, results
from mom_compile.config import parse_options
from mom_compile.planning.configs import find_config
from mom_compile.report.rendered import plain_table
from mom_compile.report.units import in_units

#: How many contexts the table has below the longest.
CONTEXTS = 8
#: The memory of usual cards: what is told where no device's memory is given.
CARDS = tuple(size << 30 for size in (16, 24, 48, 80))
#: Where a config does not say how many positions it has.
USUAL_TOKENS = 131072


@click.command(short_help="Will it fit, and what is the longest context?")
@CONFIG
@click.option("--seq-len", type=TOKENS, help="The longest context: 131072, 455k, 1M. By default the model's own.")
@click.option("--device-memory", type=BYTES, help="What the device has for everything: 80GiB, 80gb.")
@BATCH_SIZE
@DTYPE
@click.option("--device", default="H100", show_default=True, help="Whose speed the time is estimated with.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw memory against context.")
@OPTION
@click.option("--json", "as_json", is_flag=True, help="Numbers for programs, in bytes and tokens.")
def plan(
    config: str,
    seq_len: int | None,
    device_memory: int | None,
    batch_size: int,
    dtype: str | None,
    device: str,
    plot: Path | None,
    given: tuple[str, ...],
    as_json: bool,
) -> None:
    """Will it fit, and what is the longest context? Needs neither a GPU nor weights.

    CONFIG is a folder with a config.json, such a file, or the name of a shipped shape (Llama-3-8B, Qwen3-30B-A3B, ...).
    A plan is of a prefill with the cache that is kept, and the last token's logits; weights are counted.
    """
    options = backend_options(given)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise click.UsageError(f"--plot {str(plot)!r}: there is no folder {str(plot.absolute().parent)!r}")
    with bad_input():
        parse_options(options)  # before anything takes time
        if seq_len is None:
            seq_len = getattr(find_config(config).config, "max_position_embeddings", None) or USUAL_TOKENS
        with progress(f"planning {config}") as say:
            made = mom_compile.plan(
                config, seq_len=seq_len, batch_size=batch_size, dtype=dtype, device=device, progress=say, **options
            )
            if plot is not None:
                made.plot(plot)
    if as_json:
        click.echo(json.dumps(as_data(made, device_memory), indent=2))
    else:
        show(results(), made, device_memory)


def contexts(seq_len: int) -> list[int]:
    """Powers of two below a length, and the length itself."""
    powers = [1 << power for power in range(10, (seq_len - 1).bit_length())]
    return [*powers[-CONTEXTS:], seq_len]


def show(console: Console, made: Any, memory: int | None) -> None:
    """A plan as tables."""
    console.print(Text(_subject(made), style="bold"))
    for note in made.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(_peaks(made, memory, in_colour(console)))
    console.print(_longest(made, (memory,) if memory is not None else CARDS))
    console.print(Text(f"time: {made.seconds(made.device)}"))


def _subject(made: Any) -> str:
    subject = made.subject
    longest = "" if subject.longest is None else f", made for {subject.longest:,} tokens"
    sequences = "" if made.batch_size == 1 else f"; {made.batch_size} sequences"
    return (
        f"{subject.name} ({subject.model_type}): {subject.layers} layers, {subject.parameters / 1e9:.3g}e9 parameters, "
        f"{in_units(subject.weight_bytes)} of weights in {subject.dtype}{longest}{sequences}"
    )


def _peaks(made: Any, memory: int | None, colour: bool) -> Table:
    """Contexts against peaks; what does not fit is red or, without colours, a dash."""
    table = plain_table("context", *(way.what for way in made.ways.values()), title="peak memory of the device")
    for column in table.columns:
        column.justify = "right"
    for tokens in contexts(made.seq_len):
        sizes = [way.peak_bytes(tokens) for way in made.ways.values()]
        table.add_row(f"{tokens:,}", *(_peak(size, memory, colour) for size in sizes))
    if memory is not None:
        sign = "in red" if colour else "-"
        table.caption = Text(f"{sign}: does not fit into {in_units(memory)}")
        table.caption_justify = "left"
    return table


def _peak(size: int, memory: int | None, colour: bool) -> Text:
    if memory is None or size <= memory:
        return Text(in_units(size))
    return Text(in_units(size), style="red") if colour else Text("-")


def _longest(made: Any, memories: Sequence[int]) -> Table:
    columns = [f"in {in_units(memory)}" for memory in memories]
    table = plain_table("way", *columns, "beside it on the host", title="longest context, in tokens")
    for key, way in made.ways.items():
        lengths = [way.max_seq_len(memory) for memory in memories]
        host = way.host_bytes(lengths[-1]) if lengths[-1] else 0
        chosen = "bold" if key == made.way else ""
        row = [f"{length:,}" if length else "nothing fits" for length in lengths]
        table.add_row(Text(way.what, style=chosen), *row, in_units(host) if host else "")
    return table


def as_data(made: Any, memory: int | None) -> dict[str, Any]:
    """A plan as JSON has it: bytes and tokens as whole numbers."""
    lengths, memories = contexts(made.seq_len), (memory,) if memory is not None else CARDS
    subject = made.subject
    names = ("name", "model_type", "layers", "parameters", "weight_bytes", "longest", "dtype")
    return {
        "subject": {name: getattr(subject, name) for name in names},
        "seq_len": made.seq_len,
        "batch_size": made.batch_size,
        "device": made.device,
        "notes": list(made.notes),
        "way": made.way,
        "ways": {key: _way(way, lengths, memories) for key, way in made.ways.items()},
        "formula": str(made.formula),
        "time": str(made.seconds(made.device)),
    }


def _way(way: Any, lengths: Sequence[int], memories: Sequence[int]) -> Mapping[str, Any]:
    return {
        "what": way.what,
        "peak_bytes": {str(tokens): way.peak_bytes(tokens) for tokens in lengths},
        "host_bytes": {str(tokens): way.host_bytes(tokens) for tokens in lengths},
        "max_seq_len": {str(size): way.max_seq_len(size) for size in memories},
    }
