"""`mom-compile plan CONFIG`: memory and time of a context for each way to run it, and the longest that fits."""

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
from mom_compile.memory.devices import DEVICES
from mom_compile.planning.configs import find_config
from mom_compile.planning.estimate import device_named, in_words
from mom_compile.planning.planner import CPU
from mom_compile.report.rendered import plain_table
from mom_compile.report.units import in_units

#: The number of contexts in the table below the longest.
CONTEXTS = 8
GIB = 1 << 30
#: Memory sizes of usual cards, used if neither a device nor its memory is given.
CARDS = tuple(size * GIB for size in (16, 24, 48, 80))
#: Used for configs without max_position_embeddings.
USUAL_TOKENS = 131072
#: The device whose speed is used by default.
USUAL_DEVICE = "H100"


@click.command(short_help="Will it fit, and what is the longest context?")
@CONFIG
@click.option("--seq-len", type=TOKENS, help="The longest context: 131072, 455k, 1M. Default: the model's own.")
@click.option("--device-memory", type=BYTES, help="Memory of the device: 80GiB. Default: that of --device.")
@BATCH_SIZE
@DTYPE
@click.option("--device", help=f"Device for memory and speed: {', '.join(DEVICES)}.  [default speed: {USUAL_DEVICE}]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Plot memory against context.")
@OPTION
@click.option("--weight-bits", type=int, help="Bits of quantised weights, 16 for none. Default: the config's.")
@click.option("--tensor-parallel", type=int, default=1, help="Ranks that share the model; memory is that of one.")
@click.option("--weights-on-host", is_flag=True, help="Plan with weights that are stored on the host.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in bytes, tokens and seconds.")
def plan(
    config: str,
    seq_len: int | None,
    device_memory: int | None,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    plot: Path | None,
    given: tuple[str, ...],
    weight_bits: int | None,
    tensor_parallel: int,
    weights_on_host: bool,
    as_json: bool,
) -> None:
    """Will it fit, and what is the longest context? Needs neither a GPU nor weights.

    CONFIG is a folder with a config.json, a JSON file, or the name of a shipped shape (Llama-3-8B, Qwen3-30B-A3B, ...).
    A plan is for a prefill that keeps its cache and returns the last token's logits; weights are included.
    """
    options = backend_options(given)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise click.UsageError(f"--plot {str(plot)!r}: the folder {str(plot.absolute().parent)!r} does not exist")
    with bad_input():
        parse_options(options)  # before slow steps
        memory = device_memory if device is None else device_memory or _memory_of(device)
        memories = CARDS if memory is None else (memory,)
        if seq_len is None:
            seq_len = getattr(find_config(config).config, "max_position_embeddings", None) or USUAL_TOKENS
        settings: dict[str, Any] = {"seq_len": seq_len, "batch_size": batch_size, "dtype": dtype}
        settings["device"] = device or USUAL_DEVICE
        if weight_bits is not None:
            settings["weight_bits"] = weight_bits
        if tensor_parallel != 1:
            settings["tensor_parallel"] = tensor_parallel
        with progress(f"planning {config}") as report:
            made = mom_compile.plan(config, **settings, **options, weights_on_host=weights_on_host, progress=report)
            data = as_data(made, memories, memory or made.memory)  # plans all ways
            if plot is not None:
                made.plot(plot, memories)
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        show(results(), data, fits=memory)


def _memory_of(device: str) -> int | None:
    """Return the memory of a known device in bytes, None for a CPU. Raises `PlanError` for an unknown device."""
    return None if device.lower() == CPU else device_named(device)[1].memory


def as_data(made: Any, memories: Sequence[int], fits: int | None) -> dict[str, Any]:
    """Return a plan as JSON data: bytes and tokens as integers, seconds, and tokens per second.

    Times are given for ways that fit into `fits` bytes.
    """
    subject, lengths = made.subject, contexts(made.seq_len)
    names = ("name", "model_type", "layers", "parameters", "weight_bytes", "longest", "dtype", "stored")
    ways = {key: _way(way, lengths, memories) for key, way in made.ways.items()}
    for key, way in ways.items():
        tokens = str(made.seq_len)
        way["fits"] = fits is None or max(way["peak_bytes"][tokens], way["step_bytes"][tokens]) <= fits
        way.update(_times(made, key) if way["fits"] else _NO_TIMES)
    own = ways[made.way]
    return {
        "subject": {name: getattr(subject, name) for name in names},
        "seq_len": made.seq_len,
        "batch_size": made.batch_size,
        "tensor_parallel": made.tensor_parallel,
        "kv_bytes_per_token": made.kv_bytes_per_token,
        "device": made.device,
        "device_memory": fits,
        "notes": list(made.notes),
        "way": made.way,
        "ways": ways,
        "formula": str(made.formula),
        **{name: own[name] for name in ("time", "seconds", "bound", "decode")},
    }


def _way(way: Any, lengths: Sequence[int], memories: Sequence[int]) -> dict[str, Any]:
    longest = {size: way.max_seq_len(size) for size in memories}
    return {
        "what": way.what,
        "peak_bytes": {str(tokens): way.peak_bytes(tokens) for tokens in lengths},
        "step_bytes": {str(tokens): way.step_bytes(tokens) for tokens in lengths},
        "host_bytes": {str(tokens): way.host_bytes(tokens) for tokens in lengths},
        "fewest_bytes": way.fewest_bytes,
        "max_seq_len": {str(size): tokens for size, tokens in longest.items()},
        "host_bytes_then": {str(size): way.host_bytes(tokens) if tokens else 0 for size, tokens in longest.items()},
    }


