"""What the passes found out about a graph, apart from the graph itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mom_passes.program.own_rows import OwnRows

#: What a graph is for. A graph without attention, such as one between two graph breaks, is a `GRAPH`. An `ENCODER`,
#: such as a vision tower, has attention that is not causal, and keeps no keys and values.
PREFILL, DECODE_STEP, SCORING, ENCODER, GRAPH = "prefill", "decode step", "scoring", "encoder", "graph"


@dataclass(frozen=True)
class KVReport:
    """Keys or values of one layer that leave for the host: all rows or, with a past, only the new ones.

    `bytes_per_token` is what each token of it takes on the host instead of on the device.
    """

    name: str
    layer: int
    bytes_per_token: int
    has_past: bool


@dataclass(frozen=True)
class PassReport:
    name: str
    seconds: float
    change: str


@dataclass(frozen=True)
class Facts:
    """What is known of one graph after the passes.

    Attributes
    ----------
    kind : str
        `"prefill"`, `"decode step"` (one token of each sequence), `"scoring"` (logits of all tokens, no cache),
        `"encoder"` (attention that is not causal, no cache), or `"graph"` for a graph without attention.
    keys_and_values : frozenset of str
        Names of all values that attentions read as keys or values.
    growing : tuple of (int, int)
        Positions of outputs that a cache keeps, with the dimension in which the next call finds them longer.
    token_dimension : str
        The dimension that carries tokens, in words.
    left_out : mapping of str to str
        Operator to the reason why it runs on the full sequence.
    work : int
        Multiply-adds of all matrix products and attentions, at the captured sizes.
    work_outside : mapping of str to int
        Multiply-adds of these that run on the full sequence, by operator as in `left_out`.
    on_host : tuple of KVReport
        Keys and values that leave for the host.
    on_device : mapping of str to str
        Keys and values that stay on the device, by name, with the reason.
    own_rows : tuple of OwnRows
        Outputs, such as windows of a cache, whose rows were copied out of a larger value that is then freed.
    source_lines : mapping of str to str
        The user's line, by the names in `left_out` and `on_device`, where it is known.
    passes : tuple of PassReport
        Name, seconds and effect of each pass.
    """

    kind: str = GRAPH
    keys_and_values: frozenset[str] = frozenset()
    growing: tuple[tuple[int, int], ...] = ()
    token_dimension: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    work: int = 0
    work_outside: Mapping[str, int] = field(default_factory=dict)
    on_host: tuple[KVReport, ...] = ()
    on_device: Mapping[str, str] = field(default_factory=dict)
    own_rows: tuple[OwnRows, ...] = ()
    source_lines: Mapping[str, str] = field(default_factory=dict)
    passes: tuple[PassReport, ...] = ()

    def located(self, name: str) -> str:
        """Return a name with its source line, if that is known."""
        line = self.source_lines.get(name)
        return name if line is None else f"{name} ({line})"


NOTHING_FOUND = Facts()


@dataclass
class PieceLog:
    """The pieces of one graph as they were compiled.

    It has the names of those that are new, how many are shared with other graphs, the seconds that took, and those that
    run eagerly, with Inductor's error and the user's line.
    """

    compiled_pieces: list[str] = field(default_factory=list)
    bodies_shared: int = 0
    compile_seconds: float = 0.0
    eager_pieces: dict[str, str] = field(default_factory=dict)
    source_lines: dict[str, str] = field(default_factory=dict)

    def located(self, name: str) -> str:
        """Return a name with its source line, if that is known."""
        line = self.source_lines.get(name)
        return name if line is None else f"{name} ({line})"
