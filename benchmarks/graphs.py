"""How many graphs an ordinary session takes (`python -m benchmarks.graphs`), and docs/graphs.md of it (`--write`).

Dynamo captures one graph for all calls that pass the same guards. The number of graphs of a model is limited; a call
that needs another one runs in eager mode. A small model of each family is compiled by `mom_compile.compile` and called
with prompts below, at and above its window, one and several sequences, with and without padding, turns of a chat, and
drafted tokens. Pieces run node by node (`benchmarks/without_codegen.py`), since their code does not affect the count.
TORCH_LOGS=recompiles prints why each graph was made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import FAMILIES
from benchmarks.measure import describe_machine
from benchmarks.models import keeping
from benchmarks.without_codegen import pieces_run_eagerly, stock_runs_eagerly

PAGE = Path(__file__).resolve().parent.parent / "docs" / "graphs.md"
NAMES = ("Llama", "Qwen3", "Gemma3Text", "Mistral", "GPT2", "Mixtral")
WINDOW = 64
VOCABULARY = 200
NEW_TOKENS = 4

_SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "n_embd": 32, "n_head": 4, "num_hidden_layers": 2, "n_layer": 2, "sliding_window": WINDOW,
    "sliding_window_pattern": 2, "num_local_experts": 4, "max_position_embeddings": 1024, "n_positions": 1024,
}  # fmt: skip


def small(family: str) -> Any:
    """Return a model with two layers and random weights, without an end-of-sequence token."""
    import transformers

    known = {name: value for name, value in _SMALL.items() if name in FAMILIES[family]}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{**FAMILIES[family], **known}, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().double()


@dataclass(frozen=True)
class Call:
    """A call of `generate`: `lengths` are those of its prompts, padded to the longest; `turns` of a chat follow."""

    kind: str
    lengths: tuple[int, ...]
    turns: tuple[int, ...] = ()
    drafted: bool = False


def _calls(kind: str, *lengths: int | tuple[int, ...], **how: Any) -> list[Call]:
    return [Call(kind, (n,) if isinstance(n, int) else n, **how) for n in lengths]


#: Kinds in the order of their first call.
SESSION: tuple[Call, ...] = (
    *_calls("one prompt, above the window", 150, 200, 90, 311),
    *_calls("below the window", 40, 20, 55),
    *_calls("at the window", WINDOW, WINDOW - 1, WINDOW + 1),
    *_calls("several sequences", (120, 120), (30, 30), (99, 99, 99), (64, 64)),
    *_calls("padded", (120, 90), (50, 30), (170, 60, 100), (WINDOW, 10)),
    *_calls("turns of a chat", 80, 40, turns=(20, 30)),
    *_calls("tokens drafted from the prompt", 100, 45, drafted=True),
    *_calls("any of these again", 70, 33, 256, (75, 75), (41, 41), (210, 140), (35, 22), 62, 66, 128),
    *_calls("any of these again", 500, 5, (88, 17), (20, 20, 20, 20), 64, 65, 240, 58, (66, 130)),
    *_calls("any of these again", 140, turns=(10,)),
)


def prompts(call: Call, seed: int) -> dict[str, torch.Tensor]:
    """Return ids and a mask, padded on the left."""
    longest = max(call.lengths)
    ids = torch.randint(3, VOCABULARY, (len(call.lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, length in enumerate(call.lengths):
        mask[row, : longest - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def make(model: Any, call: Call, seed: int) -> torch.Tensor:
    """Run the call and return all tokens."""
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if call.drafted:
        settings["prompt_lookup_num_tokens"] = 3
    given = prompts(call, seed)
    if not call.turns:
        return model.generate(**given, **settings)  # type: ignore[no-any-return]
    out = model.generate(**given, **settings, return_dict_in_generate=True)
    for turn, length in enumerate(call.turns):
        more = prompts(Call("", (length,)), seed + turn + 1)["input_ids"]
        tokens = torch.cat([out.sequences, more], dim=1)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        kept = keeping(out.past_key_values, model)
        out = model.generate(**given, **kept, **settings, return_dict_in_generate=True)
    return out.sequences  # type: ignore[no-any-return]


@dataclass
class Counted:
    """One call of a session: new graphs, calls of the model, and how many of these were eager."""

    call: Call
    graphs: int
    calls: int
    eager: int
    tokens: torch.Tensor


def session(model: Any, calls: Sequence[Call] = SESSION) -> Iterator[Counted]:
    """Run the calls with a compiled model in order, and count."""
    from mom_compile import reports
    from mom_compile.compiled import CompiledGraph

    ran, called, eager = 0, 0, 0
    run: Any = CompiledGraph.__call__
    compiled = model._compiled_call_impl

    def running(graph: CompiledGraph, inputs: Any) -> Any:
        nonlocal ran
        ran += 1
        return run(graph, inputs)

    def calling(*args: Any, **kwargs: Any) -> Any:
        nonlocal called, eager
        before, called = ran, called + 1
        found = compiled(*args, **kwargs)
        eager += ran == before
        return found

    setattr(CompiledGraph, "__call__", running)  # noqa: B010  (mypy takes no other way of replacing a method)
    model._compiled_call_impl = calling
    try:
        for number, call in enumerate(calls):
            before = len(reports()), called, eager
            tokens = make(model, call, 10 * number)
            yield Counted(call, len(reports()) - before[0], called - before[1], eager - before[2], tokens)
    finally:
        setattr(CompiledGraph, "__call__", run)  # noqa: B010
        model._compiled_call_impl = compiled


def count(family: str, compile_model: Callable[[Any], Any]) -> tuple[dict[str, int], int]:
    """Return the graphs by kind of call, and the number of eager calls of the model."""
    torch._dynamo.reset()
    found = dict.fromkeys((call.kind for call in SESSION), 0)
    eager = 0
    with pieces_run_eagerly(), stock_runs_eagerly():
        for one in session(compile_model(small(family))):
            found[one.call.kind] += one.graphs
            eager += one.eager
            print(family, one.call.kind, one.call.lengths, one.graphs, "eager" * bool(one.eager), flush=True)
    return found, eager


_HEAD = f"""# Graphs of a session

