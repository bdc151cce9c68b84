"""`mom-compile plan CONFIG`: what a context takes in each way to run it, the longest that fits, and how fast it is."""

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

#: How many contexts the table has below the longest.
CONTEXTS = 8
GIB = 1 << 30
#: The memory of usual cards: what is told where neither a device nor its memory is given.
CARDS = tuple(size * GIB for size in (16, 24, 48, 80))
#: Where a config does not say how many positions it has.
USUAL_TOKENS = 131072
#: Whose figures times are estimated with where no device is given.
USUAL_DEVICE = "H100"


@click.command(short_help="Will it fit, and what is the longest context?")
@CONFIG
@click.option("--seq-len", type=TOKENS, help="The longest context: 131072, 455k, 1M. By default the model's own.")
@click.option("--device-memory", type=BYTES, help="What the device has for everything: 80GiB. By default --device's.")
@BATCH_SIZE
@DTYPE
@click.option("--device", help=f"Whose memory and speed it is: {', '.join(DEVICES)}.  [default speed: {USUAL_DEVICE}]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw memory against context.")
@OPTION
@click.option("--weight-bits", type=int, help="Bits of quantised weights, 16 for none. By default as the config says.")
@click.option("--weights-on-host", is_flag=True, help="Plan with weights that are kept on the host.")
@click.option("--json", "as_json", is_flag=True, help="Numbers for programs, in bytes, tokens and seconds.")
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
    with bad_input():
        parse_options(options)  # before anything takes time
        memory = device_memory if device is None else device_memory or _memory_of(device)
        memories = CARDS if memory is None else (memory,)
        if seq_len is None:
            seq_len = getattr(find_config(config).config, "max_position_embeddings", None) or USUAL_TOKENS
        asked: dict[str, Any] = {"seq_len": seq_len, "batch_size": batch_size, "dtype": dtype}
        asked["device"] = device or USUAL_DEVICE
        if weight_bits is not None:
            asked["weight_bits"] = weight_bits
        with progress(f"planning {config}") as say:
            made = mom_compile.plan(config, **asked, **options, weights_on_host=weights_on_host, progress=say)
            data = as_data(made, memories, memory or made.memory)  # the ways are planned here
            if plot is not None:
                made.plot(plot, memories)
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        show(results(), data, fits=memory)


def _memory_of(device: str) -> int | None:
    """Bytes of a recorded device; of a CPU nobody knows. Raises `PlanError` for another."""
    return None if device.lower() == CPU else device_named(device)[1].memory


def as_data(made: Any, memories: Sequence[int], fits: int | None) -> dict[str, Any]:
    """A plan as JSON has it: bytes and tokens as whole numbers, seconds, and tokens per second. Times are those of ways
    that fit into `fits` bytes."""
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
    """The estimates of a way; of a device without recorded figures, a CPU, there are none."""
    try:
        prefill, decode = made.estimate(way=way), made.estimate_decode(way=way)
    except ValueError as error:
        return {**_NO_TIMES, "time": f"no estimate: {error}"}
    speed = {"tokens_per_second": decode.tokens_per_second, "bound": decode.bound}
    return {"time": str(prefill), "seconds": prefill.seconds, "bound": prefill.bound, "decode": speed}


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
    return (
        f"{subject['name']} ({subject['model_type']}): {subject['layers']} layers, {subject['parameters'] / 1e9:.3g}e9 "
        f"parameters, {in_units(subject['weight_bytes'])} of weights in {subject['stored']}{longest}{sequences}"
    )


#: Behind a number that is more than there is, where there are no colours.
_TOO_LARGE = "*"


def _peaks(data: Mapping[str, Any], fits: int | None, colour: bool) -> Table:
    """Contexts against peaks; what does not fit is red or, without colours, has a star."""
    ways = data["ways"].values()
    unit = "GiB" if max(size for way in ways for size in way["peak_bytes"].values()) >= GIB else "MiB"
    title = f"peak memory of the device, in {unit}"
    table = plain_table("context", *(way["what"] for way in ways), title=title, left=0)
    for tokens in contexts(data["seq_len"]):
        sizes = [way["peak_bytes"][str(tokens)] for way in ways]
        table.add_row(f"{tokens:,}", *(_peak(size, unit, fits, colour) for size in sizes))
    if fits is not None:
        table.caption = Text(f"{'in red' if colour else _TOO_LARGE}: needed, and does not fit into {in_units(fits)}")
        table.caption_justify = "left"
    return table


def _peak(size: int, unit: str, fits: int | None, colour: bool) -> Text:
    """With three digits of meaning."""
    number = size / (GIB if unit == "GiB" else GIB >> 10)
    text = f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"
    if fits is None or size <= fits:
        return Text(text)
    return Text(text, style="red") if colour else Text(f"{text}{_TOO_LARGE}")


def _longest(data: Mapping[str, Any]) -> Table:
    """What of each way fits into each memory; in bold the way that the options stand for."""
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
    """What the length that was asked for needs on the device and on the host, and how fast what fits is."""
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
