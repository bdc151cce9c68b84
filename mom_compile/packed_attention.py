"""Attention of packed sequences, traced as one call with a mask instead of one call for each sequence.

Model files of transformers that pack images, frames or windows into one sequence attend to each of them with a call of
its own: `torch.split(query, (cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), dim=2)`. The lengths are data, so Dynamo
breaks the graph in every layer and unrolls the calls. The same files pass `cu_seqlens` to FlashAttention where that is
requested. `traced_packed` returns the code of that branch with another attention function in it: PyTorch's SDPA with
the mask of `same_sequence`, whose form the passes prove, so that each sequence is computed by itself and no mask is
stored.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mom_compile.substitution import copy_of, is_for_this_backend, needs_gradients

Tensor = torch.Tensor
#: Global names of a model file -> the names that its attention reads instead while it is traced for this backend.
READ_INSTEAD = {
    "is_flash_attention_requested": "_mom_takes_boundaries",
    "ALL_ATTENTION_FUNCTIONS": "_mom_attention_functions",
    "get_max_seqlen": "_mom_no_longest",
}
#: The attention implementation whose results the traced call has.
IMPLEMENTATION = "sdpa"


def same_sequence(boundaries: Tensor, tokens: int) -> Tensor:
    """Return boolean `[1, 1, T, T]`: whether query and key are in the same packed sequence.

    Parameters
    ----------
    boundaries : integer Tensor `[N + 1]`
        Where the sequences begin and end, ascending from 0 to T. A sequence may be empty.
    tokens : int
        T, the tokens of all sequences.
    """
    numbers = torch.bucketize(torch.arange(tokens, device=boundaries.device), boundaries[1:], right=True)
    return (numbers[:, None] == numbers[None, :])[None, None]


class _PackedFunctions:
    """Stands for `ALL_ATTENTION_FUNCTIONS`: its functions take the boundaries of packed sequences."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = self._functions.get_interface(implementation, default)

        def attend_packed(
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *,
            cu_seq_lens_q: Tensor,
            cu_seq_lens_k: Tensor,
            max_length_q: int | None,
            max_length_k: int | None,
            attention_mask: None,
            **kwargs: Any,
        ) -> Any:
            mask = same_sequence(cu_seq_lens_q, query.shape[2])
            return attend(module, query, key, value, attention_mask=mask, **kwargs)

        return attend_packed


def _takes_boundaries(config: Any) -> bool:
    return True


def _no_longest(*args: Any, **kwargs: Any) -> None:
    return None


def traced_packed(function: types.FunctionType) -> Callable[..., Any] | None:
    """Return the function that Dynamo traces in place of the `forward` of an attention over packed sequences.

    None if the code is not such an attention: it takes `cu_seqlens`, splits by lengths that it reads from them, and
    has a branch for FlashAttention. The globals of its file gain the names in `READ_INSTEAD`.
    """
    names = set(_names(function.__code__))
    if not {"is_flash_attention_requested", "ALL_ATTENTION_FUNCTIONS", "split", "tolist"} <= names:
        return None
    parameters = list(inspect.signature(function).parameters)
    if "cu_seqlens" not in parameters or parameters[0] != "self":
        return None
    own = function.__globals__
    own[READ_INSTEAD["is_flash_attention_requested"]] = _takes_boundaries
    own[READ_INSTEAD["ALL_ATTENTION_FUNCTIONS"]] = _PackedFunctions(own["ALL_ATTENTION_FUNCTIONS"])
    own[READ_INSTEAD["get_max_seqlen"]] = _no_longest
    original, packed = copy_of(function), copy_of(function, READ_INSTEAD)

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters[1:], args)), **kwargs}  # noqa: B905  Dynamo does not trace `strict`
        plain = given.get("cu_seqlens") is None or given.get("attention_mask") is not None
        if plain or self.config._attn_implementation != IMPLEMENTATION or self.training:
            return original(self, *args, **kwargs)
        if not is_for_this_backend() or needs_gradients(args, kwargs):
            return original(self, *args, **kwargs)
        return packed(self, *args, **kwargs)

    return traced


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes that a function and the comprehensions in it read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
