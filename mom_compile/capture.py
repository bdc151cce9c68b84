"""Dynamo's graph to the one that passes are given: Inductor's front half, with layers that are alike traced once.

    Dynamo's graph -> outline_layers -> AOTAutograd, decompositions, joint passes -> inline_layers -> inner_compile

For 24 layers that are alike AOTAutograd needs a fifth of the time. Whatever cannot be traced so is traced as it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from mom_compile.torch_compat import InnerCompile, any_autocast, needs_gradients, trace
from mom_passes.errors import PassError
from mom_passes.graph.repeated_layers import inline_layers, outline_layers

log = logging.getLogger(__name__)


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner_compile: InnerCompile,
    patches: dict[str, Any],
    *,
    cache_tag: str | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """`trace`, of which see arguments and result. `strict`: that layers cannot be traced once raises."""
    traced = functools.partial(trace, gm, example_inputs, patches=patches, cache_tag=cache_tag)
    if needs_gradients(example_inputs) or any_autocast() or not outline_layers(gm):
        return traced(inner_compile)
    inlining = _Inlining(inner_compile)
    try:
        return traced(inlining)
    except Exception:
        if strict or inlining.done:
            raise
        log.debug("layers that are alike cannot be traced once", exc_info=True)
    inline_layers(gm)
    return traced(inner_compile)


class _Inlining:
    """`inner_compile` on a graph whose layers have been put in their places."""

    def __init__(self, inner_compile: InnerCompile) -> None:
        self.inner_compile = inner_compile
        self.done = False

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not inline_layers(gm):
            raise PassError("a layer writes to its operands, or is called in a way of its own")
        self.done = True
        return self.inner_compile(gm, example_inputs, **kwargs)
