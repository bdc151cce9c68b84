"""Find the token dimension of each value. An analysis.

Terms
-----
seed       A dimension of a graph input that is not a parameter: a candidate for the tokens. If no input has one, or
           its rows are groups of tokens, a dimension that begins inside the graph, for example after a strided
           convolution (see `tokens.seeds`).
carries    A value carries tokens along a `Dim` if its rows can be computed from rows of other carriers.
mixes      An operator without such a claim (a roll over tokens). Its result may still have one row per token: the
           sweep continues with it, and the planner runs the operator on the whole sequence.
option     A value with the sequence in two dimensions, such as scores of every query and key, may carry tokens along
           either. The dim that its readers need is chosen.

    for seed in every dimension of every input that is no parameter:
        for node in graph order:
            dims[node] = a dim whose claim needs the operands' rows along their own dims, or all of them
        for node with several options, in reverse order:
            dims[node] = the dim that most readers need
    choose the seed that carries most matmul work and meets barriers: products that need rows of one activation and
        all of another (keys of an attention), rows before others, or carries. Along the batch there are none.
    repeat for the values that carry no tokens so far: those of an encoder are others than those of its decoder

Tokens of an encoder and of its decoder have lengths of their own. No value has both: a cross-attention needs rows of
the decoder's queries and all of the encoder's keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from mom_passes.graph.arguments import argument_node, aten
from mom_passes.graph.sizes import Size, all_same, hint, is_one, product, same
from mom_passes.graph.values import value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules import Dim
from mom_passes.rules.work import matmul_work
from mom_passes.tokens.seeds import STACK_SHARE, activations_of, inner_seeds, reach, seed_inputs
from mom_passes.tokens.sweep import Carrier, Sweep, choose_options

#: A seed that carries less than this share of the most work is no candidate, even with barriers. A weight that is a
#: graph input and is used twice has barriers, too.
WORK_SHARE = 0.75
#: A seed carries at least this share of the work that depends on it, or its dimension is no token dimension.
REACH_SHARE = 1 / 2
#: Other tokens are looked for while at least this share of all work carries none.
LEAST_SHARE = 1 / 32


@dataclass(frozen=True)
class TokenDims:
    """The token dimension of every value.

    seed       the seed of the tokens that carry most work, with `seed_dim` and `length`
    others     the same for other tokens in the graph, such as those of an encoder
    carriers   every value with a token dimension
    rowwise    the carriers whose operator can run on rows
    worked     the carriers that depend on a product, an attention or a look-up; others are as cheap as an input
    mixing     the operators that need the whole sequence, with the reason
    work       multiply-adds that are carried
    barriers   the number of operators that need all of an activation, rows before their own or a carry
    batched    whether there are products of two activations and no barriers, as along a batch dimension
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
    others: tuple[TokenDims, ...] = ()

    @property
    def lengths(self) -> tuple[Size, ...]:
        """The numbers of tokens, those that carry most work first."""
        return (self.length, *(other.length for other in self.others))

    def group_of(self, length: Size) -> int:
        """Return how many rows of attentions are one of so many tokens: several where a view merges them later."""
        carriers = [self.carriers[node] for node in self.rowwise if node.target is MOM_ATTENTION]
        return max((hint(one.dim.inner) for one in carriers if same(one.length, length)), default=1)

    def joined(self, other: TokenDims) -> TokenDims:
        """Return these tokens and other ones. A value with both has these."""
        return replace(
            self,
            others=(*self.others, other),
            carriers={**other.carriers, **self.carriers},
            rowwise=self.rowwise | other.rowwise,
            worked=self.worked | other.worked,
            mixing={**other.mixing, **self.mixing},
            work=self.work + other.work,
            barriers=self.barriers + other.barriers,
        )


def analyse_token_dims(
    gm: fx.GraphModule, *, static_inputs: Collection[fx.Node] = (), inside: bool = True
) -> TokenDims | None:
    """Return the token dimension of every value, or None if no dimension carries half of the matmul work after it.

    `static_inputs` are the placeholders of parameters and buffers. With `inside`, dimensions that begin inside the
    graph are tried if no input has a token dimension, or only one of groups of tokens.
    """
    static = set(static_inputs)
    activations = activations_of(gm, static)
    total, left = sum(matmul_work(node) for node in gm.graph.nodes), set(gm.graph.nodes)
    found = _best(gm, static, activations, left, inside)
    while found is not None:
        left -= found.carriers.keys() | found.mixing.keys()
        if sum(map(matmul_work, left)) < LEAST_SHARE * total:
            break
        other = _best(gm, static, activations, left, inside)
        if other is None:
            break
        found = found.joined(other)
    return found


def _best(
    gm: fx.GraphModule, static: set[fx.Node], activations: set[fx.Node], among: set[fx.Node], inside: bool
) -> TokenDims | None:
    """Return the token dims of the best seed among some values; those of inputs first."""
    inputs = [(seed, [Dim(i) for i in range(value_of(seed).dim())]) for seed in seed_inputs(gm, static, among)]
    found = _best_of(gm, inputs, activations, among)
    if inside and (found is None or _in_groups(found)):
        inner = inner_seeds(gm, activations, among)
        found = _best_of(gm, [*inputs, *inner] if found is not None else inner, activations, among)
    return found and _with_merged_rows(gm, found, activations, among)


