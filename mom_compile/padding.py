"""Arguments for a padded batch, with which a model computes each sequence as if it were alone.

    attention_mask  0 0 1 1 1        position_ids  0 0 0 1 2

A model that takes `position_ids` gets them. A model without modules that name them derives positions from the mask. A
wrapper may pass positions on, derive them from the mask, or do neither. In the last case, results with padding before
tokens would be wrong, so that is an error.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from mom_compile.arguments import names, takes
from mom_compile.trial import Trial, tried

POSITIONS, MASK = "position_ids", "attention_mask"


def batch_arguments(model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    """Return the arguments of `model.forward` for ids `[B, S]` and a mask of the same shape (0 at padding) or None.

    Raises `ValueError` for a model that takes no mask, and for one that needs positions but does not pass them on.
    """
    given: dict[str, Any] = {"input_ids": input_ids}
    if takes(model, "use_cache"):
        given["use_cache"] = False
    if mask is None:
        return given
    if takes(model, MASK) is False:
        raise ValueError(f"{type(model).__name__}.forward takes no attention_mask, so it does not support padding")
    given[MASK] = mask
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    positions = counted + _first_position(model)
    if takes(model, POSITIONS) or (_are_shifted(counted, mask) and _needs_positions(model, given, positions)):
        given[POSITIONS] = positions
    return given


def _first_position(model: nn.Module) -> int:
    """Return a text's first position. RoBERTa and similar models count from the row after their table's padding row.
    Other models with an offset have an embedding class that adds it."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    paddings = [table.padding_idx for table in tables if type(table) is nn.Embedding]
    return next((padding + 1 for padding in paddings if padding is not None), 0)


def _are_shifted(counted: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the position of some token differs from its index in the row, the default of a model."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return bool(((counted != places) & mask.bool()).any())


def _needs_positions(model: nn.Module, given: dict[str, Any], positions: torch.Tensor) -> bool:
    """Whether a model whose signature does not name positions uses them. Raises `ValueError` if that is unknown."""
    inner = [(name, module) for name, module in model.named_modules() if name and names(module, POSITIONS)]
    hidden = takes(model, POSITIONS) is None
    if not inner and not hidden:
        return False
    trial = _known_trial(model, {**given, POSITIONS: positions} if hidden else given)
    if trial is not None and POSITIONS in trial.logits:
        return True
    if trial is not None and (not inner or MASK in trial.received):
        return False
    raise ValueError(_refusal(model, inner, trial))


def _refusal(model: nn.Module, inner: list[tuple[str, nn.Module]], trial: Trial | None) -> str:
    outer = type(model).__name__
    advice = "pad on the right instead"
    if trial is None:
        fault = f"it is unknown whether {outer}.forward, which does not name position_ids, uses them"
    else:
        fault = f"{outer}.forward does not pass on position_ids"
    models = [(name, module) for name, module in inner if _returns_logits(module)]
    if models:
        name, module = models[0]
        advice += f", score the model inside it (model.{name}, a {type(module).__name__})"
    return (
        f"attention_mask has padding before tokens, so the model needs position_ids, and {fault}: {advice}, or "
        f"let {outer}.forward name position_ids and pass them on"
    )


def _returns_logits(module: nn.Module) -> bool:
    head = getattr(module, "get_output_embeddings", None)
    return head is not None and head() is not None


#: The last trial of each model, with the model's settings at that time: peft can switch adapters, which affect whether
#: positions are used.
_TRIALS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Trial | None]] = weakref.WeakKeyDictionary()


def _known_trial(model: nn.Module, given: dict[str, Any]) -> Trial | None:
    key = (tuple(given), _settings(model))
    if model not in _TRIALS or _TRIALS[model][0] != key:
        _TRIALS[model] = (key, tried(model, given, POSITIONS))
    return _TRIALS[model][1]


def _settings(model: nn.Module) -> tuple[Any, ...]:
    """Return the plain attributes of all modules, such as the name of the active adapter."""
    plain = (str, int, float, bool, type(None))
    every = ((name, key, value) for name, module in model.named_modules() for key, value in vars(module).items())
    return tuple(setting for setting in every if isinstance(setting[-1], plain))
