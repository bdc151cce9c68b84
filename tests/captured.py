"""ATen graphs of tiny models, as Inductor's front half hands them over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx


@dataclass(frozen=True)
class Captured:
    """A graph, the inputs of its first run, and what it returned then."""

    gm: fx.GraphModule
    inputs: list[Any]
    outputs: tuple[Any, ...]


def capture(function: Callable[..., Any], *, dynamic: bool | None = None, **inputs: Any) -> Captured:
    """The one graph that `function(**inputs)` compiles to, before any pass of ours."""
    captured: list[Captured] = []

    def inner(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        def run(given: list[Any]) -> Any:
            given = list(given)
            outputs = gm(*given)
            captured.append(Captured(gm, given, tuple(outputs)))
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    torch._dynamo.reset()
    with torch.no_grad(), functorch_config.patch(enable_autograd_cache=False):
        compiled = torch.compile(
            function, backend=lambda gm, ex: compile_fx(gm, ex, inner_compile=inner), dynamic=dynamic, fullgraph=True
        )
        compiled(**inputs)
    torch._dynamo.reset()
    (only,) = captured
    return only
