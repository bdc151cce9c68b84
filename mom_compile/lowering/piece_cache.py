"""Compiled pieces, shared by all graphs of a process.

The layers of a decoder are the same graph with different weights. The key of a piece is its graph, with names and
symbols numbered in order of appearance, and its templates, so all layers share one piece.
"""

from __future__ import annotations

import logging
import time

from mom_compile.lowering.pieces import Piece
from mom_compile.progress import advance
from mom_compile.report.facts import PieceLog
from mom_compile.torch_compat.dynamo import COMPILING
from mom_compile.torch_compat.inductor import CodegenSettings
from mom_passes.source_lines import source_range

log = logging.getLogger(__name__)


class PieceCache:
    def __init__(self) -> None:
        self._pieces: dict[tuple[str, bool, str], Piece] = {}

    def get(self, piece: Piece, settings: CodegenSettings, report: PieceLog, name: str) -> Piece:
        """Return the compiled piece with the same key. If there is none, compile this one."""
        found = self.begin(piece, settings, report, name)
        self.finish(found, report, name)
        return found

    def begin(self, piece: Piece, settings: CodegenSettings, report: PieceLog, name: str) -> Piece:
        """Do the same as `get`, but do not wait for C++ compilers, so that the next piece is made meanwhile."""
        key = (settings.key, piece.strict, piece.key())
        with COMPILING:
            found = self._pieces.get(key)
            if found is None:
                began = time.perf_counter()
                piece.settings = settings
                piece.make()
                seconds = time.perf_counter() - began
                report.compiled_pieces.append(name)
                report.compile_seconds += seconds
                log.debug("made %s in %.1f s", name, seconds)
                found = self._pieces[key] = piece
            else:
                report.bodies_shared += 1
                log.debug("%s shares a compiled piece", name)
        advance()
        return found

    def finish(self, found: Piece, report: PieceLog, name: str) -> None:
        """Wait for the C++ compilers of a piece, and report a piece that runs eagerly."""
        began = time.perf_counter()
        found.finish()
        report.compile_seconds += time.perf_counter() - began
        advance()
        if found.eager_reason is not None:
            report.eager_pieces[name] = found.eager_reason
            line = source_range(found.gm.graph)
            report.source_lines |= {} if line is None else {name: line}

    def clear(self) -> None:
        self._pieces.clear()
