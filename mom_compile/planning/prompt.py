"""A model without weights and a prompt for it, made from a config. `explain` traces them if it gets a config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mom_compile.arguments import takes
from mom_compile.planning.configs import PlanError, find_config, of_config
from mom_compile.quantities import parse_tokens

#: The default number of tokens of a prompt.
USUAL_TOKENS = 4096


@dataclass(frozen=True)
class Prompt:
    """`model` and `arguments` are on the meta device. Together they are a prefill, with the cache that the model makes
    by itself and the logits of the last token. `title` names it in a line, `notes` are about the config."""

    model: nn.Module
    arguments: dict[str, Any]
    title: str
    notes: tuple[str, ...]


def prompt_of(
    config: Any, seq_len: int | str = USUAL_TOKENS, batch_size: int = 1, dtype: torch.dtype | str | None = None
) -> Prompt:
    """The prefill of a folder, a config.json, the name of a shipped shape or a config of transformers.

    seq_len     tokens of each sequence, as a number or as "455k"
    batch_size  sequences
    dtype       of the weights; by default the config's own

    Raises `ValueError` for an amount or a dtype that is not valid, and `PlanError`, a `ValueError`, for a config that
    is not there or of which transformers can build no model.
    """
    tokens = parse_tokens(seq_len)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is not valid; it is a whole number of sequences, 1 or more")
    chosen = {} if dtype is None else {"dtype": _checked_dtype(dtype)}
    found = find_config(config) if isinstance(config, str | Path) else of_config(config, type(config).__name__)
    kind = found.config.model_type
    with torch.device("meta"):
        model = _built(found.config, chosen)
        arguments: dict[str, Any] = {"input_ids": torch.empty(batch_size, tokens, dtype=torch.long)}
    if takes(model, "logits_to_keep"):
        arguments["logits_to_keep"] = 1
    title = f"{found.name} ({kind}), a prefill of {batch_size} x {tokens:,} tokens"
    return Prompt(model, arguments, title, found.notes)


def _built(config: Any, chosen: dict[str, Any]) -> nn.Module:
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_config(config, **chosen).eval()  # type: ignore[no-any-return]
    except Exception as error:  # whatever a model raises for values that do not go together
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlanError(f"transformers cannot build this {config.model_type}: {reason}") from error


def _checked_dtype(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not valid; it is that of weights: 'bfloat16', 'float16', 'float32'")
    return found
