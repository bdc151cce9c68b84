"""Scores without logits: results computed in blocks of the vocabulary equal those computed from logits."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx

import mom_compile
from benchmarks import measure
from mom_compile.runtime import scored as runtime
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.values import tensors_of
from mom_passes.graph.whole_slices import drop_whole_slices_of
from mom_passes.loops.loop import loop_nodes
from mom_passes.ops.scored import GREEDY, LIKELY, SCORED, TOTAL, WEIGHTED, ScoredCall, scored_reference
from mom_passes.tokens.scored import outline_scores
from tests.models import SMALL, ids, small_model, sweep
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS
from tests.tracing import rewrite, trace

WIDTH, COLUMNS = 8, 53
OPTIONS = {"strict": True, "mini_seq_len": 16}


@contextlib.contextmanager
def blocks_of(size: int, columns: int = 4) -> Iterator[None]:
    """Limits blocks to a number of bytes, and to few columns if necessary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "block_bytes", lambda device: size)
        patch.setattr(runtime, "FEWEST_COLUMNS", columns)
        yield


# --- the kernel ---


def compare(call: ScoredCall) -> None:
    """The kernel's results equal those of the reference."""
    for name, actual, expected in zip(
        ("top", "shift", "total", "weighted", "chosen", "greedy"),
        runtime.scored_in_blocks(call),
        scored_reference(call),
        strict=True,
    ):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        tolerance = 1e-9 if call.wide == torch.float64 else 1e-4
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"{name}: {actual} is not {expected}"
        )


