"""Random programs over the rule table, as plain functions of a `[B, S, H]` tensor.

Each step is a line somebody could have written in a model. `ROWWISE` steps keep tokens apart,
`ATTENTION` steps need whole keys and values, `MIXING` steps move data between tokens and must still be right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

HIDDEN = 8
HEADS = 2

Step = Callable[[torch.Tensor, "Weights"], torch.Tensor]


class Weights(NamedTuple):
    """Parameters a program may use."""

    square: torch.Tensor
    bias: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    scale: torch.Tensor
    table: torch.Tensor


class Weighted(torch.nn.Module):
    """A program of a tensor and `weights_of(torch.float32)`, with these as its parameters."""

    def __init__(self, program: Callable[..., Any]) -> None:
        super().__init__()
        self.program = program
        for name, value in weights_of(torch.float32)._asdict().items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> Any:
        return self.program(x, *(getattr(self, name) for name in Weights._fields))


def weights_of(dtype: torch.dtype) -> Weights:
    """The same for every program of a dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HIDDEN, HIDDEN), (HIDDEN,), (3 * HIDDEN, HIDDEN), (HIDDEN, 3 * HIDDEN), (HIDDEN,), (64, HIDDEN)]
    return Weights(*((torch.randn(s, generator=generator, dtype=torch.float64) / 4).to(dtype) for s in shapes))


def heads(x: torch.Tensor) -> torch.Tensor:
    batch, tokens, _ = x.shape
    return x.view(batch, tokens, HEADS, -1).transpose(1, 2)


def folded(x: torch.Tensor) -> torch.Tensor:
    batch, _, tokens, _ = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, -1)


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1], device=x.device)


def eager_attention(x: torch.Tensor, w: Weights) -> torch.Tensor:
    q, k = heads(x @ w.square), heads(x)
    scores = q @ k.transpose(-1, -2) / 2
    causal = positions(x)[None, :] <= positions(x)[:, None]
    return x + folded(torch.softmax(scores.masked_fill(~causal, float("-inf")), -1) @ k)


def windowed_attention(x: torch.Tensor, w: Weights) -> torch.Tensor:
    p = positions(x)
    seen = (p[None, :] <= p[:, None]) & (p[None, :] > p[:, None] - 3)
    return folded(F.scaled_dot_product_attention(heads(x @ w.square), heads(x), heads(x + w.bias), attn_mask=seen))


def indexed_attention(x: torch.Tensor, w: Weights, *, keys_first: bool) -> torch.Tensor:
    """Sparse attention: an indexer scores every key for every query, and each query attends to its best three."""
    index_q, index_k = x @ w.up[:HIDDEN], x @ w.up[HIDDEN : 2 * HIDDEN]
    scores = (index_k @ index_q.mT).mT if keys_first else index_q @ index_k.mT
    p = positions(x)
    scores = scores.masked_fill(p[None, :] > p[:, None], float("-inf"))
    best = scores.topk(min(3, x.shape[1]), -1).indices
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & (p[None, :] <= p[:, None])
    q, k = heads(x @ w.square), heads(x)
    return x + folded(F.scaled_dot_product_attention(q, k, k, attn_mask=seen.unsqueeze(1)))


def gated_attention(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """Every key has a number that is spread out over all queries; each attends to the keys with the highest."""
    p = positions(x)
    gates = torch.tanh(x @ w.bias)[:, None, :].expand(-1, x.shape[1], -1)
    gates = gates.masked_fill(p[None, :] > p[:, None], -9.0)
    best = gates.topk(min(3, x.shape[1]), -1).indices
    bias = torch.full_like(gates, -9.0).scatter(-1, best, 1.0)
    q, k = heads(x @ w.square), heads(x)
    return x + folded(F.scaled_dot_product_attention(q, k, k, attn_mask=(gates + bias).unsqueeze(1)))


def rope(x: torch.Tensor, w: Weights) -> torch.Tensor:
    angle = positions(x).to(x.dtype)[:, None] * w.scale[None, : HIDDEN // 2]
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], -1) * sin


