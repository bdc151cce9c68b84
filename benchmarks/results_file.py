"""Results that are written to disk as they arrive, and continued by the next run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
#: Fields of the machine that may differ between two runs of one file.
OF_A_RUN = ("date", "mom_compile")


class OtherMachine(RuntimeError):
    """The file has figures of another machine or of other versions, which must not be mixed with new ones."""


class Results:
    """Figures by key, in a file that is complete after each.

    `known` are files of earlier runs, the newest last. Those of another machine raise `OtherMachine`; differences in
    `may_differ` are allowed.
    """

    def __init__(
        self,
        path: Path,
        machine: Mapping[str, Any],
        known: tuple[Path, ...] = (),
        *,
        may_differ: tuple[str, ...] = OF_A_RUN,
    ) -> None:
        self.path, self.may_differ = path, may_differ
        self.data: Row = {"machine": dict(machine), "rates": None, "cells": {}}
        for source in dict.fromkeys((*known, path)):
            if source.exists():
                self._take(source, machine)

    def _take(self, source: Path, machine: Mapping[str, Any]) -> None:
        found = json.loads(source.read_text())
        of_ours, of_file = (
            {name: value for name, value in stamp.items() if name not in self.may_differ}
            for stamp in (machine, found["machine"])
        )
        if of_ours != of_file:
            differing = sorted(k for k in of_ours | of_file if of_ours.get(k) != of_file.get(k))
            raise OtherMachine(
                f"{source.name} was made with other {', '.join(differing)}; "
                "--fresh measures again, --results FILE selects another file"
            )
        self.data["cells"] |= found["cells"]
        self.data["rates"] = found["rates"]
        if "questions" in found:
            self.data["questions"] = {**self.data.get("questions", {}), **found["questions"]}

    @property
    def cells(self) -> dict[str, Row]:
        return self.data["cells"]  # type: ignore[no-any-return]

    def keep(self, key: str, row: Mapping[str, Any]) -> None:
        self.cells[key] = dict(row)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.path)


def taken_up(
    path: Path, machine: Mapping[str, Any], *, fresh: bool, may_differ: tuple[str, ...] = OF_A_RUN
) -> Results | None:
    """Return the results of a file, which is deleted first if `fresh`. Return None, with a message on standard error,
    if the
    file has results of another machine."""
    if fresh:
        path.unlink(missing_ok=True)
    try:
        return Results(path, machine, may_differ=may_differ)
    except OtherMachine as other:
        print(other, file=sys.stderr)
        return None