def call_of(
    shape: tuple[int, ...], columns: int, seed: int, dtype: torch.dtype = torch.float64, targets: int | None = 1,
    **changes: Any,
) -> ScoredCall:  # fmt: skip
    """Integer logits: their sums are exact in any order, and many are equal."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*size: int) -> torch.Tensor:
        return torch.randint(-2, 3, size, generator=generator).to(dtype)

    chosen = torch.randint(0, columns, (*shape, targets), generator=generator) if targets is not None else None
    given = ScoredCall(whole(*shape, WIDTH), whole(columns, WIDTH).t(), None, chosen, [], [], [TOTAL, LIKELY, GREEDY])
    return replace(given, **changes)


@dataclass(frozen=True)
class Steps:
    names: tuple[str, ...]
    numbers: tuple[float, ...]


STEPS = {
    "none": Steps((), ()),
    "capped": Steps(("div", "tanh", "mul"), (30.0, 0.0, 30.0)),
    "scaled": Steps(("mul",), (0.0625,)),
    "in float32": Steps(("float32", "neg"), (0.0, 0.0)),
    "moved": Steps(("add", "sub"), (4.0, 1.0)),
}


@random_examples(
    25, 600, RANDOM_PROGRAMS,
    st.integers(1, 3), st.integers(0, 5), st.integers(1, 70), st.integers(0, 4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.sampled_from(sorted(STEPS)),
    st.lists(st.sampled_from([TOTAL, WEIGHTED, GREEDY]), unique=True), st.booleans(), st.integers(32, 4000),
)  # fmt: skip
def test_blocks_give_the_result_of_all_columns(
    batch: int, rows: int, columns: int, targets: int, dtype: torch.dtype, steps: str, wants: list[str], bias: bool,
    size: int,
) -> None:  # fmt: skip
    """For any block: a single column and row, all of them, and a shorter last one; with ties."""
    known = STEPS[steps]
    moved = torch.arange(columns).to(dtype) % 3 if bias else None
    changes = {"steps": known.names, "numbers": known.numbers, "wants": wants, "bias": moved}
    call = call_of((batch, rows), columns, rows + columns, dtype, targets or None, **changes)
    with blocks_of(size):
        compare(call)


@pytest.mark.parametrize("wants", [[TOTAL, WEIGHTED, GREEDY], [TOTAL, LIKELY, GREEDY]])
@pytest.mark.parametrize("special", list(itertools.product([-math.inf, math.inf, math.nan, -1e30, 700.0], repeat=2)))
def test_nan_logits_give_the_result_of_all_columns(special: tuple[float, float], wants: list[str]) -> None:
    """In the first or last block, alone in it, or in all of them."""
    at_first, at_last, everywhere = (torch.zeros(12, dtype=torch.float64) for _ in range(3))
    at_first[1:4], at_last[-2:] = special[0], special[1]
    both = at_first + at_last
    everywhere[:] = special[0]
    everywhere[-1] = special[1]
    for bias in (at_first, at_last, both, everywhere, torch.full((12,), special[0], dtype=torch.float64)):
        with blocks_of(3 * 16 * 5):
            compare(call_of((5,), 12, 0, bias=bias, wants=wants))


def test_the_first_of_equal_largest_logits_is_chosen() -> None:
    hidden, matrix = torch.ones(3, 1), torch.tensor([[1.0, 5, 2, 5, 5, 0, 5]])
    with blocks_of(3 * 4 * 2, 2):
        *_, greedy = runtime.scored_in_blocks(ScoredCall(hidden, matrix, None, None, [], [], [GREEDY]))
    assert greedy.tolist() == [[1]] * 3


@pytest.mark.parametrize("wrong", [-1, 12])
def test_a_target_out_of_range_raises(wrong: int) -> None:
    call = call_of((5,), 12, 0)
    assert call.targets is not None
    call.targets[3] = wrong
    with pytest.raises(IndexError, match=f"targets from .*{wrong}"):
        runtime.scored_in_blocks(call)


# --- recognised graphs ---


@dataclass(frozen=True)
class Asking:
    """A function of logits, and how it is written."""

    logits: str
    rows: str
    asked: tuple[str, ...]
    half: bool = False


Tensor = torch.Tensor
#: `(product [B, S, V]) -> logits`, as in models.
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "capped": lambda x: 30.0 * torch.tanh(x / 30.0),
    "scaled": lambda x: x * 0.25,
    "divided": lambda x: x / 1.5,
}
#: The scored rows, by targets `[B, S]`.
ROWS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "all": lambda x, t: (x, t),
    "all but the last": lambda x, t: (x[:, :-1], t[:, 1:]),
    "contiguous": lambda x, t: (x[..., :-1, :].contiguous(), t[..., 1:].contiguous()),
    "in one": lambda x, t: (x.reshape(-1, COLUMNS), t.reshape(-1)),
    "labels moved": lambda x, t: (x.view(-1, COLUMNS), F.pad(t, (0, 1), value=-100)[:, 1:].reshape(-1)),
}


def chosen(x: Tensor, t: Tensor) -> Tensor:
    return x.gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def as_scores_does(x: Tensor, t: Tensor) -> Tensor:
    below = x - x.amax(-1, keepdim=True)
    return chosen(below, t) - below.exp().sum(-1, dtype=torch.float64).log().to(x.dtype)


def likely_entropy(x: Tensor, t: Tensor) -> Tensor:
    log_all = x.log_softmax(-1)
    likely = log_all.exp()
    return -torch.where(likely > 0, likely * log_all, 0.0).sum(-1)


ASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_prob": as_scores_does,
    "loss": lambda x, t: F.cross_entropy(x.flatten(0, -2), t.flatten(), ignore_index=-100, reduction="none"),
    "log_softmax": lambda x, t: chosen(x.log_softmax(-1), t),
    "softmax": lambda x, t: chosen(x.softmax(-1), t),
    "several": lambda x, t: x.log_softmax(-1).gather(-1, torch.stack([t.clamp(min=0), (t + 7).clamp(min=0) % 9], -1)),
    "logsumexp": lambda x, t: x.logsumexp(-1),
    "greedy": lambda x, t: x.argmax(-1) == t,
    "largest": lambda x, t: x.amax(-1),
    "log of the largest": lambda x, t: x.log_softmax(-1).amax(-1, keepdim=True),
    "entropy": lambda x, t: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1),
    "entropy, as TRL": lambda x, t: x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1),
}
#: Sums with columns of probability 0 and sums without them are exclusive.
LIKELY_ENTROPY = {"likely entropy": likely_entropy}


def function_of(asking: Asking) -> Callable[..., tuple[Tensor, ...]]:
    """An attention, so that there is a token dimension, and a head."""

    def run(x: Tensor, targets: Tensor, weight: Tensor, square: Tensor) -> tuple[Tensor, ...]:
        x = x + torch.softmax(x @ square @ x.mT, -1) @ x
        x = x + torch.tanh(x @ square)
        logits = LOGITS[asking.logits](F.linear(x, weight))
        logits, labels = ROWS[asking.rows](logits.float() if asking.half else logits, targets)
        return tuple({**ASKED, **LIKELY_ENTROPY}[name](logits, labels) for name in asking.asked)

    return run


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, COLUMNS, (batch, tokens), generator=generator)
    return made(batch, tokens, WIDTH), targets, made(COLUMNS, WIDTH), made(WIDTH, WIDTH) / 3


def has_logits(gm: fx.GraphModule, columns: Any = COLUMNS) -> bool:
    """Whether a value of a graph or its loops has a number for each column in every row."""
    graphs = [gm.graph, *(module.body.graph for _, module in loop_nodes(gm))]
    values = [v for graph in graphs for node in graph.nodes for v in [*tensors_of(node), node.meta.get("type")]]
    shapes = [list(map(str, value.shape)) for value in values if hasattr(value, "shape")]
    of_logits = [shape for shape in shapes if len(shape) > 1 and shape[-1] == str(columns)]
    return any(shape[:-1] != [str(weight_width(gm))] for shape in of_logits)


def weight_width(gm: fx.GraphModule) -> Any:
    return gm.graph.find_nodes(op="placeholder")[2].meta["val"].shape[1]


def outlined(asking: Asking, batch: int, tokens: int, dynamic: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
    dtype = torch.bfloat16 if asking.half else torch.float64
    gm = trace(function_of(asking), *inputs(batch, tokens, dtype), dynamic=dynamic)
    changed = copy_graph(gm)
    drop_whole_slices_of(changed)  # as in the pipeline
    assert outline_scores(changed, 0) == {}
    changed.graph.lint()
    changed.recompile()
    return gm, changed


def askings() -> st.SearchStrategy[Asking]:
    several = st.lists(st.sampled_from(sorted(ASKED)), min_size=1, max_size=3, unique=True).map(tuple)
    alone = st.lists(st.sampled_from(["loss", "greedy", "log_prob"]), max_size=2, unique=True)
    asked = several | alone.map(lambda names: (*names, "likely entropy"))
    return st.builds(Asking, st.sampled_from(sorted(LOGITS)), st.sampled_from(sorted(ROWS)), asked)


@random_examples(
    8, 300, RANDOM_PROGRAMS, askings(), st.integers(1, 3), st.integers(5, 24), st.integers(2, 7), st.booleans()
)
def test_results_equal_those_from_logits(asking: Asking, batch: int, tokens: int, mini: int, dynamic: bool) -> None:
    """As one operator, and in loops with blocks that do not divide the vocabulary; no logits remain."""
    gm, changed = outlined(asking, batch, tokens, dynamic)
    columns = gm.graph.find_nodes(op="placeholder")[2].meta["val"].shape[0]
    assert has_logits(gm, columns) and not has_logits(changed, columns)
    assert len(changed.graph.find_nodes(op="call_function", target=SCORED)) == 1
    given = inputs(batch, tokens)
    expected = gm(*given)
    rewritten = changed
    if tokens > 2 * mini:
        rewritten, _ = rewrite(changed, mini, ("weight_1", "square_1"))
        assert not has_logits(rewritten, columns)
        assert any(n.target is SCORED for _, module in loop_nodes(rewritten) for n in module.body.graph.nodes)
    with blocks_of(600):
        for graph in (changed, rewritten):
            for actual, wanted in zip(graph(*given), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("asked", sorted({**ASKED, **LIKELY_ENTROPY}))
def test_logits_in_half_precision_are_scored_in_float32(asked: str) -> None:
    asking = Asking("capped", "all but the last", (asked,), half=True)
    gm, changed = outlined(asking, 2, 9, False)
    given = inputs(2, 9, torch.bfloat16)
    assert not has_logits(changed)
    for actual, wanted in zip(changed(*given), gm(*given), strict=True):
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


# --- graphs that are not rewritten ---


def returned(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return F.cross_entropy(x.flatten(0, 1), t.flatten()), x


def smoothed(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return (F.cross_entropy(x.flatten(0, 1), t.flatten(), label_smoothing=0.1),)


def best_five(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return (x.log_softmax(-1).topk(5).values,)


def of_the_largest(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return (x.log_softmax(-1).gather(-1, x.argmax(-1, keepdim=True)),)


def over_tokens(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return (x.softmax(1).amax(-1),)


def of_some_rows(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return chosen(x[:, 2:].log_softmax(-1), t[:, 2:]), x.argmax(-1)


def of_many_columns(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return (x.gather(-1, (t[:, :, None] + torch.arange(70)) % COLUMNS),)


def largest_and_where(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.max(-1))


def entropies_of_two_kinds(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return likely_entropy(x, t), (x.softmax(-1) * x.log_softmax(-1)).sum(-1)


def moved_by_column(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    return ((x - x.softmax(-1)[:, :1]).amax(-1),)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (returned, "logits are returned"),
        (smoothed, "aten.sum"),
        (best_five, "aten.topk"),
        (of_the_largest, "a chosen column depends on the logits"),
        (over_tokens, None),
        (of_some_rows, "of some rows only"),
        (of_many_columns, "70 columns"),
        (largest_and_where, None),
        (moved_by_column, "reads logits"),
        (entropies_of_two_kinds, "one sum leaves out columns of likelihood 0"),
    ],
)
def test_other_readers_get_all_logits(function: Callable[..., Any], reason: str | None) -> None:
    """With a reason, if some results could be computed without logits."""
    gm = trace(lambda x, t, w: function(F.linear(x, w), t), *inputs(2, 9)[:3])
    same = copy_graph(gm)
    refused = outline_scores(same, 0)
    assert len(refused) == (reason is not None)
    assert all(re.search(str(reason), why) for why in refused.values()), refused
    assert str(same.graph) == str(gm.graph)


def test_a_router_is_not_scored() -> None:
    gm = trace(lambda x, w: (x @ w).argmax(-1), torch.randn(2, 9, 8), torch.randn(8, 8))
    assert outline_scores(gm, 0) == {}
    assert not gm.graph.find_nodes(op="call_function", target=SCORED)


def test_logits_of_few_rows_stay() -> None:
    """With a known number of rows that fits into a block they stay; with a symbolic number they do not."""
    for dynamic in (False, True):
        gm = trace(lambda x, t, w: F.linear(x, w).argmax(-1), *inputs(2, 9)[:3], dynamic=dynamic)
        assert outline_scores(gm) == {}
        assert bool(gm.graph.find_nodes(op="call_function", target=SCORED)) == dynamic


# --- models ---


HEADS = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "Phi": {},
}


@pytest.mark.parametrize("family", sweep(sorted(HEADS), quick=["Gemma2"]))
def test_a_loss_of_labels_equals_the_models(family: str, eager_pieces: None, stock_is_eager: None) -> None:
    """Mean for one length, then for any; sum and custom number of tokens for one length; with some labels -100."""
    model = small_model(family, num_hidden_layers=2, **HEADS[family])
    compiled = torch.compile(lambda **named: model(**named, use_cache=False).loss, backend="mom", options=OPTIONS)
    for tokens in (40, 57, 70):
        x = ids(2, tokens, tokens, SMALL.vocabulary)
        labels = x.clone()
        labels[0, :9] = -100
        for named in ({}, {"num_items_in_batch": 31}) if tokens == 40 else ({},):
            with torch.no_grad():
                expected = model(input_ids=x, labels=labels, use_cache=False, **named).loss
                actual = compiled(input_ids=x, labels=labels, **named)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert any("1 heads" in taken.change for report in mom_compile.reports() for taken in report.passes)


class Wide(torch.nn.Module):
    """An attention and a head over a vocabulary of which 64 rows of logits are 32 MiB."""

    def __init__(self, vocabulary: int = 131_072) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(64, 16)
        self.head = torch.nn.Linear(16, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(input_ids)
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        logits = self.head(x)
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


MIB = 1 << 20


@pytest.fixture
def wide() -> Wide:
    measure.watch_cpu()
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Wide().eval()


@pytest.mark.parametrize("entropy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_at_most_one_block_of_logits_exists(wide: Wide, entropy: bool) -> None:
    """For any number of rows, which equals that of a loop without logits; and the report matches what is measured."""
    sequence = ids(1, 900, 0, 64)

    def score() -> Any:
        return mom_compile.token_log_probs(wide, sequence, entropy=entropy, options={"strict": True})

    scores = score()
    peak = measure.peak_bytes(score).peak
    (report,) = mom_compile.reports()
    assert report.kind == "scoring"
    assert peak < 8 * MIB
    assert report.expected_peak_bytes == pytest.approx(peak, rel=0.01)
    assert min(moment.rows for moment in report.memory.moments if moment.rows) >= 256
    with torch.no_grad():
        exact = wide(sequence)[0, :-1].double().log_softmax(-1)
    torch.testing.assert_close(
        scores.log_probs[0].double(), exact.gather(-1, sequence[0, 1:, None])[:, 0], rtol=0, atol=1e-5
    )


def test_a_text_without_loops_has_no_logits_either(wide: Wide) -> None:
    """Its length is a constant that fits into one mini-sequence: a graph without loops, and without logits."""
    compiled = torch.compile(wide, backend="mom", options={"strict": True}, dynamic=False)
    x = ids(1, 100, 0, 64)
    with torch.no_grad():
        expected = wide(x, x)
        torch.testing.assert_close(compiled(x, x), expected, rtol=0, atol=1e-5)
        assert measure.peak_bytes(lambda: compiled(x, x)).peak < 8 * MIB
    (report,) = mom_compile.reports()
    assert not report.stages
    assert report.expected_peak_bytes < 8 * MIB
