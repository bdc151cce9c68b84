"""Where things are printed: results on stdout, in colour on a terminal and whole elsewhere; progress on stderr."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

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
    """A line on stderr that says what is being done, gone afterwards. Where stderr is no terminal there is none.

    Meanwhile models are traced: what PyTorch warns of there, of transformers' own code, is not the user's.
    """
    console = Console(stderr=True, highlight=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*Dynamo detected a call to a `functools.lru_cache`")
        if not console.is_terminal:
            yield lambda text: None
            return
        with console.status(Text(what)) as status:
            yield lambda text: status.update(Text(text))
