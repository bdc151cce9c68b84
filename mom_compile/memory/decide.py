"""What is decided of a graph once, before it is lowered: its loops' rows, and where keys and values go.

    decision = decide(rewritten, options, static, device)

A run with other sizes chooses again, from `decision.choice` (see `choice`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import sympy
import torch
from torch import fx

from mom_compile.config import Options
from mom_compile.memory.attention import most_of_attention
from mom_compile.memory.choice import Budget, Choice, RowsOf
from mom_compile.memory.device import DeviceRows, budget_of, properties_of, rows_for, rows_on
from mom_compile.memory.devices import Properties, device_of
from mom_compile.memory.layer import Work, in_words, work_of
from mom_compile.memory.model import Model, bytes_in_tokens, captured_tokens, in_tokens, input_bytes, static_bytes
from mom_compile.memory.ranks import Agreement
from mom_compile.memory.refuse import MemoryBudgetError, below_weights
from mom_compile.memory.row_rule import rows_of_steps
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.placement import MEMORY, TIERS, Placement
from mom_passes.graph.edit import compute_device
from mom_passes.graph.size_values import function_of
from mom_passes.graph.sizes import expr
from mom_passes.host.kv_values import KVValues
from mom_passes.loops.loop import loop_nodes
from mom_passes.ops.transfers import FETCH, FETCH_WEIGHT
from mom_passes.program.memory import Leaving, Memory, leaving
from mom_passes.program.program import LoopStep, Step
from mom_passes.program.rewritten import Rewritten

_NO_LOOPS = Work(None, {})

#: A cache that fits this many times leaves decode steps whole. It may outgrow the device in one run only by then.
HEADROOM = 2


@dataclass(frozen=True)
class ForLong:
    """What "auto" asks of a device once: whether it has the `needed` bytes, so that all keys and values may stay for
    long. `budget` is what it has for everything, including the `weights`."""

    needed: int
    weights: int
    budget: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.budget

    def __str__(self) -> str:
        return f"weights and {HEADROOM} times the present cache take {self.needed} bytes, {self.budget} may be used"


@dataclass(frozen=True)
class Decision:
    """What is decided of a graph.

    Parameters
    ----------
    program
        The rewritten graph. Its loops have the rows of the captured sizes.
    device, placement
        Where the graph computes, and where what its cache keeps goes.
    choice
        What each run chooses from (None: nothing).
    rows
        The loops whose rows each run chooses, by their nodes. The other loops have the rows that `program` says.
    cuda_graphs
        Whether pieces of a graph without loops are recorded as CUDA graphs.
    why
        Why loops have their rows, for reports; empty where no rule decides them.
    whole
        The number of tokens, if no loop has more than one mini-sequence: the graph is better off without loops.
    refusal
        Why a run of the captured sizes cannot keep the user's budget; empty if it can.
    agreement
        What the ranks of the graph's process groups agree on before each run; None: it has no collectives, or is a
        decode step.
    """

    program: Rewritten
    device: torch.device
    placement: Placement
    choice: Choice | None = None
    rows: Mapping[fx.Node, RowsOf] = field(default_factory=dict)
    cuda_graphs: bool = False
    why: str = ""
    whole: int | None = None
    refusal: str = ""
    agreement: Agreement | None = None

    def agreed(self) -> Decision:
        """Return the same decision, on which the ranks of the graph's process groups agree before each run."""
        return replace(self, agreement=Agreement.on_program(self.program.plan, tuple(self.rows)))

    @property
    def is_for_each_run(self) -> bool:
        """Whether some runs may keep the user's budget and others not."""
        if self.choice is None or self.choice.budget is None:
            return False
        return self.choice.budget.asked and bool(self.choice.model.symbols)


