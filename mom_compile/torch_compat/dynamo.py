"""Tracing a call with Dynamo, Dynamo's state, and sizes that become dynamic.

compile_lock                     the reentrant lock that Dynamo holds while it compiles a frame
OptimizedModule._orig_mod        the module that `torch.compile` was called with
_torchdynamo_orig_callable       the function that `torch.compile` was called with
input_codes, reset_code          code objects that Dynamo has compiled; drops all graphs of one of them
get_code_state                   sizes seen so far by code object, from which Dynamo decides which are dynamic
cached_backends                  backends by id, as guards on the backend refer to them
TORCH_DYNAMO_RESUME_IN_PREFIX    begins the name of a function that Dynamo makes of the code after a graph break
maybe_mark_dynamic               marks a dimension that may be traced as a symbol
current_tx                       the translator of the frame that Dynamo traces; its `output` knows the backend
PolyfilledFunctionVariable       the functions that Dynamo traces in place of others
mark_dynamo_propagated_dynamic_indices
                                 the mark that AOTAutograd sets on outputs with symbolic sizes
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import compile_lock, input_codes
from torch._dynamo.decorators import maybe_mark_dynamic
from torch._dynamo.eval_frame import OptimizedModule, cached_backends, reset_code
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.pgo import get_code_state
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import PolyfilledFunctionVariable
from torch._functorch._aot_autograd import runtime_wrappers

from mom_passes.torch_compat import is_wrapper

#: The lock that Dynamo holds while it compiles, and AOTAutograd while it compiles a backward graph at run time. It is
#: reentrant. Code that compiles outside of Dynamo takes this lock and no other: Inductor is not thread-safe, and with a
#: single lock there is no lock order to violate.
COMPILING = compile_lock


def compiled_from(model: Any) -> Any:
    """Return the module or function that `torch.compile` made `model` from; None if `torch.compile` did not make it."""
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    return getattr(model, "_torchdynamo_orig_callable", None) if inspect.isfunction(model) else None


# --- tracing a call ---


class _GraphIsKnown(ShortenTraceback):
    """Ends a traced call once its graph is known. Dynamo passes it on and keeps no compiled code."""


def trace_whole(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], backend: Callable[..., Any]
) -> str | None:
    """Trace a call as one graph and pass the graph to `backend`. The call itself does not run and has no side effects.

    Returns
    -------
    None, or the first line of the reason why the call is not one graph. In that case `backend` may not have been
    called.
    """

    @functools.wraps(backend)
    def stopping(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        backend(gm, example_inputs)
        raise _GraphIsKnown("the graph is known", first_useful_frame=None)

    # Dynamo counts graphs and records sizes by code object. A new code object shares neither with any other call.
    code = _call.__code__.replace(co_name="explained")
    own = types.FunctionType(code, _call.__globals__, "explained")
    try:
        torch.compile(own, backend=stopping, fullgraph=True)(function, args, kwargs)
    except _GraphIsKnown:
        return None
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return function(*args, **kwargs)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore Dynamo's state at the end of the block: compiled code objects, recorded sizes and known backends."""
    codes, sizes, backends = set(input_codes.seen_ids), copy.deepcopy(dict(get_code_state())), set(cached_backends)
    try:
        yield
    finally:
        for known in list(input_codes.seen):
            code = known()
            if code is not None and id(code) not in codes:
                reset_code(code)
        state = get_code_state()
        state.clear()
        state.update(sizes)
        for key in cached_backends.keys() - backends:
            del cached_backends[key]


def is_cut_apart(library: str) -> bool:
    """Return whether Dynamo is compiling a function of the module `library` after a graph break in its caller.

    Call this while a backend runs: the frame that Dynamo compiles is on the stack then. Dynamo turns the code after a
    graph break into a function of the same module, with `TORCH_DYNAMO_RESUME_IN_PREFIX` in front of its name.
    """
    names: list[str] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == library:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    resumed = [name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX) for name in names]
    return bool(resumed) and not resumed[0] and any(resumed)


# --- one function traced in place of another ---

#: Attributes in which PyTorch's wrappers of a backend hold the wrapped one.
_WRAPPED = ("compiler_fn", "_torchdynamo_orig_backend", "func", "__wrapped__")


def substitute(function: types.FunctionType, traced: Callable[..., Any]) -> None:
    """Have Dynamo trace `traced` wherever it would trace `function`, for every backend. Raises `ValueError` if it
    traces another function already."""
    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(traced)


def is_substituted(function: Any) -> bool:
    """Return whether Dynamo traces another function in place of this one."""
    return function in PolyfilledFunctionVariable._get_polyfill_handlers()


def backend_of_trace(mark: str) -> Any:
    """Return the backend of the frame that Dynamo is tracing: the wrapped backend with an attribute `mark`, if any."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while backend is not None and not hasattr(backend, mark):
        backend = next((getattr(backend, name) for name in _WRAPPED if hasattr(backend, name)), None)
    return backend


# --- dynamic sizes ---

#: `(tensor, dimensions)`: the mark that AOTAutograd sets on outputs with symbolic sizes. 2.11 has the second name.
_mark_dynamic: Any = getattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices", None) or getattr(
    runtime_wrappers, "maybe_mark_dynamic_helper", None
)


def sizes_become_dynamic() -> bool:
    """Return whether Dynamo makes a size dynamic after it has seen two values. It does not with `dynamic=False`."""
    return bool(dynamo_config.automatic_dynamic_shapes)


def expect_other_sizes(tensor: Any, dim: int) -> None:
    """Make the first graph that Dynamo captures with this tensor as an input dynamic in `dim`.

    No guard depends on this mark. `maybe_mark_dynamic` is public, but Dynamo guards on it since PyTorch 2.13.
    """
    if _mark_dynamic is None:
        return
    _mark_dynamic(tensor, {dim})
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        for inner in (getattr(tensor, name) for name in names):
            if inner.dim() == tensor.dim():
                _mark_dynamic(inner, {dim})


def may_vary(value: torch.Tensor, dim: int) -> None:
    """Have a dimension of an input traced as a symbol, unless the traced code specialises on it."""
    maybe_mark_dynamic(value, dim)


def floats_are_constants() -> contextlib.AbstractContextManager[None]:
    """Keep floats constant while a function is compiled for all sizes.

    Otherwise Dynamo makes floats graph inputs, for instance the epsilon of a norm, finds in AOTAutograd that they can
    be constants, and traces everything a second time.
    """
    return dynamo_config.patch(specialize_float=True)  # type: ignore[no-any-return]
