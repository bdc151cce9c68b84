"""Have Dynamo trace one operator in place of the code of a recurrence, and one call for packed attention.

transformers writes linear attention and state-space models as Python loops over chunks or tokens. Dynamo unrolls them:
the graph grows with the prompt and has no rows that a mini-sequence could compute. Functions with a known name are
traced as `mom_compile.scans` has them instead. Attention that is one call for each packed sequence is traced as one
call (`mom_compile.packed_attention`). Only graphs for this backend change: for any other backend and for training,
Dynamo traces the function's own code, and it does so for recurrences of packed sequences.

    scan_operator(mylib.delta_rule, like="gated_delta_rule")     a function of another library
"""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from mom_compile.packed_attention import traced_packed
from mom_compile.scans import SCANS
from mom_compile.substitution import as_method, copy_of, is_for_this_backend, needs_gradients
from mom_compile.torch_compat.dynamo import is_substituted, substitute

#: Function or `Class.method` of a model file of transformers -> the name of its operator.
KNOWN = {
    "torch_chunk_gated_delta_rule": "gated_delta_rule",
    "chunk_kimi_delta_attention": "kda",
    "mamba2_chunk_scan": "mamba2_scan",
    "mamba_selective_scan": "selective_scan",
    "RecurrentGemmaRglru._rnn_scan": "linear_recurrence",
}
#: Arguments that keep packed sequences apart, which the operators cannot.
PACKED = ("cu_seqlens", "seq_idx")
#: Parameters that do not change what a recurrence computes.
WITHOUT_EFFECT = ("self", "chunk_size", "use_mambapy", "use_associative_scan")


def scan_operator(function: Callable[..., Any], like: str) -> None:
    """Trace a function as a recurrence operator, so that each mini-sequence can pass its state to the next.

    Parameters
    ----------
    function : function
        A Python function with the parameters, shapes and results of the one it is like, and with the same meaning, in
        any order and with its own defaults. Its code is not looked at. It still runs in eager mode, in training, with
        other backends, and in calls that give another value than None to a parameter that the operator does not know.
    like : str
        `"gated_delta_rule"`, `"kda"`, `"mamba2_scan"`, `"selective_scan"` or `"linear_recurrence"`:
        `torch_chunk_gated_delta_rule`, `chunk_kimi_delta_attention`, `mamba2_chunk_scan`, `mamba_selective_scan` and
        `RecurrentGemmaRglru._rnn_scan` of transformers.

    Raises
    ------
    TypeError
        If `function` is not a Python function, is a method, lacks a parameter, or needs another one.
    ValueError
        If `like` is not one of these names, or Dynamo traces another function in place of this one already.
    """
    if not isinstance(like, str) or like not in SCANS:
        raise ValueError(f"like={like!r}; expected one of {', '.join(SCANS)}")
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"expected a Python function, got {type(function).__name__}")
    fault = _fault_of(function, SCANS[like])
    if fault is not None:
        raise TypeError(f"{function.__qualname__} {fault}")
    if is_substituted(function):
        raise ValueError(f"{function.__qualname__} is traced as another function already")
    substitute(function, _traced(function, SCANS[like]))


def substitute_in(module: types.ModuleType) -> None:
    """Substitute the recurrences and the packed attention of a model file. A function of unknown form stays."""
    _substitute_recurrences(module)
    _substitute_packed_attention(module)


def _substitute_recurrences(module: types.ModuleType) -> None:
    for path, like in KNOWN.items():
        owner, _, name = path.rpartition(".")
        holder = getattr(module, owner, None) if owner else module
        found = vars(holder).get(name) if holder is not None else None
        if not isinstance(found, types.FunctionType) or found.__module__ != module.__name__:
            continue
        if is_substituted(found) or _fault_of(found, SCANS[like], is_method=bool(owner)):
            continue
        substitute(found, _traced(found, SCANS[like]))
        if owner:
            setattr(holder, name, as_method(found))


def _substitute_packed_attention(module: types.ModuleType) -> None:
    for holder in [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]:
        found = vars(holder).get("forward")
        if not isinstance(found, types.FunctionType) or hasattr(found, "__wrapped__") or is_substituted(found):
            continue
        traced = traced_packed(found)
        if traced is not None:
            substitute(found, traced)
            setattr(holder, "forward", as_method(found))  # noqa: B010  mypy: a method of an unknown class


def watch_models() -> None:
    """Substitute functions of all model files: of those that are imported, and of those that will be."""
    for name, module in list(sys.modules.items()):
        if _is_model_file(name) and module is not None:
            substitute_in(module)
    if not any(isinstance(finder, _ModelFiles) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ModelFiles())


def _is_model_file(name: str) -> bool:
    return name.startswith("transformers.models.") and ".modeling_" in name


def _fault_of(function: types.FunctionType, traced: Callable[..., Any], *, is_method: bool = False) -> str | None:
    """Return why a function cannot be traced as a recurrence, or None."""
    if getattr(function, "_torchdynamo_disable", False):
        return "is disabled for Dynamo, which does not trace it"
    holder = function.__qualname__.rpartition(".")[0]
    if holder and not holder.endswith("<locals>") and not is_method:
        return "is a method, and Dynamo looks for functions only: name a function that the method calls"
    own, known = inspect.signature(function).parameters, inspect.signature(traced).parameters
    missing = [name for name in known if name not in own]
    if missing:
        return f"has no parameter {', '.join(missing)}, which the operator needs"
    others = [one.name for one in own.values() if _is_needed(one) and one.name not in (*known, *WITHOUT_EFFECT)]
    if others:
        return f"needs {', '.join(others)}, which the operator does not take"
    return None


def _is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a call must give a parameter."""
    several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return not several and parameter.default is parameter.empty


def _traced(function: types.FunctionType, scan: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that Dynamo traces in place of `function`."""
    original, own = copy_of(function), inspect.signature(function).parameters
    names = [one.name for one in own.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    defaults = {one.name: one.default for one in own.values() if one.default is not one.empty}
    known = frozenset(inspect.signature(scan).parameters)
    # What the operator does not know must have no effect: None or the default. `**kwargs` has none, unless packed.
    unknown = {name: defaults.get(name) for name in (*own, *PACKED) if name not in (*known, *WITHOUT_EFFECT)}

    def traced(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= len(names) and is_for_this_backend() and not needs_gradients(args, kwargs):
            given = {**dict(zip(names, args)), **kwargs}  # noqa: B905  Dynamo does not trace `strict`
            if all(given.get(name, neutral) in (None, neutral) for name, neutral in unknown.items()):
                values = {**defaults, **given}
                return scan(**{name: value for name, value in values.items() if name in known})
        return original(*args, **kwargs)

    return traced


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