def decide(rewritten: Rewritten, options: Options, static: Collection[str], device: torch.device) -> Decision:
    """Decide the rows of a rewritten graph's loops and the place of its keys and values.

    `static` names parameters and buffers. The modules of the graph are given the rows of the captured sizes.
    """
    by_rule = rewritten.no_loops is None and options.mini_seq_len == "auto" and bool(loop_nodes(rewritten.gm))
    gpu = properties_of(device) if by_rule else None
    work = work_of(rewritten, static) if by_rule else _NO_LOOPS
    wants = rows_on(device.type, gpu, work.layer) if by_rule else None
    choice, numbers = _choice(rewritten, options, static, device, work, wants)
    sizes = choice.model.captured
    decision = Decision(
        rewritten,
        device,
        placement_of(options, device),
        choice,
        cuda_graphs=options.decode_cuda_graphs and rewritten.no_loops is not None,
        refusal=choice.refusal(sizes),
    )
    if not by_rule:
        return decision
    chosen = choice.best(sizes).rows
    rows = {node: chosen[number] for node, number in numbers.items()}
    together = Agreement.on_program(rewritten.plan, ()) is not None
    usual = rows_of_steps(choice.model, wants, sizes)
    # Ranks with less memory than others must not be the only ones with loops.
    whole = _whole(rewritten, {node: usual[number] for node, number in numbers.items()} if together else rows)
    why = _why(gpu, work, chosen)
    if chosen != usual:
        why = ", ".join(filter(None, [why, "fewer for memory_budget"]))
    by_run = bool(sizes) or choice.budget is not None or together
    of_runs = {node: RowsOf(choice, number) for node, number in numbers.items()} if by_run else {}
    return replace(decision, program=_settled(rewritten, rows), rows=of_runs, why=why, whole=whole)


def offloads(options: Options, device: torch.device) -> bool:
    """Whether keys and values may leave at all. A CPU's memory is the host's: "auto" needs a budget to leave it."""
    if options.kv_offload == "auto":
        return device.type != "cpu" or options.memory_budget is not None
    return bool(options.kv_offload)


def fits_for_long(
    gm: fx.GraphModule, kv: KVValues, options: Options, static: Collection[str]
) -> ForLong | None:
    """Return whether "auto" keeps all keys and values of a graph without loops on the device; None where it does not
    ask.

    Between loops, copies cost nothing. A decode step that may move layers out is cut at each of them, which costs time
    in every step. It has to be cut if anything is on the host already.
    """
    device = compute_device(gm)
    if options.kv_offload != "auto" or not offloads(options, device) or not kv.found:
        return None
    if any(node.target in (FETCH, FETCH_WEIGHT) and node.users for node in gm.graph.nodes):
        return None
    kept = sum(value.bytes for value in kv.found)
    layers = 1 + max(value.layer for value in kv.found)
    on_device = kept + 2 * kept // layers
    weights = static_bytes(gm, static, device)
    return ForLong(weights + HEADROOM * on_device, weights, budget_of(options, device, weights))


def why_below_weights(gm: fx.GraphModule, options: Options, static: Collection[str]) -> str:
    """Return why a graph's weights alone do not fit into the user's budget; empty if they do."""
    weights, budget = static_bytes(gm, static, compute_device(gm)), options.budget_bytes
    return below_weights(budget, weights) if budget is not None and budget < weights else ""


def check_weights(gm: fx.GraphModule, options: Options, static: Collection[str]) -> None:
    """Raise `MemoryBudgetError` if a graph's weights alone do not fit into the user's budget."""
    refusal = why_below_weights(gm, options, static)
    if refusal:
        raise MemoryBudgetError(refusal)


def placement_of(options: Options, device: torch.device) -> Placement:
    """Return where new stores of a device's keys and values go."""
    tier = str(options.kv_offload) if options.kv_offload in TIERS else MEMORY
    folder = None if options.kv_dir is None else Path(options.kv_dir)
    return Placement(tier, folder, pin_for(device) if device.type == "cuda" else None)


# --- what a program chooses from ---


def _choice(
    rewritten: Rewritten,
    options: Options,
    static: Collection[str],
    device: torch.device,
    work: Work,
    wants: DeviceRows | None,
) -> tuple[Choice, dict[fx.Node, int]]:
    """Return what the runs of a program choose from, and the numbers that its loops have in the model, by their nodes.

    `wants` are the rows that the device wants; None: loops keep their rows.
    """
    memory = rewritten.memory
    values = leaving(rewritten.plan) if options.kv_offload == "auto" else {}
    weights, asked = static_bytes(rewritten.gm, static, device), options.memory_budget is not None
    budget = Budget(budget_of(options, device, weights), asked) if asked or values else None
    layers = 1 + max(value.layer for value in values.values()) if values else 0
    kernels = _of_attention(rewritten, device, work, wants) if budget is not None else sympy.S.Zero
    layer_bytes = _layer_bytes(rewritten, values)
    given = input_bytes(rewritten.gm, static, device) if rewritten.no_loops is None else {}

    def made(
        memory: Memory, inputs: Collection[sympy.Expr], shorter: Choice | None = None
    ) -> tuple[Choice, dict[fx.Node, int]]:
        total = sum(inputs, sympy.S.Zero)
        model, numbers = Model.of(memory, work.sequences, kernels, (total, layer_bytes))
        of_inputs, of_layer = function_of(total, model.symbols), function_of(layer_bytes, model.symbols)
        tokens = _symbol_of_tokens(memory, model.symbols)
        return Choice(model, wants, weights, of_inputs, budget, layers, of_layer, tokens, shorter), numbers

    tokens = captured_tokens(memory, rewritten.gm, static) if asked else None
    if tokens is None:
        return made(memory, given.values())
    grown = [bytes_in_tokens(node, size, tokens) for node, size in given.items()]
    shorter, _ = made(in_tokens(memory, tokens), grown)
    return made(memory, given.values(), shorter)


