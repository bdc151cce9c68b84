"""References of the recurrences of `ops/scans.py`, in plain PyTorch, for every device.

They compute in float32 (float64 for float64 operands), in chunks of `CHUNK` rows and a few chunks at a time, so that
their workspace does not depend on the number of rows. Operands stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

#: Rows whose interaction is computed as a matrix product.
CHUNK = 64
#: Rows of a chunk whose pairwise decays per channel are computed explicitly (`kda`).
SUBCHUNK = 16
#: Entries of the largest value of a workspace: as many chunks are computed at a time as stay below it, one at least.
WORKSPACE = 1 << 15
#: Rows whose states are in memory at a time, where every row has one.
ROWS = 8

Pair = tuple[torch.Tensor, torch.Tensor]
#: Scaled keys, queries, keys and cumulative decays of chunks -> products of the first two with keys, decayed.
Products = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Pair]


#: Operands of a delta rule with their dimensions, a letter each.
_DELTA = "query=bsgd key=bsgd value=bshv decay={decay} beta=bsh state=bhdv"


def _check(operator: str, layouts: str, *operands: torch.Tensor | None) -> None:
    """Raise an error that names the operand if dimensions of the same letter differ, or numbers are not floats."""
    sizes: dict[str, int] = {}
    for layout, operand in zip(layouts.split(), operands, strict=True):
        name, _, dims = layout.partition("=")
        if operand is None:
            continue
        if not operand.is_floating_point():
            raise TypeError(f"mom::{operator}: {name} is {operand.dtype}, expected floating-point numbers")
        if torch.is_grad_enabled() and operand.requires_grad:
            raise RuntimeError(f"mom::{operator} has no derivative, and {name} requires gradients")
        same_rank = operand.dim() == len(dims)
        if not same_rank or any(sizes.setdefault(d, n) != n for d, n in zip(dims, operand.shape, strict=True)):
            expected = ", ".join(str(sizes.get(d, d)) for d in dims)
            raise ValueError(f"mom::{operator}: {name} has shape {list(operand.shape)}, expected [{expected}]")
    if sizes.get("h", 0) % max(1, sizes.get("g", 1)):
        raise ValueError(f"mom::{operator}: {sizes['h']} heads are no multiple of {sizes['g']} groups")


def state_dtype(value: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a recurrence is computed."""
    return torch.float64 if value.dtype is torch.float64 else torch.float32


