"""The per-token term of GRPO, as TRL computes it: ratio, clip, KL to the reference; forward only, no gradients.

    python -m examples.grpo_loss                         a small Llama with random weights, eager and mom
    python -m examples.grpo_loss --full                  and stock Inductor
    python -m examples.grpo_loss --model DIR             your model, against itself before a small step

The term needs the log-probability of each completion token, from policy and reference. The plain implementation
computes the logits of all of them; `token_log_probs` has no logits at full length.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import mom_compile
from benchmarks import measure
from examples import beside

#: A vocabulary in proportion to the width as in small models of today: logits are by far the largest value.
SMALL = {
    "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "vocab_size": 64_000,
}  # fmt: skip
CLIP, BETA = 0.2, 0.04
#: `(model, ids [B, P + C], mask [B, P + C], C)` to the log-probabilities `[B, C]` of the last C tokens.
LogProbs = Callable[[Any, torch.Tensor, torch.Tensor, int], torch.Tensor]


def plain_log_probs(model: Any, ids: torch.Tensor, mask: torch.Tensor, completion: int) -> torch.Tensor:
    """Return each token's logit minus the log-sum-exp of all logits, one sequence at a time."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False, "logits_to_keep": completion + 1}
    logits = model(input_ids=ids, **given).logits[:, :-1].float()
    chosen = logits.gather(-1, ids[:, -completion:, None]).squeeze(-1)
    return chosen - torch.stack([of_one.logsumexp(-1) for of_one in logits])


def mom_log_probs(model: Any, ids: torch.Tensor, mask: torch.Tensor, completion: int) -> torch.Tensor:
    """Return the same without logits. Labels of prompt tokens are -100, so they are not scored."""
    labels = ids.clone()
    labels[:, :-completion] = -100
    return mom_compile.token_log_probs(model, ids, mask, labels=labels).log_probs[:, -completion:]


def per_token_term(
    log_probs: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """Return the per-token term `[B, C]` from log-probabilities `[B, C]` and advantages `[B]`."""
    ratio = (log_probs - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[:, None])
    away = reference - log_probs
    return -gain + BETA * (away.exp() - away - 1)


def small_policy() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=32_768)).eval()


@torch.no_grad()
def after_a_step(model: Any) -> Any:
    """Return a copy with slightly changed weights."""
    torch.manual_seed(1)
    policy = copy.deepcopy(model)
    for parameter in policy.parameters():
        parameter.add_(torch.randn_like(parameter) * 1e-3)
    return policy


def samples(batch: int, prompt: int, completion: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random prompts of different lengths, padded on the left as in TRL, followed by completions."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocabulary, (batch, prompt + completion), generator=generator)
    begins = torch.arange(batch)[:, None] * (prompt // (2 * batch))
    mask = (torch.arange(prompt + completion)[None, :] >= begins).long()
    return ids * mask, mask


def work(spec: dict[str, Any]) -> None:
    measure.watch_cpu()
    if spec["model"] is None:
        reference = small_policy()
    else:
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    policy = after_a_step(reference)
    completion = spec["completion"]
    ids, mask = samples(spec["batch"], spec["prompt"], completion, reference.config.vocab_size)
    advantages = torch.linspace(-1, 1, spec["batch"])
    log_probs: LogProbs = mom_log_probs if spec["backend"] == "mom" else plain_log_probs
    if spec["backend"] == "inductor":
        log_probs = torch.compile(plain_log_probs)

    def term() -> torch.Tensor:
        # The reference's log-probabilities are also the old policy's: the policy is one step ahead of the sampler.
        new, old = (log_probs(model, ids, mask, completion) for model in (policy, reference))
        return per_token_term(new, old, old, advantages)

    beside.run(spec["backend"], term, Path(spec["result"]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.grpo_loss", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the hub (default: a small Llama with random weights)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the longest prompt (default 512)")
    parser.add_argument("--completion", type=int, default=1024, help="tokens of a completion (default 1024)")
    parser.add_argument("--full", action="store_true", help="with stock Inductor")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.batch, options.prompt, options.completion) < 1:
        parser.error("--batch, --prompt and --completion are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        work(json.loads(options.worker))
        return 0
    shared = {name: getattr(options, name) for name in ("model", "batch", "prompt", "completion")}
    what = f"{options.batch} completions of {options.completion} tokens after prompts of {options.prompt}"
    beside.tell("grpo_loss", f"{what}: per-token term of GRPO", shared, full=options.full)
    return 0


if __name__ == "__main__":
    sys.exit(main())
