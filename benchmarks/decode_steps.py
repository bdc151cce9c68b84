"""Warm decode steps of eager mode, stock Inductor and mom, in one process and in turn.

    python -m benchmarks.decode_steps --layers 12 --tokens 1000 8000 [--save]

The cache is on the device. The mask is that of `generate()`, a growing row of ones; `--padding` makes its first tenth
zeros. Bytes are the peak of one step above weights and cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks import measure, models
from benchmarks.decoding import WARM_UP

BACKENDS = ("eager", "inductor", "mom")
RESULTS = Path(__file__).with_name("results")


class Session:
    """A model with a cache of random keys and values; `step()` decodes a token."""

    def __init__(self, backend: str, shape: str, layers: int, tokens: int, padding: bool) -> None:
        self.model: Any = models.llama(shape, layers, seq=1 << 16)
        if backend == "mom":
            self.model.compile(backend="mom", options={"strict": True})
        elif backend != "eager":
            self.model.compile(backend=backend)
        config, generator = self.model.config, torch.Generator().manual_seed(1)
        rows = 1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads
        self.cache = DynamicCache(config=config)
        for layer in range(layers):
            keys, values = (torch.randn(rows, generator=generator) for _ in range(2))
            self.cache.update(keys, values, layer)
        self.mask = torch.ones(1, tokens, dtype=torch.long)
        self.mask[:, : tokens // 10] = int(not padding)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(1, 1)], dim=1)
        named = {**models.keeping(self.cache, self.model), "use_cache": True, "logits_to_keep": 1}
        found: torch.Tensor = self.model(torch.tensor([[7]]), attention_mask=self.mask, **named).logits
        return found

    @property
    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in models.cached(self.cache))


def measured(shape: str, layers: int, tokens: int, padding: bool, repeats: int) -> dict[str, Any]:
    """Return seconds of each step, peak bytes, and the difference of the logits from eager mode's."""
    sessions = {name: Session(name, shape, layers, tokens, padding) for name in BACKENDS}
    logits = {name: [session.step() for _ in range(WARM_UP + 1)][-1] for name, session in sessions.items()}
    steps: dict[str, Callable[[], Any]] = {name: session.step for name, session in sessions.items()}
    times = measure.alternate(steps, repeats)
    peaks = {name: measure.peak_bytes(session.step).peak for name, session in sessions.items()}
    return {
        "shape": shape,
        "layers": layers,
        "tokens": tokens,
        "padding": padding,
        "seconds": {name: statistics.median(some) for name, some in times.items()},
        "of_stock": measure.median_ratio(times, "mom", "inductor"),
        "of_eager": measure.median_ratio(times, "mom", "eager"),
        "peak_bytes": peaks,
        "cache_bytes": sessions["mom"].cache_bytes,
        "distance": {name: float((found - logits["eager"]).abs().max()) for name, found in logits.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=sorted(models.SHAPES))
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 8000])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--padding", action="store_true")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/decode-DATE.json")
    given = parser.parse_args(arguments)
    measure.watch_cpu()
    rows = []
    for layers in given.layers:
        for tokens in given.tokens:
            torch._dynamo.reset()
            rows.append(measured(given.shape, layers, tokens, given.padding, given.repeats))
            print(json.dumps(rows[-1]), flush=True)
    if given.save:
        stamp = measure.machine()
        path = RESULTS / f"decode-{stamp['date']}.json"
        path.write_text(json.dumps({"machine": stamp, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
