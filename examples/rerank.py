"""Score long documents of different lengths in one batch, as Qwen3-Reranker does: is "yes" or "no" the next token?

    python -m examples.rerank                            a small Qwen3 with random weights, eager and mom
    python -m examples.rerank --full                     and stock Inductor
    python -m examples.rerank --model Qwen/Qwen3-Reranker-0.6B

Only the row of each document's last token is needed: `hidden[arange(B), last]`. mom moves this index up: in the last
layer only these rows are queries and go through the MLP and the head.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from examples import beside

#: Ids of "yes" and "no" in the model with random weights.
ANSWERS = (1, 2)
#: The shape of Qwen3 0.6B, at a quarter of its width.
SMALL = {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "num_hidden_layers": 4, "vocab_size": 32_000,
}  # fmt: skip


def relevance(model: Any, ids: torch.Tensor, mask: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the log-odds `[B]` of the first answer against the second, for documents `[B, S]` padded on the right."""
    last = mask.sum(1) - 1
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[torch.arange(ids.shape[0], device=ids.device), last])
    of_answers = logits[:, answers].float()
    return of_answers[:, 0] - of_answers[:, 1]


def compiled(backend: str) -> Callable[..., torch.Tensor]:
    return relevance if backend == "eager" else torch.compile(relevance, backend=backend)


def small_model(layers: int | None = None) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    changes = {} if layers is None else {"num_hidden_layers": layers}
    return Qwen3ForCausalLM(Qwen3Config(**{**SMALL, **changes})).eval()


def random_documents(lengths: Sequence[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(list(lengths))[:, None]
    ids = torch.randint(3, vocabulary, mask.shape, generator=generator)
    return ids.where(mask, 0), mask.long()


def english_documents(lengths: Sequence[int], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of query, document (English text that Python ships, truncated) and question."""
    from pydoc_data.topics import topics

    before = tokenizer('Judge whether the Document answers the Query: "yes" or "no".\n<Query>: lists\n<Document>: ')
    after = tokenizer("\nThe answer is:", add_special_tokens=False).input_ids
    text = tokenizer("\n\n".join(topics.values()), add_special_tokens=False).input_ids
    rows = []
    for number, length in enumerate(lengths):
        room = max(0, length - len(before.input_ids) - len(after))
        rows.append([*before.input_ids, *text[number * 1000 :][:room], *after])
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    return ids, mask


def lengths_between(documents: int, shortest: int, longest: int) -> list[int]:
    """Return evenly spaced lengths, the longest last."""
    steps = max(1, documents - 1)
    return [longest - (longest - shortest) * (steps - n) // steps for n in range(documents)]


def work(spec: dict[str, Any]) -> None:
    measure.watch_cpu()
    lengths = lengths_between(spec["documents"], spec["shortest"], spec["longest"])
    if spec["model"] is None:
        model = small_model(spec["layers"])
        ids, mask = random_documents(lengths, model.config.vocab_size)
        answers = torch.tensor(ANSWERS)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
        ids, mask = english_documents(lengths, tokenizer)
        answers = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")])
    score = compiled(spec["backend"])
    beside.run(spec["backend"], lambda: score(model, ids, mask, answers), Path(spec["result"]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.rerank", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the hub or a folder (default: a small Qwen3 with random weights)")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=500, help="tokens of the shortest document (default 500)")
    parser.add_argument("--longest", type=int, default=4000, help="tokens of the longest document (default 4000)")
    parser.add_argument("--layers", type=int, help="layers of the model with random weights (default 4)")
    parser.add_argument("--full", action="store_true", help="with stock Inductor")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.documents < 1 or not 1 <= options.shortest <= options.longest:
        parser.error("--documents is at least 1, and 1 <= --shortest <= --longest")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        work(json.loads(options.worker))
        return 0
    shared = {name: getattr(options, name) for name in ("model", "documents", "shortest", "longest", "layers")}
    what = f"{options.documents} documents of {options.shortest} to {options.longest} tokens"
    beside.tell("rerank", f"{what}: log-odds of yes", shared, full=options.full)
    return 0


if __name__ == "__main__":
    sys.exit(main())
