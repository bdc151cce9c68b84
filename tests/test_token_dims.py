"""The choice of the token dimension in ambiguous graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from mom_compile.pipeline import NotWorthwhile
from mom_passes.graph.sizes import hint, product
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import Stored
from mom_passes.tokens.dims import analyse_token_dims
from tests.models import sweep
from tests.programs import ATTENTION, HEADS, HIDDEN, STEPS, Step, Weights, folded, heads, positions, weights_of
from tests.test_properties import parameter_names
from tests.tracing import check_every_length, rewrite, trace

SPARSE = ["indexed", "indexed, keys first", "gated"]


def example(tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)


def program(*steps: Step) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        for step in steps:
            x = step(x, Weights(*parameters))
        return x

    return run


def check(run: Callable[..., torch.Tensor], x: torch.Tensor, mini: int = 4, dynamic: bool = False) -> fx.GraphModule:
    weights = weights_of(torch.float64)
    gm = trace(run, x, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, mini, parameter_names(gm))
    assert not report.left_out
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)
    return rewritten


# Values with the sequence in two dimensions


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("tokens", [17, HIDDEN], ids=["", "as wide as long"])
def test_scores_are_computed_per_mini_sequence_of_queries(name: str, tokens: int) -> None:
    """No stored value has a row per query and a column per key."""
    step = ATTENTION[name]
    rewritten = check(program(step, STEPS["mlp"], step, STEPS["mlp"]), example(tokens))
    stored = [out.type.shape for _, m in loop_nodes(rewritten) for out in m.loop.outputs if isinstance(out, Stored)]
    assert stored and not any(list(shape).count(tokens) > 1 + (tokens == HIDDEN) for shape in stored)
    scores = [n.meta["val"].shape for n in rewritten.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert not any(list(shape[-2:]) == [tokens, tokens] for shape in scores if tokens != HIDDEN)


@pytest.mark.parametrize("name", SPARSE)
def test_scores_for_the_last_token_are_computed_for_its_query_only(name: str) -> None:
    def last(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return program(STEPS["mlp"], ATTENTION[name], STEPS["mlp"], ATTENTION[name])(x, *parameters)[:, -1:]

    x, weights = example(17), weights_of(torch.float64)
    gm = trace(last, x, *weights)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)
    values = [node.meta["val"] for node in rewritten.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert not any(list(value.shape[-2:]) == [17, 17] for value in values)


@pytest.mark.parametrize("name", sweep(SPARSE, quick=["indexed"]))
def test_compiled_scores_are_equal_for_every_length(name: str) -> None:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
        return (program(ATTENTION[name], STEPS["mlp"])(x, *parameters),)

    check_every_length(run)


def test_scores_for_a_slice_of_tokens_are_computed_for_their_queries_only() -> None:
    """Two layers share a bias per pair of tokens; of the second layer, only a slice of rows is needed."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        p = positions(x)
        bias = w.table[(p[:, None] - p[None, :]).clamp(-3, 3) + 3, 0] + torch.tanh(x @ w.bias)[:, None, :]
        for _ in range(2):
            scores = (x @ w.square) @ x.mT + bias
            x = STEPS["mlp"](x + torch.softmax(scores, -1) @ x, w)
        return x[:, 3:] @ w.square

    rewritten = check(run, example(17))
    lengths = [module.loop.length for _, module in loop_nodes(rewritten)]
    assert 14 in lengths
    stored = [out.type.shape for _, m in loop_nodes(rewritten) for out in m.loop.outputs if isinstance(out, Stored)]
    assert not any(list(shape).count(17) > 1 or (17 in shape and 14 in shape) for shape in stored)


def test_a_bias_that_is_looked_up_by_distance_is_not_kept_at_full_length() -> None:
    """Layers of T5 share a bias for each pair of tokens. Each loop looks up the rows of its queries again."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w, p = Weights(*parameters), positions(x)
        distances = (p[None, :] - p[:, None]).clamp(-3, 3) + 3
        bias = F.embedding(distances, w.table[:, :HEADS]).permute(2, 0, 1)[None]
        for _ in range(2):
            q, k = heads(x @ w.square), heads(x)
            x = STEPS["mlp"](x + folded(F.scaled_dot_product_attention(q, k, k, attn_mask=bias)), w)
        return x

    rewritten = check(run, example(17))
    stored = [out.type.shape for _, m in loop_nodes(rewritten) for out in m.loop.outputs if isinstance(out, Stored)]
    assert stored and not any(list(shape).count(17) > 1 for shape in stored)


def test_scores_read_by_rows_of_queries_and_of_keys_are_equal() -> None:
    """One reader needs the scores by rows of queries, another by rows of keys."""

    def run(x: torch.Tensor, w: Weights) -> torch.Tensor:
        scores = torch.tanh((x @ w.square) @ x.mT)
        return x + scores @ x + (scores.amax(1, keepdim=True).mT * x) + torch.softmax(scores, 1).mT @ x

    weights, x = weights_of(torch.float64), example(17)
    gm = trace(program(STEPS["mlp"], run, STEPS["mlp"]), x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert report.stages
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)


# Tokens or batch, without an attention


def per_token_product(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A product of two activations within each token, as in residual streams mixed by computed weights."""
    streams = x.unflatten(-1, (2, -1))
    mixed = torch.tanh(x @ w.square)[..., :4].unflatten(-1, (2, 2)) @ streams
    return x + mixed.flatten(-2)


