"""Compile a decoder with `backend="mom"`, check it against eager, and print what was done to it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mom_compile

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(config.vocab_size, (1, 4099))

with torch.no_grad():
    eager = model(prompt, logits_to_keep=1).logits
    report = mom_compile.explain(model, prompt, logits_to_keep=1)  # traces the call and does not make it
    model.compile(backend="mom")  # what generate() calls, too
    compiled = model(prompt, logits_to_keep=1).logits

print(f"largest difference from eager: {(compiled - eager).abs().max():.1e}")
print(report)
