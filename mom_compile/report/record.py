"""What was done to a graph and what was not, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from mom_compile.report.shares import Share
from mom_compile.report.stages import StageReport
from mom_compile.torch_compat.recompiles import GraphCount
from mom_passes.program.memory import Memory
from mom_passes.program.own_rows import OwnRows
from mom_passes.program.program import Call, Compute, LoopStep, Transfer
from mom_passes.program.traffic import WeightTraffic

#: What a graph is for. One that attends to nothing has no name: what lies between two breaks, say.
PREFILL, DECODE_STEP, SCORING, GRAPH = "prefill", "decode step", "scoring", "graph"


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


#: A cache that fits this many times leaves decode steps whole. It may outgrow the device in one run only by then.
HEADROOM = 2


@dataclass(frozen=True)
class ForLong:
    """What "auto" asks of a device once: whether it has `needed` bytes, so that all keys and values may stay for long.
    `budget` is what it had for everything, its `weights` included."""

    needed: int
    weights: int
    budget: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.budget

    def __str__(self) -> str:
        return f"weights and {HEADROOM} times the present cache take {self.needed} bytes, {self.budget} may be used"


@dataclass
class Record:
    """What is known of one captured graph.

    kind           "prefill", "decode step" (one token of each sequence), "scoring" (logits of all tokens, no cache), or
                   "graph" for what attends to nothing
    fallback       why the graph went to stock Inductor unchanged, or None
    failed         whether that reason was a failure of ours rather than a decision
    stages         the loops, in the order they run
    left_out       operator -> why it runs on the full sequence
    no_loops       why nothing runs over mini-sequences although the graph is ours, or None
    refused        why a `memory_budget` that was asked for cannot be kept, where `explain` has found that; else empty
    rows           why mini-sequences have the rows that they have, where a rule says it for a GPU; else empty
    tokens         how many tokens the longest loop had when it was captured
    peak_without_loops  what `expected_peak_bytes` would be if the captured operators ran one by one on all tokens, by
                   the same memory model; None where it does not say (experts) or nobody asked (`explain` does)
    peak           what the expected peak is made of, the largest first
    keys_and_values  names of all values that attentions read as such
    growing        positions of outputs that a cache keeps, with the dimension in which the next call finds them longer
    memory         what the program needs, step by step, as expressions in the sizes of the graph
    on_host        keys and values that leave for the host
    weights        what arrives of weights that are kept on the host, or None
    for_long       whether all keys and values of a decode step may stay, where "auto" had to ask
    on_device      keys and values that stay on the device, by name, with the reason
    own_rows       outputs, windows of a cache say, whose rows were copied out of a larger value that then goes
    eager_pieces   pieces that Inductor could not compile and that run eagerly, with its error
    source_lines   the user's line, by the names in `left_out`, `on_device` and `eager_pieces`, where it is known
    work           multiply-adds of all matrix products and attentions, at the captured sizes
    work_outside   those of them that run on the full sequence, by operator as in `left_out`
    layer_pieces   into how many pieces a graph without loops was cut, so that its layers share them; 0: it stayed whole
    from_cache     whether this process read it from the compile cache: no pass has run, and there is no code to show
    graphs         which of the graphs that Dynamo makes of its code this is, and how many there may be; None where
                   Dynamo did not compile it (`explain`)
    limit_hit      whether Dynamo has since given a call of this code up to eager mode, because it has made its most
    compiled_pieces  the loop bodies and straight pieces that were compiled for this graph; the others were shared
    """

    nodes: int = 0
    kind: str = GRAPH
    fallback: str | None = None
    failed: bool = False
    token_dimension: str = ""
    stages: list[StageReport] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    no_loops: str | None = None
    refused: str = ""
    rows: str = ""
    tokens: int = 0
    peak_without_loops: int | None = None
    peak: tuple[Share, ...] = ()
    keys_and_values: frozenset[str] = frozenset()
    growing: tuple[tuple[int, int], ...] = ()
    memory: Memory | None = None
    on_host: list[KVReport] = field(default_factory=list)
    weights: WeightTraffic | None = None
    for_long: ForLong | None = None
    on_device: dict[str, str] = field(default_factory=dict)
    own_rows: list[OwnRows] = field(default_factory=list)
    eager_pieces: dict[str, str] = field(default_factory=dict)
    source_lines: dict[str, str] = field(default_factory=dict)
    compiled_pieces: list[str] = field(default_factory=list)
    work: int = 0
    work_outside: dict[str, int] = field(default_factory=dict)
    bodies_shared: int = 0
    layer_pieces: int = 0
    compile_seconds: float = 0.0
    from_cache: bool = False
    graphs: GraphCount | None = None
    limit_hit: bool = False
    graph: fx.GraphModule | None = None

    def locate(self, lines: Mapping[str, str | None]) -> None:
        """Add source lines of names. None: the line is not known."""
        self.source_lines |= {name: line for name, line in lines.items() if line is not None}

    def located(self, name: str) -> str:
        """Return a name with its source line, if that is known."""
        line = self.source_lines.get(name)
        return name if line is None else f"{name} ({line})"

    @property
    def floor_bytes(self) -> int:
        """The least a run needs, at the captured sizes: the full-length values of the stage that has most of them."""
        return max((sum(value.bytes for value in stage.live) for stage in self.stages), default=0)

    @property
    def iteration_bytes(self) -> int:
        """What one mini-sequence is expected to hold beside full-length values, at the captured sizes."""
        return max((stage.iteration_bytes for stage in self.stages), default=0)

    @property
    def straight_bytes(self) -> int:
        """The most that is alive between loops, at the captured sizes."""
        return self.memory.most(Compute, Call, Transfer) if self.memory is not None else 0

    @property
    def expected_peak_bytes(self) -> int:
        """What a run is expected to take above its inputs, at the captured sizes: in a loop or between two.

        An estimate: kernels need memory of their own beside it, and Inductor may get by with less.
        """
        return self.memory.most(LoopStep, Compute, Call, Transfer) if self.memory is not None else 0

    def exposed_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """How long a run waits for weights on a link and a device of so much, at the captured sizes: what of their
        copies is not hidden behind the compute before it. 0 where none is on the host."""
        arrivals = self.weights.arrivals if self.weights is not None else ()
        return sum(arrival.exposed(bytes_per_second, flops_per_second) for arrival in arrivals)

    @property
    def floor_bytes_per_token(self) -> int:
        return max((sum(value.bytes_per_token for value in stage.live) for stage in self.stages), default=0)

    @property
    def full_length_values(self) -> list[str]:
        """Names of all values that live at full length, stage by stage."""
        return [output.name for stage in self.stages for output in stage.crossing]


def limit_in_words(record: Record) -> str | None:
    """What Dynamo's limit on the number of graphs means for calls to come; None as long as there may be more graphs."""
    graphs = record.graphs
    if graphs is None or not (record.limit_hit or graphs.number >= graphs.most):
        return None
    to_come = "a call that needs another one runs in eager mode"
    now = "calls have run in eager mode since" if record.limit_hit else to_come
    return f"graph {graphs.number} of the {graphs.most} that {graphs.limit} allows for this code: {now}"


def host_share(record: Record) -> tuple[int, int] | None:
    """Of how many layers keys and values leave for the host, and their bytes per token; None where none does."""
    if not record.on_host or record.fallback is not None:
        return None
    return len({value.layer for value in record.on_host}), sum(value.bytes_per_token for value in record.on_host)


def own_share(record: Record) -> tuple[int, int]:
    """Bytes of the rows that are copied out of larger values, and of these values."""
    return sum(rows.bytes for rows in record.own_rows), sum(rows.base_bytes for rows in record.own_rows)


def moved_rows(record: Record) -> str:
    """What leaves for the host, in words."""
    rows = "new rows" if all(value.has_past for value in record.on_host) else "rows"
    return f"{rows} of {len(record.on_host)} keys and values"
