"""Scores of each token of a text by a model: log-probabilities, greedy choices and entropy, without all logits.

    scores = mom_compile.token_log_probs(model, input_ids, attention_mask)
    scores.log_probs        [B, S - 1] float32, entry t is token t + 1's

The logits of all tokens are by far the largest value of scoring: 2 GiB in float32 for 2,000 tokens and a vocabulary of
262,144. Here scores are computed in the loop that computes the logits, one mini-sequence at a time.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mom_compile.arguments import unwrapped
from mom_compile.config import joined_options, parse_options
from mom_compile.divided import check_heads
from mom_compile.padding import batch_arguments
from mom_compile.report.notebook import html_of_text
from mom_compile.report.units import counted
from mom_compile.torch_compat.dynamo import floats_are_constants

#: The label of a token that is not scored, as in Hugging Face's losses.
IGNORED = -100


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of a batch. Entry `t` is for token `t + 1`, given tokens 0 to `t`.

    At padding and at ignored labels, log-probability and entropy are 0 and `greedy` is `False`.

    Attributes
    ----------
    log_probs : torch.Tensor
        `[B, S - 1]` float32: log-probability of the token, in nats.
    greedy : torch.Tensor
        `[B, S - 1]` bool: whether the token is the most likely one.
    entropy : torch.Tensor or None
        `[B, S - 1]` float32: entropy of the model's distribution, in nats. `None` unless `entropy=True`.
    """

    log_probs: torch.Tensor
    greedy: torch.Tensor
    entropy: torch.Tensor | None = None

    def __repr__(self) -> str:
        scored = self.log_probs[self.log_probs != 0]
        rows, entries = self.log_probs.shape
        size = f"{counted(rows, 'sequence')} x {counted(entries, 'token')}, {scored.numel():,} of them scored"
        if not scored.numel():
            return f"<TokenScores: {size}>"
        spread = "" if self.entropy is None else f", entropy {self._mean(self.entropy):.3g}"
        return (
            f"<TokenScores: {size}; means: log-probability {self._mean(self.log_probs):.3g}{spread} nats, "
            f"greedy {self._mean(self.greedy):.0%}>"
        )

    def _repr_html_(self) -> str:
        return html_of_text(repr(self))

    def _mean(self, values: torch.Tensor) -> float:
        """The mean over the tokens that have a score. A log-probability of exactly 0 marks a token without one."""
        return float(values[self.log_probs != 0].double().mean())

    def sums(self, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Sum the log-probabilities of one span of each sequence.

        Parameters
        ----------
        spans : sequence of (int, int)
            `(start, end)` for each sequence: tokens `start` to `end - 1`, counted as in `input_ids`.

        Returns
        -------
        torch.Tensor
            `[B]` float64, in nats.

        Raises
        ------
        ValueError
            If the number of spans is not `B`, or a span is not within tokens 1 to `S - 1`.
        """
        self._check(spans)
        return torch.stack(
            [row[a - 1 : b - 1].double().sum() for row, (a, b) in zip(self.log_probs, spans, strict=True)]
        )

    def all_greedy(self, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return whether greedy decoding would generate the span of each sequence.

        Parameters
        ----------
        spans : sequence of (int, int)
            As in `sums`.

        Returns
        -------
        torch.Tensor
            `[B]` bool.

        Raises
        ------
        ValueError
            As in `sums`.
        """
        self._check(spans)
        return torch.stack([row[a - 1 : b - 1].all() for row, (a, b) in zip(self.greedy, spans, strict=True)])

    def _check(self, spans: Sequence[tuple[int, int]]) -> None:
        batch, tokens = self.log_probs.shape[0], self.log_probs.shape[1] + 1
        if len(spans) != batch:
            raise ValueError(f"expected one span per sequence, got {len(spans)} spans for {batch} sequences")
        for a, b in spans:
            if not 1 <= a < b <= tokens:
                raise ValueError(
                    f"the span {a} to {b} is invalid for a text of {tokens} tokens: the first scored token is token 1, "
                    f"and the end is exclusive"
                )


def token_log_probs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    entropy: bool = False,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> TokenScores:
    """Score the tokens of a batch by a causal language model, without logits at full length.

    The model is compiled once for all lengths, independently of `model.compile`. The compiled function does not keep
    the model alive. Scores are computed in float32 from logits of the model's dtype; the sum over the vocabulary is
    float64.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model that returns `logits`, in evaluation mode. It may be wrapped by `torch.compile`,
        `DataParallel` or `DistributedDataParallel` (the inner model is scored), by hooks of accelerate, by peft, or by
        a module that passes `**kwargs` on. Logits of the virtual tokens of a tuned prompt are not scored.
    input_ids : torch.Tensor
        `[B, S]` integers, `S >= 2`.
    attention_mask : torch.Tensor, optional
        `[B, S]`, 0 at padding, which may be on either side. Each sequence is scored as it would be alone.
    labels : torch.Tensor, optional
        `[B, S]` integers that are scored in place of `input_ids`, at the same places; -100 for none.
    entropy : bool
        Whether to compute entropies, too.
    options : mapping, optional
        Options of the backend.
    **named
        Options of the backend by name.

    Returns
    -------
    TokenScores
        Log-probabilities, greedy choices and entropies, each `[B, S - 1]`.

    Raises
    ------
    ValueError
        If ids, mask or labels have other shapes or are outside of the vocabulary; if `S < 2`; if the model is in
        training mode or returns no logits; if padding stands before tokens and the model cannot be given positions; if
        an option is not valid.
    TypeError
        If an option is given twice.
    """
    options = joined_options(options, named)
    parse_options(options)
    model = unwrapped(model)
    _check_inputs(model, input_ids, attention_mask, labels)
    targets = (input_ids if labels is None else labels)[:, 1:]
    seen = targets != IGNORED
    if attention_mask is not None:
        seen = seen & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    given = batch_arguments(model, input_ids, attention_mask)
    run = _compiled(model, entropy, options)
    with torch.no_grad(), floats_are_constants():
        log_probs, greedy, spread = run(model, given, torch.where(seen, targets, 0))
    entropies = torch.where(seen, spread, 0.0) if entropy else None
    return TokenScores(torch.where(seen, log_probs, 0.0), greedy & seen, entropies)


def _scores(model: Any, given: dict[str, Any], targets: torch.Tensor, entropy: bool) -> Any:
    """The function that is compiled. All that follows the logits is per token, so it runs in the logits' loop."""
    out = model.forward(**given)
    logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if logits is None:
        raise ValueError(f"expected a causal language model; the model returned a {type(out).__name__} without logits")
    extra = logits.shape[1] - given["input_ids"].shape[1]
    if extra < 0:
        raise ValueError(f"the model returned {logits.shape[1]} rows of logits for {logits.shape[1] - extra} tokens")
    logits = logits[:, extra:-1].float()
    below_top = logits - logits.amax(-1, keepdim=True)
    # In float32, a sum of 262,144 terms has an error of 1e-5 or more, biased in the same direction for all tokens. In
    # float64 it takes the same time, as the terms are read once either way.
    log_sum = below_top.exp().sum(-1, dtype=torch.float64).log().float()
    log_probs = below_top.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_sum
    greedy = logits.argmax(-1) == targets
    if not entropy:
        return log_probs, greedy, None
    log_all = below_top - log_sum.unsqueeze(-1)
    probs = log_all.exp()
    return log_probs, greedy, -torch.where(probs > 0, probs * log_all, 0.0).sum(-1)


#: Compiled functions of each living model. They take the model as an argument and do not keep it alive.
_COMPILED: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()
_COMPILING = threading.Lock()


def _compiled(model: torch.nn.Module, entropy: bool, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    key = (entropy, repr(sorted((options or {}).items())))
    with _COMPILING:
        known = _COMPILED.setdefault(model, {})
        if key in known:
            return known[key]
        check_heads(model)
        # Dynamo caches per code object, with a limit on each: every model gets its own code object.
        name = f"score_by_{type(model).__name__}"
        code = _scores.__code__.replace(co_name=name)
        function = types.FunctionType(code, _scores.__globals__, name)
        compiled = torch.compile(function, backend="mom", dynamic=True, options=dict(options or {}))
        known[key] = lambda *given: compiled(*given, entropy)
        return known[key]


def _check_inputs(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor | None
) -> None:
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first, as dropout would change scores")
    head = getattr(model, "get_output_embeddings", None)
    if head is not None and head() is None:
        raise ValueError(f"{type(model).__name__} returns no logits: load it with AutoModelForCausalLM")
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"input_ids: expected a tensor of integers, [batch, tokens], got a {type(ids).__name__}")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids: expected integers, [batch, tokens], got {ids.dtype} {list(ids.shape)}")
    if ids.shape[0] == 0 or ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected a sequence of two or more tokens, got {list(ids.shape)}")
    for name, value in (("attention_mask", mask), ("labels", labels)):
        if value is not None and value.shape != ids.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, but input_ids have shape {list(ids.shape)}")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        vocabulary = None
    _check_ids("input_ids", ids, vocabulary)
    if labels is not None:
        _check_ids("labels", labels[labels != IGNORED], vocabulary)


def _check_ids(name: str, ids: torch.Tensor, vocabulary: int | None) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise ValueError(f"{name} contain {wrong}, which is not in the vocabulary of {vocabulary} tokens")
