"""The `mom-compile` command: plans, explanations and a check of this machine. See `mom-compile --help`."""

from mom_compile.cli.commands import main

__all__ = ["main"]