def test_products_within_tokens_do_not_mark_a_dimension_as_batch() -> None:
    check(program(per_token_product, STEPS["mlp"]), example(17))
    assert token_dim(program(per_token_product, STEPS["mlp"]), example(17)) == 1


def test_a_decode_step_of_many_sequences_is_not_split_along_the_batch() -> None:
    weights, x = weights_of(torch.float64), example(1, batch=17)
    past = torch.randn(17, 9, HIDDEN, dtype=torch.float64)

    def step(x: torch.Tensor, past: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([past, x], 1)
        return STEPS["mlp"](torch.softmax(x @ keys.mT, -1) @ keys, Weights(*parameters))

    gm = trace(step, x, past, *weights)
    with pytest.raises(NotWorthwhile):
        rewrite(gm, 4, parameter_names(gm)[1:])


def wide_step(x: torch.Tensor, past: torch.Tensor, w: Weights) -> torch.Tensor:
    """A decode step of two layers with grouped heads: `x [B, 1, 8]`, `past [2, B, 2, P, 2]`, four heads."""
    for keys in past:
        q = (x @ w.square).unflatten(-1, (4, 2)).transpose(1, 2)
        k = torch.cat([keys, (x @ w.square[:, :4]).unflatten(-1, (2, 2)).transpose(1, 2)], 2)
        seen = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        x = STEPS["mlp"](x + seen.transpose(1, 2).flatten(2) @ w.square, w)
    return x


@pytest.mark.parametrize("batch", [2, 4, 8, 9, 10])
def test_a_batch_of_the_same_size_as_another_dimension_is_recognised(batch: int) -> None:
    """The batch is as large as the heads, groups of heads, channels or rows of the KV cache."""
    weights, x = weights_of(torch.float64), example(1, batch)
    rows = torch.randn(2, batch, 2, 9, 2, dtype=torch.float64)
    gm = trace(lambda x, rows, *parameters: wide_step(x, rows, Weights(*parameters)), x, rows, *weights)
    with pytest.raises(NotWorthwhile, match="decode step"):
        rewrite(gm, 4, parameter_names(gm)[1:])


@pytest.mark.parametrize("given", ["a bias for each head", "weights"])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 17), (17, 5), (8, 8)])
def test_an_input_shared_by_all_sequences_is_no_barrier_along_the_batch(batch: int, tokens: int, given: str) -> None:
    """A product along the batch needs all of an input that is no parameter, too."""
    weights, x = weights_of(torch.float64), example(tokens, batch)
    bias = torch.randn(1, HEADS, tokens, tokens, dtype=torch.float64)

    def run(x: torch.Tensor, bias: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        for _ in range(3):
            q, k = heads(x @ w.square), heads(x)
            x = STEPS["mlp"](x + folded(F.scaled_dot_product_attention(q, k, k, attn_mask=bias)), w)
        return x[:, -2:]

    gm = trace(run, x, bias, *weights)
    names = parameter_names(gm)
    rewritten, report = rewrite(gm, 4, names[1:] if given == "a bias for each head" else ())
    assert report.token_dimension.startswith("dim 1 of")
    torch.testing.assert_close(rewritten(x, bias, *weights), gm(x, bias, *weights), rtol=0, atol=1e-10)


def test_an_attention_of_one_query_marks_its_keys_as_tokens() -> None:
    """Other products are within tokens; only this one combines several."""

    def pooled(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        x = program(per_token_product, STEPS["mlp"])(x, *parameters)
        query = Weights(*parameters).table[:1].expand(x.shape[0], -1, -1) + x[:, -1:]
        return torch.softmax(query @ x.mT, -1) @ x

    weights, x = weights_of(torch.float64), example(17)
    assert token_dim(pooled, x) == 1
    gm = trace(pooled, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert report.stages
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)


def test_a_weight_that_is_an_input_used_twice_does_not_carry_tokens() -> None:
    """A product needs all of its columns, but they carry half of the work, and the rows of `x` carry all of it."""

    def tied(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.relu(x @ w) @ w.t())

    gm = trace(tied, torch.randn(2, 40, 16), torch.randn(16, 32))
    found = analyse_token_dims(gm)
    assert found is not None
    assert (found.seed, found.seed_dim.index) == (next(iter(gm.graph.nodes)), 1)


# Two token dimensions: an encoder and its decoder


def encoder_decoder(x: torch.Tensor, states: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Two layers of an encoder, and two of a decoder that attends to its own tokens and to those of the encoder."""
    for _ in range(2):
        q, k = heads(states @ w.square), heads(states)
        states = STEPS["mlp"](states + folded(F.scaled_dot_product_attention(q, k, k)), w)
    for _ in range(2):
        q, k = heads(x @ w.square), heads(x)
        x = x + folded(F.scaled_dot_product_attention(q, k, k, is_causal=True))
        k, v = heads(states @ w.square), heads(states)
        x = STEPS["mlp"](x + folded(F.scaled_dot_product_attention(heads(x), k, v)), w)
    return x, k


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize(("tokens", "encoded"), [(17, 29), (29, 17), (17, 17), (1, 29), (17, 3)])
def test_an_encoder_and_its_decoder_run_in_loops(tokens: int, encoded: int, dynamic: bool) -> None:
    """Each has loops over its own tokens, unless they fit into one mini-sequence. Equal lengths share loops."""
    given = example(tokens), example(encoded), *weights_of(torch.float64)
    gm = trace(lambda x, y, *parameters: encoder_decoder(x, y, Weights(*parameters)), *given, dynamic=dynamic)
    rewritten, report = rewrite(gm, 4, parameter_names(gm)[1:])
    for one, other in zip(rewritten(*given), gm(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert {hint(module.loop.length) for _, module in loop_nodes(rewritten)} >= {n for n in (tokens, encoded) if n > 4}
    assert not report.work_outside or min(tokens, encoded) < 4


def test_three_stacks_of_layers_run_in_loops() -> None:
    """None has half of the work, as of a model with an encoder of images and one of sound."""

    def run(*given: torch.Tensor) -> torch.Tensor:
        w, merged = Weights(*given[3:]), torch.zeros(())
        for x in given[:3]:
            for _ in range(2):
                q, k = heads(x @ w.square), heads(x)
                x = STEPS["mlp"](x + folded(F.scaled_dot_product_attention(q, k, k)), w)
            merged = merged + x.mean(1)
        return merged

    given = example(21), example(22), example(23), *weights_of(torch.float64)
    gm = trace(run, *given)
    rewritten, report = rewrite(gm, 4, parameter_names(gm)[2:])
    torch.testing.assert_close(rewritten(*given), gm(*given), rtol=0, atol=1e-10)
    assert {module.loop.length for _, module in loop_nodes(rewritten)} == {21, 22, 23}
    assert not report.work_outside


def test_the_last_row_of_a_decoder_leaves_its_encoder_in_loops() -> None:
    """Slices that move up make another graph, in which an encoder whose tokens begin inside is found again."""

    def run(x: torch.Tensor, image: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        patches = F.conv2d(image, w.up.view(-1, 2, 2, 2)[:HIDDEN], stride=2).flatten(2).mT
        return encoder_decoder(x, patches, w)[0][:, -1:] @ w.square

    given = example(29), torch.randn(2, 2, 8, 10, dtype=torch.float64), *weights_of(torch.float64)
    gm = trace(run, *given)
    rewritten, report = rewrite(gm, 4, parameter_names(gm)[1:])
    torch.testing.assert_close(rewritten(*given), gm(*given), rtol=0, atol=1e-10)
    assert {module.loop.length for _, module in loop_nodes(rewritten)} == {20, 29}
    assert report.token_dimension.count("; ") == 1


def token_dim(run: Callable[..., torch.Tensor], x: torch.Tensor) -> int:
    gm = trace(run, x, *weights_of(torch.float64))
    first, *others = (node for node in gm.graph.nodes if node.op == "placeholder")
    found = analyse_token_dims(gm, static_inputs=others)
    assert found is not None and found.seed is first
    return found.seed_dim.index


# Rows that are merged


def merging(size: int, *, layers: int = 2, dim: int = 0) -> Callable[..., torch.Tensor]:
    """Layers of `[S, HIDDEN]`, and a projector that reads `size` rows at once."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        for _ in range(layers):
            x = STEPS["mlp"](STEPS["full"](x, w), w)
        wide = x.reshape(*x.shape[:dim], x.shape[dim] // size, size * HIDDEN)
        return torch.tanh(wide @ w.square.repeat(size, 1)) @ w.square

    return run


@pytest.mark.parametrize("size", [2, 4])
def test_merged_rows_and_the_layers_before_them_share_a_loop(size: int) -> None:
    """The hidden states after the last layer are never stored."""
    rewritten = check(merging(size, dim=1), example(24, batch=1), mini=8)
    last = loop_nodes(rewritten)[-1][1].loop
    assert last.rows == 8 // size and last.length == 24 // size
    assert [product(out.type.shape) for out in last.stored] == [24 // size * HIDDEN]


def test_rows_that_are_merged_twice_are_groups_of_the_larger_size() -> None:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        pairs = merging(2, dim=1)(x, *parameters)
        return pairs.reshape(1, -1, 2 * HIDDEN) + merging(4, dim=1)(x, *parameters).repeat(1, 1, 2)

    rewritten = check(run, example(24, batch=1), mini=8)
    assert {module.loop.length for _, module in loop_nodes(rewritten)} == {6}


def test_rows_that_do_not_divide_into_groups_stay_tokens() -> None:
    """A view that keeps the rows, or one that merges features, is no group."""
    rewritten = check(program(STEPS["mlp"], STEPS["full"], STEPS["mlp"]), example(15, batch=1), mini=4)
    assert all(module.loop.length == 15 for _, module in loop_nodes(rewritten))
