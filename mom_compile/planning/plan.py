"""`plan(model, seq_len=...)`: will it fit, and what is the longest context, without a GPU and without weights.

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
from mom_compile.planning.assumed import assumed_scheme, what_is_quantised
from mom_compile.planning.configs import Found, PlanError, find_config, of_config
from mom_compile.planning.estimate import DecodeEstimate, Estimate, device_named, estimate, estimate_decode
from mom_compile.planning.picture import draw
from mom_compile.planning.planner import CPU, Planner
from mom_compile.planning.subject import Subject, subject_of
from mom_compile.planning.ways import INDUCTOR, Way
from mom_compile.quantities import parse_bytes, parse_tokens, unit_hint
from mom_compile.report import StageReport
from mom_compile.report.notebook import html_of_text
from mom_compile.report.units import in_units


@dataclass(frozen=True)
class Transfers:
    """What a prefill moves between host and device, in bytes: keys and values that leave, weights that arrive."""

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
    """What a prefill of `batch_size` sequences of `seq_len` tokens takes, with the default cache and the logits of the
    last token, in eager mode, with stock Inductor and with ours.

    model            a config of transformers, a folder or config.json, the name of a shipped shape, or a module of
                     transformers, of which the config and dtype are read
    seq_len          tokens, as a number or as "455k"; any other length can be asked for afterwards
    dtype            of the weights: that of the module or config, else bfloat16
    memory_budget    bytes of the device for everything, as a number or as "24GiB"
    device           a recorded GPU, whose rule says how long mini-sequences are, whose figures say how long it takes
                     and whose memory `max_seq_len` fills; or "cpu"
    weights_on_host  whether weights are planned as `offload_weights` leaves them, all of them on the host
    weight_bits      bits of the values of quantised weights, in place of what the config says (16: none is quantised)
    progress         called with a line for each thing that takes time
    options, named   options of the backend, in a mapping or by name: `kv_offload`, `mini_seq_len`, ...

    Raises `ValueError` for an option that is not valid, `TypeError` for one that is given twice, and `PlanError`, a
    `ValueError`, for a model that cannot be planned, a device that is not known, and a budget
    that cannot be kept: it names the smallest that can, and the longest context that the given one has room for.
    """
    _check_names({**(options or {}), **named})
    tokens, batch = parse_tokens(seq_len), _checked_batch(batch_size)
    budget = {} if memory_budget is None else {"memory_budget": memory_budget}
    parsed = parse_options(joined_options(options, {**named, **budget}))
    say = progress or (lambda text: None)
    if device.lower() != CPU:
        device, _ = device_named(device)
    model = _of_transformers(model)
    found = _found(model)
    say(f"reading {found.name}")
    given = _dtype(dtype, model)
    scheme, said = assumed_scheme(found.quantization, weight_bits)
    subject, weights = subject_of(found.config, found.name, given, _class_of(model), scheme)
    planner = Planner(subject, weights, batch, device, parsed, say)
    notes = [*found.notes, *said, *what_is_quantised(scheme, weights, subject)]
    made = Plan(subject, tokens, batch, device, notes, planner, _way_of(parsed, weights_on_host))
    if subject.longest is not None and tokens > subject.longest:
        made.notes.append(f"{tokens:,} tokens are more than the {subject.longest:,} that the model is made for")
    planner.prefills(tokens)
    if parsed.memory_budget is not None:
        made = replace(made, **made._within(parse_bytes(parsed.memory_budget), parsed.memory_budget))
    return made


#: Wrong names for the memory of a device that users are likely to try.
_MEMORY_NAMES = frozenset({"device_memory", "gpu_memory", "memory", "max_memory", "vram"})


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise `PlanError` for a wrong name of the memory of a device, such as the command line's `device_memory`."""
    for name in _MEMORY_NAMES & given.keys():
        value = given[name]
        raise PlanError(
            f"unknown option {name!r}: did you mean memory_budget={value!r}, a bound that the plan has to keep, or "
            f"plan(...).max_seq_len({value!r}), the longest context that fits?"
        )


