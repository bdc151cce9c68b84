"""Write docs/architectures.md from the results of `benchmarks.architectures`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.architectures_worker import BOUND_FLOAT32
from benchmarks.measure import describe_machine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
USES = ("prefill", "batch", "decode", "scoring")
#: Uses that need all rows of all layers: their shares of work in loops are comparable.
FULL = ("batch", "scoring")

Entry = Mapping[str, Any]

_HEAD = """# Architectures

Every causal language model that transformers {transformers} builds from a configuration of its own, small, with a
layer of each kind: does mom compute what eager mode computes, and how much of its matrix products runs over
mini-sequences? The [support matrix](support.md) is a summary.

{stamp}.

`python -m benchmarks.architectures` (`make architectures`) measures and writes this page. `--only TYPE ... --redo`
measures these types again; `--page` only writes the page. `benchmarks/small_configs.py` makes the small
configurations; `benchmarks/small_configs.toml` has the exceptions, with the reason for each.

Each type runs in float64 (where the original can) with `mini_seq_len` 8 and `strict`. *prefill* is one sequence of 53
tokens; *batch* is three of 50, padded on the left, with symbolic sizes by then; *decode* is a token after these;
*scoring* is the logits of two times 53 tokens without a cache, compiled again. Figures are the largest difference
from eager mode's logits, relative to the largest logit. The bound is 1e-6 (float32: 1e-4), since many types compute
norms, routers or softmax in float32 always. Loop bodies run node by node here (`benchmarks/without_codegen.py`):
everything is tested except Inductor's code. *In loops* is the share of multiply-adds, attention and experts included,
in batch and in scoring.
"""

_DECODERS = """## Text decoders of multimodal models

The same for types with other parts for images, video or sound. A small composite is built, and its text decoder
(`get_decoder()`) with its head runs from `inputs_embeds`, as in the composite once its images are embedded
(`benchmarks/text_decoders.py`). A type here is that of the text part, with the composites that have it; peaks are not
measured. Other inputs that a composite passes to its decoder in every call are passed here, too: nine states of an
encoder, or a delay. Keys and values of the encoder's states do not belong to tokens and are computed once, outside
loops: in the types whose entries say `aten.mm` of at most 2%, they are all that is outside.
"""

_PEAKS = """
*Peak* is mom's peak over stock Inductor's, both compiled, float32, for one prefill of 2048 tokens, above weights and
inputs, cache kept: hidden size 256, intermediates 3.5 times that, a vocabulary of 4096, a layer of each kind, mom
with its default options (`--compile`). Few layers and small widths: keys, values and logits are small here.
"""

_COMPILED = """## Compiled types

Types compiled with Inductor's code, in float32, with `mini_seq_len` 64 and `strict`: a prefill of a length that
neither 64 nor a scan's chunk divides, and a decode step after it (– where it was not run, or the model keeps no
state). Figures are the largest difference as above; the bound is 1e-4 from eager mode or from stock Inductor. *Eager
pieces* are those that Inductor could not compile. *CPU seconds* are those of one process for eager mode, compiling
and running; code that the process of an earlier type compiled is read from the disk. `python -m
benchmarks.architectures_compiled TYPE ... --tokens N` adds to this table. `make sweep` tests every type at two
lengths.

{stamp}.
"""


def page(results: Mapping[str, Any], compiled: Mapping[str, Any] | None = None) -> str:
    """Return the page as text. `compiled` has the results of compiled types, if there are any."""
    types: Mapping[str, Entry] = results["types"]
    decoders: Mapping[str, Entry] = results.get("decoders", {})
    stamp = results["stamp"]
    parts = [_HEAD.format(transformers=stamp["transformers"], stamp=describe_machine(stamp))]
    if any("peaks" in entry for entry in types.values()):
        parts.append(_PEAKS)
    parts += [counts(types, stamp.get("types", len(types))), _table(types)]
    if decoders:
        parts.append(_DECODERS)
        parts += [decoder_counts(decoders, stamp["decoders"], results["known"]), _table(decoders)]
    if compiled:
        parts += [_COMPILED.format(stamp=describe_machine(compiled["machine"])), _compiled_table(compiled["cells"])]
    parts += [text for text in _apart({**types, **decoders}) if text]
    return "\n".join(parts)


def compared(entry: Entry) -> bool:
    """Return whether mom ran some use, or failed in one."""
    return any("difference" in use or _ours(use) for use in entry.get("uses", {}).values())


def _ours(use: Entry) -> bool:
    """Return whether a use fails with mom and not with stock `torch.compile`."""
    return "error" in use and "stock_error" not in use


def right(entry: Entry, use: str) -> bool:
    """Return whether mom's result is within the bound of the entry's dtype from eager mode's."""
    return bool(entry["uses"].get(use, {}).get("difference", float("inf")) <= entry["bound"])


def share(entry: Entry, use: str) -> float | None:
    """Return the share of a use's multiply-adds that is in loops."""
    got = entry["uses"].get(use, {})
    return 1 - got["work_outside"] / got["work"] if got.get("work") else None


