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
    """What is known of one captured graph, as numbers and names. Sizes are in bytes at the captured sizes.

    Attributes
    ----------
    nodes : int
        Number of nodes of the captured graph.
    kind : str
        `"prefill"`, `"decode step"` (one token of each sequence), `"scoring"` (logits of all tokens, no cache),
        or `"graph"` for a graph without attention.
    fallback : str or None
        Why the graph went to stock Inductor.
    failed : bool
        Whether `fallback` is an error of this package and not a decision.
    token_dimension : str
        The dimension that carries tokens, in words.
    stages : list of StageReport
        The loops, in the order they run.
    passes : list of PassReport
        Name, seconds and effect of each pass.
    left_out : dict of str to str
        Operator to the reason why it runs on the full sequence.
    no_loops : str or None
        Why nothing runs over mini-sequences although this package compiled the graph.
    refused : str
        Why the given `memory_budget` does not suffice, where `explain` found that; else empty.
    rows : str
        Why mini-sequences have their number of rows, where a rule for a GPU decided it; else empty.
    tokens : int
        Tokens of the longest loop at capture.
    peak_without_loops : int or None
        What `expected_peak_bytes` would be if each captured operator ran on all tokens, by the same memory
        model. Only `explain` computes it, and not for experts outside of a loop.
    peak : tuple of Share
        The parts of the expected peak, the largest first.
    keys_and_values : frozenset of str
        Names of all values that attentions read as keys or values.
    growing : tuple of (int, int)
        Positions of outputs that a cache keeps, with the dimension in which the next call finds them longer.
    memory : Memory or None
        What the program needs in each step, as expressions in the sizes of the graph.
    on_host : list of KVReport
        Keys and values that leave for the host.
    weights : WeightTraffic or None
        Copies of weights that are kept on the host.
    for_long : ForLong or None
        Whether all keys and values of a decode step may stay on the device, where `kv_offload="auto"` decided
        it.
    on_device : dict of str to str
        Keys and values that stay on the device, by name, with the reason.
    own_rows : list of OwnRows
        Outputs, such as windows of a cache, whose rows were copied out of a larger value that is then freed.
    eager_pieces : dict of str to str
        Pieces that Inductor could not compile and that run eagerly, with the error.
    source_lines : dict of str to str
        The user's line, by the names in `left_out`, `on_device` and `eager_pieces`, where it is known.
    compiled_pieces : list of str
        Loop bodies and pieces that were compiled for this graph. It shares the others.
    work : int
        Multiply-adds of all matrix products and attentions, at the captured sizes.
    work_outside : dict of str to int
        Multiply-adds of these that run on the full sequence, by operator as in `left_out`.
    bodies_shared : int
        Number of loop bodies that were not compiled because an identical one existed.
    layer_pieces : int
        Number of pieces into which a graph without loops was cut, so that layers share them; 0 if it was not
        cut.
    compile_seconds : float
        Seconds that compiling took.
    from_cache : bool
        Whether the graph was read from the compile cache. There is no code to show then.
    graphs : GraphCount or None
        The number of this graph among those of its code object, and Dynamo's limit. `None` for `explain`.
    limit_hit : bool
        Whether Dynamo has run a call of this code in eager mode since, because the limit was reached.
    graph : torch.fx.GraphModule or None
        The rewritten graph.
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
        """Bytes of the full-length values of the stage that has most of them: the least that a run needs."""
        return max((sum(value.bytes for value in stage.live) for stage in self.stages), default=0)

    @property
    def iteration_bytes(self) -> int:
        """Bytes that one mini-sequence is expected to hold in addition to full-length values."""
        return max((stage.iteration_bytes for stage in self.stages), default=0)

    @property
    def straight_bytes(self) -> int:
        """The most bytes that are live between loops."""
        return self.memory.most(Compute, Call, Transfer) if self.memory is not None else 0

    @property
    def expected_peak_bytes(self) -> int:
        """The expected peak of a run in bytes above its inputs, at the captured sizes.

        It is an estimate: kernels may need workspace in addition, and Inductor may need less.
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
