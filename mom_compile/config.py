"""Options of the backend: frozen, validated, with defaults in one place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mom_compile.quantities import parse_bytes
from mom_compile.runtime.host.placement import MEMORY, TIERS
from mom_compile.torch_compat import UserError, inductor_option_names, mode_options
from mom_passes.loops.loop import ExpertRows, RowLimit

#: Tokens per mini-sequence with `mini_seq_len="auto"`, by type of device, until the memory model chooses it.
#: CPU: at the shape of `benchmarks.cpu`, 512 rows peak at 1.28 times what must live at full length, 1024 at 1.56 and
#: 2048 at 2.12, all in the same time within a tenth (`python -m benchmarks.cpu --only prefill --backends mom-512
#: mom-1024 mom-2048`; torch 2.13.0, 2 cores). Elsewhere 1024, never measured. Of a CUDA device this only says which
#: prompts are too short for loops, and the rows of graphs without weights or with experts: for it there is
#: `memory/layer_rows.py`.
DEFAULT_MINI_SEQ_LEN = {"cpu": 512}
DEFAULT_ELSEWHERE = 1024

#: Rows that the mini-sequences of a short prompt have at least, with `mini_seq_len="auto"`, by type of device. At the
#: shape of `benchmarks.cpu` 256 rows take 1.05 times the time of 512, 128 rows 1.2 times (`--backends mom-128 mom-256
#: mom-512`; torch 2.13.0, 2 cores). Elsewhere fewer rows than the default were never measured.
SHORT_MINI_SEQ_LEN = {"cpu": 256}

#: With `mini_seq_len="auto"`, bytes that one value of a mini-sequence may take: 128 rows of logits over a vocabulary of
#: 262,144 in float32. A product with 128 rows is already bound by arithmetic, not by reading the weights.
DEFAULT_VALUE_BYTES = 128 << 20

#: Rows that the product of one expert should have, with `mini_seq_len="auto"`, and the bytes that a value may take for
#: their sake. Elsewhere than on a CPU by the rule of arithmetic intensity, never measured: a product of r rows with a
#: matrix computes r FLOPs for each byte of it in 16 bits, and an H100 computes 990e12 / 3.35e12 = 295 in the time in
#: which it reads one.
EXPERT_ROWS = {"cpu": ExpertRows(64, 512 << 20)}
EXPERT_ROWS_ELSEWHERE = ExpertRows(300, 512 << 20)

#: Beyond this no model has tokens; a larger number is a slip of the keyboard.
MAX_MINI_SEQ_LEN = 1 << 30

SCOPES = ("layer", "mlp", "none")

KV_OFFLOAD = (True, False, "auto", *(name for name in TIERS if name != MEMORY))


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="mom", options={...})` accepts.

    mini_seq_len  tokens per mini-sequence (at least 2), or "auto"
    scope         "layer": everything between two attentions' keys and values; "mlp": MLPs and the LM head alone, as
                  in the MOM paper, to compare with; "none": stock Inductor
    kv_offload    True: the keys and values of a cache are kept in host memory; "disk": in files in `kv_dir`; "auto":
                  only those of as many layers as do not fit into `memory_budget`; False: none
    kv_dir        an existing folder that may be written to
    memory_budget bytes of device memory for everything, weights included, as a number or as "24GiB"; None: what the
                  device has free (a CPU has no memory apart from the host's: there, None keeps all layers)
    strict        our own failures raise instead of falling back to stock Inductor
    inductor      Inductor options, passed through; a `mode` adds to them

    `torch.compile` takes `mode=` or `options=`, not both: with options, write what the mode stands for,
    `options={"kv_offload": True, "inductor": torch._inductor.list_mode_options("max-autotune")}`.
    """

    mini_seq_len: int | str = "auto"
    scope: str = "layer"
    kv_offload: bool | str = "auto"
    kv_dir: str | None = None
    memory_budget: int | str | None = None
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def limit(self, device: str) -> RowLimit:
        """How long a mini-sequence may be on a type of device (`"cpu"`, `"cuda"`)."""
        if self.mini_seq_len == "auto":
            rows = DEFAULT_MINI_SEQ_LEN.get(device, DEFAULT_ELSEWHERE)
            experts = EXPERT_ROWS.get(device, EXPERT_ROWS_ELSEWHERE)
            return RowLimit(rows, DEFAULT_VALUE_BYTES, experts, SHORT_MINI_SEQ_LEN.get(device))
        return RowLimit(int(self.mini_seq_len))

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Validate what the user passed. Raises `ValueError` that lists what is valid and names what is nearest to it."""
    given = dict(options or {})
    names = [f.name for f in fields(Options)]
    unknown = sorted(set(given) - set(names), key=str)
    if unknown:
        raise UserError(
            f"unknown option {_listed(unknown)} for backend 'mom'{_meant(unknown[0], names)}; "
            f"valid options are {_listed(names)}"
        )
    inductor = _inductor_options(given.get("inductor", {}), mode)
    parsed = Options(**{**given, "inductor": inductor})
    _check_mini_seq_len(parsed.mini_seq_len)
    if parsed.scope not in SCOPES:
        raise UserError(
            f"scope={parsed.scope!r} is not valid{_meant(parsed.scope, SCOPES)}; it is one of {_listed(SCOPES)}"
        )
    _check_kv(parsed)
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


def _check_kv(options: Options) -> None:
    if options.kv_offload not in KV_OFFLOAD or isinstance(options.kv_offload, int) != isinstance(
        options.kv_offload, bool
    ):
        raise UserError(
            f"kv_offload={options.kv_offload!r} is not valid{_meant(options.kv_offload, KV_OFFLOAD)}; "
            f"it is one of {_listed(KV_OFFLOAD)}"
        )
    if options.memory_budget is not None:
        parse_bytes(options.memory_budget)
    in_a_folder = [name for name, tier in TIERS.items() if tier.needs_directory]
    if options.kv_offload in in_a_folder:
        if options.kv_dir is None:
            raise UserError(f"kv_offload={options.kv_offload!r} needs kv_dir, the folder for the files")
        if not os.path.isdir(options.kv_dir):
            raise UserError(f"kv_dir={options.kv_dir!r} is not a folder; it has to exist")
        if not os.access(options.kv_dir, os.W_OK | os.X_OK):
            raise UserError(f"kv_dir={options.kv_dir!r} cannot be written to")
    elif options.kv_dir is not None:
        raise UserError(
            f"kv_dir is for kv_offload={' or '.join(map(repr, in_a_folder))}, and kv_offload is {options.kv_offload!r}"
        )


def _inductor_options(given: Any, mode: str | None) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"inductor={given!r} is not valid; it is a dictionary of Inductor options")
    merged = _options_of_mode(mode)
    known = inductor_option_names()
    for name, value in given.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise UserError(
                f"unknown Inductor option {name!r}{_meant(key, known)}; torch._inductor.list_options() lists them"
            )
        merged[key] = value
    return merged


def _options_of_mode(mode: str | None) -> dict[str, Any]:
    if mode in (None, "default"):
        return {}
    try:
        return mode_options(str(mode))
    except RuntimeError as error:
        raise UserError(f"mode={mode!r} is not valid: {error}") from None


def _meant(given: Any, valid: Iterable[Any]) -> str:
    """The nearest of what is valid, in brackets; or where an Inductor option that stands among ours belongs."""
    if not isinstance(given, str):
        return ""
    names = [name for name in valid if isinstance(name, str)]
    near = difflib.get_close_matches(given.lower(), names, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    if "inductor" in names and given in inductor_option_names():
        return f" (it is one of Inductor's: options={{'inductor': {{{given!r}: ...}}}})"
    return ""


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