def chunks_at_once(entries_per_chunk: int) -> int:
    """Return how many chunks are computed at a time, if the largest workspace value has so many entries per chunk."""
    return max(1, WORKSPACE // max(1, entries_per_chunk))


def _blocks(rows: int, entries_per_chunk: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(first row, chunks, rows of a chunk)`: blocks of full chunks, then one of the rows that remain."""
    at_once, first = chunks_at_once(entries_per_chunk), 0
    while first < rows:
        chunks = min(at_once, (rows - first) // CHUNK)
        length = CHUNK if chunks else rows - first
        yield first, max(1, chunks), length
        first += max(1, chunks) * length


def _in_chunks(
    value: torch.Tensor, first: int, chunks: int, length: int, heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return a copy of rows of `[B, S, G, ...]` as `[B, H, chunks, length, ...]` in another dtype."""
    rows = value.narrow(1, first, chunks * length)
    split = rows.reshape(rows.shape[0], chunks, length, *rows.shape[2:])
    by_head = split.permute(0, 3, 1, 2, *range(4, split.dim()))
    copied = by_head.new_empty(by_head.shape, dtype=dtype).copy_(by_head)
    repeats = heads // by_head.shape[1]
    return copied.repeat_interleave(repeats, dim=1) if repeats > 1 else copied


def _store(out: torch.Tensor, rows: torch.Tensor, first: int) -> None:
    """Store `[B, H, chunks, length, D]` as rows of `[B, S, H, D]`."""
    batch, heads, chunks, length, width = rows.shape
    target = out.narrow(1, first, chunks * length).view(batch, chunks, length, heads, width)
    target.copy_(rows.permute(0, 2, 3, 1, 4))


def _later(length: int, device: torch.device) -> torch.Tensor:
    """Boolean `[length, length]`: the rows of a chunk after each row."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)


def _pairwise(cumulative: torch.Tensor) -> torch.Tensor:
    """Return the decay from row j to row i of a chunk, `[..., i, j]`, zero for j after i."""
    pairs = cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)
    return pairs.masked_fill_(_later(pairs.shape[-1], pairs.device), float("-inf")).exp_()


def _first_state(state: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = state_dtype(like)
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)


# --- the delta rule ---


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Pair:
    _check("gated_delta_rule", _DELTA.format(decay="bsh"), query, key, value, decay, beta, state)
    return _delta_rule((query, key, value, decay.unsqueeze(-1), beta), state, CHUNK, _products_per_head)


def kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Pair:
    _check("kda", _DELTA.format(decay="bshd"), query, key, value, decay, beta, state)
    widest = max(CHUNK, SUBCHUNK * key.shape[-1])
    return _delta_rule((query, key, value, decay, beta), state, widest, _products_per_channel)


def _delta_rule(operands: Sequence[torch.Tensor], state: torch.Tensor | None, widest: int, products: Products) -> Pair:
    """Compute a delta rule with decays `[B, S, H, 1 or D]`. A row has `widest` entries of the largest value."""
    _, key, value, _, _ = operands
    batch, rows, heads, _ = value.shape
    now, dtype = _first_state(state, value, delta_state(key, value)), state_dtype(value)
    out = value.new_empty(value.shape)
    for first, chunks, length in _blocks(rows, batch * heads * CHUNK * widest):
        q, k, v, g, b = (_in_chunks(one, first, chunks, length, heads, dtype) for one in operands)
        b = b.unsqueeze(-1)
        cumulative, scaled = g.cumsum(-2), k * b
        system, weights = products(scaled, q, k, cumulative)
        decayed = cumulative.exp()
        known = torch.cat([v.mul_(b), scaled.mul_(decayed)], -1)
        del scaled, v
        to_end = (cumulative[..., -1:, :] - cumulative).exp_()
        end = decayed[..., -1, :].unsqueeze(-1)
        _store(out, _delta_chunks(now, known, system, weights, q.mul_(decayed), k.mul_(to_end), end), first)
    return out, now


def _delta_chunks(
    state: torch.Tensor,
    known: torch.Tensor,
    system: torch.Tensor,
    weights: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    end: torch.Tensor,
) -> torch.Tensor:
    """Run a block of chunks in order. Update `state` `[B, H, D, Dv]` in place; return `[B, H, chunks, length, Dv]`.

    `known` has the values `[..., Dv]` and the decayed keys `[..., D]`. The unit triangular `system` solves them for
    the values that the rows of a chunk write (UT transform). `query` is decayed from the start of the chunk, `key` to
    its end, and `end` is the decay over the chunk.
    """
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    values, keys = solved.split([state.shape[-1], state.shape[-2]], -1)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    for chunk in range(out.shape[2]):
        new = values[:, :, chunk] - keys[:, :, chunk] @ state
        torch.add(query[:, :, chunk] @ state, weights[:, :, chunk] @ new, out=out[:, :, chunk])
        state.mul_(end[:, :, chunk]).add_(key[:, :, chunk].mT @ new)
    return out


def _products_per_head(scaled: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cumulative: torch.Tensor) -> Pair:
    """Return the decayed products of scaled keys and of queries with keys, `[..., length, length]`."""
    pairs = _pairwise(cumulative.squeeze(-1))
    return (scaled @ key.mT).mul_(pairs), (query @ key.mT).mul_(pairs)


def _products_per_channel(
    scaled: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cumulative: torch.Tensor
) -> Pair:
    """Return the same with a decay for each channel.

    A decay per channel cannot be taken out of a product. For rows after a subchunk and rows of that subchunk it can be
    split at the subchunk's end, where both factors are at most 1. Within a subchunk all pairs are computed.
    """
    length = key.shape[-2]
    system, weights = (one.new_zeros(*one.shape[:-1], length) for one in (scaled, query))
    for first in range(0, length, SUBCHUNK):
        last = min(first + SUBCHUNK, length)
        inside = slice(first, last)
        own, k = cumulative[..., inside, :], key[..., inside, :]
        pairs = _pairwise(own.mT).movedim(-3, -1).mul_(k.unsqueeze(-3))
        for target, left in ((system, scaled), (weights, query)):
            target[..., inside, inside] = (pairs @ left[..., inside, :].unsqueeze(-1)).squeeze(-1)
        if last < length:
            edge = own[..., -1:, :]
            to_edge = k * (edge - own).exp_()
            from_edge = (cumulative[..., last:, :] - edge).exp_()
            for target, left in ((system, scaled), (weights, query)):
                target[..., last:, inside] = (left[..., last:, :] * from_edge) @ to_edge.mT
    return system, weights


def delta_state(key: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int]:
    return value.shape[0], value.shape[2], key.shape[-1], value.shape[-1]


# --- state-space models and linear RNNs ---


def mamba2_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Pair:
    _check("mamba2_scan", "x=bshp dt=bsh A=h B=bsgn C=bsgn state=bhpn", x, dt, A, B, C, state)
    batch, rows, heads, _ = x.shape
    groups, dtype = B.shape[2], state_dtype(x)
    now = _first_state(state, x, (batch, heads, x.shape[-1], B.shape[-1]))
    out = x.new_empty(x.shape)
    for first, chunks, length in _blocks(rows, batch * heads * CHUNK * CHUNK):
        values, steps = (_in_chunks(one, first, chunks, length, heads, dtype) for one in (x, dt))
        b, c = (_in_chunks(one, first, chunks, length, groups, dtype) for one in (B, C))
        values.mul_(steps.unsqueeze(-1))
        cumulative = steps.mul_(A.to(dtype).view(-1, 1, 1)).cumsum(-1)
        by_group = (batch, groups, heads // groups, chunks)
        weights = _pairwise(cumulative).view(*by_group, length, length).mul_((c @ b.mT).unsqueeze(2))
        block = weights.view(batch, heads, chunks, length, length) @ values
        decayed = cumulative.exp().unsqueeze(-1)
        values.mul_((cumulative[..., -1:] - cumulative).exp_().unsqueeze(-1))
        for chunk in range(chunks):
            by_head = now.view(batch, groups, heads // groups, *now.shape[2:])
            read = c[:, :, None, chunk] @ by_head.mT
            block[:, :, chunk].add_(read.view(batch, heads, length, -1).mul_(decayed[:, :, chunk]))
            written = values[:, :, chunk].mT.view(*by_head.shape[:4], length) @ b[:, :, None, chunk]
            now.mul_(decayed[:, :, chunk, -1:]).add_(written.view(now.shape))
        _store(out, block, first)
    return out, now


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Pair:
    _check("selective_scan", "x=bds dt=bds A=dn B=bns C=bns state=bdn", x, dt, A, B, C, state)
    batch, width, rows = x.shape
    dtype = state_dtype(x)
    now = _first_state(state, x, (batch, width, A.shape[-1]))
    out = x.new_empty(x.shape)
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        u, step, b, c = (one.narrow(2, first, count).movedim(2, 1).to(dtype) for one in (x, dt, B, C))
        written = (u * step).unsqueeze(-1) * b.unsqueeze(2)
        _run((step.unsqueeze(-1) * A.to(dtype)).exp_(), written, now)
        now = written[:, -1].clone()
        out.narrow(2, first, count).copy_(written.mul_(c.unsqueeze(2)).sum(-1).movedim(1, 2))
    return out, now


def linear_recurrence(a: torch.Tensor, b: torch.Tensor, state: torch.Tensor | None = None) -> Pair:
    _check("linear_recurrence", "a=bsd b=bsd state=bd", a, b, state)
    batch, rows, width = b.shape
    dtype = state_dtype(b)
    now = _first_state(state, b, (batch, width))
    out = b.new_empty(b.shape)
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        written = b.narrow(1, first, count).to(dtype, copy=True)
        _run(a.narrow(1, first, count).to(dtype), written, now)
        out.narrow(1, first, count).copy_(written)
        now = written[:, -1].clone()
    return out, now


def _run(decay: torch.Tensor, written: torch.Tensor, state: torch.Tensor) -> None:
    """Replace what each row writes, `[B, rows, ...]`, by the state after it, in place."""
    previous = state
    for factor, now in zip(decay.unbind(1), written.unbind(1), strict=True):
        previous = now.addcmul_(factor, previous)
