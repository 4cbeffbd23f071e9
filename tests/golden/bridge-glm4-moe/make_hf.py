"""Writes hf/: a tiny random GLM-4.5 (first layer dense, shared experts, float32 bias of the router) and its logits."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

torch.manual_seed(45)
sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 512, "num_nextn_predict_layers": 0,
}  # fmt: skip
kinds = {"use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5, "norm_topk_prob": True}
config = Glm4MoeConfig(**sizes, **kinds, routed_scaling_factor=1.5, tie_word_embeddings=False)
model = Glm4MoeForCausalLM(config)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0))
    for name, buffer in model.named_buffers():
        if "e_score" in name:
            buffer.copy_(torch.randn_like(buffer) * 0.1)
model = model.to(torch.bfloat16)
for name, buffer in model.named_buffers():
    if "e_score" in name:
        buffer.data = buffer.data.float()
ids = torch.randint(0, 64, (1, 32))
model.save_pretrained("hf")
whole = Glm4MoeForCausalLM.from_pretrained("hf", dtype=torch.float32).eval()
with torch.no_grad():
    save_file({"logits": whole(ids).logits[0]}, "logits.safetensors")
Path("ids.json").write_text(json.dumps(ids[0].tolist()))
