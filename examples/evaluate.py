"""lm-evaluation-harness with Gemma 3 270M on long documents, without and with mom: peak, time and metrics.

    pip install 'mom_compile[examples]'
    python -m examples.evaluate --documents 4 --tokens 1500

On several GPUs, each rank scores its share of the requests:

    torchrun --nproc-per-node 2 -m examples.evaluate --model FOLDER        # or: accelerate launch -m examples.evaluate

The task is local: documents of English text that Python ships, rolling log-likelihoods, the harness' own metrics. With
mom, a subclass of `HFLM` answers log-likelihood requests by `token_log_probs`; the subclass below is all that is
needed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mom_compile
from benchmarks import measure, workers
from benchmarks.measure import MIB
from examples.demo import OUTPUT, prepare
from examples.scored_requests import answers_of_ranks

Row = dict[str, Any]
TASK = "english_documents"
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
RUNS = ("harness", "harness with mom")


# ------------------------------------------------------------------------------------------------ the harness


def harness_model(with_mom: bool, model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Return the harness' model, or with mom the subclass that scores without logits."""
    from lm_eval.models.huggingface import HFLM

    class MomLM(HFLM):
        """Answers log-likelihood requests without logits; everything else is the harness' own."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            size = override_bs or int(self.batch_size)
            found = answers_of_ranks(self.model, requests, batch_size=size, longest=self.max_length)
            for number, answer in found.items():
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
            return [found[number] for number in range(len(requests))]

    kind = MomLM if with_mom else HFLM
    device = str(next(model.parameters()).device)
    return kind(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, device=device)


def task(documents: Sequence[str]) -> Any:
    """Return a task with the rolling log-likelihood of each document and the harness' metrics."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def local(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_dict({"text": list(documents)})}

    metrics = [{"metric": name, "higher_is_better": False} for name in METRICS]
    config = {"task": TASK, "custom_dataset": local, "test_split": "test", "output_type": "loglikelihood_rolling"}
    config |= {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": metrics, "metadata": {"version": 1}}
    return ConfigurableTask(config=config)


def evaluate(lm: Any, documents: Sequence[str]) -> Row:
    """Run the harness and return its metrics and the log-likelihood of each document."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(model=lm, tasks=[task(documents)], bootstrap_iters=0, log_samples=True)
    found = results["results"][TASK]
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    logs = [float(sample["resps"][0][0]) for sample in samples]
    return {"metrics": {name: found[f"{name},none"] for name in METRICS}, "documents": logs}


# ---------------------------------------------------------------------------------------------------- workers


def english_texts() -> Iterator[str]:
    """Yield English text that Python ships: its language reference, then docstrings of its library."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def english(tokenizer: Any, documents: int, tokens: int) -> list[str]:
    """Return documents of about `tokens` tokens each, consecutive parts of the text."""
    ids: list[int] = []
    for text in filter(None, english_texts()):
        ids += tokenizer(text + "\n\n", add_special_tokens=False).input_ids
        if len(ids) >= documents * tokens:
            break
    else:
        raise ValueError(f"Python ships {len(ids)} tokens of text, and {documents} documents of {tokens} are required")
    return [tokenizer.decode(ids[n * tokens : (n + 1) * tokens]) for n in range(documents)]


def load(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workers.step("loading")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def run(spec: Row) -> None:
    """Run the harness without or with mom: one document to compile, then all to measure."""
    measure.watch_cpu()
    model, tokenizer = load(spec["model"])
    documents = english(tokenizer, spec["documents"], spec["tokens"])
    lm = harness_model(spec["run"] == RUNS[1], model, tokenizer, spec["batch_size"])
    workers.step("a first document")
    first = measure.seconds(lambda: evaluate(lm, documents[: spec["batch_size"]]))
    workers.step(f"{len(documents)} documents")
    kept: list[Row] = []
    began = time.perf_counter()
    peak = measure.peak_bytes(lambda: kept.append(evaluate(lm, documents))).peak
    workers.row({"run": spec["run"], "peak": peak, "seconds": time.perf_counter() - began, "first": first, **kept[0]})


def per_token(spec: Row) -> None:
    """Return the largest difference of token log-probabilities from float64, for the harness and for mom."""
    model, tokenizer = load(spec["model"])
    documents = english(tokenizer, spec["documents"], spec["tokens"])[: spec["exact"]]
    lm = harness_model(False, model, tokenizer, 1)
    off: dict[str, float] = dict.fromkeys(RUNS, 0.0)
    sums: list[float] = []
    for number, document in enumerate(documents):
        workers.step(f"float64, document {number + 1} of {len(documents)}")
        ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(document)]])
        with_mom = mom_compile.token_log_probs(model, ids).log_probs[0]
        exact, theirs = exact_log_probs(model, ids)
        sums.append(exact.sum().item())
        for name, values in zip(RUNS, (theirs, with_mom), strict=True):
            off[name] = max(off[name], (values.double() - exact).abs().max().item())
    workers.row({"off": off, "documents": sums})


@torch.no_grad()
def exact_log_probs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token log-probabilities from eager mode's logits: in float64, and in float32 as in the harness."""
    logits = model.forward(input_ids=ids, use_cache=False).logits[0, :-1]
    parts = list(zip(logits.split(64), ids[0, 1:].split(64), strict=True))
    in_float64 = [rows.double().log_softmax(-1).gather(-1, own[:, None])[:, 0] for rows, own in parts]
    in_float32 = [rows.log_softmax(-1).gather(-1, own[:, None])[:, 0] for rows, own in parts]
    return torch.cat(in_float64), torch.cat(in_float32)


