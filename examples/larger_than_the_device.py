"""Generate with a model that is larger than its memory: weights are read from the checkpoint's files.

    python -m examples.larger_than_the_device                     a model of random weights, 3 GiB, in 1.5 GiB of memory
    python -m examples.larger_than_the_device --device cuda       the same on a GPU, an eighth of the weights there
    python -m examples.larger_than_the_device --model DIR --memory-budget 8GiB --device cuda

    model = mom_compile.load_offloaded(DIR, "cuda", memory_budget="8GiB")
    model.compile(backend="mom", options={"kv_offload": True})
    model.generate(...)

It runs twice, each in a new process: the whole model in memory, and offloaded. On a CPU the second process has a memory
limit (`RLIMIT_DATA`: what it allocates, without mapped files) that is too small for the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mom_compile
from benchmarks import measure, workers
from benchmarks.measure import MIB
from examples.demo import OUTPUT
from mom_compile.quantities import parse_bytes
from mom_compile.runtime.host.engines import engine_for

Row = dict[str, Any]
RUNS = ("all of it in memory", "offloaded")
GIB = 1 << 30
#: Below this, Python and its libraries need more than half of the weights: there is nothing to limit.
LEAST_TO_LIMIT = 2 * GIB


@dataclass(frozen=True)
class Shape:
    """A float32 Llama with layers as in models of one billion parameters, or a small one."""

    vocabulary: int = 16_000
    width: int = 2048
    inner: int = 5632
    heads: int = 16
    groups: int = 4

    @staticmethod
    def of(size: int) -> Shape:
        return Shape() if size >= GIB else Shape(512, 128, 352, 4, 2)

    @property
    def layer(self) -> int:
        """Bytes of a layer."""
        return 4 * self.width * (2 * self.width + 2 * self.width * self.groups // self.heads + 3 * self.inner)

    def config(self, size: int) -> Any:
        """Return a config whose layers and embeddings take about `size` bytes."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=max(3, (size - 2 * 4 * self.vocabulary * self.width) // self.layer),
            num_attention_heads=self.heads, num_key_value_heads=self.groups, dtype="float32",
            architectures=["LlamaForCausalLM"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- the checkpoint


def write_checkpoint(folder: Path, size: int) -> None:
    """Write random weights of about `size` bytes, one file for each layer, never holding all of them."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = Shape.of(size).config(size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = parameter
    weight_map: dict[str, str] = {}
    for file, named in files.items():
        made = {
            name: torch.ones(p.shape) if p.dim() == 1 else torch.randn(p.shape, generator=generator) * 0.02
            for name, p in named.items()
        }
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(named, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)  # last: a folder with a config is complete


# ---------------------------------------------------------------------------------------------------- workers


def limit_memory(size: int) -> None:
    """Let allocations beyond `size` bytes fail in this process."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def load(spec: Row) -> Any:
    from transformers import AutoModelForCausalLM

    if spec["run"] == RUNS[0]:
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype="auto").eval().to(spec["device"])
    return mom_compile.load_offloaded(spec["model"], spec["device"], memory_budget=spec["memory_budget"])