def _with_merged_rows(
    gm: fx.GraphModule, found: TokenDims, activations: set[fx.Node], among: set[fx.Node]
) -> TokenDims:
    """Return the same tokens in groups, if a view merges the rows of a group to one row and more work then has tokens.

    A vision tower merges four patches to one embedding. A mini-sequence of whole groups computes both.
    """
    sizes = {size for node in found.mixing if (size := _merged_rows(node, found)) is not None}
    rows, plain = hint(found.length), found.seed_dim
    for size in sorted(sizes):
        dim, length = Dim(plain.index, plain.outer, product([plain.inner, size])), rows // size
        grouped = _sweep(gm, found.seed, dim, length, activations, among)
        if length > 1 and grouped.work > found.work:
            found = grouped
    return found


def _merged_rows(node: fx.Node, found: TokenDims) -> int | None:
    """Return how many rows of a value with tokens a view merges to one, None for other operators."""
    if node.target is not aten.view.default or not isinstance(found.length, int):
        return None
    source = argument_node(node, "self")
    carrier = found.carriers.get(source)
    if carrier is None or not carrier.dim.plain or carrier.length != found.length:
        return None
    index, (before, after) = carrier.dim.index, (value_of(source).shape, value_of(node).shape)
    if len(after) <= index or not all_same(before[:index], after[:index]) or not isinstance(after[index], int):
        return None
    size, rest = divmod(found.length, max(1, after[index]))
    return size if rest == 0 and size > 1 else None


def _in_groups(found: TokenDims) -> bool:
    """Return whether each token is several rows of an attention, as a line or a column of a mask of patches is.

    The patches themselves are then a longer dimension, which may begin inside the graph.
    """
    attentions = [node for node in found.rowwise if node.target in (MOM_ATTENTION, aten.bmm.default)]
    return bool(attentions) and not any(found.carriers[node].dim.plain for node in attentions)


def _best_of(
    gm: fx.GraphModule, seeds: Iterable[tuple[fx.Node, Sequence[Dim]]], activations: set[fx.Node], among: set[fx.Node]
) -> TokenDims | None:
    """Return the token dims of the best of these seeds, None if none carries enough of the matmul work."""
    total = sum(map(matmul_work, among))
    candidates: list[TokenDims] = []
    for seed, dims in seeds:
        sizes = [(dim, value_of(seed).shape[dim.index]) for dim in dims]
        larger = [(dim, size) for dim, size in sizes if not is_one(size) and hint(size) > 1]
        sweeps = [_sweep(gm, seed, dim, size, activations, among) for dim, size in larger]
        least = max(REACH_SHARE * reach(seed, among), STACK_SHARE * total)
        candidates += [found for found in _without_batch(sweeps) if found.work >= least > 0]
    most = max((found.work for found in candidates), default=0)
    return max((found for found in candidates if found.work >= WORK_SHARE * most), key=_score, default=None)


def _score(found: TokenDims) -> tuple[bool, int, int]:
    return (found.barriers > 0, found.work, hint(found.length))


def _without_batch(sweeps: list[TokenDims]) -> list[TokenDims]:
    """Return the dimensions of an input that are not the batch.

    Along the batch, every product of activations takes rows of both. Along the tokens, some product needs all rows of
    an activation. If none does along any dimension, tokens are mixed in another graph only, and any dimension that
    carries all the work is valid. Two dimensions of an input may lead to the same dimension of all other values, where
    an operator without a rule ends both: three channels and a batch of three images.
    """
    tokens = [found for found in sweeps if not found.batched]
    if any(found.work for found in tokens):
        return tokens
    most = max((found.work for found in sweeps), default=0)
    equal = [found for found in sweeps if found.work == most]
    carried = [{node: c.dim for node, c in found.carriers.items() if node is not found.seed} for found in equal]
    return equal if any(dims != carried[0] for dims in carried) else tokens


def _sweep(
    gm: fx.GraphModule, seed: fx.Node, dim: Dim, length: Size, activations: set[fx.Node], among: set[fx.Node]
) -> TokenDims:
    """Return the token dims of some values that follow from one seed."""
    sweep = Sweep(length, activations, {seed}, {seed: Carrier(dim, length)})
    for node in gm.graph.nodes:
        if node.op == "call_function" and node is not seed and node in among:
            sweep.visit(node)
    if sweep.options:
        sweep.carriers.update(choose_options(gm, sweep))
    rowwise, worked = frozenset(sweep.rowwise), frozenset(sweep.worked)
    batched = sweep.batched > 0 and not sweep.barriers
    return TokenDims(
        seed, dim, length, sweep.carriers, rowwise, worked, sweep.mixing, sweep.work, sweep.barriers, batched
    )
