"""Which dimension of each value is the token dimension? An analysis; it changes nothing.

Terms
-----
seed       A dimension of a graph input that is not a parameter: a candidate for the tokens. Where no input's will do,
           one that begins inside the graph, behind a strided convolution say (see `tokens.seeds`).
carries    A value carries tokens along a `Dim` if its rows can be computed from rows of other carriers.
mixes      An operator without a claim that keeps rows apart (a cumsum over tokens, a roll). Its result may
           still have one row per token; the sweep goes on from there, and the planner runs it on the whole sequence.
option     A value with the sequence in two dimensions, scores of every key for every query, may carry tokens along
           either. It is settled on the one that its readers' rows ask for.

    for seed in every dimension of every input that is no parameter:
        for node in graph order:
            dims[node] = the dim whose claim asks carriers for their own rows, or for all of them
        for node in reverse, of those with several options:
            dims[node] = the one that most readers ask for
    keep the seed that carries most matmul work and meets barriers: products that take rows of one activation and
        all of another, or rows before these (attention's keys). Along the batch there are none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from mom_passes.graph.sizes import Size, hint, is_one
from mom_passes.graph.values import value_of
from mom_passes.rules import Dim
from mom_passes.rules.work import matmul_work
from mom_passes.tokens.seeds import activations_of, inner_seeds, seed_inputs
from mom_passes.tokens.sweep import Carrier, Sweep, settled

#: A seed that carries less than this share of the most work is no candidate, whatever barriers it meets: a weight that
#: is an argument and is used twice meets some, too.
MUCH = 0.75


@dataclass(frozen=True)
class TokenDims:
    """The sweep's result for the chosen seed.

    `carriers` has every value with a token dimension; `rowwise` those whose operator can also be
    run on rows alone, `worked` those of them that took a product, an attention or a look-up: what did not is as cheap
    as an input. `mixing` says of each operator that must see the whole sequence why. `work` is in multiply-adds;
    `barriers` counts the products that need all of an activation; `batched` says that there are products of two
    activations and none of them does.
    """

    seed: fx.Node
    seed_dim: Dim
    length: Size
    carriers: dict[fx.Node, Carrier]
    rowwise: frozenset[fx.Node]
    worked: frozenset[fx.Node]
    mixing: dict[fx.Node, str]
    work: int
    barriers: int
    batched: bool


def analyse_token_dims(
    gm: fx.GraphModule, *, static_inputs: Collection[fx.Node] = (), inside: bool = True
) -> TokenDims | None:
    """The token dimension of every value, or None where no dimension carries the matmul work.

    `static_inputs` are the placeholders that hold parameters and buffers. `inside` allows for a seed inside the graph.
    """
    static = set(static_inputs)
    activations = activations_of(gm, static)
    inputs = [(seed, [Dim(i) for i in range(value_of(seed).dim())]) for seed in seed_inputs(gm, static)]
    found = _best(gm, inputs, activations)
    return _best(gm, inner_seeds(gm, activations), activations) if found is None and inside else found


def _best(
    gm: fx.GraphModule, seeds: Iterable[tuple[fx.Node, Sequence[Dim]]], activations: set[fx.Node]
) -> TokenDims | None:
    """What follows from the best of some values' dimensions; None where none carries half of the matmul work."""
    total = sum(matmul_work(node) for node in gm.graph.nodes)
    candidates: list[TokenDims] = []
    for seed, dims in seeds:
        sizes = [(dim, value_of(seed).shape[dim.index]) for dim in dims]
        several = [(dim, size) for dim, size in sizes if not is_one(size) and hint(size) > 1]
        sweeps = [_sweep(gm, seed, dim, size, activations) for dim, size in several]
        candidates += [found for found in _no_batches(sweeps) if found.work * 2 >= total > 0]
    most = max((found.work for found in candidates), default=0)
    return max((found for found in candidates if found.work >= MUCH * most), key=_score, default=None)


def _score(found: TokenDims) -> tuple[bool, int, int]:
    return (found.barriers > 0, found.work, hint(found.length))


def _no_batches(sweeps: list[TokenDims]) -> list[TokenDims]:
    """Those of an input's dimensions that are not the batch's.

    Along the batch, products of activations stay within its rows, an attention's too; along the tokens some needs all
    rows of another. Where none does along either, products are each token's own (what mixes tokens is in another
    graph), and any of the dimensions that carry all of them will do.
    """
    tokens = [found for found in sweeps if not found.batched]
    if any(found.work for found in tokens):
        return tokens
    most = max((found.work for found in sweeps), default=0)
    alike = [found for found in sweeps if found.work == most]
    return alike if len(alike) > 1 else tokens


def _sweep(gm: fx.GraphModule, seed: fx.Node, dim: Dim, length: Size, activations: set[fx.Node]) -> TokenDims:
    """What follows from one dimension of a value."""
    sweep = Sweep(length, activations, {seed}, {seed: Carrier(dim, length)})
    for node in gm.graph.nodes:
        if node.op == "call_function" and node is not seed:
            sweep.visit(node)
    if sweep.options:
        sweep.carriers.update(settled(gm, sweep))
    rowwise, worked = frozenset(sweep.rowwise), frozenset(sweep.worked)
    batched = sweep.batched > 0 and not sweep.barriers
    return TokenDims(
        seed, dim, length, sweep.carriers, rowwise, worked, sweep.mixing, sweep.work, sweep.barriers, batched
    )
