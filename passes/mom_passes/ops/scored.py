"""`mom::scored`: sums, maxima and chosen columns of logits, without all logits of a row in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mom_passes.ops.library import define, implement

SCORED = define(
    "scored(Tensor hidden, Tensor matrix, Tensor? bias, Tensor? targets, str[] steps, float[] numbers, str[] wants)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
"""Reductions over the logits `x = steps(hidden @ matrix + bias)`: hidden `[.., K]`, matrix `[K, V]`, bias `[V]`,
x `[.., V]`.

`steps` are applied elementwise in order: `"mul"`, `"div"`, `"add"` and `"sub"` take the number at the same place in
`numbers`; `"tanh"` and `"neg"` take none; a dtype such as `"float32"` is a conversion. Reductions are computed in x's
dtype or float32, whichever is wider (`wide`). Every result has the leading dimensions of `hidden`. A result that is not
in `wants` has no columns.

    top         [.., 1] wide       the largest logit
    shift       [.., 1] float64    `top` where it is finite, else 0
    total       [.., 1] float64    "total": the sum of exp(x - shift)
    weighted    [.., 1] float64    "weighted": the sum of exp(x - shift) * (x - shift), NaN if a logit is -inf;
                                   "likely": the same, where a logit of -inf adds 0
    chosen      [.., T] wide       the logits at `targets` [.., T], integers from 0 to V - 1; T is 0 without targets
    greedy      [.., 1] int64      "greedy": the first column with the largest logit

A NaN logit makes the numbers of its row NaN, and `greedy` the first such column.

A kernel processes blocks of columns of at most `block_bytes(device)`, intermediate values included.
"""

WITH_NUMBER = ("mul", "div", "add", "sub")
WITHOUT = ("tanh", "neg")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

TOTAL, WEIGHTED, LIKELY, GREEDY = "total", "weighted", "likely", "greedy"
#: The results, by their place.
TOP, SHIFT, TOTALS, WEIGHTS, CHOSEN, BEST = range(6)


@dataclass(frozen=True)
class ScoredCall:
    """The arguments of one call of `mom.scored`, in the order of its schema."""

    hidden: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor | None
    steps: Sequence[str]
    numbers: Sequence[float]
    wants: Sequence[str]

    @property
    def columns(self) -> int:
        return self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits after the last step."""
        return dtype_after(self.steps, self.hidden.dtype)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def weighs(self) -> bool:
        return WEIGHTED in self.wants or LIKELY in self.wants

    def results(self) -> Results:
        """Uninitialised results."""
        shape = self.hidden.shape[:-1]

        def new(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return self.hidden.new_empty([*shape, columns], dtype=dtype)

        return (
            new(1, self.wide),
            new(1, torch.float64),
            new(int(TOTAL in self.wants), torch.float64),
            new(int(self.weighs), torch.float64),
            new(0 if self.targets is None else self.targets.shape[-1], self.wide),
            new(int(GREEDY in self.wants), torch.int64),
        )

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The distinct dtypes that an element has in turn; the last is `wide`."""
        return dtypes_on_the_way(self.steps, self.hidden.dtype)


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Kernel = Callable[[ScoredCall], Results]


def dtype_after(steps: Sequence[str], before: torch.dtype) -> torch.dtype:
    return next((DTYPES[step] for step in reversed(steps) if step in DTYPES), before)


def dtypes_on_the_way(steps: Sequence[str], before: torch.dtype) -> list[torch.dtype]:
    wide = torch.promote_types(dtype_after(steps, before), torch.float32)
    known = dict.fromkeys([before, *(DTYPES[step] for step in steps if step in DTYPES)])
    return [*(dtype for dtype in known if dtype != wide), wide]


def element_bytes(dtypes: Sequence[torch.dtype], weighs: bool) -> int:
    """Bytes per logit of a block: the logit in each dtype and, for "weighted" or "likely", its exponential."""
    return sum(dtype.itemsize for dtype in dtypes) + (dtypes[-1].itemsize if weighs else 0)


def block_bytes(device: str) -> int:
    """Bytes of a block on a type of device.

    On a CPU a block should fit in a cache. Measured on one core: with 256 rows, 1024 to 8192 columns take the same time
    within 10%; with 1024 rows, 4096 columns and more take up to twice as long as 1024 columns.
    """
    return (4 if device == "cpu" else 16) << 20


def stepped(x: torch.Tensor, steps: Sequence[str], numbers: Sequence[float]) -> torch.Tensor:
    """Apply the steps to a product `hidden @ matrix + bias`."""
    for step, number in zip(steps, numbers, strict=True):
        if step in DTYPES:
            x = x.to(DTYPES[step])
        else:
            x = getattr(x, step)(*([number] if step in WITH_NUMBER else []))
    return x


def shift_of(top: torch.Tensor) -> torch.Tensor:
    return torch.where(top.isfinite(), top, 0.0)


def below(x: torch.Tensor, shift: torch.Tensor, wants: Sequence[str]) -> torch.Tensor:
    """`x - shift`, in place. With "likely", -inf becomes the smallest finite number, which times 0 is 0."""
    x.sub_(shift)
    return x.clamp_(min=torch.finfo(x.dtype).min) if LIKELY in wants else x


def scored_reference(call: ScoredCall) -> Results:
    """The definition in plain PyTorch."""
    product = call.hidden @ call.matrix
    x = stepped(product if call.bias is None else product + call.bias, call.steps, call.numbers).to(call.wide)
    top = x.amax(-1, keepdim=True)
    shift = shift_of(top)
    _, _, total, weighted, chosen, greedy = call.results()
    if call.targets is not None:
        chosen = x.gather(-1, call.targets)
    if GREEDY in call.wants:
        greedy = x.argmax(-1, keepdim=True)
    if TOTAL in call.wants or call.weighs:
        lower = below(x.clone(), shift, call.wants)
        likelihood = lower.exp()
        if TOTAL in call.wants:
            total = likelihood.sum(-1, keepdim=True, dtype=torch.float64)
        if call.weighs:
            weighted = (likelihood * lower).sum(-1, keepdim=True, dtype=torch.float64)
    return top, shift.double(), total, weighted, chosen, greedy


def as_operator(kernel: Kernel) -> Callable[..., Results]:
    """Wrap `kernel` to take the arguments of the schema."""

    def operator(*arguments: Any, **named: Any) -> Results:
        return kernel(ScoredCall(*arguments, **named))

    return operator


implement(SCORED, as_operator(scored_reference), as_operator(ScoredCall.results))
