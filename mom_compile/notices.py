"""What a user is told while a model compiles: each thing once, not for every graph of the model."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
import warnings
from collections.abc import Mapping

from mom_compile.versions import running, untested

#: Names listed with a reason; a deep model has many.
_MOST_NAMES = 4


class MomWarning(UserWarning):
    """Something does not go as asked: a graph fell back, or a request of the user's is not honoured."""


_said: set[str] = set()

#: Libraries that call a model for their user, or that stand between a call of it and us.
_LIBRARIES = frozenset({"mom_compile", "mom_passes", "torch", "transformers", "accelerate", "peft"})
_STANDARD_LIBRARY, _PACKAGES = (sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib"))


def _warn(text: str) -> None:
    """Warn at the user's line: that of the innermost frame which is of no library between a call and us."""
    frame = sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        frame = frame.f_back
    seen = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(text, MomWarning, frame.f_code.co_filename, frame.f_lineno, name, seen)


def _is_between(frame: types.FrameType) -> bool:
    name, file = frame.f_globals.get("__name__"), frame.f_code.co_filename
    if name is None or name.partition(".")[0] in _LIBRARIES:
        return True  # generated code has no name
    return file.startswith(("<frozen ", _STANDARD_LIBRARY)) and not file.startswith(_PACKAGES)


def warn_once(key: str, text: str) -> None:
    """Warn unless something was said under that key since the last `forget`."""
    if key not in _said:
        _warn(text)
        _said.add(key)


def forget() -> None:
    """Say everything anew, but for what concerns the whole process."""
    _said.clear()


@functools.cache
def warn_of_versions() -> None:
    """Once in a process: what is outside the tested range."""
    text = untested(running())
    if text is not None:
        _warn(text)


def warn_of_gradients() -> None:
    text = "graphs that need gradients are left to stock Inductor; call the model under torch.no_grad() or "
    warn_once("gradients", f"backend 'mom' is for inference: {text}torch.inference_mode()")


def warn_of_device_kv(option: object, on_device: Mapping[str, str]) -> None:
    """`kv_offload` was asked for, and these keys and values stay: name -> reason. Each reason is told once."""
    for reason in dict.fromkeys(on_device.values()):
        names = [name for name, why in on_device.items() if why == reason]
        shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
        warn_once(
            f"kv: {reason}",
            f"kv_offload={option!r} is not honoured for {len(names)} keys or values, which stay on the device: "
            f"{reason} ({shown})",
        )


def warn_of_ignored_kv(option: object, reason: str) -> None:
    """`kv_offload` was asked for, and stock Inductor has the whole graph."""
    warn_once(f"ignored: {reason}", f"kv_offload={option!r} is not honoured: {reason}")
