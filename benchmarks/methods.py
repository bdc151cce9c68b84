"""Methods of prefill for long prompts: what users have today, what papers propose, and mom.

Each computes logits for the last token only and keeps the cache for decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks import models

#: Tokens of a chunk of Hugging Face's chunked prefill.
CHUNK = 1024
#: On a GPU, where a product needs more rows. The MOM paper compares with this size at its best, too.
CHUNK_ELSEWHERE = 8192


@dataclass(frozen=True)
class Method:
    """One method of prefill.

    Attributes
    ----------
    name : str
    what : str
        A line for a table.
    compiled : mapping, optional
        Arguments of `model.compile`; None: eager mode.
    chunked : bool
        The prompt in chunks over a growing cache, as in `generate(prefill_chunk_size=...)`.
    offloaded : bool
        Hugging Face's `DynamicCache(offloading=True)`: layers of the cache leave for the host, and return for each
        chunk and token. It needs a device that is not the host.
    """

    name: str
    what: str
    compiled: Mapping[str, Any] | None = None
    chunked: bool = False
    offloaded: bool = False

    def runs_on(self, device: str) -> bool:
        return device != "cpu" or not self.offloaded

    def prepare(self, model: Any) -> None:
        if self.compiled is not None:
            model.compile(**self.compiled)

    @property
    def keeps_cache_on_host(self) -> bool:
        return self.offloaded or bool((self.compiled or {}).get("options", {}).get("kv_offload"))

    @torch.no_grad()
    def prefill(self, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the logits of the last token, `[B, 1, V]`, and the cache."""
        if not self.chunked and not self.offloaded:
            return models.prefill(model, ids, cache=True)
        given = {"offloading": True} if self.offloaded else {}
        cache = DynamicCache(config=model.config, **given)
        kept = models.keeping(cache, model)
        size = ids.shape[1] if not self.chunked else CHUNK if ids.device.type == "cpu" else CHUNK_ELSEWHERE
        for chunk in ids.split(size, dim=1):
            logits = model(input_ids=chunk, **kept, use_cache=True, logits_to_keep=1).logits
        return logits, cache


def _mom(**options: Any) -> dict[str, Any]:
    """Options of mom. `strict`: a fallback to stock Inductor must not be measured as mom."""
    return {"backend": "mom", "options": {"kv_offload": False, "strict": True, **options}}


METHODS = {
    method.name: method
    for method in (
        Method("eager", "transformers as it is"),
        Method("inductor", 'stock `torch.compile` (`backend="inductor"`)', {"backend": "inductor"}),
        Method("chunked", "`generate(prefill_chunk_size=...)`, eager", chunked=True),
        Method("chunked-offload", "the same with an offloaded cache", chunked=True, offloaded=True),
        Method("offload", "an offloaded cache, not chunked, eager", offloaded=True),
        Method("mlp", 'the MOM paper: MLPs over mini-sequences (`scope="mlp"`), the cache kept', _mom(scope="mlp")),
        Method(
            "prefill-only",
            'PrefillOnly: the same, outputs in place, keys and values leave (`scope="mlp", kv_offload=True`)',
            _mom(scope="mlp", kv_offload=True),
        ),
        Method("mom", "mom, the cache on the device", _mom()),
        Method("mom-host", "mom, the cache on the host (`kv_offload=True`)", _mom(kv_offload=True)),
    )
}


@dataclass(frozen=True)
class Setup:
    """A prefill: the shape of a model, the number of sequences, the tokens of each, and the device."""

    shape: str
    layers: int
    tokens: int
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    def model(self, *, more: int = 0) -> Any:
        """The model, with positions for `more` tokens than there are."""
        dtype = getattr(torch, self.dtype)
        return models.llama(self.shape, self.layers, dtype=dtype, device=self.device, seq=self.tokens + more)

    def ids(self, model: Any) -> torch.Tensor:
        return models.tokens(model, self.tokens, self.batch)


@dataclass(frozen=True)
class Cell:
    """A method at a setup, with `limit` bytes above the weights."""

    method: str
    setup: Setup
    limit: int | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        s = self.setup
        limit = "" if self.limit is None else f" in {self.limit >> 20} MiB"
        key = f"{self.method} {s.shape}-{s.layers} {s.dtype} {s.batch}x{s.tokens}{limit}"
        object.__setattr__(self, "key", key)
