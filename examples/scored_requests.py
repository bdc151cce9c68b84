"""Answer the requests of lm-evaluation-harness by `token_log_probs`, without logits at full length.

    request     (cache key, context ids, continuation ids)
    answer      (log-probability of the continuation, whether greedy decoding would generate it)

Both are the harness' own types, so a subclass of its `HFLM` needs one method (`examples.evaluate`). This module does
not import the harness.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

import mom_compile

Request = tuple[Any, Sequence[int], Sequence[int]]
Answer = tuple[float, bool]


def answers(model: Any, requests: Sequence[Request], *, batch_size: int, longest: int) -> Iterator[tuple[int, Answer]]:
    """Yield the number and the answer of each request, the longest request first.

    Texts of more than `longest` + 1 tokens are truncated on the left, as in the harness. Raises `ValueError` for a
    continuation without tokens, without a token before it, or that does not fit.
    """
    for number, request in enumerate(requests):
        _check(number, request, longest)
    order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
    for first in range(0, len(order), max(1, batch_size)):
        numbers = order[first : first + max(1, batch_size)]
        texts = [[*requests[n][1], *requests[n][2]][-(longest + 1) :] for n in numbers]
        spans = [(len(text) - len(requests[n][2]), len(text)) for n, text in zip(numbers, texts, strict=True)]
        ids, mask = padded(texts)
        device = next(model.parameters()).device
        scores = mom_compile.token_log_probs(model, ids.to(device), mask.to(device))
        found = zip(scores.sums(spans).tolist(), scores.all_greedy(spans).tolist(), strict=True)
        yield from zip(numbers, found, strict=True)


def _check(number: int, request: Request, longest: int) -> None:
    _, context, continuation = request
    if not continuation or not context:
        raise ValueError(
            f"request {number} has a context of {len(context)} and a continuation of {len(continuation)} tokens: both "
            f"have at least one (the harness puts the prefix token before an empty context)"
        )
    if len(continuation) > longest:
        raise ValueError(f"request {number} continues for {len(continuation)} tokens, and the model takes {longest}")


def padded(texts: Iterable[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask `[B, S]`, padded on the right."""
    rows = [torch.tensor(text, dtype=torch.long) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
