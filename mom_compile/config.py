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
from mom_passes.loops.loop import FEWEST_ROWS, RowLimit

#: Beyond this no model has tokens; a larger number is a slip of the keyboard.
MAX_MINI_SEQ_LEN = 1 << 30

#: How alike a misspelt name and an option are: `max_seq_len`, a name that models have, is less like `mini_seq_len`.
_SLIP = 0.9

SCOPES = ("layer", "mlp", "none")

KV_OFFLOAD = (True, False, "auto", *(name for name in TIERS if name != MEMORY))


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="mom", options={...})` accepts.

    mini_seq_len  tokens per mini-sequence (at least 2), or "auto": as many as hold a tenth of what lives at full
                  length, but no fewer than are efficient on a device, and no more than help; on a GPU as many as help
    scope         "layer": everything between two attentions' keys and values; "mlp": MLPs and the LM head alone, as
                  in the MOM paper, to compare with; "none": stock Inductor
    kv_offload    True: the keys and values of a cache are kept in host memory; "disk": in files in `kv_dir`; "auto":
                  only those of as many layers as do not fit into `memory_budget`; False: none
    kv_dir        an existing folder that may be written to
    memory_budget bytes of device memory for everything, weights included, as a number or as "24GiB"; None: what the
                  device has free (a CPU has no memory apart from the host's: there, None keeps all layers). Fewer
                  tokens at a time keep it first, then layers leave; what cannot be kept is a `MemoryBudgetError`
    decode_cuda_graphs
                  whether pieces of a decode step between two attentions are recorded as CUDA graphs, where their shapes
                  are the same in every step and their weights on the device; it has never run on a GPU
    strict        a failure of our own raises instead of falling back to stock Inductor; a piece that Inductor cannot
                  compile raises instead of running eagerly
    inductor      Inductor options, passed through; a `mode` adds to them
    progress      what takes longer than a second to compile is told on standard error

    `torch.compile` takes `mode=` or `options=`, not both: with options, write what the mode stands for,
    `options={"kv_offload": True, "inductor": torch._inductor.list_mode_options("max-autotune")}`.
    """

    mini_seq_len: int | str = "auto"
    scope: str = "layer"
    kv_offload: bool | str = "auto"
    kv_dir: str | None = None
    memory_budget: int | str | None = None
    decode_cuda_graphs: bool = False
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)
    #: Not in `repr`, which is in the keys of the compile cache.
    progress: bool = field(default=True, repr=False)

    def limit(self, device: str) -> RowLimit:
        """How long a mini-sequence may be on a type of device (`"cpu"`, `"cuda"`). With "auto" that is decided once it
        is known what one holds: `memory/row_rule.py`."""
        if self.mini_seq_len == "auto":
            return RowLimit(FEWEST_ROWS, fewest=True)
        return RowLimit(int(self.mini_seq_len))

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)


def option_names() -> tuple[str, ...]:
    """Names of all options of the backend."""
    return tuple(f.name for f in fields(Options))


def meant_as_option(name: str) -> bool:
    """Whether a name looks like an option: a misspelt option of the backend, or an option of Inductor."""
    near = difflib.get_close_matches(name.lower(), option_names(), n=1, cutoff=_SLIP)
    return bool(near) or name in inductor_option_names()


def joined_options(options: object, named: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the options of a mapping and those given by name. `parse_options` checks whether they are valid.

    Raises `TypeError` for `options` that are not a mapping, and for an option that is given both ways.
    """
    given: dict[str, Any] = {}
    if isinstance(options, Mapping):
        given.update(options)
    elif options is not None:
        example = "write options={'kv_offload': True} or kv_offload=True"
        raise TypeError(f"options={options!r} is not a mapping; {example}")
    twice = sorted(given.keys() & named.keys(), key=str)
    if twice:
        raise TypeError(f"{_listed(twice)} given twice: in options={{...}} and by name; give each option once")
    return {**given, **named}


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Validate what the user passed. Raises `ValueError` that lists what is valid and names what is nearest to it."""
    given = dict(options or {})
    names = option_names()
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
    for name in ("decode_cuda_graphs", "strict", "progress"):
        value = getattr(parsed, name)
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r} is not valid; it is True or False")
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
