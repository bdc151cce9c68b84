"""Run multimodal and encoder models, each in a process of its own, for `benchmarks.multimodal`.

The rows of a type have: differences of prefill and decode from eager mode, whether `generate()` has the same tokens,
graphs of mom and of stock `torch.compile`, pieces that run eagerly, multiply-adds of the encoder and of the decoder
with those in loops, and peaks of mom and of stock Inductor.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx  # here, so that no type's seconds have its import
import transformers
from torch import fx

import mom_compile.backend as backend_module
import mom_compile.pipeline.to_loops as to_loops
from benchmarks import measure
from benchmarks.architectures_worker import describe_error, difference, in_a_child
from benchmarks.multimodal_calls import OPTIONS, Subject, build, generate
from benchmarks.workers import row, step
from mom_compile import reports
from mom_passes.rules.work import products


class Work:
    """Multiply-adds of products by part of the model (`encoder` or `decoder`), all of them and those in loops."""

    def __init__(self, subject: Subject) -> None:
        self.all: Counter[str] = Counter()
        self.in_loops: Counter[str] = Counter()
        model, name = subject.model, subject.decoder
        head = model.get_output_embeddings()
        self._alone = bool(name) and model.get_submodule(name) is model.base_model
        self._names = {n.rpartition(".")[2] for n, part in model.named_modules() if name == n or (n and part is head)}
        own = set(model.get_submodule(name).modules() if name else [])
        self._classes = {type(part) for part in own} - {type(part) for part in model.modules() if part not in own}

    def part(self, node: fx.Node) -> str:
        """Return the part that a node belongs to, by the modules that Dynamo entered."""
        if self._alone:  # with any other head
            return "decoder"
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if kind in self._classes or not self._names.isdisjoint(path.split(".")):
                return "decoder"
        return "encoder"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count the products of graphs that are compiled inside the context."""
        cut, compile_stock = to_loops.loops_over_mini_sequences, backend_module.stock_or_eager

        def see(tokens: to_loops.Tokens, *args: Any) -> Any:
            found = cut(tokens, *args)
            for node, work in products(tokens.gm.graph).items():
                self.all[self.part(node)] += work
                self.in_loops[self.part(node)] += work * (node in found[0].in_loops)
            return found

        def stock(gm: fx.GraphModule, *args: Any) -> Any:
            for node, work in products(gm.graph).items():
                self.all[self.part(node)] += work
            return compile_stock(gm, *args)

        with (
            mock.patch.object(to_loops, "loops_over_mini_sequences", see),
            mock.patch.object(backend_module, "stock_or_eager", stock),
            torch._inductor.config.patch(fx_graph_cache=False),  # a graph that is read from the disk shows no passes
        ):
            yield


class Stock:
    """Stock Inductor, as a backend that counts its graphs. With `code` off, graphs run node by node."""

    def __init__(self) -> None:
        self.graphs, self.code = 0, True

    def __call__(self, gm: fx.GraphModule, example_inputs: Any, **options: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled: Any = torch._inductor.compile_fx.compile_fx(gm, example_inputs) if self.code else gm.forward
        return compiled  # type: ignore[no-any-return]


def result(out: Any) -> torch.Tensor:
    """Return the logits, or the hidden states of an encoder."""
    logits = out.get("logits")
    return out.last_hidden_state if logits is None else logits  # type: ignore[no-any-return]


def uses(subject: Subject) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Return the uses of a model by name: functions of the results of the uses before. The decode step is that of
    `generate()`, which has the same graph."""
    found: dict[str, Callable[[dict[str, Any]], Any]] = {"prefill": lambda got: subject.model(**subject.inputs)}
    if subject.generates:
        _, decode = generate(subject)
        found["decode"] = lambda got: subject.model(**{**decode, "past_key_values": got["prefill"].past_key_values})
        found["generate"] = lambda got: generate(subject)[0]
    return found


def compare(use: str, actual: Any, wanted: Any) -> dict[str, Any]:
    if use == "generate":
        return {"same": actual == wanted}
    return {"difference": difference(result(actual), wanted)}


def compile_model(model: Any, backend: Any, **options: Any) -> None:
    torch._dynamo.reset()
    model._compiled_call_impl = None
    model.compile(backend=backend, **options)


def run_one(name: str, side: int) -> None:
    """Run all uses of a type with mom and with stock Inductor, and emit rows."""
    measure.watch_cpu()
    subject = build(name, side)
    model = subject.model
    row({"type": name, "parameters": sum(p.numel() for p in model.parameters())})
    wanted: dict[str, Any] = {}
    got: dict[str, Any] = {}
    runs = uses(subject)
    for use, run in runs.items():
        got[use] = run(got)
        wanted[use] = got[use] if use == "generate" else result(got[use]).clone()
    stock = Stock()
    for who, backend in (("mom", "mom"), ("stock", stock)):
        compile_model(model, backend, **({"options": OPTIONS} if who == "mom" else {}))
        got = {}
        found: dict[str, Any] = {}
        work = Work(subject)
        for use, run in runs.items():
            step(f"{who} {use}")
            before = len(reports()), stock.graphs
            try:
                with work.watched() if use == "prefill" else contextlib.nullcontext():
                    got[use] = run(got)
                found[use] = compare(use, got[use], wanted[use])
            except Exception as error:
                found[use] = {"error": describe_error(error)}
                break
            made = reports()[before[0] :]
            found[use] |= {"graphs": len(made) if who == "mom" else stock.graphs - before[1]}
            if who == "mom":
                found[use] |= seen(made)
            if use == "prefill":
                found["work"] = {part: [work.in_loops[part], total] for part, total in work.all.items()}
                found["peak"] = measure.peak_bytes(lambda: runs["prefill"]({})).peak
            row({"type": name, who: found})
            stock.code = use != "prefill"
        row({"type": name, who: found})


def seen(made: list[Any]) -> dict[str, Any]:
    """Return what reports say besides figures: eager pieces, failures, and what is not in loops, with reasons."""
    looped = [report for report in made if report.stages]
    whole = [report.fallback or report.no_loops or "" for report in made if not report.stages]
    return {
        "eager_pieces": [f"{name}: {why}"[:300] for report in made for name, why in report.eager_pieces.items()],
        "failed": [report.fallback for report in made if report.failed],
        "left_out": {report.located(name): why for report in looped for name, why in report.left_out.items()},
        "outside": {report.located(name): work for report in looped for name, work in report.work_outside.items()},
        "whole_graphs": dict(Counter(filter(None, whole))),
    }


def main() -> int:
    spec = json.loads(sys.argv[sys.argv.index("--worker") + 1])
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name, side in spec["types"]:
        began = time.monotonic()
        with torch.no_grad():
            failed = in_a_child(name, functools.partial(run_one, name, side), spec["timeout"])
        ended = {} if failed is None else {"ended": failed}
        row({"type": name, **ended, "seconds": round(time.monotonic() - began, 1)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
