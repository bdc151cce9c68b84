"""Small models of each type, and what `benchmarks.architectures` calls them with: a prefill, a padded batch, and a
token after each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from benchmarks.models import keeping
from benchmarks.small_configs import SMALL, Scale, exceptions, small_config
from benchmarks.text_decoders import TextDecoder, build_decoder

TOKENS = {"prefill": 53, "batch": 50, "decode": 50, "scoring": 53}
PADDING = (7, 0, 20)
OPTIONS = {"mini_seq_len": 8, "strict": True}
#: Decode steps, and the use that each follows.
FOLLOWS = {"decode": "batch", "step": "prefill"}
#: The outputs that a decode step may take as its cache.
STATES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A type that is run: a causal language model, or the text decoder of a composite of this type."""

    name: str
    composite: str | None = None

    @property
    def exceptions(self) -> dict[str, Any]:
        return exceptions(self.composite or self.name)


def build(subject: Subject, scale: Scale, dtype: torch.dtype) -> Any:
    """Return a model with noise on every parameter: biases and gates that are zero at first would hide errors."""
    torch.manual_seed(0)
    if subject.composite is None:
        model = transformers.AutoModelForCausalLM.from_config(small_config(subject.name, scale))
    else:
        model = build_decoder(subject.composite, scale)
    return add_noise(model.eval().to(dtype))


def add_noise(model: Any) -> Any:
    """Add noise to every parameter of a model, and return the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.02)
    return model


def words(model: Any, rows: int, tokens: int, scale: Scale, seed: int = 0) -> Inputs:
    """Return token ids, or their embeddings for the text decoder of a composite model."""
    ids = torch.randint(3, scale.words, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"inputs_embeds": model.embed(ids)} if isinstance(model, TextDecoder) else {"input_ids": ids}


def accepted(model: Any, **inputs: Any) -> Inputs:
    """Return the inputs that the model's `forward` accepts."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def padded(model: Any, tokens: int) -> Inputs:
    mask = torch.ones(len(PADDING), tokens, dtype=torch.long)
    for i, count in enumerate(PADDING):
        mask[i, :count] = 0
    return accepted(model, **words(model, len(PADDING), tokens, SMALL), attention_mask=mask, use_cache=True)


def after(model: Any, inputs: Inputs, out: Any) -> Inputs:
    """Return the inputs of the next decode step: one token of each sequence."""
    batch = next(iter(inputs.values())).shape[0]
    mask = inputs.get("attention_mask")
    grown = {} if mask is None else {"attention_mask": torch.cat([mask, torch.ones(batch, 1, dtype=torch.long)], 1)}
    state = next((name for name in STATES if out.get(name) is not None), None)
    if state is None:
        raise NoState(f"it returns none of {', '.join(STATES)}")
    kept = keeping(out[state], model) if state == "past_key_values" else {state: out[state]}
    return {**accepted(model, **words(model, batch, 1, SMALL, 9), use_cache=True), **grown, **kept}


def is_recurrent(out: Any) -> bool:
    """Return whether a layer carries a state from token to token besides keys and values.

    Examples are the last rows of a short convolution, and the sum of a scan or of a linear attention.
    """
    kept, own = out.get("past_key_values"), out.get("cache_params")
    # Since transformers 5.24 both names are one cache: the methods of its layers tell.
    if out.get("state") is not None or (own is not None and not (own is kept and hasattr(own, "layers"))):
        return True
    layers = getattr(kept, "layers", ())
    return any(hasattr(layer, "update_conv_state") or hasattr(layer, "update_recurrent_state") for layer in layers)


class NoState(Exception):
    """The model returns no cache, so that no decode step can follow its prefill."""


@dataclass
class Caller:
    """Calls a model compiled with one backend; `None` is eager mode."""

    model: Any
    backend: str | None
    tokens: Mapping[str, int] = field(default_factory=lambda: TOKENS)
    options: Inputs = field(default_factory=lambda: OPTIONS)

    def __call__(self, inputs: Inputs) -> Any:
        call = self.model.forward if self.backend is None else self.model
        with torch.no_grad():
            return call(**inputs)

    def use(self, name: str, outputs: dict[str, Any]) -> torch.Tensor:
        """Return the logits of one use. `outputs` has the outputs of the uses before it, with the same backend."""
        inputs = self.inputs(name, outputs)
        out = outputs[name] = self(inputs)
        mask = inputs.get("attention_mask")
        whole = mask is not None and out.logits.dim() == 3 and out.logits.shape[1] == mask.shape[1]
        return out.logits[mask.bool()] if whole else out.logits  # type: ignore[union-attr]

    def inputs(self, name: str, outputs: dict[str, Any]) -> Inputs:
        model = self.model
        if name in FOLLOWS:
            before = FOLLOWS[name]
            if before not in outputs:
                raise NoState("there is no prefill to follow")
            return after(model, self.inputs(before, outputs), outputs[before])
        tokens = self.tokens[name]
        if name == "prefill":
            return accepted(model, **words(model, 1, tokens, SMALL), use_cache=True, logits_to_keep=1)
        if name == "batch":
            return padded(model, tokens)
        return accepted(model, **words(model, 2, tokens, SMALL), use_cache=False)

    def compile(self) -> None:
        torch._dynamo.reset()
        self.model._compiled_call_impl = None
        if self.backend is not None:
            self.model.compile(backend=self.backend, options=self.options if self.backend == "mom" else None)