_NO_TIMES: dict[str, Any] = {"time": None, "seconds": None, "bound": None, "decode": None}


def _times(made: Any, way: str) -> dict[str, Any]:
    """Return the time estimates of a way. There are none for a device without recorded speed, such as a CPU."""
    try:
        prefill, decode = made.estimate(way=way), made.estimate_decode(way=way)
    except ValueError as error:
        return {**_NO_TIMES, "time": f"no estimate: {error}"}
    speed = {"tokens_per_second": decode.tokens_per_second, "bound": decode.bound}
    return {"time": str(prefill), "seconds": prefill.seconds, "bound": prefill.bound, "decode": speed}


def contexts(seq_len: int) -> list[int]:
    """Return powers of two below a length, and the length itself."""
    powers = [1 << power for power in range(10, (seq_len - 1).bit_length())]
    return [*powers[-CONTEXTS:], seq_len]


def show(console: Console, data: Mapping[str, Any], fits: int | None) -> None:
    """Print a plan as tables; contexts have to fit into `fits` bytes, if given."""
    console.print(Text(_subject(data), style="bold"))
    for note in data["notes"]:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(_peaks(data, fits, in_colour(console)))
    console.print(_longest(data))
    console.print(_at_this_length(data))
    own = data["ways"][data["way"]]
    console.print(Text(f"time of {own['what']}: {own['time'] if own['fits'] else _too_large(own, data)}"))


def _too_large(way: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    tokens, memory = str(data["seq_len"]), in_units(data["device_memory"])
    needed = max(way["peak_bytes"][tokens], way["step_bytes"][tokens])
    return f"none, since {in_units(needed)} ({needed:,} bytes) do not fit into {memory}"


def _subject(data: Mapping[str, Any]) -> str:
    subject, batch = data["subject"], data["batch_size"]
    longest = "" if subject["longest"] is None else f", made for {subject['longest']:,} tokens"
    sequences = "" if batch == 1 else f"; {batch} sequences"
    per_rank = "" if data["tensor_parallel"] == 1 else f" on each of {data['tensor_parallel']} ranks"
    return (
        f"{subject['name']} ({subject['model_type']}): {subject['layers']} layers, {subject['parameters'] / 1e9:.3g}e9 "
        f"parameters, {in_units(subject['weight_bytes'])} of weights in {subject['stored']} and "
        f"{in_units(data['kv_bytes_per_token'])} of cache per token{per_rank}{longest}{sequences}"
    )


#: Marks numbers that do not fit if there are no colours.
_TOO_LARGE = "*"


def _peaks(data: Mapping[str, Any], fits: int | None, colour: bool) -> Table:
    """Peaks by context; those that do not fit are red or, without colours, starred."""
    ways = data["ways"].values()
    unit = "GiB" if max(size for way in ways for size in way["peak_bytes"].values()) >= GIB else "MiB"
    title = f"peak memory of the device, in {unit}"
    table = plain_table("context", *(way["what"] for way in ways), title=title, left=0)
    for tokens in contexts(data["seq_len"]):
        sizes = [way["peak_bytes"][str(tokens)] for way in ways]
        table.add_row(f"{tokens:,}", *(_peak(size, unit, fits, colour) for size in sizes))
    if fits is not None:
        table.caption = Text(f"{'in red' if colour else _TOO_LARGE}: does not fit into {in_units(fits)}")
        table.caption_justify = "left"
    return table


def _peak(size: int, unit: str, fits: int | None, colour: bool) -> Text:
    """Format a size with three significant digits."""
    number = size / (GIB if unit == "GiB" else GIB >> 10)
    text = f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"
    if fits is None or size <= fits:
        return Text(text)
    return Text(text, style="red") if colour else Text(f"{text}{_TOO_LARGE}")


def _longest(data: Mapping[str, Any]) -> Table:
    """The longest context of each way in each memory; the way selected by the options is bold."""
    ways = data["ways"]
    memories = list(ways[data["way"]]["max_seq_len"])
    columns = [f"in {in_units(int(size))}" for size in memories]
    table = plain_table("way", *columns, "then on the host", title="longest context, in tokens: prefill and one more")
    for key, way in ways.items():
        lengths, host = way["max_seq_len"].values(), way["host_bytes_then"][memories[-1]]
        nothing = f"none, needs {in_units(way['fewest_bytes'])}"
        row = [f"{length:,}" if length else nothing for length in lengths]
        table.add_row(_named(data, key), *row, in_units(host) if host else "")
    return table


def _at_this_length(data: Mapping[str, Any]) -> Table:
    """Memory of each way at the requested length on device and host, and the speed of those that fit."""
    tokens = data["seq_len"]
    columns = ("on the device", "on the host", "prefill", "decode", "decode is bound by")
    table = plain_table("way", *columns, title=f"{tokens:,} tokens, times estimated for {data['device']}")
    for key, way in data["ways"].items():
        sizes = [way["peak_bytes"][str(tokens)], way["host_bytes"][str(tokens)]]
        decode = way["decode"]
        speed = ("", "") if decode is None else (f"{decode['tokens_per_second']:.3g} tokens/s", decode["bound"])
        prefill = "does not fit" if not way["fits"] else "" if way["seconds"] is None else in_words(way["seconds"])
        table.add_row(_named(data, key), in_units(sizes[0]), in_units(sizes[1]) if sizes[1] else "", prefill, *speed)
    return table


def _named(data: Mapping[str, Any], key: str) -> Text:
    return Text(data["ways"][key]["what"], style="bold" if key == data["way"] else "")
