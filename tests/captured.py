"""ATen graphs of tiny models, as Inductor's front half hands them over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

from benchmarks.models import keeping
from tests.models import ids


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


def behind_a_past(model: Any, new: int, dynamic: bool) -> Captured:
    """The call for `new` tokens behind twelve, of two sequences of which the first is padded at the left."""
    mask = torch.ones(2, 12 + new, dtype=torch.long)
    mask[0, :3] = 0
    past = transformers.DynamicCache(config=model.config)
    (name,) = kept = keeping(past, model)
    with torch.no_grad():
        model(input_ids=ids(2, 12), attention_mask=mask[:, :12], **kept)
    return capture(
        lambda past, **given: model(**{name: past}, **given).logits,
        dynamic=dynamic, past=past, input_ids=ids(2, new), attention_mask=mask,
    )  # fmt: skip