def _of_transformers(model: Any) -> Any:
    """The model of transformers in a module that may be wrapped; anything else as it is."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module for module in modules if hasattr(type(module), "_from_config")), model)


def _found(model: Any) -> Found:
    if isinstance(model, str | Path):
        return find_config(model)
    config = getattr(model, "config", model) if isinstance(model, nn.Module) else model
    return of_config(config, type(model).__name__)


def _checked_batch(batch_size: Any) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise PlanError(f"batch_size={batch_size!r} is not valid; it is a whole number of sequences, 1 or more")
    return batch_size


def _dtype(given: torch.dtype | str | None, model: Any) -> torch.dtype | None:
    if given is None:
        return next(model.parameters()).dtype if isinstance(model, nn.Module) else None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanError(f"dtype={given!r} is not valid; it is that of weights: 'bfloat16', 'float16', 'float32'")
    return found


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
    """What a prefill takes. `ways` are how it can be run, `way` is the one that the options stand for; `notes` are what
    its reader has to know. With a `memory_budget`, `budget` is it in bytes, and keys and values of `resident_layers`
    stay on the device."""

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
        return self._planner.ways()

    def peak_bytes(self, seq_len: int | str | None = None) -> int:
        """Bytes of the device at the peak, weights included."""
        return self.ways[self.way].peak_bytes(self.seq_len if seq_len is None else parse_tokens(seq_len))

    def max_seq_len(self, budget: int | str | None = None) -> int:
        """The longest context whose prefill and first decode step fit into `budget` bytes of the device; 0 if none
        fits. The default is the budget of the plan, or else the memory of its device."""
        size = self.memory if budget is None else parse_bytes(budget, "budget")
        if size is None:
            raise PlanError("max_seq_len needs a budget: max_seq_len('80GiB')")
        return self.ways[self.way].max_seq_len(size)

    @property
    def formula(self) -> sympy.Expr:
        """Bytes above weights and inputs at the peak, of the models that are traced, in the symbols of their graph."""
        made = self._planner.compiled(self.seq_len, self.way)
        if made is None:
            return self._planner.stock(self._planner.prefills(self.seq_len)[-1]).peak
        return made[-1].rewritten.memory.highest.bytes

    @property
    def stages(self) -> list[StageReport]:
        """The loops of the longer of the models that are traced; none where stock Inductor has it."""
        made = self._planner.compiled(self.seq_len, self.way)
        return [] if made is None else list(made[-1].report.stages)

    @property
    def transfers(self) -> Transfers:
        planner = self._planner
        return Transfers(planner.cache_on_host(self.way, self.seq_len), planner.weights_on_host(self.way))

    def host_bytes(self, seq_len: int | str | None = None) -> int:
        """Bytes on the host: keys and values, and weights that are kept there."""
        return self.ways[self.way].host_bytes(self.seq_len if seq_len is None else parse_tokens(seq_len))

    @property
    def memory(self) -> int | None:
        """Bytes of device memory: the budget, or else the memory of the device; None for a CPU."""
        if self.budget is not None or self.device == CPU:
            return self.budget
        return device_named(self.device)[1].memory

    def fits(self, way: str | None = None) -> bool:
        """Whether the prefill and one token fit into the device's memory, in the plan's way or another."""
        return self.memory is None or self.ways[way or self.way].needed_bytes(self.seq_len) <= self.memory

    def estimate(self, device: str | None = None, way: str | None = None) -> Estimate:
        """How long a prefill takes on a recorded device, that of the plan by default, in the plan's way or another.

        Raises `PlanError` for a device that is not recorded.
        """
        return estimate(self._planner.load(way or self.way, self.seq_len), device or self.device)

    def estimate_decode(self, device: str | None = None, way: str | None = None) -> DecodeEstimate:
        """How many tokens per second decode makes behind a prefill, in the plan's way or another.

        Raises `PlanError` for a device that is not recorded.
        """
        stay = (self.resident_layers or 0) if (way or self.way) == self.way else 0
        return estimate_decode(self._planner.step(way or self.way, self.seq_len, stay), device or self.device)

    def plot(self, path: str | Path, memories: tuple[int, ...] = ()) -> None:
        """Draw memory against context, with a line for each device's memory in bytes. Needs matplotlib."""
        draw(Path(path), self.subject, self.ways, self.batch_size, self.seq_len, memories)

    def summary(self) -> str:
        """A few lines for people; `print(plan)` prints them."""
        sizes = {way.what: way.peak_bytes(self.seq_len) for way in self.ways.values()}
        width = max(map(len, sizes))
        s = self.subject
        lines = [
            f"{s.name}: {s.layers} layers, {s.parameters / 1e9:.3g}e9 parameters, {in_units(s.weight_bytes)}",
            *(f"note: {note}" for note in self.notes),
            f"peak of the device for {self.batch_size} x {self.seq_len:,} tokens, weights included:",
            *(f"  {what:{width}}  {in_units(size)}" for what, size in sizes.items()),
            self._in_its_way(),
        ]
        if self.budget is not None:
            stays = "" if self.resident_layers is None else f", keys and values of {self.resident_layers} layers stay"
            lines.append(f"longest context in {in_units(self.budget)}: {self.max_seq_len():,} tokens{stays}")
        return "\n".join(lines)

    def _in_its_way(self) -> str:
        """A line on the plan's way: host memory and times or, if it does not fit, the bytes that it needs."""
        what, host = self.ways[self.way].what, self.host_bytes()
        beside = f"{what}: {in_units(host)} on the host" if host else f"{what}: nothing on the host"
        if self.device == CPU:
            return beside
        if not self.fits():
            needed, there = self.ways[self.way].needed_bytes(self.seq_len), self.memory or 0
            return f"{what}: {in_units(needed)} ({needed:,} bytes) do not fit into {in_units(there)}, {self.device}"
        return f"{beside}; prefill {self.estimate()}; decode {self.estimate_decode()}"

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
        """The plan for a budget: where the cache has to go. Raises `PlanError` where it cannot be kept."""
        options, planner = self._planner.options, self._planner
        may_leave = options.kv_offload is not False and self.way not in (INDUCTOR, "mlp")
        away = "mom-weights" if self.way == "mom-weights" else "mom-cache" if may_leave else self.way
        least = planner.peak(away, self.seq_len, fewest=True)
        if least > budget:
            raise PlanError(self._refused(budget, given, least, away))
        if away != "mom-cache" or self.way == "mom-cache":
            return {"budget": budget}
        whole, gone = planner.peak("mom", self.seq_len), planner.peak(away, self.seq_len)
        layers = self.subject.layers
        each = max(1, planner.host(away, self.seq_len) // layers)
        stay = layers if whole <= budget else max(0, min(layers, (budget - gone) // each))
        return {"budget": budget, "resident_layers": stay, "way": "mom" if stay == layers else away}

    def _refused(self, budget: int, given: int | str, least: int, way: str) -> str:
        weights = f", of which weights take {in_units(self.subject.weight_bytes)}" if way != "mom-weights" else ""
        longest = self.ways[way].max_seq_len(budget)
        room = f"it has room for {longest:,} tokens" if longest else "it has no room for a single token"
        more = "" if way == "mom-weights" else self._with_weights_on_host()
        return (
            f"memory_budget={given!r} cannot be kept for {self.seq_len:,} tokens: the smallest "
            f"that can is {least} ({in_units(least)}){weights}; {room}{more}{unit_hint(given)}"
        )

    def _with_weights_on_host(self) -> str:
        least = self.ways["mom-weights"].peak_bytes(self.seq_len)
        return f"; with the weights on the host, too, {in_units(least)} are enough"
