"""What ranks do in `test_ranks.py`: each function runs on every rank and returns what the test compares."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import mom_compile
from benchmarks.without_codegen import pieces_run_eagerly, stock_runs_eagerly
from mom_compile.runtime import parted
from mom_passes.ops.collectives import ALL_GATHER, ALL_REDUCE, GATHER_COLUMNS, REDUCE_SCATTER
from tests.models import TinyDecoder, ids, prompt
from tests.parallel import ParallelDecoder
from tests.rule_law import Call, check_call
from tests.rule_samples import floats


@contextlib.contextmanager
def without_codegen() -> Iterator[None]:
    torch._dynamo.reset()
    torch._functorch.config.enable_autograd_cache = False  # each scenario compiles its own graphs
    with pieces_run_eagerly(), stock_runs_eagerly(), torch.no_grad():
        yield


def compiled(rank: int, **options: Any) -> tuple[TinyDecoder, Callable[..., torch.Tensor]]:
    whole = TinyDecoder(layers=2)
    model = ParallelDecoder(whole, rank, dist.get_world_size())
    return whole, torch.compile(model, backend="mom", options={"mini_seq_len": 16, "strict": True, **options})


def error_of(call: Callable[[], Any]) -> str:
    """Return the type and the text of what a call raises; empty if it raises nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def waits_of(call: Callable[[], Any]) -> int:
    before = parted.WAITED.collectives
    call()
    return parted.WAITED.collectives - before


# --- one scenario each ---


def rule_law(rank: int) -> int:
    """The number of accepted dims of the collectives' rules, each of which obeys the law on these ranks."""
    calls = [
        Call(ALL_REDUCE, (floats(2, 6, 4) * (rank + 1), "sum", "0")),
        Call(ALL_REDUCE, (floats(6, 4) * (rank + 1), "max", "0")),
        Call(ALL_GATHER, (floats(1, 6, 3) + rank, 2, "0")),
        Call(ALL_GATHER, (floats(6, 3) + rank, 2, "0")),
        Call(GATHER_COLUMNS, (floats(2, 6, 3) + rank, 2, "0")),
        Call(REDUCE_SCATTER, (floats(12, 3) + rank, "sum", 2, "0")),
    ]
    return sum(map(check_call, calls))


def lengths(rank: int) -> dict[int, float]:
    """By length: the difference of a parallel decoder's logits from those of the whole decoder."""
    with without_codegen():
        whole, model = compiled(rank)
        return {n: float((model(ids(2, n)) - whole(ids(2, n))).abs().max()) for n in (45, 17, 2, 64, 33)}


