"""What ranks do with models of transformers in `test_models_on_ranks.py`: each function runs on every rank."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mom_compile
from examples.scored_requests import Request, answers_of_ranks
from mom_compile.runtime import parted, ranks
from mom_compile.weights.nested import leaves
from tests.models import ids, tiny
from tests.on_ranks import error_of, without_codegen

LENGTH = 45
OPTIONS = {"mini_seq_len": 16, "strict": True}


def loaded(folder: str, **parallel: Any) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **parallel).eval()


def expert_parallel(size: int = 2, implementation: str = "auto") -> Any:
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=size, ep_size=size, ep_implementation=implementation)


def padded(tokens: int = LENGTH, batch: int = 2) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": ids(batch, tokens), "attention_mask": mask}


def difference(model: nn.Module, expected: torch.Tensor, tokens: int = LENGTH) -> float:
    """The largest difference of logits of a padded batch, padding excluded."""
    given = padded(tokens)
    return float((model(**given).logits - expected)[given["attention_mask"].bool()].abs().max())


def logits_of(folder: str, tokens: int = LENGTH) -> torch.Tensor:
    """Logits of the whole model, in eager mode."""
    return loaded(folder)(**padded(tokens)).logits


def communication() -> list[tuple[int, int]]:
    """Collectives in loops and outside, of each graph that has any."""
    found = [report.communication for report in mom_compile.reports()]
    return [(one.in_loops, one.outside) for one in found if one is not None]


def loops() -> list[int]:
    return [len(report.stages) for report in mom_compile.reports()]


# --- data parallel ---


def data_parallel(rank: int, asked: list[Request]) -> dict[str, Any]:
    """What each rank answers, its own scores, and what is raised where rank 1 cannot answer."""
    with without_codegen():
        model = tiny("Llama")
        found = {"answers": answers_of_ranks(model, asked, batch_size=2, longest=64), "own": own_prompts(rank, model)}
        if rank == 1:
            model.forward = None
        return {**found, "failure": error_of(lambda: answers_of_ranks(model, asked, batch_size=2, longest=64))}


def own_prompts(rank: int, model: nn.Module) -> tuple[float, int]:
    """Scores of a wrapped model: rank 1 scores three batches while rank 0 sleeps, then rank 0 scores one. The
    difference from eager mode, and the number of exchanges between the ranks."""
    wrapped, off = nn.parallel.DistributedDataParallel(model), 0.0
    time.sleep(0 if rank else 1)
    for tokens in (33, 50, 41) if rank else (20,):
        given = ids(2, tokens)
        scores = mom_compile.token_log_probs(wrapped, given)
        exact = model(given).logits[:, :-1].log_softmax(-1).gather(-1, given[:, 1:, None])[..., 0]
        off = max(off, float((scores.log_probs - exact).abs().max()))
    return off, len(ranks._EXCHANGES)


# --- FSDP2 ---


def fully_sharded(rank: int, layers: int, per_layer: bool) -> tuple[float, list[int], list[str]]:
    """The difference from the whole model, the loops of each graph, and the warnings."""
    from torch.distributed.fsdp import fully_shard

    with without_codegen(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tiny("Llama", num_hidden_layers=layers)
        expected = model(**padded()).logits
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        for module in model.model.layers if per_layer else [model]:
            mom_compile.compile(module, recompile_limit=1, options=OPTIONS)  # each layer has a graph of the same code
        assert "sharded by FSDP" in error_of(lambda: mom_compile.offload_weights(model, "cpu", memory_budget="1MiB"))
        off = difference(model, expected)
        return off, loops(), [str(one.message) for one in caught if isinstance(one.message, mom_compile.MomWarning)]


# --- tensor and expert parallel ---


def on_host(rank: int, folder: str, load: bool) -> dict[str, Any]:
    """Weights of a tensor-parallel model on each rank's host: by `offload_weights`, or loaded that way."""
    with without_codegen():
        expected = logits_of(folder)
        if load:
            warnings.simplefilter("ignore")
            model = mom_compile.load_offloaded(folder, "cpu", memory_budget="31KiB", tp_plan="auto")
            made = None
        else:
            model = loaded(folder, tp_plan="auto")
            made = mom_compile.offload_weights(model, "cpu", memory_budget="31KiB")
        host = [name for name, p in model.named_parameters() if mom_compile.weights.nested.is_on_host(p)]
        shapes = {name: list(leaves(p)[0].shape) for name, p in model.named_parameters()}
        eager = difference(model, expected)
        parts = {name: value for name, value in model.state_dict().items() if hasattr(value, "full_tensor")}
        state = {name: value.full_tensor() for name, value in parts.items()}
        whole = loaded(folder).state_dict()
        model.compile(backend="mom", options=OPTIONS)
        return {
            "eager": eager,
            "compiled": difference(model, expected),
            "on host": host,
            "shapes": shapes,
            "made": made,
            "state": all(torch.equal(value, whole[name]) for name, value in state.items()) and len(state),
            "copied": [report.weights.bytes for report in mom_compile.reports() if report.weights is not None],
            "communication": communication(),
        }


