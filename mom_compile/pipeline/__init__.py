"""The passes as one list: ATen graph in, the same graph with loops over mini-sequences out.

    captured --TO_FORM--> one form -make_loops-> with loops ----BETWEEN_LOOPS, STORAGE--> Rewritten
                                            \\-> without loops -BETWEEN_LOOPS-----------> Rewritten, or cut by layers

A `Pipeline` runs the first two parts once. `finish_loops` and `finish` run the others, on the graph with loops or, if
its rows turn out to be all tokens, on the one without.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mom_compile.pipeline.form import TO_FORM, State, facts_of, find_keys_and_values, lay_out_to_grow
from mom_compile.pipeline.moves import BETWEEN_LOOPS, STORAGE, Moves, only_what_is_needed, rows_of_their_own
from mom_compile.pipeline.run import Runner, Watch, log
from mom_compile.pipeline.to_loops import NotWorthwhile, WithLoops, WithoutLoops, make_loops
from mom_compile.report.facts import NOTHING_FOUND, Facts, KVReport
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.known_symbols import substitute_known_symbols
from mom_passes.graph.writes import read_after_write
from mom_passes.host.kv_values import KVValues, find_kv
from mom_passes.loops.loop import RowLimit
from mom_passes.loops.stages import MOST_PRODUCTS
from mom_passes.program.layers import by_layers
from mom_passes.program.own_rows import OwnRows, own_rows
from mom_passes.program.rewritten import Rewritten
from mom_passes.source_lines import source_lines
from mom_passes.verify import Contract, verify

__all__ = ["NotWorthwhile", "Outcome", "Pipeline", "WithLoops", "WithoutLoops", "for_stock", "run_pipeline"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the passes made of a graph.

    Parameters
    ----------
    facts
        What they found out.
    program
        The rewritten graph; None: stock Inductor compiles the captured graph as a whole.
    no_loops
        Why nothing runs over mini-sequences, or None.
    by_layers
        Whether the program is no more than the captured graph, cut between its layers.
    """

    facts: Facts
    program: Rewritten | None
    no_loops: str | None = None
    by_layers: bool = False


class Pipeline:
    """The passes on one captured graph, which stays as it is.

    `found` is the graph with loops, or the one without and the reason. `kv` are its keys and values. `inputs` are the
    values of its placeholders in a call, if they are known.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        *,
        static_inputs: Collection[str],
        limit: RowLimit,
        scope: str = "layer",
        loop_products: int = MOST_PRODUCTS,
        kv_on_host: bool = False,
        overlap_collectives: bool = True,
        skip: Collection[str] = (),
        watch: Watch | None = None,
        inputs: Sequence[Any] | None = None,
    ) -> None:
        copied = copy_graph(gm)
        substitute_known_symbols(copied)
        self._runner = Runner(Contract.of(copied), skip, watch)
        self._static, self._kv_on_host = static_inputs, kv_on_host
        self._overlap_collectives = overlap_collectives
        self.kv = KVValues((), ())
        self.found: WithLoops | WithoutLoops
        out_of_order = read_after_write(gm)
        if out_of_order is not None:
            self.found = WithoutLoops(gm, NOTHING_FOUND, out_of_order, untouched=True)
            return
        state = State(copied, static_inputs, kv_on_host)
        self._runner.edit(TO_FORM, state)
        self.kv = self._runner.take(find_keys_and_values, state)
        self.found = make_loops(state, self.kv, limit, scope, loop_products, self._runner, inputs)
        if isinstance(self.found, WithoutLoops):
            self._fetch_parts(self.found)

    def without_loops(self, found: WithLoops, tokens: int) -> WithoutLoops:
        """Return the graph without loops, where `tokens` tokens are one mini-sequence."""
        without = found.without(tokens)
        self._fetch_parts(without)
        return without

    def finish_loops(self, found: WithLoops) -> tuple[Rewritten, Facts]:
        """Return the program of a graph with loops, and what is known of it."""
        moves = Moves(
            found.gm,
            self._static,
            self.kv,
            self._kv_on_host,
            overlap_collectives=self._overlap_collectives,
        )
        self._runner.edit((*BETWEEN_LOOPS, *STORAGE), moves)
        log.debug("rewritten graph:\n%s", moves.gm.code)
        return Rewritten.of(moves.gm, None, moves.weights), self._facts(found.facts, moves)

    def finish(self, found: WithoutLoops, all_stay: str = "") -> Outcome:
        """Return what becomes of a graph without loops. `all_stay` is why all its keys and values stay on the device,
        if they do."""
        if found.untouched:
            return Outcome(found.facts, None, found.reason)
        moves, facts = Moves(found.gm, self._static, self.kv, self._kv_on_host and not all_stay), found.facts
        if all_stay:
            moves.kv, facts = self._to_grow(found)
        self._runner.edit(BETWEEN_LOOPS, moves)
        if all_stay:
            moves.offload = replace(moves.offload, left_out={"all": all_stay})
        if moves.matter:
            self._runner.edit(STORAGE, moves)
            program = Rewritten.of(moves.gm, found.reason, moves.weights)
            return Outcome(self._facts(facts, moves), program, found.reason)
        self._runner.edit((rows_of_their_own,), moves)
        plan, facts = by_layers(moves.gm), self._facts(facts, moves)
        if plan is None:
            return Outcome(replace(facts, own_rows=()), None, found.reason)
        return Outcome(facts, Rewritten.planned(moves.gm, plan, found.reason), found.reason, by_layers=True)

    def _fetch_parts(self, found: WithoutLoops) -> None:
        self._runner.edit((only_what_is_needed,), Moves(found.gm, self._static, self.kv, self._kv_on_host))

    def _to_grow(self, found: WithoutLoops) -> tuple[KVValues, Facts]:
        """Lay out keys and values that were to leave and stay; return them again, with the facts about them."""
        self._runner.edit((lay_out_to_grow,), State(found.gm, self._static))
        kv = find_kv(found.gm)
        now = facts_of(found.gm, kv)
        return kv, replace(found.facts, keys_and_values=now.keys_and_values, growing=now.growing)

    def _facts(self, facts: Facts, moves: Moves) -> Facts:
        on_host = tuple(
            KVReport(value.kept.name, value.layer, value.bytes_per_token, value.past is not None)
            for value in moves.offload.leaving
        )
        passes, on_device = tuple(self._runner.taken), dict(moves.offload.left_out)
        lines = source_lines({value.node.name: value.node for value in moves.kv.left_out})
        facts = replace(facts, source_lines={**facts.source_lines, **lines})
        return replace(facts, on_host=on_host, on_device=on_device, own_rows=moves.own_rows, passes=passes)


def run_pipeline(gm: fx.GraphModule, **given: Any) -> Outcome:
    """Run all passes on a graph without a decision between them; `given` are the arguments of `Pipeline`."""
    passes = Pipeline(gm, **given)
    if isinstance(passes.found, WithoutLoops):
        return passes.finish(passes.found)
    program, facts = passes.finish_loops(passes.found)
    return Outcome(facts, program)


def for_stock(gm: fx.GraphModule) -> tuple[fx.GraphModule, tuple[OwnRows, ...]]:
    """Return a graph for stock Inductor, and the rows that are copied out of larger values in it: the graph itself, or
    a copy where there are such rows."""
    if read_after_write(gm) is not None:
        return gm, ()
    copied = copy_graph(gm)
    rows = own_rows(copied)
    verify(copied, Contract.of(gm))
    return (copied, rows) if rows else (gm, ())
