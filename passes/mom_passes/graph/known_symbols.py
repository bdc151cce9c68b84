"""Replace symbols to which the graph's guards leave one value by that number.

`hidden[:, -keep:]`, traced for `keep = 0` with `keep` as a symbol, has `tokens + keep` rows by PyTorch's arithmetic,
and a guard says that these equal `tokens`. A comparison of sizes would see two lengths.

    guard          Eq(64*tokens, 64*tokens + 64*keep)         -> keep = 0
    Before:  view: [batch * (tokens + keep), 64]
    After:   view: [batch * tokens, 64]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.graph.edit import fake_mode
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr
from mom_passes.torch_compat import SYMBOLIC, equalities_of, hint_of, new_number, shape_env_of


def known_symbols(gm: fx.GraphModule) -> dict[sympy.Symbol, sympy.Integer]:
    """The symbols that the guards determine, with their values."""
    numbers = [meta_value(node) for node in gm.graph.nodes if node.op == "placeholder"]
    env = next((shape_env_of(number) for number in numbers if isinstance(number, SYMBOLIC)), None)
    known: dict[sympy.Symbol, sympy.Integer] = {}
    for left, right in equalities_of(env) if env is not None else ():
        difference = sympy.expand(left - right)
        if len(difference.free_symbols) != 1 or not difference.is_polynomial():
            continue
        (symbol,) = difference.free_symbols
        (value, *others) = sympy.roots(difference, symbol) or (None,)
        if not others and isinstance(value, sympy.Integer):
            known[symbol] = value
    return known


def substitute_known_symbols(gm: fx.GraphModule) -> int:
    """Replace them in all recorded values, in place. Return the number of symbols."""
    known = known_symbols(gm)
    for node in gm.graph.nodes if known else ():
        value = meta_value(node)
        items = value if isinstance(value, (tuple, list)) else (value,)
        if any(_mentions(item, known) for item in items):
            with fake_mode(gm.graph):
                new = [_described(item, known) for item in items]
            node.meta["val"] = type(value)(new) if isinstance(value, (tuple, list)) else new[0]
    return len(known)


def _mentions(value: Any, known: Mapping[sympy.Symbol, Any]) -> bool:
    numbers = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(n, SYMBOLIC) and not expr(n).free_symbols.isdisjoint(known) for n in numbers)


def _described(value: Any, known: Mapping[sympy.Symbol, Any]) -> Any:
    if not _mentions(value, known):
        return value
    if isinstance(value, torch.Tensor):
        sizes, strides = ([_number(n, known) for n in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    # A number that is no longer symbolic is kept as recorded: a node's number is never a constant.
    number = _number(value, known)
    return number if isinstance(number, SYMBOLIC) else value


def _number(number: Any, known: Mapping[sympy.Symbol, Any]) -> Any:
    if not isinstance(number, torch.SymInt):
        return number
    value = expr(number).xreplace(dict(known))
    return int(value) if value.is_Integer else new_number(shape_env_of(number), value, int, hint_of(number))
