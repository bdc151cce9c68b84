"""The result of `plan`: what a model needs at any length, each way, and what fits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy

from mom_compile.planning.configs import PlanError
from mom_compile.planning.estimate import DecodeEstimate, Estimate, device_named, estimate, estimate_decode
from mom_compile.planning.picture import draw
from mom_compile.planning.planner import CPU, Planner
from mom_compile.planning.subject import Subject
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
        return self.ways[self.way].peak_bytes(self._tokens(seq_len))

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

    @property
    def tensor_parallel(self) -> int:
        """The number of ranks that share the model. All bytes of a plan are those of one rank."""
        return self.subject.ranks.count

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a further token of one sequence adds to the cache, on each rank: none in layers whose window is
        full, and none for recurrent states."""
        return self._planner.cache_per_token(self.seq_len)

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
        return self.ways[self.way].host_bytes(self._tokens(seq_len))

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
        s, per_rank = self.subject, "" if self.tensor_parallel == 1 else f" on each of {self.tensor_parallel} ranks"
        lines = [
            f"{s.name}: {s.layers} layers, {s.parameters / 1e9:.3g}e9 parameters, {in_units(s.weight_bytes)} and "
            f"{in_units(self.kv_bytes_per_token)} of cache per token{per_rank}",
            *(f"note: {note}" for note in self.notes),
            f"peak of the device for {self.batch_size} x {self.seq_len:,} tokens, weights included:",
            *(f"  {what:{width}}  {in_units(size)}" for what, size in sizes.items()),
            self._way_line(),
        ]
        if self.budget is not None:
            stays = "" if self.resident_layers is None else f", keys and values of {self.resident_layers} layers stay"
            lines.append(f"longest context in {in_units(self.budget)}: {self.max_seq_len():,} tokens{stays}")
        return "\n".join(lines)

    def _tokens(self, seq_len: int | str | None) -> int:
        """Return a number of tokens, by default that of the plan."""
        return self.seq_len if seq_len is None else parse_tokens(seq_len)

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
