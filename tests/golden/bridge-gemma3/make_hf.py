"""Writes hf/: a tiny random Gemma 3 (five layers with a window, one without and with scaled rope) and its logits."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

torch.manual_seed(5)
sizes = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 8, "query_pre_attn_scalar": 6,
    "max_position_embeddings": 512,
}  # fmt: skip
ropes = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, rope_parameters=ropes))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.2))
ids = torch.randint(0, 64, (1, 32))
model.to(torch.bfloat16).save_pretrained("hf")
whole = Gemma3ForCausalLM.from_pretrained("hf", dtype=torch.float32).eval()
with torch.no_grad():
    save_file({"logits": whole(ids).logits[0]}, "logits.safetensors")
Path("ids.json").write_text(json.dumps(ids[0].tolist()))
