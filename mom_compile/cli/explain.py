"""`mom-compile explain CONFIG`: what would be rewritten of a model's prefill and what not, without its weights."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import click
import torch
from rich.text import Text

import mom_compile
from mom_compile.cli.inputs import BATCH_SIZE, CONFIG, DTYPE, OPTION, TOKENS, backend_options, bad_input
from mom_compile.cli.printing import progress, results
from mom_compile.config import parse_options
from mom_compile.explain import Explanation
from mom_compile.planning.configs import Found, find_config


@click.command()
@CONFIG
@click.option("--seq-len", type=TOKENS, default="4096", show_default=True, help="Tokens of the prompt: 131072, 455k.")
@BATCH_SIZE
@DTYPE
@OPTION
@click.option("--details", is_flag=True, help="Every stage with its operators and values at full length.")
def explain(
    config: str, seq_len: int, batch_size: int, dtype: str | None, given: tuple[str, ...], details: bool
) -> None:
    """What is rewritten of a model's prefill, what not, and why.

    CONFIG is a folder with a config.json, such a file, or the name of a shipped shape. Nothing is computed, and nothing
    downloaded.
    """
    options = backend_options(given)
    with bad_input():
        parse_options(options)  # before anything takes time
        found = find_config(config)
    with bad_input(), progress(f"tracing {found.name}, {seq_len:,} tokens"):
        explanation = explained(found, seq_len, batch_size, dtype, options)
    console = results()
    console.print(Text(f"{found.name} ({found.config.model_type}), a prefill of {batch_size} x {seq_len:,} tokens"))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(Text(explanation.details()) if details else explanation)


def explained(
    found: Found, seq_len: int, batch_size: int, dtype: str | None, options: dict[str, Any]
) -> Explanation:
    """The explanation of a prefill with the cache that the model makes by itself, and the last token's logits."""
    models = importlib.import_module("transformers").AutoModelForCausalLM
    chosen = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    with torch.device("meta"):
        model = models.from_config(found.config, **chosen).eval()
        prompt = torch.empty(batch_size, seq_len, dtype=torch.long)
    last = "logits_to_keep" in inspect.signature(model.forward).parameters
    return mom_compile.explain(model, input_ids=prompt, options=options, **({"logits_to_keep": 1} if last else {}))
