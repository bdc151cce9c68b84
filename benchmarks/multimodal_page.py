"""Write docs/multimodal.md from the results of `benchmarks.multimodal`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.architectures_page import cell, number, percent
from benchmarks.architectures_worker import BOUND_FLOAT32
from benchmarks.measure import MIB, describe_machine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "multimodal.md"

Entry = Mapping[str, Any]

_HEAD = """# Multimodal models and encoders

Small models of transformers with images, sound or long text in an encoder, compiled in float32 with `mini_seq_len`
128: does mom compute what eager mode computes, how much runs over mini-sequences, and what does it need?

{stamp}.

`python -m benchmarks.multimodal` (`make multimodal`) measures and writes this page. `--only TYPE ... --redo` measures
these types again; `--page` only writes the page. `benchmarks/multimodal_calls.py` makes the models and their calls.

Each model has two layers, or one of each kind, and a hidden size of 64. *Patches* are those of the image; audio has
twice as many frames, and text as many tokens. The text of a multimodal model has 500 tokens besides one for each
embedding of an image or of audio; a decoder that reads an encoder has 300.

*prefill* and *decode* are the largest difference of the logits (hidden states of an encoder) from eager mode, relative
to the largest logit; the bound is 1e-4. *generate* is whether six greedy tokens are those of eager mode. *Encoder* and
*decoder* are the shares of multiply-adds of matrix products and attentions in loops, in a prefill; a projector belongs
to the encoder. *Graphs* are those of prefill, decode step and `generate()`, in brackets those of stock `torch.compile`.
*Eager pieces* are those that Inductor could not compile. *Peak* is that of a prefill above weights and inputs, in
brackets that of stock Inductor, in MiB. *Notes* are errors and operators that end loops, with reasons. Logits are those
of the last token, where the model can leave out the others.

{counts}
"""

_GENERATE = """
## `generate()` calls encoders by themselves

Since transformers 5.23, `generate()` calls the encoder of images before it calls the model, as it has always called the
encoder of an encoder-decoder model. `mom_compile.compile(model)` compiles these modules, too.
`model.compile(backend="mom")` compiles the model only: in `generate()`, such encoders then run in eager mode.
"""


def page(results: Mapping[str, Any]) -> str:
    """Return the page as text."""
    cells: Mapping[str, Entry] = results["cells"]
    rows = [
        "| type | patches | prefill | decode | generate | encoder | decoder | graphs | eager pieces | peak | notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(key, found) for key, found in cells.items()),
    ]
    head = _HEAD.format(stamp=describe_machine(results["machine"]), counts=_counts(list(cells.values())))
    return head + "\n" + "\n".join(rows) + "\n" + _GENERATE


def is_right(found: Entry) -> bool:
    """Return whether mom is within the bound in all uses, and generates the same tokens."""
    uses = [
        use
        for use in found.get("mom", {}).values()
        if isinstance(use, Mapping) and {"difference", "same", "error"} & set(use)
    ]
    return bool(uses) and "ended" not in found and all(_is_right(use) for use in uses)


def _is_right(use: Entry) -> bool:
    return bool(use.get("same") or use.get("difference", float("inf")) <= BOUND_FLOAT32)


def share(found: Entry, part: str) -> float | None:
    """Return the share of a part's multiply-adds that is in loops, None if it has none."""
    inside, total = found.get("mom", {}).get("work", {}).get(part, (0, 0))
    return inside / total if total else None


def peak_ratio(found: Entry) -> float | None:
    """Return mom's peak over stock Inductor's, if both were measured."""
    peaks = [found.get(who, {}).get("peak") for who in ("mom", "stock")]
    return peaks[0] / peaks[1] if all(peaks) else None  # type: ignore[operator]


def _counts(found: list[Entry]) -> str:
    shares = [[share(one, part) for part in ("encoder", "decoder")] for one in found]
    looped = sum(all(part is None or part >= 0.95 for part in parts) and any(parts) for parts in shares)
    ratios = sorted(ratio for one in found if (ratio := peak_ratio(one)) is not None)
    middle = f"; the median of {len(ratios)} peaks is {ratios[len(ratios) // 2]:.2f} of stock's" if ratios else ""
    return (
        f"Of {len(found)} rows, {sum(map(is_right, found))} are right in all uses, and {looped} have at least 95 % of "
        f"both parts in loops{middle}."
    )


def _row(key: str, found: Entry) -> str:
    name, patches = key.split(", ")
    mom, stock = found.get("mom", {}), found.get("stock", {})
    uses = [mom.get(use, {}) for use in ("prefill", "decode", "generate")]
    graphs = " / ".join(
        f"{use['graphs']} ({stock.get(key, {}).get('graphs', '–')})"
        for key, use in zip(("prefill", "decode", "generate"), uses, strict=True)
        if "graphs" in use
    )
    pieces = sum(len(use.get("eager_pieces", ())) for use in uses)
    ratio = peak_ratio(found)
    peak = f"{mom['peak'] / MIB:.1f} ({stock['peak'] / MIB:.1f}): {ratio:.2f}" if ratio is not None else "–"
    shares = [percent(share(found, part)) for part in ("encoder", "decoder")]
    cells = [name, patches, *map(_figure, uses), *shares, graphs, str(pieces), peak, _outside(found)]
    return f"| {' | '.join(cells)} |"


def _figure(use: Entry) -> str:
    if "error" in use:
        return "**fails**"
    if "same" in use:
        return "same" if use["same"] else "**differs**"
    if "difference" not in use:
        return "–"
    text = number(use["difference"])
    return text if _is_right(use) else f"**{text}**"


def _outside(found: Entry) -> str:
    """Return errors, and operators of a prefill that multiply outside of loops or end them, with reasons."""
    mom = found.get("mom", {})
    prefill = mom.get("prefill", {})
    errors = [use["error"] for use in mom.values() if isinstance(use, Mapping) and "error" in use]
    failed = [f"failed: {why}" for why in prefill.get("failed", ())]
    reasons = dict.fromkeys(
        f"{name.partition(' ')[0].removesuffix('.default')}: {why}" for name, why in prefill.get("left_out", {}).items()
    )
    eager = [why for use in mom.values() if isinstance(use, Mapping) for why in use.get("eager_pieces", ())]
    ended = [found["ended"]] if "ended" in found else []
    return cell("; ".join([*ended, *errors, *failed, *eager, *list(reasons)[:3]]))
