"""Command-line parameters: amounts, backend options, and errors in them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from mom_compile.quantities import parse_memory, parse_tokens

log = logging.getLogger(__name__)


class _Amount(click.ParamType):
    def __init__(self, name: str, parse: Callable[[Any, str], int]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        with bad_input():
            return self.parse(value, param.opts[0] if param is not None else self.name)


BYTES, TOKENS = _Amount("bytes", parse_memory), _Amount("tokens", parse_tokens)

_WORDS = {"true": True, "false": False, "none": None}


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Report a `ValueError` or `ImportError` as one line, without a traceback (which is logged at debug level)."""
    try:
        yield
    except ValueError as error:
        log.debug("bad input", exc_info=True)
        raise click.UsageError(str(error) or type(error).__name__) from error
    except ImportError as error:
        raise click.UsageError(str(error)) from error


def backend_options(given: Sequence[str]) -> dict[str, Any]:
    """Parse `["kv_offload=true", "inductor.max_autotune=true"]` as options of the backend, which validates them.

    Values are true, false, none, numbers or strings.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise click.UsageError(f"--option {text!r} is not valid; expected NAME=VALUE, such as kv_offload=true")
        outer, dot, inner = name.partition(".")
        owner = found.setdefault(outer, {}) if dot else found
        key = inner if dot else name
        if not isinstance(owner, dict) or key in owner:
            raise click.UsageError(f"--option {name} is given twice")
        owner[key] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


#: Parameters shared by several commands.
CONFIG = click.argument("config", metavar="CONFIG")
BATCH_SIZE = click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Prompts at once.")
DTYPE = click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Dtype of weights. Default: the config's."
)
OPTION = click.option(
    "--option", "-o", "given", multiple=True, metavar="NAME=VALUE",
    help="An option of the backend, such as kv_offload=true or mini_seq_len=2048. Can be repeated.",
)  # fmt: skip
