"""Options of the backend: frozen, validated, with defaults in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mom_compile.torch_compat import UserError, inductor_option_names, mode_options
from passes.mini_sequence import RowLimit

#: Tokens per mini-sequence with `mini_seq_len="auto"`, by type of device, until the memory model chooses it.
#: CPU: at the shape of `make bench`, 512 rows peak at 1.28 times what must live at full length, 1024 at 1.56 and 2048
#: at 2.12, all in the same time within a tenth (`python -m benchmarks.cpu --only prefill --backends mom-512 mom-1024
#: mom-2048`; torch 2.13.0, 2 cores). Elsewhere 1024, never measured: a GPU wants more rows to a kernel.
DEFAULT_MINI_SEQ_LEN = {"cpu": 512}
DEFAULT_ELSEWHERE = 1024

#: With `mini_seq_len="auto"`, bytes that one value of a mini-sequence may take: 128 rows of logits over a vocabulary of
#: 262,144 in float32. A product with 128 rows is already bound by arithmetic, not by reading the weights.
DEFAULT_VALUE_BYTES = 128 << 20

#: Beyond this no model has tokens; a larger number is a slip of the keyboard.
MAX_MINI_SEQ_LEN = 1 << 30

SCOPES = ("layer", "mlp", "none")


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="mom", options={...})` accepts.

    mini_seq_len  tokens per mini-sequence (at least 2), or "auto"
    scope         "layer": everything between two attentions' keys and values; "mlp": MLPs and the LM head alone, as
                  in the MOM paper, to compare with; "none": stock Inductor
    strict        our own failures raise instead of falling back to stock Inductor
    inductor      Inductor options, passed through; a `mode` adds to them
    """

    mini_seq_len: int | str = "auto"
    scope: str = "layer"
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def limit(self, device: str) -> RowLimit:
        """How long a mini-sequence may be on a type of device (`"cpu"`, `"cuda"`)."""
        if self.mini_seq_len == "auto":
            return RowLimit(DEFAULT_MINI_SEQ_LEN.get(device, DEFAULT_ELSEWHERE), DEFAULT_VALUE_BYTES)
        return RowLimit(int(self.mini_seq_len))


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Validate what the user passed. Raises `ValueError` that lists what is valid."""
    given = dict(options or {})
    names = [f.name for f in fields(Options)]
    unknown = sorted(set(given) - set(names), key=str)
    if unknown:
        raise UserError(f"unknown option {_listed(unknown)} for backend 'mom'; valid options are {_listed(names)}")
    inductor = _inductor_options(given.get("inductor", {}), mode)
    parsed = Options(**{**given, "inductor": inductor})
    _check_mini_seq_len(parsed.mini_seq_len)
    if parsed.scope not in SCOPES:
        raise UserError(f"scope={parsed.scope!r} is not valid; it is one of {_listed(SCOPES)}")
    if not isinstance(parsed.strict, bool):
        raise UserError(f"strict={parsed.strict!r} is not valid; it is True or False")
    return parsed


def _check_mini_seq_len(value: Any) -> None:
    if value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= MAX_MINI_SEQ_LEN:
        raise UserError(
            f"mini_seq_len={value!r} is not valid; it is 'auto' or a whole number of tokens "
            f"from 2 to {MAX_MINI_SEQ_LEN} (a mini-sequence of one row would be specialised on)"
        )


def _inductor_options(given: Any, mode: str | None) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"inductor={given!r} is not valid; it is a dictionary of Inductor options")
    merged = _options_of_mode(mode)
    known = inductor_option_names()
    for name, value in given.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise UserError(f"unknown Inductor option {name!r}; torch._inductor.list_options() lists them")
        merged[key] = value
    return merged


def _options_of_mode(mode: str | None) -> dict[str, Any]:
    if mode in (None, "default"):
        return {}
    try:
        return mode_options(str(mode))
    except RuntimeError as error:
        raise UserError(f"mode={mode!r} is not valid: {error}") from None


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
