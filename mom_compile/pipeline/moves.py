"""The steps after loops, or without them: copies between host and device, and which storage a value has."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from torch import fx

from mom_passes.graph.edit import compute_device
from mom_passes.host.chosen import fetch_used_parts
from mom_passes.host.kv_extended import extend_in_place
from mom_passes.host.kv_offload import KVOffload, kv_offload
from mom_passes.host.kv_values import KVValues
from mom_passes.host.weights import weights_arrive
from mom_passes.loops.body_parts import may_overlap
from mom_passes.loops.loop import loop_nodes, loops
from mom_passes.ops.transfers import FETCH_CHOSEN, FETCH_ROWS
from mom_passes.program.in_place import take_over_storage
from mom_passes.program.overlap import overlap
from mom_passes.program.own_rows import OwnRows, own_rows
from mom_passes.program.slots import reuse_slots
from mom_passes.tokens.region import inline_regions
from mom_passes.tokens.scored import scores_in_blocks


@dataclass
class Moves:
    """A graph that steps edit, with its keys and values as found before loops, and what the steps have moved."""

    gm: fx.GraphModule
    static_inputs: Collection[str]
    kv: KVValues
    kv_on_host: bool
    offload: KVOffload = field(default_factory=lambda: KVOffload((), {}, 0))
    #: The waits for weights that arrive from the host.
    weights: tuple[fx.Node, ...] = ()
    own_rows: tuple[OwnRows, ...] = ()
    #: Whether a mini-sequence computes while the collective of another is under way.
    overlap_collectives: bool = True

    @property
    def matter(self) -> bool:
        """Whether a graph without loops differs from the captured one in what matters: it reads weights on the host,
        moves keys and values there, or has logits in blocks."""
        fetches = any(node.target in (FETCH_ROWS, FETCH_CHOSEN) for node in self.gm.graph.nodes)
        return bool(self.offload or self.weights) or fetches or scores_in_blocks(self.gm.graph)


Step = Callable[[Moves], str]


def only_what_is_needed(moves: Moves) -> str:
    """Fetch only a part of weights on the host: matrices of the chosen experts, rows that are looked up."""
    return f"of {fetch_used_parts(moves.gm)} weights on the host a part arrives"


def regions_put_back(moves: Moves) -> str:
    """Inline outlined regions that are in no loop."""
    return f"{inline_regions(moves.gm)} regions"


def keys_and_values_to_host(moves: Moves) -> str:
    """Copy what the cache keeps to the host after its stage, and back for its attention."""
    moves.offload = kv_offload(moves.gm, compute_device(moves.gm), start=moves.kv_on_host, kv=moves.kv)
    return f"{len(moves.offload.leaving)} values leave, {moves.offload.arriving} arrive"


def cache_grows_in_place(moves: Moves) -> str:
    """Write the new rows of keys and values that stay on the device into the storage of the old ones."""
    return f"{extend_in_place(moves.gm, moves.kv, moves.static_inputs)} keys and values"


def weights_for_their_stretch(moves: Moves) -> str:
    """Let weights on the host arrive before the loop, or the stretch between two attentions, that reads them."""
    moves.weights = weights_arrive(moves.gm)
    return f"{len(moves.weights)} weights arrive"


def copies_one_layer_ahead(moves: Moves) -> str:
    """Start copies to the device while the layer before computes."""
    return f"{overlap(moves.gm, moves.weights)} layers arrive"


def weights_in_place_of_others(moves: Moves) -> str:
    """Reuse the storage of a weight that is not read any more for one that arrives."""
    return f"{reuse_slots(moves.gm, moves.weights)} of {len(moves.weights)} weights take another's place"


def rows_of_their_own(moves: Moves) -> str:
    """Copy parts of a value that leave, such as a window of a cache, so that the rest of the value can die."""
    moves.own_rows = own_rows(moves.gm)
    return f"{len(moves.own_rows)} parts"


def residual_in_place(moves: Moves) -> str:
    """Store rows over an operand that dies in the stage: the residual stream exists once."""
    moves.gm = take_over_storage(moves.gm)
    taken = [o.name for _, loop in loops(moves.gm) for o in loop.stored if o.over is not None]
    return f"{len(taken)} values in place of others"


def collectives_under_way(moves: Moves) -> str:
    """Let two mini-sequences of each loop with collectives take turns."""
    found = [m for _, m in loop_nodes(moves.gm) if moves.overlap_collectives and may_overlap(m.loop)]
    for module in found:
        module.loop = replace(module.loop, in_flight=2)
    return f"{len(found)} loops with two mini-sequences in flight"


BETWEEN_LOOPS: tuple[Step, ...] = (
    only_what_is_needed,
    regions_put_back,
    keys_and_values_to_host,
    cache_grows_in_place,
    weights_for_their_stretch,
    copies_one_layer_ahead,
    weights_in_place_of_others,
)
#: What decides which storage a value has, once it is known what leaves: a value that was copied out does not hold it.
STORAGE: tuple[Step, ...] = (rows_of_their_own, residual_in_place, collectives_under_way)
