"""A model without weights and a prompt for it, made from a config. `explain` traces them for a config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mom_compile.arguments import takes
from mom_compile.planning.configs import PlanError, find_config, of_config
from mom_compile.planning.subject import build_on_meta
from mom_compile.quantities import parse_tokens

#: The default number of tokens of a prompt.
USUAL_TOKENS = 4096


@dataclass(frozen=True)
class Prompt:
    """`model` and `arguments` are on the meta device: a prefill with the model's default cache and the logits of the
    last token. `title` names it in one line, `notes` are about the config."""

    model: nn.Module
    arguments: dict[str, Any]
    title: str
    notes: tuple[str, ...]


def prompt_of(
    config: Any, seq_len: int | str = USUAL_TOKENS, batch_size: int = 1, dtype: torch.dtype | str | None = None
) -> Prompt:
    """Return the prefill of a folder, a config.json, the name of a shipped shape or a transformers config.

    seq_len     tokens of each sequence, as a number or as "455k"
    batch_size  sequences
    dtype       of the weights; by default the config's

    Raises `ValueError` for an invalid amount or dtype, for a config that does not exist, and for one from which
    transformers cannot build a model.
    """
    tokens, batch = parse_tokens(seq_len), checked_batch(batch_size)
    chosen = {} if dtype is None else {"dtype": checked_dtype(dtype)}
    found = find_config(config) if isinstance(config, str | Path) else of_config(config, type(config).__name__)
    kind = found.config.model_type
    model = build_on_meta(found.config, **chosen)
    arguments: dict[str, Any] = {"input_ids": torch.empty(batch, tokens, dtype=torch.long, device="meta")}
    if takes(model, "logits_to_keep"):
        arguments["logits_to_keep"] = 1
    title = f"{found.name} ({kind}), a prefill of {batch} x {tokens:,} tokens"
    return Prompt(model, arguments, title, found.notes)


def checked_batch(batch_size: Any) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise PlanError(f"batch_size={batch_size!r} is not valid; it is a number of sequences, 1 or more")
    return batch_size


def checked_dtype(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanError(f"dtype={dtype!r} is not valid; it is the dtype of weights: 'bfloat16', 'float16', 'float32'")
    return found
