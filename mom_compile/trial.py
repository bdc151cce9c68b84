"""Call a model on tensors without data, to see whether an argument hidden by `**kwargs` has an effect.

    wrapper.forward(input_ids, attention_mask, **kwargs)  ->  logits that depend on position_ids, or do not

A signature does not show what a wrapper does with `**kwargs`: pass them on, drop some or replace them. The call shows
it: the result of an operator depends on the arguments that its operands depend on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mom_compile.arguments import names
from mom_compile.stand_ins import called_without_data, on_stand_ins
from mom_compile.torch_compat.tensors import TorchDispatchMode, tree_leaves

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    logits    names of the arguments that the logits depend on
    received  names of the arguments from which `watched`, an argument of inner modules, was computed
    """

    logits: frozenset[str]
    received: frozenset[str]


def tried(model: nn.Module, given: Mapping[str, torch.Tensor], watched: str) -> Trial | None:
    """Call `model.forward(**given)` without data or gradients. Returns None if the call fails, e.g. as it needs data.

    The model and the tensors are not changed.
    """
    try:
        with torch.no_grad(), on_stand_ins(model, dict(given), plain=True) as stand_ins, _Sources(stand_ins) as sources:
            with _watching(model, watched, sources) as received:
                out = model.forward(**stand_ins)
            return Trial(sources.of(getattr(out, "logits", out)), frozenset().union(*received))
    except Exception:
        log.debug("a call could not be tried without data", exc_info=True)
        return None


@contextmanager
def _watching(model: nn.Module, watched: str, sources: _Sources) -> Iterator[list[frozenset[str]]]:
    """Record the sources of an argument for each inner module that names it."""
    received: list[frozenset[str]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        received.append(sources.of(bound.arguments.get(watched)))

    handles = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in model.modules()
        if module is not model and names(module, watched)
    ]
    try:
        yield received
    finally:
        for handle in handles:
            handle.remove()


class _Sources(TorchDispatchMode):
    """Records the arguments from which each tensor is computed."""

    def __init__(self, arguments: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {id(value): frozenset((name,)) for name, value in arguments.items()}
        self._alive: list[torch.Tensor] = []  # the id of a tensor is only unique while the tensor lives

    def of(self, value: Any) -> frozenset[str]:
        """Return the arguments from which the tensors in a value were computed."""
        return frozenset().union(*(self._names.get(id(leaf), frozenset()) for leaf in tree_leaves(value)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.of((args, kwargs or {}))
        out = called_without_data(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._names[id(tensor)] = found | self._names.get(id(tensor), frozenset())
                self._alive.append(tensor)
        return out
