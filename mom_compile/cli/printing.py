"""Terminal output: results on stdout, coloured on a terminal and without line breaks otherwise; progress on stderr."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

#: Width of piped output, which is not wrapped: the widest table has a sixth of it.
WHOLE = 2000


def results() -> Console:
    """Return a console. A new one for each command, as stdout may change (it does in tests)."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WHOLE, color_system=None)


def in_colour(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show a status line on stderr, only if it is a terminal. Yields a function that updates it.

    Models are traced within this context. Warnings of PyTorch about code of transformers are suppressed.
    """
    console = Console(stderr=True, highlight=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*Dynamo detected a call to a `functools.lru_cache`")
        if not console.is_terminal:
            yield lambda text: None
            return
        with console.status(Text(what)) as status:
            yield lambda text: status.update(Text(text))
