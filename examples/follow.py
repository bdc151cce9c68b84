"""Follow one value of one layer from capture to kernel: `python -m examples.follow`.

The value is the activation of the second layer's MLP, `silu(gate(x)) * up(x)`, of a small Llama, which stock Inductor
holds for all tokens at once. The program prints what is known about it after each step. `docs/architecture.md` explains
the steps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from mom_compile.backend import static_input_names
from mom_compile.capture import capture
from mom_compile.config import parse_options
from mom_compile.lowering.build import Lowering
from mom_compile.lowering.piece_cache import PieceCache
from mom_compile.lowering.pieces import Piece
from mom_compile.lowering.templates import SizeTemplate
from mom_compile.memory.decide import Decision
from mom_compile.pipeline import run_pipeline
from mom_compile.pipeline.form import State
from mom_compile.pipeline.moves import Moves
from mom_compile.pipeline.to_loops import Looped, Tokens
from mom_compile.report.facts import PieceLog
from mom_compile.runtime.host.placement import Placement
from mom_compile.torch_compat.inductor import mark_boxed
from mom_passes.loops.instances import DemandGraph
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import COUNT
from mom_passes.loops.stages import Stages
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.program.program import LoopStep
from mom_passes.program.rewritten import Rewritten
from mom_passes.rules import claim_for
from mom_passes.verify import Contract, verify

aten = torch.ops.aten

#: Width of the intermediates, which identifies them: no other value has it.
INTERMEDIATE = 192
TOKENS = 300


def small_llama() -> LlamaForCausalLM:
    """Return a model with two layers and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=INTERMEDIATE, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def activation(graph: fx.Graph) -> fx.Node:
    """Return the product of both halves of the last gated MLP."""
    wide = [n for n in graph.nodes if n.target is aten.mul.Tensor and n.meta["val"].shape[-1] == INTERMEDIATE]
    return wide[-1]