def complex_rope(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """As Llama 4 and DeepSeek write it: pairs of channels are complex numbers, turned by one product."""
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = positions(x).to(wide)[:, None] * w.scale.to(wide)[None, : HIDDEN // 2]
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


ROWWISE: dict[str, Step] = {
    "relu": lambda x, w: torch.relu(x),
    "silu": lambda x, w: F.silu(x),
    "gelu": lambda x, w: F.gelu(x, approximate="tanh"),
    "tanh": lambda x, w: torch.tanh(x) + 1,
    "exp": lambda x, w: torch.exp(-x.abs()),
    "scale": lambda x, w: x * w.scale + w.bias,
    "clamp": lambda x, w: x.clamp(-1, 1),
    "where": lambda x, w: torch.where(x > 0, x, x * 0.1),
    "masked_fill": lambda x, w: x.masked_fill(x > 1, 0.5),
    "rsqrt_norm": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * w.scale,
    "layer_norm": lambda x, w: F.layer_norm(x, (HIDDEN,), w.scale, w.bias, 1e-3),
    "softmax": lambda x, w: torch.softmax(x, -1),
    "log_softmax": lambda x, w: torch.log_softmax(x, -1),
    "linear": lambda x, w: F.linear(x, w.square, w.bias),
    "mlp": lambda x, w: x + F.linear(F.silu(F.linear(x, w.up)), w.down),
    "matmul": lambda x, w: x @ w.square,
    "split": lambda x, w: torch.cat(list(x.split(HIDDEN // 2, -1))[::-1], -1),
    "slice": lambda x, w: torch.cat([x[..., 2:], x[..., :2]], -1),
    "sort": lambda x, w: x.sort(-1).values,
    "topk": lambda x, w: torch.cat([x.topk(HIDDEN // 2, -1).values] * 2, -1),
    "amax": lambda x, w: x - x.amax(-1, keepdim=True),
    "sum": lambda x, w: x + x.sum(-1, keepdim=True) / 8,
    "cumsum": lambda x, w: x.cumsum(-1) / 4,
    "heads": lambda x, w: folded(heads(x) * 0.5),
    "merged": lambda x, w: (x.reshape(-1, HIDDEN) @ w.square).reshape(x.shape),
    "unsqueezed": lambda x, w: (x.unsqueeze(2) * torch.ones(1, 1, 2, 1, dtype=x.dtype)).sum(2),
    "position": lambda x, w: x + w.table[positions(x) % 64],
    "rope": rope,
    "complex rope": complex_rope,
    "flip": lambda x, w: x.flip(-1),
    "pad": lambda x, w: F.pad(x[..., :-1], (1, 0)),
    "bool": lambda x, w: x * (x > 0.1).to(x.dtype) + (x < -1).to(x.dtype),
}

ATTENTION: dict[str, Step] = {
    "causal": lambda x, w: (
        x + folded(F.scaled_dot_product_attention(heads(x @ w.square), heads(x), heads(x), is_causal=True))
    ),
    "full": lambda x, w: folded(F.scaled_dot_product_attention(heads(x @ w.square), heads(x), heads(x + w.bias))),
    "windowed": windowed_attention,
    "eager": eager_attention,
    "indexed": lambda x, w: indexed_attention(x, w, keys_first=False),
    "indexed, keys first": lambda x, w: indexed_attention(x, w, keys_first=True),
    "gated": gated_attention,
    "grouped": lambda x, w: folded(
        F.scaled_dot_product_attention(
            heads(x),
            *(heads(x)[:, :1, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2) for _ in range(2)),
            is_causal=True,
        )
    ),
}


def asserted(x: torch.Tensor, w: Weights) -> torch.Tensor:
    torch._assert_async(torch.isfinite(x + w.bias).any(), "nothing is finite")
    return x


MIXING: dict[str, Step] = {
    "cumsum tokens": lambda x, w: x.cumsum(1) / x.shape[1],
    "roll tokens": lambda x, w: x + x.roll(1, 1),
    "flip tokens": lambda x, w: x.flip(1),
    "mean tokens": lambda x, w: x - x.mean(1, keepdim=True),
    "softmax tokens": lambda x, w: torch.softmax(x, 1),
    "matmul tokens": lambda x, w: (x @ x.transpose(1, 2)) @ x / x.shape[1],
    "previous token": lambda x, w: x - F.pad(x, (0, 0, 1, 0))[:, :-1],
    "sort tokens": lambda x, w: x.sort(1).values,
    "prompt before": lambda x, w: torch.cat([w.table[:3].expand(x.shape[0], -1, -1), x], 1),
    "mean batch": lambda x, w: x - x.mean(0, keepdim=True),
    "asserted": asserted,
}

LAST: dict[str, Step] = {
    "all": lambda x, w: x,
    "last token": lambda x, w: x[:, -1:],
    "all but last": lambda x, w: x[:, :-1] @ w.square,
    "without first": lambda x, w: x[:, 1:] * 2,
    "select": lambda x, w: x[:, -1] @ w.square,
    "mean": lambda x, w: x.mean(1),
}

#: Several outputs of which some may show what another shows.
SEVERAL: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "channels": lambda x: (x, x[..., :3]),
    "halves": lambda x: (*x.chunk(2, -1),),
    "overlapping": lambda x: (x[..., :5], x[..., 3:], x[..., :1]),
    "head": lambda x: (x, heads(x)[:, 1]),
    "two heads": lambda x: (heads(x)[:, 0], heads(x)[:, 1]),
    "entry": lambda x: (x[0], x),
    "tokens": lambda x: (x[:, 1:], x[:, :-1, 2:]),
    "merged": lambda x: (x.reshape(-1, HIDDEN), x, x.mT),
    "apart": lambda x: (x, x * 2, (x * 2)[..., :2]),
    "strided": lambda x: (x[..., ::2], x[..., 1::2], x[..., 0]),
}

STEPS = {**ROWWISE, **ATTENTION, **MIXING}