# ------------------------------------------------------------------------------------------------------ ranks


def ranks() -> int:
    """Return how many processes torchrun or accelerate has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_on_ranks(options: argparse.Namespace, evaluated: Callable[..., Row]) -> Row:
    """Evaluate with mom on all ranks. `evaluated(model, tokenizer, documents)` returns metrics. Rank 0 prints them.

    Each rank runs the harness on all documents, and scores its share of the requests (`answers_of_ranks`).
    """
    on_gpu, own = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        model, tokenizer = load(options.model)
        model.to(f"cuda:{own}" if on_gpu else "cpu")
        began = time.perf_counter()
        found = evaluated(model, tokenizer, english(tokenizer, options.documents, options.tokens))
        if dist.get_rank() == 0:
            print(f"{options.documents} documents of {options.tokens} tokens on {dist.get_world_size()} ranks: "
                  f"{time.perf_counter() - began:.1f} s")  # fmt: skip
            for name, value in found["metrics"].items():
                print(f"{name:24}{value:.6f}")
        return found
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- parent


def report(rows: Sequence[Row], exact: Row | None) -> list[str]:
    """Return the lines to print: figures, metrics, their differences, and differences from float64."""
    plain, with_mom = rows
    lines = [f"{'':24}{RUNS[0]:>18}{RUNS[1]:>20}{'of the first':>14}"]
    peaks = [f"{row['peak'] / MIB:,.0f} MiB" for row in rows]
    times = [f"{row['seconds']:.1f} s" for row in rows]
    firsts = [f"{row['first']:.1f} s" for row in rows]
    lines.append(f"{'peak above the weights':24}{peaks[0]:>18}{peaks[1]:>20}{with_mom['peak'] / plain['peak']:>13.3f}x")
    lines.append(f"{'time, not in turn':24}{times[0]:>18}{times[1]:>20}")
    lines.append(f"{'a first document':24}{firsts[0]:>18}{firsts[1]:>20}")
    for name in METRICS:
        a, b = plain["metrics"][name], with_mom["metrics"][name]
        lines.append(f"{name:24}{a:>18.6f}{b:>20.6f}{abs(a - b):>14.1e} apart")
    apart = [abs(a - b) for a, b in zip(plain["documents"], with_mom["documents"], strict=True)]
    lines.append(
        f"log-likelihood of a document: at most {max(apart):.1e} apart, of {abs(plain['documents'][0]):.0f} nats"
    )
    if exact is not None:
        said = ", ".join(f"{name} {value:.1e}" for name, value in exact["off"].items())
        lines.append(f"log-probability of a token: at most this far from eager logits scored in float64: {said}")
        of_sums = [max(abs(a - b) for a, b in zip(row["documents"], exact["documents"], strict=False)) for row in rows]
        said = ", ".join(f"{name} {value:.1e}" for name, value in zip(RUNS, of_sums, strict=True))
        lines.append(f"log-likelihood of a document, in the same way: {said}")
    lines.append("peaks are exact; times are of this run only")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the hub (default: Gemma 3 270M from a package)")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of each document (default 1500)")
    parser.add_argument("--batch-size", type=int, default=1, help="batch size of the harness (default 1)")
    parser.add_argument("--exact", type=int, default=2, help="documents scored in float64, too (default 2)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.documents, options.batch_size) < 1 or options.tokens < 2:
        parser.error("--documents and --batch-size are at least 1, --tokens at least 2")
    return options


def missing() -> str | None:
    """Return what to do if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return "lm-evaluation-harness is not installed: pip install 'mom_compile[examples]', or pip install lm-eval"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    wanted = missing()
    if wanted is not None:
        print(wanted, file=sys.stderr)
        return 2
    if ranks() > 1:
        if options.model is None:
            print("on several ranks, --model is required", file=sys.stderr)
            return 2
        run_on_ranks(options, lambda model, tokenizer, documents: evaluate(
            harness_model(True, model, tokenizer, options.batch_size), documents))  # fmt: skip
        return 0
    if options.worker is not None:
        spec = json.loads(options.worker)
        kinds = {"prepare": lambda spec: prepare(16), "run": run, "per_token": per_token}
        kinds[spec["kind"]](spec)
        return 0
    OUTPUT.mkdir(exist_ok=True)
    module = "examples.evaluate"
    if options.model is None:
        workers.run_worker(module, {"kind": "prepare"}, on_step=print)
    folder = options.model or str(OUTPUT / "model")
    if Path(folder).is_dir():
        folder = str(Path(folder).resolve())
    shared = {name: getattr(options, name) for name in ("documents", "tokens", "batch_size", "exact")}
    spec = {**shared, "model": folder}
    rows: list[Row] = []
    for name in RUNS:
        rows += workers.run_worker(module, {**spec, "kind": "run", "run": name}, on_step=print)
    exact = workers.run_worker(module, {**spec, "kind": "per_token"}, on_step=print)[0] if options.exact else None
    print(f"\n{options.documents} documents of {options.tokens} tokens")
    print("\n".join(report(rows, exact)))
    print(measure.describe_machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