def _of_attention(
    rewritten: Rewritten, device: torch.device, work: Work, wants: DeviceRows | None
) -> sympy.Expr:
    """Return the bytes that attention takes for itself on a CUDA device, with the most rows that loops may have."""
    if device.type != "cuda":
        return sympy.S.Zero
    if wants is not None:
        number = rewritten.memory.number
        rewritten = _with_rows(rewritten, {node: wants.bounds(number(n)).most for node, n in work.sequences.items()})
    return most_of_attention(rewritten.plan)


def _layer_bytes(rewritten: Rewritten, values: Mapping[fx.Node, Leaving]) -> sympy.Expr:
    """Return the bytes of keys and values of the layer that has most of them."""
    layers: dict[int, sympy.Expr] = {}
    for node, value in values.items():
        size = rewritten.plan.storages[node].bytes
        layers[value.layer] = layers.get(value.layer, sympy.S.Zero) + size
    return sympy.Max(0, *dict.fromkeys(layers.values()), evaluate=False)


def _symbol_of_tokens(memory: Memory, symbols: tuple[sympy.Symbol, ...]) -> int | None:
    """Return the position of the only symbol that all lengths of loops are made of."""
    lengths = [expr(moment.step.loop.length) for moment in memory.moments if isinstance(moment.step, LoopStep)]
    found = {symbol for length in lengths for symbol in length.free_symbols}
    return symbols.index(found.pop()) if len(found) == 1 and found <= set(symbols) else None


# --- rows of the captured sizes ---


def _whole(rewritten: Rewritten, rows: Mapping[fx.Node, int]) -> int | None:
    """Return the length of the longest loop if all lengths are numbers and no loop has two mini-sequences."""
    lengths = {node: module.loop.length for node, module in loop_nodes(rewritten.gm)}
    literal = {node: length for node, length in lengths.items() if isinstance(length, int)}
    whole = literal.keys() == lengths.keys() and all(length <= rows[node] for node, length in literal.items())
    return max(literal.values()) if whole else None


def _with_rows(rewritten: Rewritten, rows: Mapping[fx.Node, int]) -> Rewritten:
    """Return the same program with other rows, by the loops' nodes. The graph's own modules stay as they are."""
    steps: dict[Step, LoopStep] = {}
    for step in rewritten.plan.steps:
        if isinstance(step, LoopStep):
            steps[step] = replace(step, loop=replace(step.loop, rows=rows[step.node]))
    found = rewritten.memory
    moments = tuple(
        replace(m, step=steps[m.step], rows=steps[m.step].loop.rows) if m.step in steps else m for m in found.moments
    )
    plan = replace(rewritten.plan, steps=tuple(steps.get(step, step) for step in rewritten.plan.steps))
    return replace(rewritten, plan=plan, memory=replace(found, moments=moments))


def _settled(rewritten: Rewritten, rows: Mapping[fx.Node, int]) -> Rewritten:
    """Return the same program with other rows, and give these to the graph's modules too."""
    settled = _with_rows(rewritten, rows)
    made = {step.node: step.loop for step in settled.plan.steps if isinstance(step, LoopStep)}
    for node, module in loop_nodes(settled.gm):
        module.loop = made[node]
    return settled


def _why(gpu: Properties | None, work: Work, rows: Collection[int]) -> str:
    """Return why loops on a GPU have their rows, for reports; empty where the rule for GPUs does not apply."""
    if gpu is None or work.layer is None:
        return ""
    device, name = device_of(gpu)
    need = rows_for(device, work.layer)
    cut = ", fewer where values are wider than that" if any(0 < n < need for n in rows) else ""
    return f"{need} tokens at a time for {in_words(work.layer)} on {name}{cut} (never measured)"
