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
GIB = 1 << 30
#: The memory of usual cards: what is told where no device's memory is given.
CARDS = tuple(size * GIB for size in (16, 24, 48, 80))
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
@click.option("--weights-on-host", is_flag=True, help="Plan with weights that are kept on the host.")
@click.option("--json", "as_json", is_flag=True, help="Numbers for programs, in bytes, tokens and seconds.")
def plan(
    config: str,
    seq_len: int | None,
    device_memory: int | None,
    batch_size: int,
    dtype: str | None,
    device: str,
    plot: Path | None,
    given: tuple[str, ...],
    weights_on_host: bool,
    as_json: bool,
) -> None:
    """Will it fit, and what is the longest context? Needs neither a GPU nor weights.

    CONFIG is a folder with a config.json, such a file, or the name of a shipped shape (Llama-3-8B, Qwen3-30B-A3B, ...).
    A plan is of a prefill with the cache that is kept, and the last token's logits; weights are counted.
    """
    options = backend_options(given)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise click.UsageError(f"--plot {str(plot)!r}: there is no folder {str(plot.absolute().parent)!r}")
    memories = CARDS if device_memory is None else (device_memory,)
    with bad_input():
        parse_options(options)  # before anything takes time
        if seq_len is None:
            seq_len = getattr(find_config(config).config, "max_position_embeddings", None) or USUAL_TOKENS
        asked = {"seq_len": seq_len, "batch_size": batch_size, "dtype": dtype, "device": device, **options}
        with progress(f"planning {config}") as say:
            made = mom_compile.plan(config, **asked, weights_on_host=weights_on_host, progress=say)
            data = as_data(made, memories)  # the ways are planned here
            if plot is not None:
                made.plot(plot, memories)
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        show(results(), data, fits=device_memory)


def as_data(made: Any, memories: Sequence[int]) -> dict[str, Any]:
    """A plan as JSON has it: bytes and tokens as whole numbers, and seconds."""
    subject, lengths = made.subject, contexts(made.seq_len)
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
        **_time(made),
    }


def _way(way: Any, lengths: Sequence[int], memories: Sequence[int]) -> dict[str, Any]:
    longest = {size: way.max_seq_len(size) for size in memories}
    return {
        "what": way.what,
        "peak_bytes": {str(tokens): way.peak_bytes(tokens) for tokens in lengths},
        "host_bytes": {str(tokens): way.host_bytes(tokens) for tokens in lengths},
        "max_seq_len": {str(size): tokens for size, tokens in longest.items()},
        "host_bytes_then": {str(size): way.host_bytes(tokens) if tokens else 0 for size, tokens in longest.items()},
    }


def _time(made: Any) -> dict[str, Any]:
    """The estimate, in words and as numbers; of a device without recorded figures, a CPU, there is none."""
    try:
        found = made.estimate(made.device)
    except ValueError as error:
        return {"time": f"no estimate: {error}", "seconds": None, "bound": None}
    return {"time": str(found), "seconds": found.seconds, "bound": found.bound}


def contexts(seq_len: int) -> list[int]:
    """Powers of two below a length, and the length itself."""
    powers = [1 << power for power in range(10, (seq_len - 1).bit_length())]
    return [*powers[-CONTEXTS:], seq_len]


def show(console: Console, data: Mapping[str, Any], fits: int | None) -> None:
    """A plan as tables; `fits` are the bytes that contexts have to fit into, if any were given."""
    console.print(Text(_subject(data), style="bold"))
    for note in data["notes"]:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(_peaks(data, fits, in_colour(console)))
    console.print(_longest(data))
    console.print(Text(f"time of {data['ways'][data['way']]['what']}: {data['time']}"))


def _subject(data: Mapping[str, Any]) -> str:
    subject, batch = data["subject"], data["batch_size"]
    longest = "" if subject["longest"] is None else f", made for {subject['longest']:,} tokens"
    sequences = "" if batch == 1 else f"; {batch} sequences"
    return (
        f"{subject['name']} ({subject['model_type']}): {subject['layers']} layers, {subject['parameters'] / 1e9:.3g}e9 "
        f"parameters, {in_units(subject['weight_bytes'])} of weights in {subject['dtype']}{longest}{sequences}"
    )


def _peaks(data: Mapping[str, Any], fits: int | None, colour: bool) -> Table:
    """Contexts against peaks; what does not fit is red or, without colours, a dash."""
    ways = data["ways"].values()
    unit = "GiB" if max(size for way in ways for size in way["peak_bytes"].values()) >= GIB else "MiB"
    title = f"peak memory of the device, in {unit}"
    table = plain_table("context", *(way["what"] for way in ways), title=title, left=0)
    for tokens in contexts(data["seq_len"]):
        sizes = [way["peak_bytes"][str(tokens)] for way in ways]
        table.add_row(f"{tokens:,}", *(_peak(size, unit, fits, colour) for size in sizes))
    if fits is not None:
        table.caption = Text(f"{'in red' if colour else '-'}: does not fit into {in_units(fits)}")
        table.caption_justify = "left"
    return table


def _peak(size: int, unit: str, fits: int | None, colour: bool) -> Text:
    """With three digits of meaning."""
    number = size / (GIB if unit == "GiB" else GIB >> 10)
    text = f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"
    if fits is None or size <= fits:
        return Text(text)
    return Text(text, style="red") if colour else Text("-")


def _longest(data: Mapping[str, Any]) -> Table:
    """What of each way fits into each memory; in bold the way that the options stand for."""
    ways = data["ways"]
    memories = list(ways[data["way"]]["max_seq_len"])
    columns = [f"in {in_units(int(size))}" for size in memories]
    table = plain_table("way", *columns, "then on the host", title="longest context, in tokens")
    for key, way in ways.items():
        lengths, host = way["max_seq_len"].values(), way["host_bytes_then"][memories[-1]]
        row = [f"{length:,}" if length else "nothing fits" for length in lengths]
        style = "bold" if key == data["way"] else ""
        table.add_row(Text(way["what"], style=style), *row, in_units(host) if host else "")
    return table
