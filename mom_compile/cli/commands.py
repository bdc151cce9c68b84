"""The command group and its error handling: invalid input prints one line on stderr and exits with code 2."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

import mom_compile
from mom_compile.cli.doctor import doctor
from mom_compile.cli.explain import explain
from mom_compile.cli.plan import plan

NAME = "mom-compile"
#: Tracing creates many long-lived objects: collecting garbage every 700 of them takes a tenth of its time.
COLLECT_SELDOM = (200_000, 20, 50)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(mom_compile.__version__, prog_name=NAME)
def commands() -> None:
    """Long contexts in a fraction of the memory. Plans need neither a GPU nor weights."""


for command in (plan, explain, doctor):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, by default the process's, and exit with 0, 2 for invalid input, or the command's code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    gc.set_threshold(*COLLECT_SELDOM)
    try:
        code = commands.main(given or ["--help"], prog_name=NAME, standalone_mode=False)
    except click.ClickException as error:
        print(f"{NAME}: {' '.join(error.format_message().split())}", file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)  # as shells do after an interrupt
    sys.exit(code if isinstance(code, int) else 0)
