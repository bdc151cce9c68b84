"""From a rewritten graph and the options to what its runs choose from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from mom_compile.config import Options
from mom_compile.memory.attention import most_of_attention
from mom_compile.memory.choice import Budget, Choice, InTokens
from mom_compile.memory.choose_rows import Footprint, RowRule
from mom_compile.memory.device_bytes import budget_of, input_bytes, static_bytes
from mom_compile.memory.in_tokens import bytes_in_tokens, captured_tokens, in_tokens
from mom_compile.memory.layer_rows import with_rows
from mom_passes.graph.edit import compute_device
from mom_passes.graph.size_values import function_of
from mom_passes.graph.sizes import expr
from mom_passes.program.memory import Leaving, Memory, leaving
from mom_passes.program.program import LoopStep
from mom_passes.program.rewritten import Rewritten


@dataclass(frozen=True)
class _Parts:
    """What a choice is made of beside a program's memory."""

    budget: Budget | None
    weights: int
    layers: int
    layer_bytes: sympy.Expr
    beside: sympy.Expr
    rule: RowRule | None

    def choice(
        self, memory: Memory, inputs: sympy.Expr, longer: InTokens | None = None
    ) -> tuple[Choice, dict[fx.Node, int]]:
        footprint, numbers = Footprint.of(memory, self.rule, self.beside, (inputs, self.layer_bytes))
        symbols = footprint.symbols
        of_inputs, of_layer = function_of(inputs, symbols), function_of(self.layer_bytes, symbols)
        tokens = _symbol_of_tokens(memory, symbols)
        made = Choice(footprint, self.weights, of_inputs, self.budget, self.layers, of_layer, tokens, longer)
        return made, numbers


def make_choice(
    rewritten: Rewritten, options: Options, static: Collection[str], rule: RowRule | None
) -> tuple[Choice, dict[fx.Node, int]]:
    """What runs of a program choose from, and the numbers that loops have in it, by their nodes.

    `rule` says how many rows mini-sequences have; without one they keep those that they have. `static` names parameters
    and buffers.
    """
    device, memory = compute_device(rewritten.gm), rewritten.memory
    values = leaving(rewritten.plan) if options.kv_offload == "auto" else {}
    weights, asked = static_bytes(rewritten.gm, static, device), options.memory_budget is not None
    budget = Budget(budget_of(options, device, weights), asked) if asked or values else None
    layers = 1 + max(value.layer for value in values.values()) if values else 0
    beside = _beside(rewritten, device, rule) if budget is not None else sympy.S.Zero
    parts = _Parts(budget, weights, layers, _layer_bytes(rewritten, values), beside, rule)
    inputs = input_bytes(rewritten.gm, static, device) if rewritten.no_loops is None else {}
    tokens = captured_tokens(memory, rewritten.gm, static) if asked else None
    if tokens is None:
        return parts.choice(memory, _total(inputs))
    grown = {node: bytes_in_tokens(node, size, tokens) for node, size in inputs.items()}
    longer, _ = parts.choice(in_tokens(memory, tokens), _total(grown))
    return parts.choice(memory, _total(inputs), InTokens(longer, tokens))


def captured_sizes(choice: Choice, memory: Memory) -> tuple[int, ...]:
    """What a graph was captured with: the sizes of its first run."""
    return tuple(int(memory.hints[symbol]) for symbol in choice.footprint.symbols)


def _beside(rewritten: Rewritten, device: torch.device, rule: RowRule | None) -> sympy.Expr:
    """What attention takes for itself on a CUDA device, with as many rows as there may be."""
    if device.type != "cuda":
        return sympy.S.Zero
    if rule is not None:
        most = {node: rule.device.bounds(rewritten.memory.number(n)).most for node, n in rule.sequences.items()}
        rewritten = with_rows(rewritten, most)
    return most_of_attention(rewritten.plan)


def _layer_bytes(rewritten: Rewritten, values: Mapping[fx.Node, Leaving]) -> sympy.Expr:
    """Keys and values of the layer that has most of them."""
    layers: dict[int, sympy.Expr] = {}
    for node, value in values.items():
        size = rewritten.plan.storages[node].bytes
        layers[value.layer] = layers.get(value.layer, sympy.S.Zero) + size
    return sympy.Max(0, *dict.fromkeys(layers.values()), evaluate=False)


def _symbol_of_tokens(memory: Memory, symbols: tuple[sympy.Symbol, ...]) -> int | None:
    """The number of the only symbol that all lengths of loops are made of."""
    lengths = [expr(moment.step.loop.length) for moment in memory.moments if isinstance(moment.step, LoopStep)]
    found = {symbol for length in lengths for symbol in length.free_symbols}
    return symbols.index(found.pop()) if len(found) == 1 and found <= set(symbols) else None


def _total(sizes: Mapping[fx.Node, sympy.Expr]) -> sympy.Expr:
    return sum(sizes.values(), sympy.S.Zero)