The number of graphs that Dynamo makes in a session of {len(SESSION)} calls of `generate()`, {NEW_TOKENS} tokens each,
with a model compiled by `mom_compile.compile(model)`: two layers, and a window of {WINDOW} tokens where the family has
one. Calls run from the top row to the bottom row. A cell has the graphs that its calls needed in addition to the
existing ones.

`python -m benchmarks.graphs --write` measures and writes this page, `--only FAMILY ...` for some families. {{stamp}}.
"""

_WHY = """
## Why so many

Each reason is a guard that `TORCH_LOGS=recompiles` prints.

- **A prompt, or one token after it.** PyTorch compiles a size of one as a constant. With one token, the model knows
that
  it needs no mask.
- **One sequence, or several** (twice as many). A batch of one is a constant, too. PyTorch's setting against that,
  `torch.fx.experimental._config.backed_size_oblivious`, is process-wide and experimental. A graph with a size that is
  marked as unbacked goes to stock Inductor.
- **With or without padding** (twice as many for several sequences). `generate()` passes a mask only if a token is
  masked. Under `torch.compile`, transformers relies on causal attention only if it gets no mask: a mask of ones in
  every call would share the graphs, but each call would build its attention mask.
- **Turns of a chat** (1). Several tokens after a cache need a mask that a prompt does not need.
- **Drafted tokens** (up to 3, and 3 or more with a window). They need the logits of several tokens, a number that is a
  constant while it is one. Refused drafts are cropped off the cache, which keeps the strides of the longer one. Dynamo
  guards on strides, and making the rows dense would copy the cache once more in every step. A windowed cache then keeps
  what a crop may bring back, and takes the other side of a branch in every call.
- **A window** (2 more graphs for each kind). Transformers builds no mask for a prompt that is shorter than the window,
  and a mask for a longer one; its cache branches on whether the window is full. Dynamo follows one side of each branch.
  A prompt or a cache of exactly one token less than the window takes the other side of one branch only: the step across
  the border is a graph of its own.

## What needs no graph

- Other numbers of tokens and sequences: `mom_compile.compile` makes them symbols at the first call.
  `model.compile(backend="mom")` makes each a constant at first, and needs one more graph for each kind.
- The first step after a prompt that is longer than the window. The window's rows are copied out of the prompt's keys
  with room for one row before them, and have the strides of all later steps.
- The first step after any other prompt: its keys have the layout of later steps.
- `return_dict`, which `generate()` passes except where tokens are drafted: `mom_compile.compile` drops it where it is
  the default.
"""


def page(found: dict[str, tuple[dict[str, int], int]]) -> str:
    """Return the page as text from the result of `count` for each family."""
    rows = [[kind, *(str(by_kind[kind]) for by_kind, _ in found.values())] for kind in next(iter(found.values()))[0]]
    rows.append(["**all**", *(f"**{sum(by_kind.values())}**" for by_kind, _ in found.values())])
    rows.append(["calls of the model in eager mode", *(str(eager) for _, eager in found.values())])
    table = [["calls", *found], ["---"] * (len(found) + 1), *rows]
    return "\n".join([_HEAD.format(stamp=describe_machine()), *(f"| {' | '.join(row)} |" for row in table), _WHY])


def main(arguments: Sequence[str]) -> None:
    """Count for all or some families, print the page, and write it with `--write`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="FAMILY")
    parser.add_argument("--plain", action="store_true", help='model.compile(backend="mom"), with PyTorch\'s limit of 8')
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(arguments)

    def compile_model(model: Any) -> Any:
        import mom_compile

        settings = {"mini_seq_len": 16}
        if not options.plain:
            return mom_compile.compile(model, options=settings)
        model.compile(backend="mom", options=settings)
        return model

    found = {family: count(family, compile_model) for family in options.only}
    text = page(found)
    print(text)
    if options.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
