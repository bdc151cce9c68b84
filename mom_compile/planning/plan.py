"""`plan(model, seq_len=...)`: whether a model fits and the longest context, without a GPU and without weights.

config -> model on the meta device -> two shorter ones -> prefill captured for any length
       -> for each way: program -> memory model -> bytes at any length, of all layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mom_compile.config import Options, joined_options, parse_options
from mom_compile.planning.assumed import assumed_scheme, quantisation_notes
from mom_compile.planning.configs import Found, PlanError, find_config, of_config
from mom_compile.planning.estimate import device_named
from mom_compile.planning.planned import Plan
from mom_compile.planning.planner import CPU, Planner
from mom_compile.planning.prompt import checked_batch, checked_dtype
from mom_compile.planning.ranks import checked_ranks
from mom_compile.planning.subject import Subject, subject_of
from mom_compile.planning.ways import INDUCTOR
from mom_compile.quantities import parse_bytes, parse_tokens


def plan(
    model: nn.Module | str | Path | Any,
    *,
    seq_len: int | str,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    memory_budget: int | str | None = None,
    device: str = "H100",
    weights_on_host: bool = False,
    weight_bits: int | None = None,
    tensor_parallel: int = 1,
    progress: Callable[[str], None] | None = None,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> Plan:
    """Predict memory and time of a prefill in eager mode, with stock Inductor and with mom, without a GPU or weights.

    The plan is for the default cache and the logits of the last token.

    Parameters
    ----------
    model : module, config, str or Path
        A config of transformers, a folder, a `config.json`, the name of a shipped shape, or a module of transformers,
        of which only the config and the dtype are read.
    seq_len : int or str
        Tokens of each sequence: a number or a text such as `"455k"`. The plan answers for other lengths, too.
    batch_size : int
        Number of sequences.
    dtype : torch.dtype or str, optional
        The dtype of the weights. The default is that of the module or config, else bfloat16.
    memory_budget : int or str, optional
        Bytes of device memory for everything, weights included: a number or a text such as `"24GiB"`.
    device : str
        A recorded GPU or `"cpu"`. It determines the length of mini-sequences, the estimated times and the memory that
        `max_seq_len` fills.
    weights_on_host : bool
        Whether all weights that `offload_weights` can keep on the host are there.
    weight_bits : int, optional
        Bits of quantised weights, in place of those of the config. 16 plans weights that are not quantised.
    tensor_parallel : int
        Number of ranks that share the model as transformers' `tp_plan="auto"` does. All bytes are then those of one
        rank, and `device` and `memory_budget` are for each. Not included: the buffers of a communication library and
        the time of collectives. Needs a process without a default process group; a temporary one is made and destroyed.
    progress : callable, optional
        Called with a line of text before each part that takes time.
    options : mapping, optional
        Options of the backend.
    **named
        Options of the backend by name, such as `kv_offload=True`.

    Returns
    -------
    Plan
        Answers for this length and for others.

    Raises
    ------
    PlanError
        If the model cannot be planned, the device is not recorded, `tensor_parallel` does not divide the heads, or the
        budget does not suffice. In the last case the message names the smallest budget and the longest context that
        fits into the given one.
    ValueError
        If an option is not valid.
    TypeError
        If an option is given twice.
    """
    _check_names({**(options or {}), **named})
    tokens, batch = parse_tokens(seq_len), checked_batch(batch_size)
    budget = {} if memory_budget is None else {"memory_budget": memory_budget}
    parsed = parse_options(joined_options(options, {**named, **budget}))
    report = progress or (lambda text: None)
    if device.lower() != CPU:
        device, _ = device_named(device)
    ranks = checked_ranks(tensor_parallel)
    model = _of_transformers(model)
    found = _found(model)
    report(f"reading {found.name}")
    given = _dtype(dtype, model)
    scheme, scheme_notes = assumed_scheme(found.quantization, weight_bits)
    subject, weights = subject_of(found.config, found.name, given, _class_of(model), scheme, ranks)
    planner = Planner(subject, weights, batch, device, parsed, report)
    notes = [*found.notes, *scheme_notes, *quantisation_notes(scheme, weights, subject), *_notes_on(subject)]
    made = Plan(subject, tokens, batch, device, notes, planner, _way_of(parsed, weights_on_host))
    if subject.longest is not None and tokens > subject.longest:
        made.notes.append(f"{tokens:,} tokens exceed the {subject.longest:,} positions of the model")
    planner.prefills(tokens)
    if parsed.memory_budget is not None:
        made = replace(made, **made._within(parse_bytes(parsed.memory_budget), parsed.memory_budget))
    return made


#: Wrong names for the device's memory that users are likely to try.
_MEMORY_NAMES = frozenset({"device_memory", "gpu_memory", "memory", "max_memory", "vram"})


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise `PlanError` for a wrong name of the device's memory, such as the command line's `device_memory`."""
    for name in _MEMORY_NAMES & given.keys():
        value = given[name]
        raise PlanError(
            f"unknown option {name!r}: did you mean memory_budget={value!r}, a limit for the plan, or "
            f"plan(...).max_seq_len({value!r}), the longest context that fits?"
        )


def _of_transformers(model: Any) -> Any:
    """Return the transformers model within a wrapped module; other values unchanged."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module for module in modules if hasattr(type(module), "_from_config")), model)


def _found(model: Any) -> Found:
    if isinstance(model, str | Path):
        return find_config(model)
    config = getattr(model, "config", model) if isinstance(model, nn.Module) else model
    return of_config(config, type(model).__name__)


def _dtype(given: torch.dtype | str | None, model: Any) -> torch.dtype | None:
    if given is None:
        return next(model.parameters()).dtype if isinstance(model, nn.Module) else None
    return checked_dtype(given)


def _class_of(model: Any) -> Any:
    return type(model) if isinstance(model, nn.Module) else None


def _notes_on(subject: Subject) -> list[str]:
    """Return notes on a model that ranks share."""
    ranks, share = subject.ranks.count, subject.own_parameters / subject.parameters
    if ranks == 1:
        return []
    partly = "" if share < 1.1 / ranks else ", since transformers' plan leaves the other modules whole"
    return [
        f"memory is that of one of {ranks} ranks, which holds {share:.3g} of the parameters{partly}; times do not "
        f"include communication between ranks"
    ]


def _way_of(options: Options, weights_on_host: bool) -> str:
    if options.scope != "layer":
        return INDUCTOR if options.scope == "none" else options.scope
    if weights_on_host:
        return "mom-weights"
    return "mom-cache" if options.kv_offload not in (False, "auto") else "mom"
