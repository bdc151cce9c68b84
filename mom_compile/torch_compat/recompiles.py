"""How many graphs Dynamo makes of one function, and what happens at the limit.

exceeds_recompile_limit      Dynamo calls `convert_frame.exceeds_recompile_limit` before it compiles each graph. With
                             more graphs than the limit, the call runs in eager mode.
cache_size                   its argument: the number of compiled graphs (cache entries) of the code object
get_eval_frame_isolate_recompiles_id
                             the `isolate_recompiles` region of the frame that is compiled (PyTorch 2.13 and later)
CompileContext               identifies the frame that this thread compiles
_compiled_call_impl          what `Module.compile` makes of `_call_impl`, and `Module.__call__` calls

Dynamo has no callback for its limit, so `exceeds_recompile_limit` is wrapped for the whole process. The wrapper returns
what the function returns; it counts, and calls `when_limit_exceeded` callbacks.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame
from torch._guards import CompileContext


@dataclass(frozen=True)
class GraphCount:
    """The number of the graph that Dynamo compiles of a code object, and the limit.

    code      identifies the code object and the `isolate_recompiles` region that it is compiled in
    number    of this graph, from 1
    most      graphs that Dynamo makes of this code; later calls that need another graph run in eager mode
    limit     the setting of `torch._dynamo.config` that `most` follows from
    """

    code: tuple[int, int]
    number: int
    most: int
    limit: str


_graph_count: contextvars.ContextVar[GraphCount | None] = contextvars.ContextVar("_graph_count", default=None)
_when_exceeded: list[Callable[[GraphCount], None]] = []
_region_of_frame: Callable[[], int] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_isolate_recompiles_id", lambda: -1
)
_exceeds_recompile_limit = convert_frame.exceeds_recompile_limit


def _counting(cache_size: Any, compile_id: Any) -> tuple[bool, str]:
    exceeded, limit = _exceeds_recompile_limit(cache_size, compile_id)
    before = cache_size.num_cache_entries_with_same_id_matched_objs
    in_all = getattr(cache_size, "total_cache_entries_all_regions", cache_size.num_cache_entries)
    own = (int(dynamo_config.recompile_limit), "recompile_limit")
    shared = (int(dynamo_config.accumulated_recompile_limit) - in_all + before, "accumulated_recompile_limit")
    most, name = min(own, shared)
    count = GraphCount((compile_id.frame_id, _region_of_frame()), before + 1, most, limit if exceeded else name)
    _graph_count.set(count)
    if exceeded:
        for call in _when_exceeded:
            call(count)
    return exceeded, limit


convert_frame.exceeds_recompile_limit = _counting


def graph_count() -> GraphCount | None:
    """Return the count for the graph that this thread compiles under Dynamo; None if it compiles no graph."""
    count, compiling = _graph_count.get(), CompileContext.current_compile_id()
    known = count is not None and compiling is not None and compiling.frame_id == count.code[0]
    return count if known else None


def when_limit_exceeded(call: Callable[[GraphCount], None]) -> None:
    """Register `call(count)`. It is called when a call runs in eager mode because of too many graphs."""
    _when_exceeded.append(call)


#: Whether `torch.compile` can count the graphs of one model separately: PyTorch 2.13 and later.
CAN_ISOLATE = {"isolate_recompiles", "recompile_limit"} <= inspect.signature(torch.compile).parameters.keys()


def compile_apart(
    model: Any, limit: int, before: Callable[[dict[str, Any], Sequence[Any]], None] | None, **settings: Any
) -> Any:
    """Call `torch.compile` with a separate limit on the number of graphs. A module is compiled in place.

    Parameters
    ----------
    limit
        The most graphs of this model. Before PyTorch 2.13 the limit is in force while the model is called, and counts
        the graphs of all models that share its code.
    before
        `before(kwargs, args)` is called with the arguments of each call and may change `kwargs`.
    """
    apart: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": limit} if CAN_ISOLATE else {}
    if not isinstance(model, torch.nn.Module):
        compiled: Any = torch.compile(model, **{**settings, **apart})
        return _prepared(compiled, limit, before)
    model.compile(**settings, **apart)
    compiled = model._compiled_call_impl
    model._compiled_call_impl = _prepared(compiled, limit, before)
    return model


def _prepared(compiled: Callable[..., Any], limit: int, before: Callable[..., None] | None) -> Callable[..., Any]:
    """Wrap a compiled function: call `before` and set the limit, except while another function is traced."""
    if CAN_ISOLATE and before is None:
        return compiled

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return compiled(*args, **kwargs)
        if before is not None:
            before(kwargs, args)
        if CAN_ISOLATE:
            return compiled(*args, **kwargs)
        with dynamo_config.patch(recompile_limit=max(limit, dynamo_config.recompile_limit)):
            return compiled(*args, **kwargs)

    return run
