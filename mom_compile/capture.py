"""From Dynamo's graph to the input of our passes: Inductor's front end, which traces identical layers once.

    Dynamo's graph -> outline_layers -> AOTAutograd, decompositions, joint passes -> inline_layers -> inner_compile

With 24 identical layers AOTAutograd takes a fifth of the time. If that fails, all layers are traced.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from mom_compile.torch_compat.aot_autograd import InnerCompile, any_autocast, needs_gradients, trace
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
    """Call `trace`, with the same arguments and result. `strict`: raise if identical layers cannot be traced once."""
    traced = functools.partial(trace, gm, example_inputs, patches=patches, cache_tag=cache_tag)
    if needs_gradients(example_inputs) or any_autocast() or not outline_layers(gm):
        return traced(inner_compile)
    inlining = _Inlining(inner_compile)
    try:
        return traced(inlining)
    except Exception:
        if strict or inlining.done:
            raise
        log.debug("identical layers cannot be traced once", exc_info=True)
    inline_layers(gm)
    return traced(inner_compile)


class _Inlining:
    """Calls `inner_compile` on the graph with its layers inlined again."""

    def __init__(self, inner_compile: InnerCompile) -> None:
        self.inner_compile = inner_compile
        self.done = False

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not inline_layers(gm):
            raise PassError("a layer writes to its operands, or its call differs from the others")
        self.done = True
        return self.inner_compile(gm, example_inputs, **kwargs)
