"""docs/support.md: which model types work with which features, from result files and test parameters.

`python -m benchmarks.support` writes the page from `benchmarks/results/architectures.json`, from
`benchmarks/results/compiled-*.json`, and from the parameters of the tests that generate with a cache or with weights on
the host. It measures nothing. `tests/test_docs.py` compares the page with its sources.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.architectures_page import (
    FULL,
    USES,
    all_in_loops,
    compared,
    impossible,
    peak_ratio,
    percent,
    right,
    share,
)
from benchmarks.architectures_worker import BOUND_FLOAT32

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
RESULTS = ROOT / "benchmarks" / "results"

#: Column -> the test whose parameters are the families that it was tested with.
ON_HOST = {
    "cache on the host": "test_kv_offload.test_a_family_generates_the_same_tokens_with_its_cache_on_the_host",
    "weights on the host": "test_weights_models.test_generated_tokens_are_equal",
}

YES, NO, NONE = "yes", "**no**", "–"

_HEAD = """# Support matrix

One row for each decoder type of transformers {transformers} that was compared with eager mode.
`python -m benchmarks.support` generates this page from result files and test parameters.
[Architectures](architectures.md) has the measured differences and the reasons.

| column | value |
|---|---|
| prefill, batch, decode, scoring | *yes*: logits are within 1e-6 (float64) or 1e-4 (float32) of eager mode's |
| in loops | the share of multiply-adds that run over mini-sequences, the lower of batch and scoring |
| peak | peak of a compiled prefill of 2048 tokens over stock Inductor's, float32, above weights and inputs |
| compiled | tokens of prefills whose compiled float32 result was compared and recorded; `make sweep` runs every type |
| cache on the host | *tested*: `generate()` returns the tokens of eager mode with `kv_offload=True` |
| weights on the host | *tested*: `generate()` returns the text of eager mode with `offload_weights` |

Differences are relative to the largest logit. *batch* is padded on the left. –: eager mode or stock `torch.compile`
cannot run the use, or stock `torch.compile` differs from eager mode.

They were measured on {date} with torch {torch} on a CPU. Loop bodies ran node by node there, and not as Inductor's
code.

{counts}

"""

_COLUMNS = ("type", *USES, "in loops", "peak", "compiled", *ON_HOST)


def page() -> str:
    """Return the page as text."""
    results = json.loads((RESULTS / "architectures.json").read_text())
    found = {**results["types"], **results["decoders"]}
    types = {name: entry for name, entry in sorted(found.items()) if compared(entry)}
    host = {column: tested_types(place) for column, place in ON_HOST.items()}
    lengths = compiled_lengths()
    rows = [[name, *_marks(name, entry, lengths, host)] for name, entry in types.items()]
    table = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS)), *map(_row, rows)]
    return _HEAD.format(**results["stamp"], counts=_counts(types)) + "\n".join(table) + "\n"


def _marks(
    name: str, entry: Mapping[str, Any], lengths: Mapping[str, str], host: Mapping[str, set[str]]
) -> list[str]:
    ratio, shares = peak_ratio(entry), [share(entry, use) for use in FULL]
    looped = [value for value in shares if value is not None]
    return [
        *(_mark(entry, use) for use in USES),
        percent(min(looped)) if looped else NONE,
        NONE if ratio is None else f"{ratio:.2f}",
        lengths.get(name, ""),
        *("tested" if name in tested else "" for tested in host.values()),
    ]


def _mark(entry: Mapping[str, Any], use: str) -> str:
    if right(entry, use):
        return YES
    return NONE if use not in entry["uses"] or impossible(entry, use) else NO


def _counts(types: Mapping[str, Mapping[str, Any]]) -> str:
    four = sum(all(right(entry, use) for use in USES) for entry in types.values())
    wrong = [name for name, entry in types.items() if any(_mark(entry, use) == NO for use in USES)]
    looped = sum(map(all_in_loops, types.values()))
    text = f"Of {len(types)} types, {four} are correct in all four uses, and {looped} run all matrix products in loops."
    return text + (f" Wrong or failing: {', '.join(wrong)}." if wrong else " None is wrong where eager mode runs.")


def compiled_lengths() -> dict[str, str]:
    """Return the lengths in tokens at which the compiled result of a type is right, as text by type."""
    found: dict[str, str] = {}
    for path in sorted(RESULTS.glob("compiled-*.json")):
        for key, cell in json.loads(path.read_text())["cells"].items():
            name, _, tokens = key.partition(" ")
            exact = cell.get("prefill", float("inf")) <= BOUND_FLOAT32
            found[name] = ", ".join(filter(None, [found.get(name), f"{tokens}" if exact else f"{NO} at {tokens}"]))
    return found


def tested_types(place: str) -> set[str]:
    """Return the model types of the families that a test is parametrised with, `"module.function"`."""
    transformers = importlib.import_module("transformers")
    module, _, name = place.partition(".")
    test = getattr(importlib.import_module(f"tests.{module}"), name)
    (families,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
    names = [family if isinstance(family, str) else family.values[0] for family in families]
    return {getattr(transformers, f"{name}Config").model_type for name in names}


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
