"""`mom::scored`: what is asked of logits, row by row, without all logits of a row at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mom_passes.ops.library import LIBRARY

LIBRARY.define(
    "scored(Tensor hidden, Tensor matrix, Tensor? bias, Tensor? targets, str[] steps, float[] numbers, str[] wants)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
"""`x = steps(hidden @ matrix + bias)` are the logits: hidden `[.., K]`, matrix `[K, V]`, bias `[V]`, x `[.., V]`.

`steps` are applied to each element in order: `"mul"`, `"div"`, `"add"` and `"sub"` with the number of the same place in
`numbers`; `"tanh"` and `"neg"`; or a dtype, `"float32"`, to which it is converted. What follows is of x in float32 at
least, its dtype is `wide`. Each result has a row for each row of `hidden`. Results that are not among `wants` have no
columns.

    top         [.., 1] wide       the largest logit
    shift       [.., 1] float64    that where it is finite, else 0
    total       [.., 1] float64    "total": the sum of exp(x - shift)
    weighted    [.., 1] float64    "weighted": the sum of exp(x - shift) * (x - shift), which is NaN where a logit is
                                   -inf; "likely": the same, where a logit of -inf adds nothing
    chosen      [.., T] wide       the logits at `targets` [.., T], integers from 0 to V - 1; without them T is 0
    greedy      [.., 1] int64      "greedy": the column of the largest logit, the first of several

NaN among the logits of a row makes its numbers NaN, and `greedy` the first such column.

A kernel has blocks of a row's columns: of `block_bytes(device)` at most, whatever it makes of them included.
"""

SCORED = torch.ops.mom.scored.default

#: Steps with a number and without.
WITH_NUMBER = ("mul", "div", "add", "sub")
WITHOUT = ("tanh", "neg")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

TOTAL, WEIGHTED, LIKELY, GREEDY = "total", "weighted", "likely", "greedy"


@dataclass(frozen=True)
class ScoredCall:
    """What one call of `mom.scored` says: the arguments of its schema, by name and in order."""

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
        """Of the logits behind the last step."""
        return dtype_behind(self.steps, self.hidden.dtype)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def weighs(self) -> bool:
        return WEIGHTED in self.wants or LIKELY in self.wants

    def results(self) -> Results:
        """Uninitialised."""
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
        """In which an element is held on its way, each once; the last is `wide`."""
        return dtypes_on_the_way(self.steps, self.hidden.dtype)


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Kernel = Callable[[ScoredCall], Results]


def dtype_behind(steps: Sequence[str], before: torch.dtype) -> torch.dtype:
    return next((DTYPES[step] for step in reversed(steps) if step in DTYPES), before)


def dtypes_on_the_way(steps: Sequence[str], before: torch.dtype) -> list[torch.dtype]:
    wide = torch.promote_types(dtype_behind(steps, before), torch.float32)
    known = dict.fromkeys([before, *(DTYPES[step] for step in steps if step in DTYPES)])
    return [*(dtype for dtype in known if dtype != wide), wide]


def element_bytes(dtypes: Sequence[torch.dtype], weighs: bool) -> int:
    """What a kernel holds for each logit of a block: itself in each dtype and, where it weighs, its likelihood."""
    return sum(dtype.itemsize for dtype in dtypes) + (dtypes[-1].itemsize if weighs else 0)


def block_bytes(device: str) -> int:
    """Bytes of a block on a type of device. On a CPU they should be in a cache: 256 rows of 1024 to 8192 columns take
    the same time within a tenth, 1024 rows of 4096 columns and more up to twice as long as of 1024 (one core)."""
    return (4 if device == "cpu" else 16) << 20


def stepped(x: torch.Tensor, steps: Sequence[str], numbers: Sequence[float]) -> torch.Tensor:
    """The logits of a product."""
    for step, number in zip(steps, numbers, strict=True):
        if step in DTYPES:
            x = x.to(DTYPES[step])
        else:
            x = getattr(x, step)(*([number] if step in WITH_NUMBER else []))
    return x


def shift_of(top: torch.Tensor) -> torch.Tensor:
    return torch.where(top.isfinite(), top, 0.0)


def below(x: torch.Tensor, shift: torch.Tensor, wants: Sequence[str]) -> torch.Tensor:
    """`x - shift`, in place; with "likely", the least number in place of -inf: times 0 it is 0."""
    x.sub_(shift)
    return x.clamp_(min=torch.finfo(x.dtype).min) if LIKELY in wants else x


def scored_reference(call: ScoredCall) -> Results:
    """The definition, in plain PyTorch."""
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
    """`kernel` with the arguments of the operator's schema."""

    def operator(*arguments, **named):  # type: ignore[no-untyped-def]
        return kernel(ScoredCall(*arguments, **named))

    return operator


torch.library.register_fake("mom::scored", as_operator(ScoredCall.results), lib=LIBRARY)
LIBRARY.impl("scored", as_operator(scored_reference), "CompositeExplicitAutograd")