def all_in_loops(entry: Entry) -> bool:
    return all(share(entry, use) == 1 for use in FULL)


def counts(types: Mapping[str, Entry], known: int) -> str:
    """Return the counts of the first table as text."""
    twins = sum("same_as" in entry for entry in types.values())
    own = [entry for entry in types.values() if "same_as" not in entry]
    return (
        (f"{len(types)} of {known} types have been measured so far. " if len(types) < known else "")
        + f"Of {len(types)} types {twins} are other types under another name; of the {len(own)} others "
        + _verdict(own)
        + f"{_peak_counts([entry for entry in own if compared(entry)])}\n"
    )


def decoder_counts(decoders: Mapping[str, Entry], known: int, swept: Mapping[str, Sequence[str]]) -> str:
    """Return the counts of text decoders. `swept` has the composites by their type in the first table."""
    parts = "; ".join(f"{text} ({', '.join(sorted(names))})" for text, names in sorted(swept.items()))
    return (
        (f"{len(decoders)} of {known} types have been measured so far. " if len(decoders) < known else "")
        + f"Of {len(decoders)} types {_verdict(list(decoders.values()))}\n\n"
        + f"The text parts of {sum(map(len, swept.values()))} other composites are types of the first table: {parts}.\n"
    )


def _verdict(own: Sequence[Entry]) -> str:
    """Return as text how many of these are right, and how many have all products in loops."""
    built = [entry for entry in own if "parameters" in entry]
    run = [entry for entry in built if compared(entry)]
    exact = [entry for entry in run if all(right(entry, use) for use in USES if not impossible(entry, use))]
    four = [entry for entry in run if all(right(entry, use) for use in USES)]
    looped = [entry for entry in run if all_in_loops(entry)]
    attending = [entry for entry in run if not entry.get("recurrent")]
    of_them = [entry for entry in attending if all_in_loops(entry)]
    return (
        f"{len(built)} can be built, and {len(run)} were compared. **{len(four)} are correct in all four uses**, "
        f"{len(exact)} in all of those that eager mode and stock `torch.compile` can run. {len(looped)} have all their "
        f"matrix products in loops: {len(of_them)} of the {len(attending)} whose layers keep only keys and "
        f"values ({len(of_them) / max(1, len(attending)):.0%}), {len(looped) - len(of_them)} of the "
        f"{len(run) - len(attending)} with states of convolutions, scans or linear attention."
    )


def _peak_counts(run: Sequence[Entry]) -> str:
    ratios = sorted(ratio for entry in run if (ratio := peak_ratio(entry)) is not None)
    if not ratios:
        return ""
    lower = sum(ratio < 1 for ratio in ratios)
    return f" *Peaks* of {len(ratios)} types: {statistics.median(ratios):.2f}x at the median, lower for {lower}."


def impossible(entry: Entry, use: str) -> bool:
    got = entry["uses"].get(use, {})
    return "eager_error" in got or "stock_error" in got or got.get("stock_difference", 0) > entry["bound"]


