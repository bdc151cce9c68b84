"""`plan(model, seq_len=...)`: whether a model fits and the longest context, without a GPU and without weights.

config -> model on the meta device -> two shorter ones -> prefill captured for any length
       -> for each way: program -> memory model -> bytes at any length, of all layers
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import nn

from mom_compile.config import Options, joined_options, parse_options
from mom_compile.planning.assumed import assumed_scheme, quantisation_notes
from mom_compile.planning.configs import Found, PlanError, find_config, of_config
from mom_compile.planning.estimate import DecodeEstimate, Estimate, device_named, estimate, estimate_decode
from mom_compile.planning.picture import draw
from mom_compile.planning.planner import CPU, Planner
from mom_compile.planning.prompt import checked_batch, checked_dtype
from mom_compile.planning.subject import Subject, subject_of
from mom_compile.planning.ways import INDUCTOR, Way
from mom_compile.quantities import parse_bytes, parse_tokens, unit_hint
from mom_compile.report import StageReport
from mom_compile.report.notebook import html_of_text
from mom_compile.report.units import in_units


@dataclass(frozen=True)
class Transfers:
    """Bytes that a prefill moves between host and device: offloaded keys and values, and fetched weights."""

    to_host: int
    to_device: int


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
        If the model cannot be planned, the device is not recorded, or the budget does not suffice. In the last case the
        message names the smallest budget and the longest context that fits into the given one.
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
    model = _of_transformers(model)
    found = _found(model)
    report(f"reading {found.name}")
    given = _dtype(dtype, model)
    scheme, scheme_notes = assumed_scheme(found.quantization, weight_bits)
    subject, weights = subject_of(found.config, found.name, given, _class_of(model), scheme)
    planner = Planner(subject, weights, batch, device, parsed, report)
    notes = [*found.notes, *scheme_notes, *quantisation_notes(scheme, weights, subject)]
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


def _way_of(options: Options, weights_on_host: bool) -> str:
    if options.scope != "layer":
        return INDUCTOR if options.scope == "none" else options.scope
    if weights_on_host:
        return "mom-weights"
    return "mom-cache" if options.kv_offload not in (False, "auto") else "mom"


@dataclass(frozen=True, eq=False)
class Plan:
    """Predicted memory and time of a prefill, at any length. `print(plan)` shows a summary.

    Attributes
    ----------
    subject : Subject
        The model: its name, layers, parameters and bytes of weights.
    seq_len : int
        Tokens of each sequence.
    batch_size : int
        Number of sequences.
    device : str
        The recorded device, or `"cpu"`.
    notes : list of str
        Assumptions, for instance on quantised weights.
    way : str
        The key of `ways` that the options select: `"eager"`, `"inductor"`, `"mlp"` (the scope of the MOM paper),
        `"mom"`, `"mom-cache"` or `"mom-weights"`.
    budget : int or None
        The memory budget in bytes.
    resident_layers : int or None
        With a budget: the number of layers whose keys and values stay on the device.
    """

    subject: Subject
    seq_len: int
    batch_size: int
    device: str
    notes: list[str]
    _planner: Planner
    way: str
    budget: int | None = None
    resident_layers: int | None = None

    @functools.cached_property
    def ways(self) -> dict[str, Way]:
        """Each way to run the prefill, by name. A way has `peak_bytes(seq_len)`, `host_bytes(seq_len)` and
        `max_seq_len(budget)`."""
        return self._planner.ways()

    def peak_bytes(self, seq_len: int | str | None = None) -> int:
        """Return the peak of device memory, weights included.

        Parameters
        ----------
        seq_len : int or str, optional
            Tokens of each sequence; the default is that of the plan.

        Returns
        -------
        int
            Bytes.
        """
        return self.ways[self.way].peak_bytes(self.seq_len if seq_len is None else parse_tokens(seq_len))

    def max_seq_len(self, budget: int | str | None = None) -> int:
        """Return the longest context whose prefill and first decode step fit.

        A 32nd of what is above the weights is left free.

        Parameters
        ----------
        budget : int or str, optional
            Bytes of device memory. The default is the budget of the plan, or else the memory of its device.

        Returns
        -------
        int
            Tokens of each sequence; 0 if none fits.

        Raises
        ------
        PlanError
            If the plan is for a CPU and has no budget.
        """
        size = self.memory if budget is None else parse_bytes(budget, "budget")
        if size is None:
            raise PlanError("max_seq_len needs a budget: max_seq_len('80GiB')")
        return self.ways[self.way].max_seq_len(size)

    @property
    def formula(self) -> sympy.Expr:
        """The peak in bytes above weights and inputs, as an expression in the sizes of the traced graph."""
        made = self._planner.compiled(self.seq_len, self.way)
        if made is None:
            return self._planner.stock(self._planner.prefills(self.seq_len)[-1]).peak
        return made[-1].rewritten.memory.highest.bytes

    @property
    def stages(self) -> list[StageReport]:
        """The loops of the traced model, which has a few layers; empty where stock Inductor compiles the graph."""
        made = self._planner.compiled(self.seq_len, self.way)
        return [] if made is None else list(made[-1].report.stages)

    @property
    def transfers(self) -> Transfers:
        """Bytes that a prefill moves between device and host: `to_host` and `to_device`."""
        planner = self._planner
        return Transfers(planner.cache_on_host(self.way, self.seq_len), planner.weights_on_host(self.way))

    def host_bytes(self, seq_len: int | str | None = None) -> int:
        """Return the bytes of keys, values and weights on the host.

        Parameters
        ----------
        seq_len : int or str, optional
            Tokens of each sequence; the default is that of the plan.

        Returns
        -------
        int
            Bytes.
        """
        return self.ways[self.way].host_bytes(self.seq_len if seq_len is None else parse_tokens(seq_len))

    @property
    def memory(self) -> int | None:
        """Bytes of device memory: the budget, or else the memory of the device. `None` for a CPU without a budget."""
        if self.budget is not None or self.device == CPU:
            return self.budget
        return device_named(self.device)[1].memory

    def fits(self, way: str | None = None) -> bool:
        """Return whether the prefill and the first decode step fit into the memory of the device.

        Parameters
        ----------
        way : str, optional
            A key of `ways`; the default is that of the plan.

        Returns
        -------
        bool
            `True` also for a CPU without a budget.
        """
        return self.memory is None or self.ways[way or self.way].needed_bytes(self.seq_len) <= self.memory

    def estimate(self, device: str | None = None, way: str | None = None) -> Estimate:
        """Estimate the time of the prefill from data sheets.

        Parameters
        ----------
        device : str, optional
            A recorded device; the default is that of the plan.
        way : str, optional
            A key of `ways`; the default is that of the plan.

        Returns
        -------
        Estimate
            Seconds, and what bounds them.

        Raises
        ------
        PlanError
            If the device is not recorded.
        """
        return estimate(self._planner.load(way or self.way, self.seq_len), device or self.device)

    def estimate_decode(self, device: str | None = None, way: str | None = None) -> DecodeEstimate:
        """Estimate the speed of decode after the prefill, from data sheets.

        Parameters
        ----------
        device : str, optional
            A recorded device; the default is that of the plan.
        way : str, optional
            A key of `ways`; the default is that of the plan.

        Returns
        -------
        DecodeEstimate
            Tokens per second, and what bounds them.

        Raises
        ------
        PlanError
            If the device is not recorded.
        """
        stay = (self.resident_layers or 0) if (way or self.way) == self.way else 0
        return estimate_decode(self._planner.step(way or self.way, self.seq_len, stay), device or self.device)

    def plot(self, path: str | Path, memories: tuple[int, ...] = ()) -> None:
        """Draw device memory against context length, one line for each way. Needs matplotlib.

        Parameters
        ----------
        path : str or Path
            The image file.
        memories : tuple of int
            Sizes of device memory in bytes, each drawn as a horizontal line.
        """
        draw(Path(path), self.subject, self.ways, self.batch_size, self.seq_len, memories)

    def summary(self) -> str:
        """Return the text that `print(plan)` shows.

        Returns
        -------
        str
            A few lines.
        """
        sizes = {way.what: way.peak_bytes(self.seq_len) for way in self.ways.values()}
        width = max(map(len, sizes))
        s = self.subject
        lines = [
            f"{s.name}: {s.layers} layers, {s.parameters / 1e9:.3g}e9 parameters, {in_units(s.weight_bytes)}",
            *(f"note: {note}" for note in self.notes),
            f"peak of the device for {self.batch_size} x {self.seq_len:,} tokens, weights included:",
            *(f"  {what:{width}}  {in_units(size)}" for what, size in sizes.items()),
            self._way_line(),
        ]
        if self.budget is not None:
            stays = "" if self.resident_layers is None else f", keys and values of {self.resident_layers} layers stay"
            lines.append(f"longest context in {in_units(self.budget)}: {self.max_seq_len():,} tokens{stays}")
        return "\n".join(lines)

    def _way_line(self) -> str:
        """Return a line on the plan's way: host memory and times or, if it does not fit, the bytes that it needs."""
        what, host = self.ways[self.way].what, self.host_bytes()
        on_host = f"{what}: {in_units(host)} on the host" if host else f"{what}: nothing on the host"
        if self.device == CPU:
            return on_host
        if not self.fits():
            needed, there = self.ways[self.way].needed_bytes(self.seq_len), self.memory or 0
            return f"{what}: {in_units(needed)} ({needed:,} bytes) do not fit into {in_units(there)}, {self.device}"
        return f"{on_host}; prefill {self.estimate()}; decode {self.estimate_decode()}"

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        """One line. It needs no further planning."""
        s, budget = self.subject, "" if self.budget is None else f", within {in_units(self.budget)}"
        return (
            f"<Plan: {s.name}, {in_units(s.weight_bytes)} of weights, {self.batch_size} x {self.seq_len:,} tokens on "
            f"{self.device}, way {self.way!r}{budget}>"
        )

    def _repr_html_(self) -> str:
        return html_of_text(self.summary())

    def _within(self, budget: int, given: int | str) -> dict[str, Any]:
        """Return the plan's fields for a budget: the placement of the cache. Raises `PlanError` if it does not fit."""
        options, planner = self._planner.options, self._planner
        may_leave = options.kv_offload is not False and self.way not in (INDUCTOR, "mlp")
        offloaded = "mom-weights" if self.way == "mom-weights" else "mom-cache" if may_leave else self.way
        least = planner.peak(offloaded, self.seq_len, fewest=True)
        if least > budget:
            raise PlanError(self._refused(budget, given, least, offloaded))
        if offloaded != "mom-cache" or self.way == "mom-cache":
            return {"budget": budget}
        whole, gone = planner.peak("mom", self.seq_len), planner.peak(offloaded, self.seq_len)
        layers = self.subject.layers
        each = max(1, planner.host(offloaded, self.seq_len) // layers)
        stay = layers if whole <= budget else max(0, min(layers, (budget - gone) // each))
        return {"budget": budget, "resident_layers": stay, "way": "mom" if stay == layers else offloaded}

    def _refused(self, budget: int, given: int | str, least: int, way: str) -> str:
        weights = f", including {in_units(self.subject.weight_bytes)} of weights" if way != "mom-weights" else ""
        longest = self.ways[way].max_seq_len(budget)
        room = f"it suffices for {longest:,} tokens" if longest else "it does not suffice for a single token"
        more = "" if way == "mom-weights" else self._with_weights_on_host()
        return (
            f"memory_budget={given!r} is too small for {self.seq_len:,} tokens: the smallest "
            f"valid budget is {least} ({in_units(least)}){weights}; {room}{more}{unit_hint(given)}"
        )

    def _with_weights_on_host(self) -> str:
        least = self.ways["mom-weights"].peak_bytes(self.seq_len)
        return f"; with the weights on the host as well, {in_units(least)} suffice"
