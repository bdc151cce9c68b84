"""Inductor's front half: AOTAutograd, decompositions and joint-graph passes.

compile_fx                  Inductor's backend, from a Dynamo graph to compiled code. `inner_compile` replaces its back
                            half.
enable_autograd_cache       switches AOTAutogradCache
_is_any_autocast_enabled    whether autocast is on for any device
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

from mom_compile.torch_compat.compile_cache import storing_pieces, storing_programs
from mom_compile.torch_compat.decompositions import decompositions, with_inductors_table

#: `(gm, example_inputs, **kwargs) -> callable taking a list of inputs`, as Inductor calls it.
InnerCompile = Callable[..., Any]


def needs_gradients(example_inputs: Sequence[Any]) -> bool:
    """Return whether AOTAutograd also makes a backward graph."""
    tensors = (value for value in example_inputs if isinstance(value, torch.Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def any_autocast() -> bool:
    """Return whether autocast is on for any device."""
    return bool(torch._C._is_any_autocast_enabled())


def trace(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner_compile: InnerCompile,
    patches: dict[str, Any],
    cache_tag: str | None = None,
) -> Callable[..., Any]:
    """Run Inductor's front half on a Dynamo graph, then `inner_compile`.

    Freezing is off: it turns the weights of a graph into constants, which doubles their memory, and passes on graphs
    whose weights have no values.

    Parameters
    ----------
    patches
        Inductor options.
    cache_tag
        With a tag, `inner_compile` returns a `Storable`. AOTAutogradCache stores it and returns it for the same graph,
        settings, guards and tag, instead of tracing. The cache's keys contain the graph and not `inner_compile`.
        Without a tag the cache is off, since stock Inductor's entries and ours would have the same keys.
    """
    with contextlib.ExitStack() as stack:
        if cache_tag is None or not _cacheable(gm, example_inputs):
            stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        else:
            stack.enter_context(storing_programs(cache_tag))
            inner_compile = functools.partial(storing_pieces, inner_compile)
        compiled: Any = compile_fx(
            gm,
            example_inputs,
            inner_compile=functools.partial(with_inductors_table, inner_compile),
            config_patches={**patches, "freezing": False},
            decompositions=decompositions(),
        )
        return compiled


def _cacheable(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Return whether a graph has neither gradients nor tensor attributes: the key has only metadata of attributes."""
    if needs_gradients(example_inputs):
        return False
    own: list[Any] = [*gm.parameters(), *gm.buffers()]
    own += [vars(gm).get(str(n.target).split(".")[0]) for n in gm.graph.nodes if n.op == "get_attr"]
    return not any(isinstance(value, torch.Tensor) for value in own)
