"""Where things are printed: results on stdout, in colour on a terminal and whole elsewhere; progress on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console

#: Of what is piped no line is cut or broken: the widest table that there is has a sixth of it.
WHOLE = 2000


def results() -> Console:
    """Made anew for each command: what stdout is may change (and does in tests)."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WHOLE, color_system=None)


def in_colour(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, gone afterwards. Where stderr is no terminal there is none."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(what) as status:
        yield lambda text: status.update(text)
