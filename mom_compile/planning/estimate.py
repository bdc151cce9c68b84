"""Estimated time of a prefill and of a decode step on a known device, by its bottleneck. AN ESTIMATE: no GPU has
confirmed one for our ways.

A prefill:

    arithmetic    FLOPs of all products and attentions / (FLOPS of the device * the share that products reach)
    reading       mini-sequences * bytes of the weights that each reads / memory bandwidth
    launching     mini-sequences * loops * host time per loop body
    copies        offloaded keys and values / link bandwidth; fetched weights / link bandwidth

A decode step, which adds a token to each sequence:

    arithmetic    FLOPs of the products with the weights, as above
    memory        bytes of these weights and of all keys and values / memory bandwidth
    link          the part of them on the host / link bandwidth
    launching     layers * host time per layer

All of these overlap, so the longest is the estimate. A multiply-add is two FLOPs. A causal attention computes half of
all keys; one with a window computes as many keys per row as the window has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
from torch import fx

from mom_compile.memory.device import HOST_SECONDS, REACHED, STEP_SECONDS
from mom_compile.memory.devices import DEVICES, Device, find_device, nearest_device
from mom_compile.planning.configs import PlanError
from mom_passes.attention.form import attention_form
from mom_passes.graph.arguments import argument
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.sizes import expr, product
from mom_passes.graph.values import value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules.attention import SDPA
from mom_passes.rules.work import products


@dataclass(frozen=True)
class Estimate:
    """The estimated time of one prefill on a recorded device.

    The estimate comes from data sheets. No GPU has confirmed it.

    Attributes
    ----------
    device : str
        Name of the recorded device.
    seconds : float
        Time of the prefill, in seconds: the largest of `parts`.
    bound : str
        The resource that bounds the time, a key of `parts`.
    parts : dict of str to float
        Seconds that each resource alone would need.
    """

    device: str
    seconds: float
    bound: str
    parts: dict[str, float]

    def __str__(self) -> str:
        others = ", ".join(
            f"{what} {in_words(time)}" for what, time in self.parts.items() if what != self.bound and time
        )
        rest = f" ({others})" if others else ""
        return f"about {in_words(self.seconds)} on {self.device}, bound by {self.bound}{rest}; an estimate"

    def __repr__(self) -> str:
        return f"<Estimate: {self}>"


@dataclass(frozen=True)
class DecodeEstimate:
    """The estimated speed of decode on a recorded device.

    The estimate comes from data sheets. It leaves out the arithmetic of attention and sampling.

    Attributes
    ----------
    device : str
        Name of the recorded device.
    tokens_per_second : float
        New tokens per second, of all sequences together.
    bound : str
        The resource that bounds the speed, a key of `parts`.
    parts : dict of str to float
        Seconds of one decode step that each resource alone would need.
    """

    device: str
    tokens_per_second: float
    bound: str
    parts: dict[str, float]

    def __str__(self) -> str:
        return f"about {self.tokens_per_second:.3g} tokens/s on {self.device}, bound by {self.bound}; an estimate"

    def __repr__(self) -> str:
        return f"<DecodeEstimate: {self}>"


@dataclass(frozen=True)
class Load:
    """Work of a prefill: multiply-adds, bytes, and the average number of times that a loop runs its body."""

    work: int
    weights_read: int
    mini_sequences: float
    loops: int
    to_host: int
    to_device: int


@dataclass(frozen=True)
class Step:
    """Work of a decode step of `sequences`: multiply-adds, bytes of weights, keys and values that are read, the part of
    them that is fetched from the host, and the number of layers."""

    work: int
    read: int
    fetched: int
    layers: int
    sequences: int


def device_named(name: str) -> tuple[str, Device]:
    """Return a known device and its name. Raises `PlanError`, which lists the names, if there is none."""
    known = find_device(name)
    if known is None:
        near = nearest_device(name)
        meant = "" if near is None else f" (did you mean {near!r}?)"
        raise PlanError(
            f"device={name!r} is not a known device{meant}; known devices are {', '.join(DEVICES)}; for another device "
            f"use one of similar speed and give its memory (--device-memory, plan(memory_budget=...))"
        )
    return known, DEVICES[known]


def estimate(load: Load, name: str) -> Estimate:
    """Estimate the time of a prefill. Raises `PlanError` for an unknown device."""
    known, device = device_named(name)
    parts = {
        "arithmetic": 2 * load.work / (device.flops * REACHED),
        "reading weights": load.mini_sequences * load.weights_read / device.bandwidth,
        "launching kernels": load.mini_sequences * load.loops * HOST_SECONDS,
        "copies to the host": load.to_host / device.link,
        "copies from the host": load.to_device / device.link,
    }
    bound = max(parts, key=parts.__getitem__)
    return Estimate(known, parts[bound], bound, parts)


def estimate_decode(step: Step, name: str) -> DecodeEstimate:
    """Estimate the speed of decode. Raises `PlanError` for an unknown device."""
    known, device = device_named(name)
    parts = {
        "arithmetic": 2 * step.work / (device.flops * REACHED),
        "memory bandwidth": step.read / device.bandwidth,
        "the link to the host": step.fetched / device.link,
        "launching kernels": step.layers * STEP_SECONDS,
    }
    bound = max(parts, key=parts.__getitem__)
    return DecodeEstimate(known, step.sequences / parts[bound], bound, parts)


def work_of(gm: fx.GraphModule, tokens: sympy.Expr, captured: int) -> sympy.Expr:
    """Return the multiply-adds of a graph as an expression in its sizes.

    Products are counted at the captured number of tokens and scaled with the tokens.
    """
    graph = attention_form(copy_graph(gm)).graph
    attentions = [node for node in graph.nodes if node.target is MOM_ATTENTION]
    others = sum(work for node, work in products(graph).items() if node.target not in (MOM_ATTENTION, *SDPA))
    return sympy.Rational(others, captured) * tokens + sum(map(_of_attention, attentions), sympy.S.Zero)


def _of_attention(node: fx.Node) -> sympy.Expr:
    query, key, value = (value_of(node.args[i]) for i in range(3))  # type: ignore[arg-type]
    window, keys = argument(node, "window"), expr(key.shape[2])
    if window is not None:
        keys = sympy.Min(keys, window)
    elif argument(node, "is_causal"):
        keys = keys / 2
    return expr(product(query.shape[:3])) * keys * (expr(query.shape[3]) + expr(value.shape[3]))


def in_words(seconds: float) -> str:
    """Format seconds with two significant digits."""
    if seconds >= 90:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    digits = 0 if seconds >= 10 else 1 - math.floor(math.log10(max(seconds, 1e-3)))
    return f"{seconds:.{min(digits, 3)}f} s"