def run(spec: Row) -> None:
    """Run one of the two: cold to compile, then warm to measure."""
    device = torch.device(spec["device"])
    if spec["limit"] is not None and spec["run"] == RUNS[1]:
        limit_memory(spec["limit"])
    workers.step("loading")
    model = load(spec)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (1, spec["tokens"]), generator=torch.Generator().manual_seed(1)).to(device)
    model.compile(backend="mom", options={"kv_offload": device.type != "cpu"})

    def prefill() -> Any:
        with torch.no_grad():
            return model(ids, logits_to_keep=1)

    def generate() -> Any:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=spec["new_tokens"], do_sample=False
        )

    workers.step("compiling, generating")
    text = generate()[0, ids.shape[1] :].tolist()
    workers.step("measuring")
    seconds = min(measure.seconds(prefill, spec["device"]) for _ in range(2))
    moved = moved_by(prefill, device)
    began = time.perf_counter()
    whole = moved_by(generate, device)
    per_token = (time.perf_counter() - began - seconds) / max(1, spec["new_tokens"] - 1)
    row = {"run": spec["run"], "text": text, "prefill": seconds, "per_token": per_token, "moved": moved}
    row |= {"moved_per_token": (whole - moved) // max(1, spec["new_tokens"] - 1), "weights": weights(model)}
    workers.row(row | {"allocated": allocated(device), "mapped": mom_compile.host_memory().mapped})


def moved_by(call: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes that a call copies to the device."""
    traffic = engine_for(device).traffic
    before = traffic.to_device
    call()
    return traffic.to_device - before


def weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def allocated(device: torch.device) -> int:
    """Return allocated bytes: the peak on a GPU, else what the limit counts, the writable memory of the process.

    Read-only mapped files do not count. transformers maps files writable, so its mappings count.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return dict(_status()).get("VmData", 0)


def _status() -> Iterator[tuple[str, int]]:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            yield name, int(value.split()[0]) * 1024


# ----------------------------------------------------------------------------------------------------- parent


def report(rows: Sequence[Row], spec: Row) -> list[str]:
    plain, offloaded = rows
    names = [f"{row['run']:>22}" for row in rows]
    lines = [f"{'':34}{''.join(names)}"]
    where = "allocated on the device at most" if spec["device"] != "cpu" else "writable memory"
    lines.append(f"{where:34}" + "".join(f"{row['allocated'] / MIB:>18,.0f} MiB" for row in rows))
    lines.append(f"{'prefill':34}" + "".join(f"{row['prefill']:>20.2f} s" for row in rows))
    lines.append(f"{'a token':34}" + "".join(f"{row['per_token']:>20.2f} s" for row in rows))
    lines.append(f"{'to the device, for a prefill':34}" + "".join(f"{row['moved'] / MIB:>18,.0f} MiB" for row in rows))
    lines.append(f"{'and for a token':34}" + "".join(f"{r['moved_per_token'] / MIB:>18,.0f} MiB" for r in rows))
    said = "the same" if plain["text"] == offloaded["text"] else "NOT the same"
    lines.append(f"weights take {offloaded['weights'] / MIB:,.0f} MiB; the tokens are {said}: {offloaded['text']}")
    if spec["limit"] is not None:
        lines.append(f"the second process may allocate {spec['limit'] / MIB:,.0f} MiB and no more")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.larger_than_the_device", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="a local folder with safetensors files (default: one with random weights)")
    parser.add_argument("--gib", type=float, default=3, help="size of the random weights (default 3)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-budget", help="device memory for weights (default: an eighth of them)")
    parser.add_argument("--limit", help="memory limit of the second process (default: half of the weights; CPU only)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.new_tokens < 2 or options.gib <= 0:
        parser.error("--tokens and --new-tokens are at least 2, --gib is above 0")
    if options.device != "cpu" and options.limit is not None:
        parser.error("--limit is for --device cpu; a GPU is limited by its own memory")
    return options


def _two_layers(gib: float) -> int:
    """Return the bytes of two layers, or an eighth of the weights if that is more."""
    size = int(gib * GIB)
    layer = Shape.of(size).layer
    return max(size // 8, 2 * layer + layer // 8)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        run(json.loads(options.worker))
        return 0
    folder = Path(options.model) if options.model else OUTPUT / f"random-{options.gib:g}-gib"
    if not (folder / "config.json").is_file():
        print(f"writing random weights of {options.gib:g} GiB to {folder}")
        write_checkpoint(folder, int(options.gib * GIB))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    limit = None
    if options.device == "cpu":
        limit = parse_bytes(options.limit) if options.limit else size // 2 if size >= LEAST_TO_LIMIT else None
    budget = options.memory_budget or (size // 8 if options.model else _two_layers(options.gib))
    spec = {"model": str(folder.resolve()), "device": options.device, "memory_budget": budget, "limit": limit}
    spec |= {"tokens": options.tokens, "new_tokens": options.new_tokens}
    rows: list[Row] = []
    for name in RUNS:
        # Compilers count separately, but Inductor's pool of compile workers would not fit.
        env = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

        def on_step(text: str, name: str = name) -> None:
            print(f"{name}: {text}")

        rows += workers.run_worker("examples.larger_than_the_device", {**spec, "run": name}, env=env, on_step=on_step)
    print("\n".join(["", *report(rows, spec)]))
    print(measure.describe_machine())
    return 0 if rows[0]["text"] == rows[1]["text"] else 1


if __name__ == "__main__":
    sys.exit(main())
