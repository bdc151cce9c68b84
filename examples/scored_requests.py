"""Answer the requests of lm-evaluation-harness by `token_log_probs`, without logits at full length.

    request     (cache key, context ids, continuation ids)
    answer      (log-probability of the continuation, whether greedy decoding would generate it)

Both are the harness' own types, so a subclass of its `HFLM` needs one method (`examples.evaluate`). This module does
not import the harness. On several ranks, each answers its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

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
    order = _longest_first(requests)
    for first in range(0, len(order), max(1, batch_size)):
        numbers = order[first : first + max(1, batch_size)]
        texts = [[*requests[n][1], *requests[n][2]][-(longest + 1) :] for n in numbers]
        spans = [(len(text) - len(requests[n][2]), len(text)) for n, text in zip(numbers, texts, strict=True)]
        ids, mask = padded(texts)
        device = next(model.parameters()).device
        scores = mom_compile.token_log_probs(model, ids.to(device), mask.to(device))
        found = zip(scores.sums(spans).tolist(), scores.all_greedy(spans).tolist(), strict=True)
        yield from zip(numbers, found, strict=True)


def answers_of_ranks(model: Any, requests: Sequence[Request], *, batch_size: int, longest: int) -> dict[int, Answer]:
    """Return all answers by number. Each rank of the default process group answers its share; without one, all.

    Every rank passes the same requests, and a model that is not divided among the ranks. The ranks exchange answers
    once, at the end. If one of them fails, all raise.
    """
    for number, request in enumerate(requests):
        _check(number, request, longest)
    if not (dist.is_available() and dist.is_initialized()):
        return dict(answers(model, requests, batch_size=batch_size, longest=longest))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = _longest_first(requests)[rank::ranks]
    found, failed = {}, None
    try:
        shared = answers(model, [requests[n] for n in own], batch_size=batch_size, longest=longest)
        found = {own[index]: answer for index, answer in shared}
    except Exception as error:  # the others wait for this rank's answers
        failed = error
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, (found, None if failed is None else repr(failed)))
    failures = [f"rank {number}: {failure}" for number, (_, failure) in enumerate(gathered) if failure is not None]
    if failures:
        raise RuntimeError(f"requests were not answered. {'; '.join(failures)}") from failed
    return {number: answer for share, _ in gathered for number, answer in share.items()}


def _longest_first(requests: Sequence[Request]) -> list[int]:
    return sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))


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
