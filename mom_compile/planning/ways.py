"""Memory of a prefill for each way to run it, at any length: expressions of traced models, extrapolated to all layers.

Terms
-----
way        How a model is run: eager mode, stock Inductor, the scope of the MOM paper, or mom with more and more on the
           host.
profile    Bytes above weights and inputs over time: after each operator in eager mode, in each step of a program.
head       The common beginning of the profiles of the shorter and the longer traced model.
rest       The remainder of the longer one's profile: its last period of layers, and its end.
growth     What the longer model holds in addition at the end: what a period keeps, mostly of the cache.

    peak(all layers) = max(head, rest + growth * periods between the longer one and all)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from mom_compile.config import Options
from mom_compile.memory.attention import most_of_attention
from mom_compile.memory.device import DeviceRows, rows_on
from mom_compile.memory.devices import Properties
from mom_compile.memory.layer import work_of
from mom_compile.memory.model import Model
from mom_compile.memory.row_rule import fewest_rows, rows_of_steps
from mom_compile.pipeline import run_pipeline
from mom_compile.planning.prefill import Prefill
from mom_compile.report import Report
from mom_passes.graph.edit import compute_device, copy_graph, emit
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import value_of
from mom_passes.ops.transfers import FETCH_ROWS, FETCH_WEIGHT
from mom_passes.program.memory import memory, stock_peak
from mom_passes.program.program import Place, Program
from mom_passes.program.rewritten import Rewritten
from mom_passes.program.schedule import schedule


@dataclass(frozen=True)
class Kind:
    """A way to compile: the `scope` of loops, and whether the `cache` and the `weights` are on the host."""

    what: str
    scope: str = "layer"
    cache: bool = False
    weights: bool = False


EAGER, INDUCTOR = "eager", "inductor"

#: The length tried first, as most models are traced once for all longer lengths.
_FIRST = 8192

#: The shortest context. A graph of a single token is another one.
FEWEST_TOKENS = 2

#: A longest context leaves 1 / MARGIN_SHARE of the bytes above the weights free, the largest error of a plan.
MARGIN_SHARE = 32

EMBEDDING = torch.ops.aten.embedding.default

#: The ways that use our passes.
KINDS = {
    "mlp": Kind("the MOM paper's scope", scope="mlp"),
    "mom": Kind("mom"),
    "mom-cache": Kind("mom, cache on the host", cache=True),
    "mom-weights": Kind("mom, cache and weights on the host", cache=True, weights=True),
}


def extrapolated_peak(profiles: Sequence[Sequence[int]], periods: int) -> int:
    """Return the peak of all layers from the profile of the whole model, or of two models that differ by a period."""
    if len(profiles) == 1:
        return max(profiles[0], default=0)
    shorter, longer = profiles
    head = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    rest = max(longer[head:], default=0) + (periods - 1) * (longer[-1] - shorter[-1])
    return max(max(longer[:head], default=0), rest)


def extrapolated(values: Sequence[int], periods: int) -> int:
    """Return the value for all layers of a quantity that grows linearly with periods of layers."""
    return values[0] if len(values) == 1 else values[0] + periods * (values[1] - values[0])


@dataclass(frozen=True, eq=False)
class Compiled:
    """A traced model rewritten for one way, with its memory model and the rows that the device needs.

    `device` is None if loops keep their rows.
    """

    prefill: Prefill
    rewritten: Rewritten
    report: Report
    model: Model
    device: DeviceRows | None
    host: sympy.Expr

    def sizes(self, batch_size: int, seq_len: int) -> tuple[int, ...]:
        known = {**self.rewritten.memory.hints, **self.prefill.sizes(batch_size, seq_len)}
        return tuple(int(known[symbol]) for symbol in self.model.symbols)

    def full(self, batch_size: int, seq_len: int) -> int:
        """Bytes of values at full length."""
        return self.model.full(self.sizes(batch_size, seq_len))

    def profile(self, batch_size: int, seq_len: int, full: int, *, fewest: bool = False) -> list[int]:
        """Return the bytes of each moment.

        Mini-sequences have the rows chosen for `full` bytes at full length, or the `fewest` possible.
        """
        sizes = self.sizes(batch_size, seq_len)
        rows = rows_of_steps(self.model, self.device, sizes, full)
        if fewest:
            rows = tuple(map(min, rows, fewest_rows(self.model, self.device, sizes)))
        each = [step.bytes(sizes, count) for step, count in zip(self.model.steps, rows, strict=True)]
        return [each[number] for number in self.model.order]

    def bodies(self, batch_size: int, seq_len: int, full: int) -> int:
        """Return the number of mini-sequences of all loops."""
        sizes = self.sizes(batch_size, seq_len)
        rows, steps = rows_of_steps(self.model, self.device, sizes, full), self.model.steps
        lengths = [step.loop.length(sizes) if step.loop is not None else 0 for step in steps]
        return sum(-(-lengths[number] // rows[number]) for number in self.model.order if rows[number])

    def on_host(self, batch_size: int, seq_len: int) -> int:
        return self.rewritten.memory.number(self.host, self.prefill.sizes(batch_size, seq_len))


def compile_for(
    prefill: Prefill, kind: Kind, options: Options, gpu: Properties | None, shapes: frozenset[tuple[int, ...]]
) -> Compiled | None:
    """Rewrite a traced model for one way, on a GPU or on the CPU. `shapes` are those of offloaded weights.

    Returns None if there is nothing to gain and stock Inductor compiles the graph.
    """
    gm = _with_weights_on_host(prefill, shapes) if kind.weights else prefill.graph
    type = "cpu" if gpu is None else "cuda"
    made = run_pipeline(
        gm,
        static_inputs=prefill.static,
        limit=options.limit(type),
        scope=kind.scope,
        loop_products=options.loop_products,
        kv_on_host=kind.cache,
        overlap_collectives=options.overlap_collectives,
    )
    if made.program is None or made.by_layers:
        return None
    rewritten = made.program
    if compute_device(gm).type != type:
        rewritten = replace(rewritten, memory=memory(rewritten.plan, device=type))
    report = Report.of(made.facts, rewritten)
    beside = most_of_attention(rewritten.plan) if gpu is not None else sympy.S.Zero
    work = work_of(rewritten, prefill.static)
    wants = rows_on(type, gpu, work.layer) if options.mini_seq_len == "auto" else None
    model, _ = Model.of(rewritten.memory, work.sequences, beside)
    return Compiled(prefill, rewritten, report, model, wants, _bytes_on_host(rewritten.plan))


def _with_weights_on_host(prefill: Prefill, shapes: frozenset[tuple[int, ...]]) -> fx.GraphModule:
    """Return the graph as captured with parameters of these shapes on the host: rows of embeddings are fetched, other
    parameters as a whole."""
    gm = copy_graph(prefill.graph)
    inputs, device = gm.graph.find_nodes(op="placeholder"), compute_device(gm)
    tensors = [node for node in inputs if isinstance(meta_value(node), torch.Tensor)]
    hosted = [node for node in tensors if node.name in prefill.static and tuple(value_of(node).shape) in shapes]
    for node in hosted:
        for user in [user for user in node.users if user.target is EMBEDDING]:
            with gm.graph.inserting_before(user):
                user.replace_all_uses_with(emit(gm.graph, FETCH_ROWS, (node, user.args[1], device)))
            gm.graph.erase_node(user)
        if node.users and not all(user.target is FETCH_ROWS for user in node.users):
            with gm.graph.inserting_after(inputs[-1]):
                fetched = emit(gm.graph, FETCH_WEIGHT, (node, device))
            node.replace_all_uses_with(fetched, delete_user_cb=lambda user, own=fetched: _reads(user, own))
    gm.recompile()
    return gm


def _reads(user: fx.Node, fetched: fx.Node) -> bool:
    """Whether a user of a weight reads the fetched copy."""
    return user is not fetched and user.target is not FETCH_ROWS


def _bytes_on_host(plan: Program) -> sympy.Expr:
    found = dict.fromkeys(storage for storage in plan.storages.values() if storage.place is Place.HOST)
    return sum((storage.bytes for storage in found), sympy.S.Zero)


@dataclass(frozen=True)
class Stock:
    """A traced model as compiled by stock Inductor: its `peak`, and the bytes that it `keeps`, mostly the cache.

    The peak is not linear in layers, since Inductor's reordering depends on the layer; the kept bytes are.
    """

    peak: sympy.Expr
    keeps: sympy.Expr

    @staticmethod
    def of(prefill: Prefill, device: str) -> Stock:
        """Plan for a device type."""
        gm = copy_graph(prefill.graph)
        plan = schedule(gm)
        kept = dict.fromkeys(plan.storages[node] for node in plan.outputs if node in plan.storages)
        ours = (storage.bytes for storage in kept if storage.place is Place.DEVICE)
        return Stock(stock_peak(gm, device).peak, sum(ours, sympy.S.Zero))


def longest_that_fits(
    needed: Callable[[int], int], budget: int, most: int, fewest: int = FEWEST_TOKENS
) -> int:
    """Return the most tokens that need at most `budget` bytes; 0 if `fewest` do not fit, `most` if all do. `needed` is
    monotonic.

    The search interpolates linearly between a length that fits and one that does not, and bisects once the same end has
    moved twice.
    """
    low, high = _around(needed, budget, most, fewest)
    turns = 0
    while high - low > 1:
        fits, over = needed(low), needed(high)
        guess = low + (high - low) * (budget - fits) // max(1, over - fits)
        guess = (low + high) // 2 if abs(turns) == 2 else min(max(guess, low + 1), high - 1)
        if needed(guess) <= budget:
            low, turns = guess, max(turns, 0) % 2 + 1
        else:
            high, turns = guess, min(turns, 0) % -2 - 1
    return low


def _around(needed: Callable[[int], int], budget: int, most: int, fewest: int) -> tuple[int, int]:
    """Return a length that fits and the next tried one that does not; the result twice if the search is done."""
    first = min(_FIRST, most)
    if needed(first) > budget:
        if needed(fewest) <= budget:
            return fewest, first
        return (0, 0)
    low = high = first
    while high < most:
        low, high = high, min(most, 8 * high)
        if needed(high) > budget:
            return low, high
    return most, most


@dataclass(frozen=True, eq=False)
class Way:
    """Bytes at any length: on the device at the peaks of a prefill and of the first decode step after it, including
    weights and inputs, and on the host. `weights` are those on the device. `fewest` and `most` are the shortest and the
    longest context."""

    what: str
    weights: int
    of_device: Callable[[int], int]
    of_step: Callable[[int], int]
    of_host: Callable[[int], int]
    most: int
    fewest: int = FEWEST_TOKENS

    def peak_bytes(self, seq_len: int) -> int:
        return self._peak(seq_len)

    def step_bytes(self, seq_len: int) -> int:
        """Bytes of the first decode step after a prefill of `seq_len` tokens."""
        return self.of_step(seq_len)

    def needed_bytes(self, seq_len: int) -> int:
        """Bytes of a prefill and one more token."""
        return max(self._peak(seq_len), self.of_step(seq_len))

    def host_bytes(self, seq_len: int) -> int:
        return self.of_host(seq_len)

    @property
    def fewest_bytes(self) -> int:
        """Bytes of the shortest context, with the margin."""
        return self._with_margin(self.fewest)

    def max_seq_len(self, budget: int) -> int:
        """Return the longest context, prefill and one more token, that fits into `budget` bytes with a margin, or 0."""
        return longest_that_fits(self._with_margin, budget, self.most, self.fewest)

    def _with_margin(self, seq_len: int) -> int:
        peak = self.needed_bytes(seq_len)
        return peak + (peak - self.weights) // MARGIN_SHARE

    @functools.cached_property
    def _peak(self) -> Callable[[int], int]:
        return functools.cache(self.of_device)