def _table(types: Mapping[str, Entry]) -> str:
    rows = ["| type | prefill | batch | decode | scoring | in loops | graphs | peak | on the full sequence, and why |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, entry in types.items():
        if not compared(entry):
            continue
        also = [other for other, of in types.items() if of.get("same_as") == name] or entry.get("composites", [])
        label = name + (f" ({', '.join(also)})" if also else "")
        figures = [_figure(entry, use) for use in USES]
        shares = " / ".join(percent(share(entry, use)) for use in FULL)
        rows.append(
            f"| {label} | {' | '.join(figures)} | {shares} | {_graphs(entry)} | {_peak(entry)} | {_outside(entry)} |"
        )
    return "\n".join(rows) + "\n"


def _compiled_table(cells: Mapping[str, Entry]) -> str:
    """Return a row for each length and type. Keys of `cells` are `"type tokens"`."""
    rows = ["| type | tokens | prefill | decode step | eager pieces | CPU seconds |", "|---|---|---|---|---|---|"]
    keys = sorted((int(tokens), name) for name, _, tokens in (key.partition(" ") for key in cells))
    for tokens, name in keys:
        found = cells[f"{name} {tokens}"]
        figures = [_compiled_figure(found, use) for use in ("prefill", "step")]
        pieces = found.get("eager_pieces", "–")
        rows.append(f"| {name} | {tokens} | {' | '.join(figures)} | {pieces} | {found['cpu_seconds']:.0f} |")
    return "\n".join(rows) + "\n"


def _compiled_figure(found: Entry, use: str) -> str:
    failed = found.get("error", found.get("ended"))
    if failed is not None:
        return cell(f"**fails**: {failed}") if use == "prefill" else "–"
    if use not in found:
        return "–"
    text = number(found[use])
    return text if found[use] <= BOUND_FLOAT32 else f"**{text}**"


def _figure(entry: Entry, use: str) -> str:
    got = entry["uses"].get(use, {})
    if "difference" in got:
        text = number(got["difference"])
        return text if right(entry, use) else f"**{text}**" + ("¹" if impossible(entry, use) else "")
    if "eager_error" in got:
        return "³"
    return "²" if "stock_error" in got else "**fails**" if "error" in got else "–"


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def percent(value: float | None) -> str:
    if value is None:
        return "–"
    return "all" if value == 1 else f"{min(value, 0.999):.1%}" if value > 0.99 else f"{value:.0%}"


def _graphs(entry: Entry) -> str:
    """Return the number of graphs of one prefill, and of breaks if there are any."""
    got = entry["uses"].get("batch", {})
    if "graphs" not in got:
        return "–"
    return f"{got['graphs']}" + (f", {got['breaks']} breaks" if got["breaks"] else "")


def peak_ratio(entry: Entry) -> float | None:
    """Return mom's peak over stock Inductor's, if both were measured."""
    peaks = entry.get("peaks", {})
    measured = "peak" in peaks.get("inductor", {}) and "peak" in peaks.get("mom", {})
    return peaks["mom"]["peak"] / peaks["inductor"]["peak"] if measured else None


def _peak(entry: Entry) -> str:
    ratio, peaks = peak_ratio(entry), entry.get("peaks", {})
    if ratio is not None:
        return f"{ratio:.2f}"
    return "stock fails" if "error" in peaks.get("inductor", {}) else "fails" if "error" in peaks.get("mom", {}) else ""


def _outside(entry: Entry) -> str:
    """Return operators that multiply outside loops, the largest first, with reasons, and graphs that stayed whole."""
    found: dict[str, tuple[float, str]] = {}
    reasons: dict[str, None] = {}
    for use in FULL:
        got = entry["uses"].get(use, {})
        for name, (work, why) in got.get("outside", {}).items():
            part = work / got["work"]
            if part > found.get(name, (0.0, ""))[0]:
                found[name] = (part, why)
        reasons.update(dict.fromkeys(filter(None, got.get("whole_graphs", ()))))
    texts = [
        f"{_operator(name)} {part:.1%}" + (f": {why}" if why else "")
        for name, (part, why) in sorted(found.items(), key=lambda item: -item[1][0])[:3]
        if part >= 0.0005
    ]
    if found and not any(why for _, why in found.values()):
        left = [item for use in FULL for item in entry["uses"].get(use, {}).get("left_out", {}).items()]
        barriers = dict.fromkeys(f"{_operator(name)}: {why}" for name, why in left)
        texts += [f"after {text}" for text in list(barriers)[:2]]
    texts += [f"whole graphs: {reason}" for reason in list(reasons)[:2]]
    broken = [entry["uses"][use]["error"] for use in USES if _ours(entry["uses"].get(use, {}))]
    return cell("; ".join([*texts, *dict.fromkeys(broken)]))


def _operator(name: str) -> str:
    return name.partition(" (")[0].removesuffix(".default")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _apart(types: Mapping[str, Entry]) -> Iterator[str]:
    """Yield the tables of exceptions, each with its reasons."""
    yield _reasons("¹ Stock `torch.compile` differs from eager mode", _stock_differs(types))
    yield _reasons("² Stock `torch.compile` cannot run it (`backend=\"aot_eager\"`)", _uses_with(types, "stock_error"))
    no_such_use = "³ The original has no such use: eager mode raises, or returns no state that a step could begin with"
    yield _reasons(no_such_use, _uses_with(types, "eager_error"))
    unbuilt = [(name, entry["not_built"]) for name, entry in types.items() if "not_built" in entry]
    yield _reasons("Not built or not run", unbuilt)
    yield _reasons("Not finished", [(name, entry["ended"]) for name, entry in types.items() if "ended" in entry])
    broken = [(name, _breaks(entry)) for name, entry in types.items() if _breaks(entry)]
    yield _reasons("More than one graph, why Dynamo breaks", broken)


def _breaks(entry: Entry) -> str:
    found: dict[str, None] = {}
    for use in entry.get("uses", {}).values():
        found.update(dict.fromkeys(use.get("break_reasons", ())))
    return "; ".join(list(found)[:3])


def _stock_differs(types: Mapping[str, Entry]) -> list[tuple[str, str]]:
    found = []
    for name, entry in types.items():
        uses = entry.get("uses", {})
        texts = [
            f"{use} {got['stock_difference']:.0e}"
            for use, got in uses.items()
            if got.get("stock_difference", 0) > entry["bound"]
        ]
        if texts:
            found.append((name, ", ".join(texts)))
    return found


def _uses_with(types: Mapping[str, Entry], key: str) -> list[tuple[str, str]]:
    """Return the types with an error of this kind, each error once with its uses."""
    found = []
    for name, entry in types.items():
        by_error: dict[str, list[str]] = {}
        for use, got in entry.get("uses", {}).items():
            if key in got:
                by_error.setdefault(got[key], []).append(use)
        found += [(name, f"{', '.join(uses)}: {error}") for error, uses in by_error.items()]
    return found


def _reasons(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"## {title}", "", "| type | |", "|---|---|", *(f"| {name} | {cell(why)} |" for name, why in rows)]
    return "\n".join(lines) + "\n"
