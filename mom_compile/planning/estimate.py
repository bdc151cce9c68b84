"""How long a prefill and a decode step take on a recorded device, by what bounds them. AN ESTIMATE: of ours, no GPU has
confirmed one.

A prefill:

    arithmetic    FLOPs of all products and attentions / (what a device computes * the share that products reach)
    reading       mini-sequences * bytes of the weights that each reads / bandwidth of the memory
    launching     mini-sequences * loops * the host's time for a body
    copies out    keys and values that leave / the link;  copies in: weights that arrive / the link

A decode step, which adds a token to each sequence:

    arithmetic    FLOPs of the products with the weights that are read, as above
    memory        bytes of these weights, and of all keys and values / bandwidth of the memory
    link          those of them that are on the host / the link
    launching     layers * the host's time for a layer

All of these go on at once, so the longest of them bounds the time. A multiply-add is two FLOPs; a causal attention
computes half of what it would with all keys, one with a window as many keys a row as that has.
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
    """Seconds of one prefill, what bounds them, and what each thing by itself would take."""

    device: str
    seconds: float
    bound: str
    parts: dict[str, float]

    def __str__(self) -> str:
        others = ", ".join(
            f"{what} {in_words(time)}" for what, time in self.parts.items() if what != self.bound and time
        )
        beside = f" ({others})" if others else ""
        return f"about {in_words(self.seconds)} on {self.device}, bound by {self.bound}{beside}; an estimate"

    def __repr__(self) -> str:
        return f"<Estimate: {self}>"


@dataclass(frozen=True)
class DecodeEstimate:
    """New tokens per second of all sequences together, the resource that bounds them, and the seconds of a step that
    each resource would need alone."""

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
    """What a prefill computes and moves: multiply-adds, bytes, and how often each loop runs its body, on average."""

    work: int
    weights_read: int
    mini_sequences: float
    loops: int
    to_host: int
    to_device: int


@dataclass(frozen=True)
class Step:
    """What a decode step of so many `sequences` computes and moves: multiply-adds, bytes of weights and of keys and
    values that are read, bytes of both that are fetched from the host, and how many layers there are."""

    work: int
    read: int
    fetched: int
    layers: int
    sequences: int


def device_named(name: str) -> tuple[str, Device]:
    """The recorded device with this name. Raises `PlanError`, which lists the names, if there is none."""
    known = find_device(name)
    if known is None:
        near = nearest_device(name)
        meant = "" if near is None else f" (did you mean {near!r}?)"
        raise PlanError(
            f"device={name!r} is not a recorded device{meant}; recorded are {', '.join(DEVICES)}; for another device "
            f"take one of similar speed and give its memory (--device-memory, plan(memory_budget=...))"
        )
    return known, DEVICES[known]


def estimate(load: Load, name: str) -> Estimate:
    """The time of a prefill. Raises `PlanError` for a device that is not recorded."""
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
    """The speed of decode. Raises `PlanError` for a device that is not recorded."""
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
    """Multiply-adds of a graph that was captured with so many tokens, in its sizes: those of products, which are known
    for these, grow with the tokens."""
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
    """Seconds for people, with two digits of meaning."""
    if seconds >= 90:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    digits = 0 if seconds >= 10 else 1 - math.floor(math.log10(max(seconds, 1e-3)))
    return f"{seconds:.{min(digits, 3)}f} s"
