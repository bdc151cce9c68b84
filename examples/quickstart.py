"""Compile a decoder with `backend="mom"`, compare it with eager mode, and print what was done.

A service that starts often can keep compiled code: with `--artifacts FILE` a first run writes the file, and later runs
with the same kind of machine and versions load it. Lengths vary in a service, so it compiles for all of them at once.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mom_compile

parser = argparse.ArgumentParser()
parser.add_argument("--artifacts", type=Path, help="file to load, or to write")
artifacts = parser.parse_args().artifacts

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(config.vocab_size, (1, 4099))
if artifacts and artifacts.exists():
    torch.compiler.load_cache_artifacts(artifacts.read_bytes())

with torch.no_grad():
    eager = model(prompt, logits_to_keep=1).logits
    report = mom_compile.explain(model, prompt, logits_to_keep=1)  # computes nothing; the model stays as it is
    model.compile(backend="mom", dynamic=True if artifacts else None)  # what generate() calls, too
    began = time.perf_counter()
    compiled = model(prompt, logits_to_keep=1).logits
    print(f"first call: {time.perf_counter() - began:.1f} s, compiling included")

print(f"largest difference from eager: {(compiled - eager).abs().max():.1e}")
print(report)
if artifacts and not artifacts.exists():
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None, "nothing was compiled"
    artifacts.write_bytes(saved[0])
    print(f"wrote {artifacts}: {len(saved[0]) / 2**20:.1f} MiB")