@dataclass
class Follower:
    """Runs the passes one by one on a graph and reports the activation after each."""

    say: Callable[[str, Iterable[str]], None]

    def graph(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[[list[Any]], Any]:
        """Inductor's `inner_compile` hook: report, and run the graph as it was captured."""
        node = activation(gm.graph)
        readers = [f"read by {_shown(user)}" for user in node.users]
        self.say("1 capture", [f"{len(gm.graph.nodes)} nodes", _shown(node), *readers])
        options, static = parse_options({"mini_seq_len": 64}), static_input_names(gm, kwargs)
        contract = Contract.of(gm)

        def watch(step: str, found: Any) -> None:
            graph = getattr(found, "gm", None)
            if graph is not None:
                verify(graph, contract, level=2)
            tell = getattr(self, f"after_{step}", None)
            if tell is not None:
                tell(found)

        made = run_pipeline(gm, static_inputs=static, limit=options.limit("cpu"), watch=watch)
        assert made.program is not None
        self.plan(made.program)
        self.kernel(made.program, static)

        def run(inputs: list[Any]) -> Any:
            values = list(inputs)
            inputs.clear()
            return gm(*values)

        return mark_boxed(run)

    def after_canonical_attention(self, state: State) -> None:
        found = [n for n in state.gm.graph.nodes if n.target is MOM_ATTENTION]
        self.say("2 one attention", [_shown(n) for n in found])

    def after_find_tokens(self, tokens: Tokens) -> None:
        node = activation(tokens.gm.graph)
        carrier = tokens.dims.carriers[node]
        claim = claim_for(node, carrier.dim)
        needs = [f"{n.name}: {need}" for n, need in zip(node.all_input_nodes, claim.needs, strict=True)]
        attention = next(n for n in tokens.gm.graph.nodes if n.target is MOM_ATTENTION)
        wanted = claim_for(attention, tokens.dims.carriers[attention].dim).needs
        query, key, value = attention.all_input_nodes[:3]
        self.say(
            "3 token dimension",
            [
                f"{node.name} has its {carrier.length} tokens in {carrier.dim}; rows of it need {', '.join(needs)}",
                f"rows of an attention need {query.name}: {wanted[0]}, "
                f"{key.name}: {wanted[1]}, {value.name}: {wanted[2]}",
            ],
        )

    def after_follow_demands(self, demands: DemandGraph) -> None:
        node = activation(next(iter(demands.kinds)).node.graph)
        asked = [i for i in demands.kinds if i.node is node]
        self.say("4 demands", [f"{i}: {demands.kinds[i].value}" for i in asked])

    def after_cut_stages(self, stages: Stages) -> None:
        lines = [
            f"stage {plan.index} stores {', '.join(str(i) for i in plan.stored)}" for plan in stages.plans
        ]
        self.say("5 stages", lines)

    def after_loops_over_mini_sequences(self, looped: Looped) -> None:
        node, loop = _loop_of(looped.gm)
        inner = activation_in(loop)
        ports = [type(port).__name__ for port in loop.inputs]
        inputs = ", ".join(f"{ports.count(kind)} {kind}" for kind in dict.fromkeys(ports))
        self.say(
            "6 loop",
            [
                f"{node.target}: {loop.length} tokens, at most {loop.rows} at a time; {inputs}",
                f"stores {', '.join(output.name for output in loop.outputs)}",
                f"{inner.name} in its body: {inner.target}, {_type(inner)}",
            ],
        )

    def after_residual_in_place(self, moves: Moves) -> None:
        lines = [
            f"{node.target}: {output.name} over {module.loop.bind(node)[output.over].name}"
            for node, module in loop_nodes(moves.gm)
            for output in module.loop.stored
            if output.over is not None
        ]
        self.say("7 in place", lines or ["nothing"])

    def plan(self, rewritten: Rewritten) -> None:
        program, found = rewritten.plan, rewritten.memory
        name = str(_loop_of(rewritten.gm)[0].target)
        moment = next(m for m in found.moments if isinstance(m.step, LoopStep) and m.step.name == name)
        self.say(
            "8 program",
            [
                *str(program).splitlines(),
                f"while {name} runs, {', '.join(storage.name for storage in moment.alive)} are alive",
                f"and a mini-sequence of {COUNT} tokens holds {moment.scratch} bytes",
                f"peak {found.number(found.peak)} bytes above the inputs",
            ],
        )

    def kernel(self, rewritten: Rewritten, static: set[str]) -> None:
        cache = PieceCache()
        place = Decision(rewritten, torch.device("cpu"), Placement())
        program = Lowering(
            rewritten, static_inputs=static, patches={}, cache=cache, report=PieceLog(), kv=place
        ).program()
        name = str(_loop_of(rewritten.gm)[0].target)
        loop = next(step.run for step in program.steps if step.name == name)
        piece = loop.body  # type: ignore[attr-defined]
        assert isinstance(piece, Piece)
        inner = [n for n in piece.gm.graph.nodes if n.target is aten.mul.Tensor][-1]
        sizes = [str(t.value) for t in piece.templates if isinstance(t, SizeTemplate)]
        writes = [n for n in piece.gm.graph.nodes if n.target is aten.copy_.default]
        self.say(
            "9 kernel",
            [
                f"the body as Inductor gets it: sizes {', '.join(sizes)}; written in place: {len(writes)} values",
                f"compiled {'eagerly: ' + str(piece.eager_reason) if piece.eager_reason else 'once, for all lengths'};"
                f" the last product in it is {inner.name}",
            ],
        )


def activation_in(loop: Loop) -> fx.Node:
    """Return the same value in a loop's body."""
    wide = [n for n in loop.body.graph.nodes if n.target is aten.mul.Tensor and _width(n) == INTERMEDIATE]
    return wide[-1]


def _loop_of(gm: fx.GraphModule) -> tuple[fx.Node, Loop]:
    """Return the last loop whose body computes the activation."""
    holding = [
        (node, module.loop)
        for node, module in loop_nodes(gm)
        if any(n.target is aten.mul.Tensor and _width(n) == INTERMEDIATE for n in module.body.graph.nodes)
    ]
    return holding[-1]


def _width(node: fx.Node) -> Any:
    kind = node.meta.get("type")
    return kind.shape[-1] if kind is not None else None


def _type(node: fx.Node) -> str:
    kind = node.meta["type"]
    return f"{kind.dtype}[{', '.join(map(str, kind.shape))}]"


def _shown(node: fx.Node) -> str:
    value = node.meta["val"]
    shape = list(value.shape) if isinstance(value, torch.Tensor) else [list(one.shape) for one in value]
    return f"{node.name} = {node.target}({', '.join(n.name for n in node.all_input_nodes)}): {shape}"


def follow(say: Callable[[str, Iterable[str]], None]) -> None:
    """Pass the name and the lines of each step to `say`."""
    model, ids = small_llama(), torch.randint(3, 320, (1, TOKENS))
    follower = Follower(say)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(gm, example_inputs, follower.graph, {})

    with torch.no_grad():
        torch.compile(model.forward, backend=backend)(input_ids=ids, use_cache=False)


def main() -> int:
    def say(station: str, lines: Iterable[str]) -> None:
        print(station)
        for line in lines:
            print(textwrap.fill(line, 118, initial_indent="    ", subsequent_indent="        "))

    follow(say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
