"""The traced models of a plan, rewritten for each way and extrapolated to all layers. Each result is computed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import sympy

from mom_compile.config import Options
from mom_compile.memory.devices import DEVICES, Properties
from mom_compile.planning.eager import eager_timeline
from mom_compile.planning.estimate import Load, Step, work_of
from mom_compile.planning.prefill import Prefill, capture_prefill
from mom_compile.planning.subject import Subject
from mom_compile.planning.ways import (
    EAGER,
    FEWEST_TOKENS,
    INDUCTOR,
    KINDS,
    Compiled,
    Stock,
    Way,
    compile_for,
    extrapolated,
    extrapolated_peak,
)
from mom_compile.planning.weights import Weights
from mom_compile.runtime.extend import room_for
from mom_passes.graph.size_values import evaluate
from mom_passes.program.program import LoopStep

#: Bytes of a token's id.
ID_BYTES = 8
#: The number of tokens over which the growth of a cache is taken.
MORE_TOKENS = 1024
#: The limit of searches: no model has a longer context.
MOST_TOKENS = 1 << 30
#: Lengths from which memory of eager mode is extrapolated, where its number of operators grows with the length.
LOOPED = (512, 1024)
CPU = "cpu"
#: A traced graph that holds from so few tokens on also stands for the shortest context.
FEW_TOKENS = 16


class Planner:
    """Traces and rewrites models on demand, each once."""

    def __init__(
        self, subject: Subject, weights: Weights, batch: int, device: str, options: Options,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.subject, self.weights, self.batch = subject, weights, batch
        self.options, self.report = options, report
        self._reported: set[str] = set()
        self.models = [subject.build(count) for count in subject.counts]
        self.captured: list[tuple[Prefill, ...]] = []
        self._compiled: dict[tuple[Prefill, str], Compiled | None] = {}
        self._stock: dict[Prefill, Stock] = {}
        self._work: dict[Prefill, sympy.Expr] = {}
        self._counted: dict[int, int] = {}
        self._timelines: dict[tuple[int, int], list[int]] = {}
        gpu = None if device.lower() == CPU else DEVICES[device]
        #: Device type.
        self.type = CPU if gpu is None else "cuda"
        self.gpu = None if gpu is None else Properties(device, gpu.multiprocessors, gpu.capability)

    # --- traced models ---

    def prefills(self, seq_len: int) -> tuple[Prefill, ...]:
        """Return the traced models for a length."""
        for known in self.captured:
            if all(prefill.holds_for(seq_len) for prefill in known):
                return known
        counts = " and ".join(map(str, self.subject.counts))
        self.report(f"tracing {self.subject.name}, {counts} layers of {self.subject.layers}, {seq_len:,} tokens")
        with self.subject.ranks.group():
            self.captured.append(tuple(capture_prefill(model, self.batch, seq_len) for model in self.models))
        return self.captured[-1]

    @property
    def fewest(self) -> int:
        """The shortest context to plan. A model with a convolution over 4 tokens has another graph for fewer, and it is
        not traced for them."""
        known = [max(prefill.shortest for prefill in prefills) for prefills in self.captured]
        return min((tokens for tokens in known if tokens <= FEW_TOKENS), default=FEWEST_TOKENS)

    def compiled(self, seq_len: int, way: str) -> list[Compiled] | None:
        """Return the traced models in one of our ways; None for other ways, or if there is nothing to gain."""
        if way not in KINDS:
            return None
        found = []
        for prefill in self.prefills(seq_len):
            if (prefill, way) not in self._compiled:
                self._report_once(f"planning {KINDS[way].what}")
                shapes = self.weights.shapes
                self._compiled[prefill, way] = compile_for(prefill, KINDS[way], self.options, self.gpu, shapes)
            found.append(self._compiled[prefill, way])
        return None if any(one is None for one in found) else found  # type: ignore[return-value]

    # --- bytes ---

    def peak(self, way: str, seq_len: int, *, fewest: bool = False) -> int:
        """Bytes on the device at the peak, including weights, inputs and a copy of a quantised matrix."""
        inputs = ID_BYTES * self.batch * seq_len + self.weights.copy
        if way == EAGER:
            self._report_once("calling it in eager mode, without data")
            return self.weights.all + inputs + self._eager_peak(seq_len)
        made = self.compiled(seq_len, way)
        if made is None:
            return self.weights.all + inputs + self._stock_peak(seq_len)
        full = self._full(made, seq_len)
        profiles = [one.profile(self.batch, seq_len, full, fewest=fewest) for one in made]
        return self.weights_on_device(way) + inputs + extrapolated_peak(profiles, self.subject.periods)

    def _eager_peak(self, seq_len: int) -> int:
        """Bytes at the peak above weights and inputs. Where eager mode runs more operators for more tokens, as loops
        over chunks do, it is extrapolated from the lengths `LOOPED`."""
        if seq_len <= LOOPED[1] or not self._loops_over_tokens:
            return self._counted_peak(seq_len)
        first, second = map(self._counted_peak, LOOPED)
        return second + (second - first) * (seq_len - LOOPED[1]) // (LOOPED[1] - LOOPED[0])

    @cached_property
    def _loops_over_tokens(self) -> bool:
        return len({len(self._timeline(0, tokens)) for tokens in LOOPED}) > 1

    def _timeline(self, number: int, seq_len: int) -> list[int]:
        """Return the timeline of a traced model in eager mode."""
        if (number, seq_len) not in self._timelines:
            with self.subject.ranks.group():
                self._timelines[number, seq_len] = eager_timeline(self.models[number], self.batch, seq_len)
        return self._timelines[number, seq_len]

    def _counted_peak(self, seq_len: int) -> int:
        if seq_len not in self._counted:
            timelines = [self._timeline(number, seq_len) for number in range(len(self.models))]
            self._counted[seq_len] = extrapolated_peak(timelines, self.subject.periods)
        return self._counted[seq_len]

    def step_peak(self, way: str, seq_len: int) -> int:
        """Bytes on the device at the peak of the first decode step after a prefill, including weights.

        Counts the cache and its temporary copies: all of it with stock Inductor, which concatenates it and returns the
        whole; one key or value in eager mode, which drops each layer's old one before the next; one key or value with
        mom, which grows them in place. A cache on the host is prefetched one layer ahead.
        """
        weights, cache, layers = self.weights_on_device(way), self.cache(seq_len), self.subject.layers
        one = cache // (2 * layers)
        if way == INDUCTOR:
            return weights + 2 * cache
        if way == EAGER:
            return weights + cache + one
        if KINDS[way].cache:
            return weights + min(4 * one, 2 * cache)
        return weights + cache * (seq_len + room_for(seq_len)) // seq_len + one

    def _full(self, made: list[Compiled], seq_len: int) -> int:
        return extrapolated([one.full(self.batch, seq_len) for one in made], self.subject.periods)

    def _stock_peak(self, seq_len: int) -> int:
        prefills = self.prefills(seq_len)
        found = [self.stock(prefill) for prefill in prefills]
        sizes = [prefill.sizes(self.batch, seq_len) for prefill in prefills]
        kept = [int(evaluate(one.keeps, own)) for one, own in zip(found, sizes, strict=True)]
        return int(evaluate(found[-1].peak, sizes[-1])) + extrapolated(kept, self.subject.periods) - kept[-1]

    def stock(self, prefill: Prefill) -> Stock:
        if prefill not in self._stock:
            self._report_once("planning stock Inductor")
            self._stock[prefill] = Stock.of(prefill, self.type)
        return self._stock[prefill]

    def weights_on_device(self, way: str) -> int:
        return self.weights.resident if way in KINDS and KINDS[way].weights else self.weights.all

    def weights_on_host(self, way: str) -> int:
        return self.weights.all - self.weights_on_device(way)

    def cache_on_host(self, way: str, seq_len: int) -> int:
        """Bytes of offloaded keys and values."""
        made = self.compiled(seq_len, way)
        return extrapolated([one.on_host(self.batch, seq_len) for one in made], self.subject.periods) if made else 0

    def host(self, way: str, seq_len: int) -> int:
        """Bytes on the host: keys, values and weights."""
        if self.compiled(seq_len, way) is None:
            return 0
        return self.cache_on_host(way, seq_len) + self.weights_on_host(way)

    def ways(self) -> dict[str, Way]:
        words = {EAGER: "eager mode", INDUCTOR: "stock Inductor", **{name: kind.what for name, kind in KINDS.items()}}
        return {name: self._way(name, what) for name, what in words.items()}

    def _way(self, name: str, what: str) -> Way:
        of_device, of_step, of_host = (partial(bytes, name) for bytes in (self.peak, self.step_peak, self.host))
        return Way(what, self.weights_on_device(name), of_device, of_step, of_host, MOST_TOKENS, self.fewest)

    def _report_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.report(text)

    def cache(self, seq_len: int) -> int:
        """Bytes of the keys and values that a prefill keeps."""
        leaves = self.cache_on_host("mom-cache", seq_len)
        return leaves or self._kept(seq_len)

    def cache_per_token(self, seq_len: int) -> int:
        """Bytes that a further token of one sequence adds to the cache."""
        return (self.cache(seq_len + MORE_TOKENS) - self.cache(seq_len)) // (MORE_TOKENS * self.batch)

    def _kept(self, seq_len: int) -> int:
        """Bytes that stock Inductor's graph returns: the cache, and the last token's logits."""
        prefills = self.prefills(seq_len)
        kept = [evaluate(self.stock(p).keeps, p.sizes(self.batch, seq_len)) for p in prefills]
        return extrapolated([int(one) for one in kept], self.subject.periods)

    def load(self, way: str, seq_len: int) -> Load:
        """Return the work of a prefill."""
        prefills = self.prefills(seq_len)
        works = [int(evaluate(self._work_of(p), p.sizes(self.batch, seq_len))) for p in prefills]
        made = self.compiled(seq_len, way)
        loops = extrapolated([_loops(one) for one in made], self.subject.periods) if made else self.subject.layers
        return Load(
            extrapolated(works, self.subject.periods),
            self.weights.all,
            self.bodies(way, seq_len) / loops,
            loops,
            self.cache_on_host(way, seq_len),
            self.weights_on_host(way),
        )

    def bodies(self, way: str, seq_len: int) -> int:
        """Return how often a prefill runs a loop body; without loops, the number of layers."""
        made = self.compiled(seq_len, way)
        if not made:
            return self.subject.layers
        full = self._full(made, seq_len)
        return extrapolated([one.bodies(self.batch, seq_len, full) for one in made], self.subject.periods)

    def _work_of(self, prefill: Prefill) -> sympy.Expr:
        if prefill not in self._work:
            self._work[prefill] = work_of(prefill.graph, prefill.tokens, prefill.captured)
        return self._work[prefill]

    def step(self, way: str, seq_len: int, resident_layers: int = 0) -> Step:
        """Return the work of a decode step after a prefill.

        Keys and values of `resident_layers` layers of an offloaded cache are on the device.
        """
        weights, cache, layers = self.weights, self.cache(seq_len), self.subject.layers
        fetched = self.cache_on_host(way, seq_len) * (layers - resident_layers) // layers
        if self.weights_on_host(way):
            fetched += weights.leaving.read(self.batch)
        return Step(weights.each.work(self.batch), weights.each.read(self.batch) + cache, fetched, layers, self.batch)


def _loops(made: Compiled) -> int:
    return sum(isinstance(step, LoopStep) for step in made.rewritten.plan.steps)
