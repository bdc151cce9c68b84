"""Have Dynamo trace one operator in place of the code of a recurrence.

transformers writes linear attention and state-space models as Python loops over chunks or tokens. Dynamo unrolls them:
the graph grows with the prompt and has no rows that a mini-sequence could compute. Functions with a known name are
traced as `mom_compile.scans` has them instead. Only graphs for this backend change: for any other backend, for training
and for packed sequences, Dynamo traces the function's own code.

    scan_operator(mylib.delta_rule, like="gated_delta_rule")     a function of another library
"""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mom_compile.scans import SCANS
from mom_compile.torch_compat.dynamo import backend_of_trace, is_substituted, substitute

#: Function or `Class.method` of a model file of transformers -> the name of its operator.
KNOWN = {
    "torch_chunk_gated_delta_rule": "gated_delta_rule",
    "chunk_kimi_delta_attention": "kda",
    "mamba2_chunk_scan": "mamba2_scan",
    "mamba_selective_scan": "selective_scan",
    "RecurrentGemmaRglru._rnn_scan": "linear_recurrence",
}
#: Set on the functions of this package that Dynamo calls as a backend.
MARK = "_traces_scans_as_operators"
#: Arguments that keep packed sequences apart, which the operators cannot.
PACKED = ("cu_seqlens", "seq_idx")
#: Parameters that do not change what a recurrence computes.
WITHOUT_EFFECT = ("chunk_size", "use_mambapy", "use_associative_scan")


def scan_operator(function: Callable[..., Any], like: str) -> None:
    """Trace a function as a recurrence operator, so that mini-sequences can pass its state on.

    Parameters
    ----------
    function : function
        A Python function with the parameters, shapes and results of the one it is like, and with the same meaning. Its
        code is not looked at. It still runs in eager mode, in training and with other backends.
    like : str
        `"gated_delta_rule"`, `"kda"`, `"mamba2_scan"`, `"selective_scan"` or `"linear_recurrence"`:
        `torch_chunk_gated_delta_rule`, `chunk_kimi_delta_attention`, `mamba2_chunk_scan`, `mamba_selective_scan` and
        `RecurrentGemmaRglru._rnn_scan` of transformers.

    Raises
    ------
    TypeError
        If `function` is not a Python function, or lacks a parameter.
    ValueError
        If `like` is not one of these names, or Dynamo traces another function in place of this one already.
    """
    if like not in SCANS:
        raise ValueError(f"like={like!r}; expected one of {', '.join(SCANS)}")
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"expected a Python function, got {type(function).__name__}")
    missing = _missing_parameters(function, SCANS[like])
    if missing:
        raise TypeError(f"{function.__qualname__} has no parameter {', '.join(missing)}, which {like} needs")
    if is_substituted(function):
        raise ValueError(f"{function.__qualname__} is traced as another function already")
    substitute(function, _traced(function, SCANS[like]))


def substitute_in(module: types.ModuleType) -> None:
    """Trace the recurrences of a model file as operators. A function with other parameters than expected stays."""
    for path, like in KNOWN.items():
        owner, _, name = path.rpartition(".")
        holder = getattr(module, owner, None) if owner else module
        found = vars(holder).get(name) if holder is not None else None
        if not isinstance(found, types.FunctionType) or found.__module__ != module.__name__:
            continue
        if is_substituted(found) or _missing_parameters(found, SCANS[like]):
            continue
        substitute(found, _traced(found, SCANS[like]))
        if owner:
            setattr(holder, name, _as_method(found))


def _as_method(function: types.FunctionType) -> Callable[..., Any]:
    """Return a method that calls the function. Dynamo looks for a substitute of functions, not of methods."""

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def watch_models() -> None:
    """Trace the recurrences of all model files as operators: those that are imported, and those that will be."""
    for name, module in list(sys.modules.items()):
        if _is_model_file(name) and module is not None:
            substitute_in(module)
    if not any(isinstance(finder, _ModelFiles) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ModelFiles())


def traces_scans(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that Dynamo calls as a backend: its graphs have recurrences as operators."""
    setattr(backend, MARK, True)
    return backend


def _is_model_file(name: str) -> bool:
    return name.startswith("transformers.models.") and ".modeling_" in name


def _missing_parameters(function: Callable[..., Any], traced: Callable[..., Any]) -> list[str]:
    """Return the parameters of the traced function that the original does not have, except those without effect."""
    own, expected = inspect.signature(function).parameters, inspect.signature(traced).parameters
    return [
        name
        for name, one in expected.items()
        if one.kind is not one.VAR_KEYWORD and name not in own and name not in WITHOUT_EFFECT
    ]


def _traced(function: types.FunctionType, scan: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that Dynamo traces in place of `function`."""
    original = _copy_of(function)

    def traced(*args: Any, **kwargs: Any) -> Any:
        if _wants_operators() and not _needs_gradients(args, kwargs) and not _is_packed(kwargs):
            return scan(*args, **kwargs)
        return original(*args, **kwargs)

    return traced


def _copy_of(function: types.FunctionType) -> types.FunctionType:
    """Return the same function as another object, which Dynamo does not know as substituted."""
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


@torch.compiler.assume_constant_result
def _wants_operators() -> bool:
    """Return whether the graph that Dynamo is tracing is for this backend. Dynamo runs this while it traces."""
    return bool(getattr(backend_of_trace(MARK), MARK, False))


def _needs_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    values = [*args, *kwargs.values()]
    return torch.is_grad_enabled() and any(isinstance(one, torch.Tensor) and one.requires_grad for one in values)


def _is_packed(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in PACKED)


class _ModelFiles:
    """Finds model files that are imported later."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_model_file(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        substitute_in(module)
