"""The text part of a multimodal model, where transformers has no causal language model for its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TextPart(nn.Module):
    """A decoder with a head, as its multimodal model runs it on text: ids `[B, S]` to logits `[B, S, vocabulary]`."""

    def __init__(self, config: Any, dtype: torch.dtype | None = None) -> None:
        import transformers

        super().__init__()
        self.config = config
        self.model = transformers.AutoModel.from_config(config, **({} if dtype is None else {"dtype": dtype}))
        embeddings = self.model.get_input_embeddings().weight
        self.lm_head = nn.Linear(embeddings.shape[1], embeddings.shape[0], bias=False, dtype=embeddings.dtype)
        if getattr(config, "tie_word_embeddings", False):
            self.lm_head.weight = embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> Any:
        out = self.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)
        out.logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return out