class Scores(torch.nn.Module):
    """Log-probabilities of the next ids, entropies and greedy ids, `[B, S - 1]` each, of a decoder."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.decoder(given)[:, :-1].float()
        likelihoods = logits.log_softmax(-1)
        chosen = likelihoods.gather(-1, given[:, 1:, None]).squeeze(-1)
        return chosen, -(likelihoods.exp() * likelihoods).sum(-1), logits.argmax(-1)


def scores(rank: int) -> dict[str, Any]:
    """Scores of a vocabulary that is divided among the ranks, and what collectives there are."""
    with without_codegen():
        whole = TinyDecoder(layers=1, vocabulary=4096)
        parallel = ParallelDecoder(whole, rank, dist.get_world_size())
        given = ids(2, 301, vocabulary=4096)
        model = torch.compile(Scores(parallel), backend="mom", options={"mini_seq_len": 64, "strict": True})
        expected, found = Scores(whole)(given), model(given)
        (report,) = mom_compile.reports()
        code = report.code()
        return {
            "differences": [float((a - b).abs().max()) for a, b in zip(expected[:2], found[:2], strict=True)],
            "greedy": torch.equal(expected[2], found[2]),
            "gathers": code.count("gather_columns"),
            "scored": code.count("mom.scored"),
            "outside": report.communication.outside if report.communication is not None else None,
            "bytes_per_token": report.communication.bytes_per_token if report.communication is not None else None,
        }


def odd_logits(rank: int) -> dict[str, list[bool]]:
    """Whether log-probabilities, greedy columns and largest logits are eager mode's: with all columns of rank 1 at -inf
    beside logits near -1000, with a NaN in rank 1's columns, with +inf there."""
    torch.manual_seed(0)
    head, x, targets = torch.nn.Linear(16, 2048), torch.randn(1, 301, 16), torch.randint(0, 2048, (1, 301, 1))

    def scored(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = funcol.all_gather_tensor(head(x), 0, dist.group.WORLD).chunk(2)
        logits = torch.cat(parts, -1).float()
        return logits.log_softmax(-1).gather(-1, targets), logits.argmax(-1), logits.amax(-1)

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name, number, columns in (("-inf", -math.inf, slice(None)), ("nan", math.nan, 5), ("inf", math.inf, 7)):
            with without_codegen():
                head.bias.fill_(-1000.0 if name == "-inf" else -10.0)
                if rank == 1:
                    head.bias[columns] = number
                compiled = torch.compile(scored, backend="mom", options={"mini_seq_len": 64, "strict": True})
                pairs = zip(scored(x), compiled(x), strict=True)
                found[name] = [torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in pairs]
                assert "mom.scored" in mom_compile.reports()[-1].code()
    return found


def two_groups(rank: int) -> list[str]:
    """What calls raise of a graph with two groups, the second of which rank 1 cannot run; and the next ones."""
    one, other = dist.new_group([0, 1]), dist.new_group([0, 1])
    matrix = torch.randn(16, 16)

    def products(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(funcol.all_reduce(x @ matrix, "sum", one) @ matrix, "sum", other)

    with without_codegen():
        options = {"strict": True, "memory_budget": "1GiB" if rank == 0 else "200KiB"}
        model = torch.compile(products, backend="mom", options=options, dynamic=True)
        return [error_of(functools.partial(model, torch.randn(1, n, 16))) for n in (45, 4000, 46, 47)]


def own_lengths(rank: int) -> list[str]:
    """What calls with another length on each rank raise if ranks share weights alone."""
    part = torch.randn(8, 16)

    def product(x: torch.Tensor) -> torch.Tensor:
        return (x @ funcol.all_gather_tensor(part, 0, dist.group.WORLD)).sin() @ torch.ones(16, 16)

    with without_codegen(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.compile(product, backend="mom", options={"mini_seq_len": 8, "strict": True})
        return [error_of(functools.partial(model, torch.randn(1, n + 20 * rank, 16))) for n in (45, 77, 90)]


def other_lengths(rank: int) -> tuple[str, float]:
    """What a call with another length on each rank raises, and that the next call is right."""
    with without_codegen():
        whole, model = compiled(rank)
        model(ids(1, 45)), model(ids(1, 46))
        raised = error_of(lambda: model(ids(1, 50 + 20 * rank)))
        return raised, float((model(ids(1, 64)) - whole(ids(1, 64))).abs().max())


def other_options(rank: int) -> str:
    with without_codegen():
        _, model = compiled(rank, mini_seq_len=16 - 4 * rank)
        return error_of(lambda: model(ids(1, 45)))


def failed_compilation(rank: int, strict: bool) -> str:
    """Rank 1 cannot rewrite the graph: it raises, or has no loops."""
    with without_codegen(), warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if rank == 1:
            broken = mock.Mock(side_effect=RuntimeError("no room for the graph"))
            stack.enter_context(mock.patch("mom_compile.backend.rewrite", broken))
        _, model = compiled(rank, strict=strict)
        return error_of(lambda: model(ids(1, 45)))


def small_budget(rank: int) -> str:
    """Rank 1 has a budget that it cannot keep."""
    with without_codegen():
        _, model = compiled(rank, mini_seq_len="auto", memory_budget="1GiB" if rank == 0 else "120KiB")
        return error_of(lambda: model(ids(1, 900)))


def unequal_budgets(rank: int) -> tuple[int, float]:
    """Rank 1 has a budget for fewer rows: the collectives of a run on each rank, and its difference."""
    with without_codegen():
        whole, model = compiled(rank, mini_seq_len="auto", memory_budget="1GiB" if rank == 0 else "1500KiB")
        given = ids(1, 900)
        model(given)
        waits = waits_of(lambda: model(given))
        return waits, float((model(given) - whole(given)).abs().max())


def exchanged_rows(rank: int) -> tuple[float, list[str | None]]:
    """Ranks exchange different numbers of rows: the difference of the result, and why each graph has no loops."""
    with without_codegen():
        product = torch.nn.Linear(8, 8)
        sent, received = ([1, 3], [1, 2]) if rank == 0 else ([2, 3], [3, 3])

        def run(x: torch.Tensor) -> torch.Tensor:
            return product(funcol.all_to_all_single(product(x), received, sent, dist.group.WORLD))

        given = floats(sum(sent), 8).float()
        made = torch.compile(run, backend="mom")(given)
        return float((made - run(given)).abs().max()), [report.fallback for report in mom_compile.reports()]


def destroyed_group(rank: int) -> str:
    """The last scenario: the group is gone afterwards."""
    with without_codegen():
        _, model = compiled(rank)
        model(ids(1, 45))
        dist.destroy_process_group()
        return error_of(lambda: model(ids(1, 45)))


# --- transformers' own tensor parallelism ---


def generated(rank: int, folder: str, options: dict[str, Any], new: int) -> dict[str, Any]:
    """Generate `new` tokens with this rank's part of a checkpoint; if they are several, also score."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    with without_codegen(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
        inputs = prompt(2, 45, padded=True)
        model.compile(backend="mom", options={"mini_seq_len": 16, "strict": True, **options})
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        prefill = next(report for report in mom_compile.reports() if report.stages)
        scored = mom_compile.token_log_probs(model, **inputs, mini_seq_len=16).log_probs.tolist() if new > 1 else None
        return {
            "ids": ids.tolist(),
            "log_probs": scored,
            "loops": len(prefill.stages),
            "communication": prefill.communication,
            "failed": [report.fallback for report in mom_compile.reports() if report.failed],
            "bytes": sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters()),
        }


SCENARIOS: dict[str, Callable[[int], Any]] = {
    "rule_law": rule_law,
    "lengths": lengths,
    "scores": scores,
    "odd_logits": odd_logits,
    "two_groups": two_groups,
    "own_lengths": own_lengths,
    "other_lengths": other_lengths,
    "other_options": other_options,
    "failed_compilation": lambda rank: failed_compilation(rank, strict=True),
    "left_to_stock": lambda rank: failed_compilation(rank, strict=False),
    "small_budget": small_budget,
    "unequal_budgets": unequal_budgets,
    "exchanged_rows": exchanged_rows,
    "destroyed_group": destroyed_group,
}


def scenarios(rank: int) -> dict[str, Any]:
    """Run all of them, one after the other."""
    return {name: scenario(rank) for name, scenario in SCENARIOS.items()}


def killed_in_the_middle(rank: int) -> tuple[str, float, int]:
    """Rank 1 ends while a loop runs: what rank 0 raises, after how many seconds, and the bytes on its host then."""
    with without_codegen():
        _, model = compiled(rank, kv_offload=True)
        begin, begun = parted.begin_collective, []

        def counted(*arguments: Any) -> torch.Tensor:
            begun.append(arguments)
            if rank == 1 and len(begun) == 5:
                os._exit(1)
            return begin(*arguments)

        started = time.monotonic()
        with mock.patch.object(parted, "begin_collective", counted):
            raised = error_of(lambda: model(ids(1, 200)))
        return raised, time.monotonic() - started, mom_compile.host_memory().rows


def missed_call(rank: int) -> tuple[str, list[float]]:
    """Rank 1 misses a call, and both go on: what rank 0 raises, and the differences of the next calls."""
    store = dist.group.WORLD.get_group_store()
    with without_codegen():
        whole, model = compiled(rank)
        model(ids(1, 45)), model(ids(1, 46))
        raised = error_of(lambda: model(ids(1, 50))) if rank == 0 else ""
        store.set("missed", "") if rank == 0 else store.wait(["missed"])
        return raised, [float((model(ids(1, n)) - whole(ids(1, n))).abs().max()) for n in (50, 51, 52)]
