"""The graph of a prefill, captured for any number of tokens: the basis of the plans of all compiled ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn

from mom_compile.backend import static_input_names
from mom_compile.capture import capture
from mom_compile.planning.configs import PlanError
from mom_compile.stand_ins import on_stand_ins
from mom_compile.substitution import traces_substitutes
from mom_compile.torch_compat.dynamo import floats_are_constants, may_vary, trace_whole, undisturbed
from mom_compile.torch_compat.inductor import mark_boxed
from mom_compile.torch_compat.symbolic_sizes import bounds_of
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr


@dataclass(frozen=True, eq=False)
class Prefill:
    """A captured graph, which must not be changed. `static` are the names of its parameters and buffers, `tokens` and
    `sequences` its sizes (usually symbols), `captured` the number of tokens at capture. It is valid for `shortest` to
    `longest` tokens (None: unlimited): a model with windows computes a different graph if all tokens fit into one."""

    graph: fx.GraphModule
    static: frozenset[str]
    captured: int
    tokens: sympy.Expr
    sequences: sympy.Expr
    shortest: int
    longest: int | None

    def holds_for(self, seq_len: int) -> bool:
        return self.shortest <= seq_len and (self.longest is None or seq_len <= self.longest)

    def sizes(self, batch_size: int, seq_len: int) -> dict[sympy.Symbol, int]:
        """Return the values of its symbols in a run."""
        given = ((self.tokens, seq_len), (self.sequences, batch_size))
        return {symbol: value for symbol, value in given if symbol.is_Symbol}


def prefill_arguments(batch_size: int, seq_len: int) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    """Return a model's arguments: ids `[batch_size, seq_len]` without data, the default cache, and the logits of the
    last token."""
    ids = torch.empty(batch_size, seq_len, dtype=torch.int64, device="meta")
    return (ids,), {"use_cache": True, "logits_to_keep": 1}


def capture_prefill(model: nn.Module, batch_size: int, seq_len: int) -> Prefill:
    """Capture a prefill on stand-ins of a model on the meta device, which takes no memory.

    Raises `PlanError` for a model that cannot be traced as one graph.
    """
    given = prefill_arguments(batch_size, seq_len)
    found: list[tuple[fx.GraphModule, dict[str, Any]]] = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        found.append((gm, kwargs))
        return mark_boxed(lambda values: ())

    with torch.no_grad(), undisturbed(), floats_are_constants(), on_stand_ins(model, given) as (args, kwargs):
        may_vary(args[0], 1)
        if batch_size > 1:
            may_vary(args[0], 0)
        backend = traces_substitutes(lambda gm, inputs: capture(gm, inputs, inner, {}))
        broken = trace_whole(model.forward, args, kwargs, backend)
    if broken is not None or len(found) != 1:
        raise PlanError(f"{type(model).__name__} cannot be traced as one graph: {broken or 'it computes nothing'}")
    gm, settings = found[0]
    return _described(gm, frozenset(static_input_names(gm, settings)), seq_len)


def _described(gm: fx.GraphModule, static: frozenset[str], seq_len: int) -> Prefill:
    sequences, tokens = _ids(gm, static).shape
    shortest, longest = _bounds(tokens)
    return Prefill(gm, static, seq_len, expr(tokens), expr(sequences), shortest, longest)


def _bounds(tokens: Any) -> tuple[int, int | None]:
    return (tokens, tokens) if type(tokens) is int else bounds_of(tokens)


def _ids(gm: fx.GraphModule, static: frozenset[str]) -> torch.Tensor:
    values = [meta_value(n) for n in gm.graph.find_nodes(op="placeholder") if n.name not in static]
    return next(value for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.int64)
