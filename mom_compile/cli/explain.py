"""`mom-compile explain CONFIG`: what is rewritten in a model's prefill and what is not, without its weights."""

from __future__ import annotations

import click
from rich.text import Text

import mom_compile
from mom_compile.cli.inputs import BATCH_SIZE, CONFIG, DTYPE, OPTION, TOKENS, backend_options, bad_input
from mom_compile.cli.printing import progress, results
from mom_compile.config import parse_options
from mom_compile.planning.configs import find_config


@click.command()
@CONFIG
@click.option("--seq-len", type=TOKENS, default="4096", show_default=True, help="Prompt length: 131072, 455k.")
@BATCH_SIZE
@DTYPE
@OPTION
@click.option("--details", is_flag=True, help="Show every stage with its operators and full-length values.")
def explain(
    config: str, seq_len: int, batch_size: int, dtype: str | None, given: tuple[str, ...], details: bool
) -> None:
    """What is rewritten in a model's prefill, what is not, and why.

    CONFIG is a folder with a config.json, a JSON file, or the name of a shipped shape. Nothing is computed or
    downloaded.
    """
    options = backend_options(given)
    with bad_input():
        parse_options(options)  # before slow steps
        name = find_config(config).name
    with bad_input(), progress(f"tracing {name}, {seq_len:,} tokens"):
        settings = {"seq_len": seq_len, "batch_size": batch_size, "dtype": dtype}
        explanation = mom_compile.explain(config, **settings, options=options)
    results().print(Text(explanation.details()) if details else explanation)
