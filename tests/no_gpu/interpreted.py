"""Prefills of small models, compiled for a simulated GPU and run on the CPU.

    TRITON_INTERPRET=1 python -m tests.no_gpu.interpreted Llama GPT2

Loop bodies and pieces are compiled for `cuda:0`. The real program and its loops then run them on CPU tensors: Triton's
interpreter runs the kernels, the CPU's operators compute products and attention.

Prints one line of JSON per model: the distance of the logits from eager mode's in float64, ours and eager mode's own,
and how often each kernel ran.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor.async_compile import AsyncCompile

import mom_compile.backend as backend
from mom_compile.capture import capture
from mom_compile.config import parse_options
from mom_compile.runtime.loop import CompiledLoop
from mom_compile.torch_compat.inductor import mark_boxed
from tests.models import ids, small_model
from tests.no_gpu import interpreter
from tests.no_gpu.graphs import graph_on_cuda, value_on_cuda
from tests.no_gpu.target import H100, pretended

CPU = torch.device("cpu")


class OnCpu(backend.Lowering):
    """Programs that allocate on the CPU what they were compiled to allocate on the GPU."""

    def program(self) -> Any:
        made = super().program()
        steps = (dataclasses.replace(step, run=_on_cpu(step.run)) for step in made.steps)
        return dataclasses.replace(made, steps=tuple(steps))


def _on_cpu(run: Any) -> Any:
    if not isinstance(run, CompiledLoop):
        return run
    inputs, outputs = (tuple(map(_port_on_cpu, ports)) for ports in (run.inputs, run.outputs))
    return dataclasses.replace(run, inputs=inputs, outputs=outputs)


def _port_on_cpu(port: Any) -> Any:
    known = getattr(port, "type", None)
    return port if known is None else dataclasses.replace(port, type=dataclasses.replace(known, device=CPU))


class NoGuard:
    """Replaces the device guard in which a wrapper launches."""

    def __init__(self, index: int) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _no_device(index: int) -> None:
    """A plain function: a mock would take longer than the call that it replaces."""


@contextlib.contextmanager
def _without_a_device() -> Iterator[None]:
    patch = mock.patch.object
    with patch(torch.cuda, "_DeviceGuard", NoGuard), patch(torch.cuda, "set_device", _no_device):
        yield


def compiled_for_cuda(model: Callable[..., Any], rows: int) -> Callable[..., Any]:
    options = parse_options({"strict": True, "kv_offload": False, "mini_seq_len": rows})
    guards: Any = torch._C._dynamo.guards

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        inputs = [value_on_cuda(value) for value in example_inputs]
        with (
            pretended(H100),
            mock.patch.object(backend, "Lowering", OnCpu),
            mock.patch.object(guards, "_empty_strided_cuda", guards._empty_strided_cpu, create=True),
        ):
            program = backend.compile_graph(graph_on_cuda(gm, H100), inputs, options=options, **kwargs)

        def run(given: list[Any]) -> Any:
            with _without_a_device():
                return program(given)

        return mark_boxed(run)

    def whole(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(gm, example_inputs, inner, {})

    compiled: Callable[..., Any] = torch.compile(model, backend=whole, fullgraph=True)
    return compiled


@contextlib.contextmanager
def planted_bug() -> Iterator[list[bool]]:
    """Rows are numbered from zero in every mini-sequence: `start` goes from the source of Triton's kernels. Gives, for
    each kernel, whether it has changed."""
    changed: list[bool] = []
    triton_of = AsyncCompile.triton

    def wrong(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Any:
        mutated = re.sub(r"\bks0 \+ ", "0*ks0 + ", source)
        changed.append(mutated != source)
        return triton_of(self, name, mutated, device_str)

    with mock.patch.object(AsyncCompile, "triton", wrong):
        yield changed


def compare(family: str, tokens: int, rows: int) -> dict[str, Any]:
    """All logits of a small model, in float32."""
    torch._dynamo.reset()
    backend._reset()
    interpreter.launched.clear()
    model = small_model(family)
    given = {"input_ids": ids(1, tokens), "use_cache": False}
    with torch.no_grad():
        eager = model(**given).logits
        exact = model.double()(**given).logits
        ours = compiled_for_cuda(model.float(), rows)(**given).logits
    report = backend.reports()[-1]
    return {
        "family": family,
        "ours": (ours - exact).abs().max().item(),
        "eager": (eager - exact).abs().max().item(),
        "loops": len(report.stages),
        "eager_pieces": report.eager_pieces,
        "launched": Counter(interpreter.launched),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="+")
    parser.add_argument("--tokens", type=int, default=70)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--bug", action="store_true", help="the first family once more, with a bug in its kernels")
    options = parser.parse_args()
    interpreter.prepare()
    for family in options.families:
        _print(compare(family, options.tokens, options.rows))
    if options.bug:
        with planted_bug() as changed:
            _print(compare(options.families[0], options.tokens, options.rows) | {"changed": sum(changed)})


def _print(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
