"""Text decoders of multimodal models, prefilled from embeddings, as the model does once its images are embedded.

Terms
    composite   a type with other parts for images, video or sound, and one for text
    decoder     that text part (`get_decoder()`), which takes `inputs_embeds`, with the composite's head if it has one

    types of transformers' image-text and multimodal mappings that are not causal language models themselves
        -> by the type of their text part: one of `decoder_types`, or a type that is swept as a causal language model
        -> a small composite (`small_configs`), its decoder and head: `TextDecoder`
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto

from benchmarks.small_configs import Scale, exceptions, small_config

_MAPPINGS = (
    (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, transformers.AutoModelForImageTextToText),
    (modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, transformers.AutoModelForMultimodalLM),
)
#: Other inputs of a decoder than `inputs_embeds`; a cache has another name since transformers 5.24.
_PASSED = ("attention_mask", "past_key_values", "cache", "use_cache")


class TextDecoder(nn.Module):
    """The decoder of a composite with its head: embeddings `[B, S, H]` to logits `[B, S, vocabulary]`, or to hidden
    states `[B, S, H]` without a head. `beside` are the other inputs that the composite passes in every call, `[1, ...]`
    for each sequence: states of its encoder, or a delay."""

    def __init__(self, decoder: nn.Module, head: nn.Module | None, beside: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.decoder, self.head, self.beside = decoder, head, tuple(beside)
        generator = torch.Generator().manual_seed(2)
        for name, shape in beside.items():
            self.register_buffer(name, torch.randn(shape, generator=generator))
        names = inspect.signature(decoder.forward).parameters
        self.passed = tuple(name for name in _PASSED if name in names)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings `[B, S, H]` of ids `[B, S]`, as the composite makes them of text."""
        with torch.no_grad():
            return self.decoder.get_input_embeddings()(ids)  # type: ignore[operator]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        given = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "cache": past_key_values,
            "use_cache": use_cache,
        }
        beside = {name: getattr(self, name).expand(inputs_embeds.shape[0], -1, -1) for name in self.beside}
        out = self.decoder(inputs_embeds=inputs_embeds, **{name: given[name] for name in self.passed}, **beside)
        states = out.get("last_hidden_state")
        if states is None:  # it has a head of its own
            logits = out.logits[:, -logits_to_keep:]
        else:
            states = states[:, -logits_to_keep:]
            logits = states if self.head is None else self.head(states)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.get("past_key_values"))


@dataclass(frozen=True)
class Composites:
    """Types of composites by the type of their text part.

    decoders   those whose text part is not swept as a causal language model
    known      those whose text part is
    unread     those whose default configuration cannot be made, with the reason
    """

    decoders: Mapping[str, list[str]] = field(default_factory=dict)
    known: Mapping[str, list[str]] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)


def composites() -> Composites:
    """Return all composites of this transformers."""
    decoders: dict[str, list[str]] = {}
    known: dict[str, list[str]] = {}
    unread: dict[str, str] = {}
    swept = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for name in dict.fromkeys(name for names, _ in _MAPPINGS for name in names):
        if name in swept:
            continue
        try:
            part = CONFIG_MAPPING[name](**exceptions(name).get("start", {})).get_text_config(decoder=True)
        except Exception as error:
            unread[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        found = (known if part.model_type in swept else decoders).setdefault(part.model_type, [])
        # The first is built: a composite with its own text part, rather than one that accepts any.
        found.insert(0 if type(part) in CONFIG_MAPPING[name].sub_configs.values() else len(found), name)
    return Composites(decoders, known, unread)


def build_decoder(composite: str, scale: Scale) -> TextDecoder:
    """Return the decoder of a small composite. Raises whatever the composite raises."""
    auto = next(auto for names, auto in _MAPPINGS if composite in names)
    model = auto.from_config(small_config(composite, scale))
    return TextDecoder(model.get_decoder(), model.get_output_embeddings(), exceptions(composite).get("beside", {}))