def turns(rank: int, folder: str, budgets: tuple[str, str]) -> dict[str, Any]:
    """Two turns of `generate()` at several lengths, with a budget of each rank: tokens in eager mode and compiled, and
    the collectives in loops of each length; or what is raised."""
    with without_codegen():
        model = loaded(folder, tp_plan="auto")
        lengths = (400, 90, 250)
        expected = [_session(model, tokens) for tokens in lengths]
        model.compile(backend="mom", dynamic=True, options={"strict": True, "memory_budget": budgets[rank]})
        waits, found = [], []
        for tokens in lengths:
            before = parted.WAITED.collectives
            raised = error_of(lambda tokens=tokens: found.append(_session(model, tokens)))  # type: ignore[misc]
            if raised:
                return {"raised": raised}
            waits.append(parted.WAITED.collectives - before)
        return {"same": found == expected, "waits": waits}


def _session(model: Any, tokens: int) -> list[list[int]]:
    from transformers import DynamicCache

    given, cache = padded(tokens), DynamicCache(config=model.config)
    settings = {"max_new_tokens": 3, "do_sample": False, "past_key_values": cache}
    first = model.generate(**given, **settings)
    second = torch.cat([first, ids(2, 37, tokens)], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(2, second.shape[1] - tokens, dtype=torch.long)], 1)
    return model.generate(second, attention_mask=mask, **settings).tolist()  # type: ignore[no-any-return]


def experts(rank: int, folder: str, implementation: str) -> dict[str, Any]:
    with without_codegen():
        model = loaded(folder, distributed_config=expert_parallel(implementation=implementation))
        expected = model(**padded()).logits
        whole = float((expected - logits_of(folder))[padded()["attention_mask"].bool()].abs().max())
        strict = implementation != "all_to_all"
        model.compile(backend="mom", options={**OPTIONS, "strict": strict})
        return {
            "eager": whole,
            "compiled": difference(model, expected),
            "communication": communication(),
            "reasons": [report.fallback for report in mom_compile.reports()],
        }


def pipeline(rank: int, folder: str) -> tuple[float, bool, list[int]]:
    """The difference of a pipeline stage's logits from the whole model, whether generated tokens are the same, and the
    loops of each graph."""
    from transformers.distributed import DistributedConfig

    with without_codegen():
        expected = logits_of(folder)
        model = loaded(folder, distributed_config=DistributedConfig(pp_size=dist.get_world_size()))
        greedy = {"max_new_tokens": 3, "do_sample": False}
        tokens = model.generate(**padded(), **greedy)
        model.compile(backend="mom", options=OPTIONS)
        off = difference(model, expected)
        return off, torch.equal(model.generate(**padded(), **greedy), tokens), loops()


def heads(rank: int, folder: str) -> list[str]:
    """What three entry points raise for a tensor-parallel model."""
    model = loaded(folder, tp_plan="auto")
    return [
        error_of(lambda: mom_compile.compile(model)),
        error_of(lambda: mom_compile.token_log_probs(model, ids(1, 20))),
        error_of(lambda: mom_compile.offload_weights(model, "cpu", memory_budget="1MiB")),
    ]


def loading(rank: int, folder: str) -> str:
    return error_of(lambda: loaded(folder, tp_plan="auto"))
