"""`mom-compile`: will it fit, what is rewritten, and what works on this machine. See `mom-compile --help`."""

from mom_compile.cli.commands import main

__all__ = ["main"]
