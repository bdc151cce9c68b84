"""What a user is told while a model compiles: each thing once, not for every graph of the model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

from mom_compile.versions import running, untested

#: Names listed with a reason; a deep model has many.
_MOST_NAMES = 4


class MomWarning(UserWarning):
    """Something does not go as asked: a graph fell back, or a request of the user's is not honoured."""


_said: set[str] = set()


def warn_once(key: str, text: str) -> None:
    """Warn unless something was said under that key since the last `forget`."""
    if key not in _said:
        warnings.warn(text, MomWarning, stacklevel=3)
        _said.add(key)


def forget() -> None:
    """Say everything anew, but for what concerns the whole process."""
    _said.clear()


@functools.cache
def warn_of_versions() -> None:
    """Once in a process: what is outside the tested range."""
    text = untested(running())
    if text is not None:
        warnings.warn(text, MomWarning, stacklevel=3)


def warn_of_gradients() -> None:
    text = "graphs that need gradients are left to stock Inductor; call the model under torch.no_grad() or "
    warn_once("gradients", f"backend 'mom' is for inference: {text}torch.inference_mode()")


def warn_of_freezing() -> None:
    text = "it would copy the weights into every compiled graph; use backend='inductor' to compile with it"
    warn_once("freezing", f"backend 'mom' compiles without Inductor's freezing: {text}")


def warn_of_eager(what: str, reason: str) -> None:
    """Inductor could not compile something, which runs eagerly. Each reason is told once."""
    warn_once(f"eager: {reason}", f"Inductor could not compile {what}, which runs eagerly: {reason}")


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
