"""Tiny random models of every family, written the ways real checkpoints are: Hugging Face folders and Meta parts."""

from __future__ import annotations

import functools
import io
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron_files import ModelType, PositionEmbeddingType
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Tiny:
    """One model. `falcon`: None, "7b" (multi-query), "40b" (groups, two norms), "11b" (groups, one norm, own head)."""

    name: str
    family: str
    layers: int = 2
    hidden: int = 64
    ffn: int = 80
    heads: int = 4
    groups: int = 4
    head_dim: int = 16
    vocab: int = 320
    max_positions: int = 4096
    eps: float = 1e-5
    theta: float = 10000.0
    linear_factor: float | None = None
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16
    eos: int | tuple[int, ...] = 2
    falcon: str | None = None

    @property
    def tied(self) -> bool:
        return self.falcon in ("7b", "40b")

    def config(self, spelling: int = 5) -> dict[str, Any]:
        """config.json as transformers 4 or 5 spells it."""
        config: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "eos_token_id": list(self.eos) if isinstance(self.eos, tuple) else self.eos,
            "use_cache": True,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tied,
            "transformers_version": {4: "4.40.0", 5: "5.2.0"}[spelling],
        }
        if self.falcon:
            config |= {
                "architectures": ["FalconForCausalLM"],
                "model_type": "falcon",
                "activation": "gelu",
                "alibi": False,
                "bias": False,
                "bos_token_id": 11,
                "eos_token_id": 11,
                "ffn_hidden_size": self.ffn,
                "layer_norm_epsilon": self.eps,
                "multi_query": True,
                "new_decoder_architecture": self.falcon != "7b",
                "num_kv_heads": self.groups if self.falcon != "7b" else self.heads,
                "parallel_attn": True,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
            }
            if self.falcon == "11b":
                config["num_ln_in_parallel_attn"] = 1
        else:
            mistral = self.family == "mistral"
            config |= {
                "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
                "model_type": "mistral" if mistral else "llama",
                "hidden_act": "silu",
                "bos_token_id": 1,
                "intermediate_size": self.ffn,
                "num_key_value_heads": self.groups,
                "rms_norm_eps": self.eps,
                "attention_dropout": 0.0,
            }
            if self.head_dim * self.heads != self.hidden:
                config["head_dim"] = self.head_dim
            if mistral:
                config["sliding_window"] = self.window
            else:
                config |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
        dtype = str(self.dtype).removeprefix("torch.")
        scaling: dict[str, Any] = {"rope_type": "linear", "factor": self.linear_factor} if self.linear_factor else {}
        if spelling == 4:
            old = {"type": "linear", "factor": self.linear_factor} if self.linear_factor else None
            return config | {"torch_dtype": dtype, "rope_theta": self.theta, "rope_scaling": old}
        rope = {"rope_theta": self.theta, "rope_type": "default"} | scaling
        return config | {"dtype": dtype, "rope_parameters": rope}

    @functools.lru_cache(maxsize=64)  # noqa: B019 the instances are frozen and live as long as the tests
    def tensors(self) -> Tensors:
        """Hugging Face names and random weights, large enough for every part of the network to move the logits."""
        h, d = self.hidden, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if self.falcon:
            shapes["transformer.word_embeddings.weight"] = (self.vocab, h)
            for i in range(self.layers):
                p = f"transformer.h.{i}"
                for norm in ("ln_attn", "ln_mlp") if self.falcon == "40b" else ("input_layernorm",):
                    shapes |= {f"{p}.{norm}.weight": (h,), f"{p}.{norm}.bias": (h,)}
                shapes[f"{p}.self_attention.query_key_value.weight"] = ((self.heads + 2 * self.groups) * d, h)
                shapes[f"{p}.self_attention.dense.weight"] = (h, self.heads * d)
                shapes[f"{p}.mlp.dense_h_to_4h.weight"] = (self.ffn, h)
                shapes[f"{p}.mlp.dense_4h_to_h.weight"] = (h, self.ffn)
            shapes |= {"transformer.ln_f.weight": (h,), "transformer.ln_f.bias": (h,)}
        else:
            shapes["model.embed_tokens.weight"] = (self.vocab, h)
            for i in range(self.layers):
                p = f"model.layers.{i}"
                shapes[f"{p}.self_attn.q_proj.weight"] = (self.heads * d, h)
                shapes[f"{p}.self_attn.k_proj.weight"] = (self.groups * d, h)
                shapes[f"{p}.self_attn.v_proj.weight"] = (self.groups * d, h)
                shapes[f"{p}.self_attn.o_proj.weight"] = (h, self.heads * d)
                shapes[f"{p}.mlp.gate_proj.weight"] = (self.ffn, h)
                shapes[f"{p}.mlp.up_proj.weight"] = (self.ffn, h)
                shapes[f"{p}.mlp.down_proj.weight"] = (h, self.ffn)
                shapes[f"{p}.input_layernorm.weight"] = (h,)
                shapes[f"{p}.post_attention_layernorm.weight"] = (h,)
            shapes["model.norm.weight"] = (h,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, h)
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return {name: random_weight(name, shape, self.dtype, generator) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Modern(Tiny):
    """A dense decoder of today: Llama's tensors, with what llama3, qwen2 and qwen3 add. `rope` is its scaling."""

    model_type: str = "llama"
    head_is_embedding: bool = False
    rope: tuple[tuple[str, Any], ...] = ()

    @property
    def tied(self) -> bool:
        return self.head_is_embedding

    def config(self, spelling: int = 5) -> dict[str, Any]:
        config = super().config(spelling)
        config |= {"model_type": self.model_type, "architectures": [f"{self.model_type.title()}ForCausalLM"]}
        if self.model_type != "llama":
            for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
                config.pop(key)
        if self.model_type == "qwen3":
            config["head_dim"] = self.head_dim
        if spelling == 4:
            return config | {"rope_scaling": dict(self.rope) or None}
        return config | {"rope_parameters": config["rope_parameters"] | dict(self.rope)}

    @functools.lru_cache(maxsize=64)  # noqa: B019 as above
    def tensors(self) -> Tensors:
        tensors = dict(super().tensors())
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 1)
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.layers):
            p = f"model.layers.{i}.self_attn"
            if self.model_type == "qwen2":
                for part, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
                    shapes[f"{p}.{part}_proj.bias"] = (heads * self.head_dim,)
            if self.model_type == "qwen3":
                shapes |= {f"{p}.q_norm.weight": (self.head_dim,), f"{p}.k_norm.weight": (self.head_dim,)}
        return tensors | {name: random_weight(name, shape, self.dtype, generator) for name, shape in shapes.items()}


def random_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
    else:
        values *= 1.0 / shape[1] ** 0.5
    return values.to(dtype)


LLAMA3_ROPE = (
    ("rope_type", "llama3"), ("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 8192),
)  # fmt: skip
MODELS: dict[str, Tiny] = {
    model.name: model
    for model in (
        Tiny("falcon-7b", "falcon", falcon="7b", groups=1, ffn=256, max_positions=2048),
        Tiny("falcon-40b", "falcon", falcon="40b", heads=8, groups=2, head_dim=8, ffn=256, max_positions=2048),
        Tiny(
            "falcon-180b", "falcon", falcon="40b", layers=4, heads=8, groups=4, head_dim=8, ffn=256, max_positions=2048
        ),
        Tiny("falcon-11b", "falcon", falcon="11b", heads=8, groups=2, head_dim=8, ffn=256, max_positions=8192),
        Tiny("llama", "llama", eps=1e-6, max_positions=2048, dtype=torch.float16),
        Tiny("llama2", "llama2", dtype=torch.float32),
        Tiny("llama2-gqa", "llama2", layers=4, heads=8, groups=4, head_dim=8),
        Tiny("codellama", "codellama", theta=1e6, max_positions=16384, vocab=336),
        Tiny("codellama-34b", "codellama", theta=1e6, max_positions=16384, heads=8, groups=2, head_dim=8),
        Tiny("mistral-v0.1", "mistral", heads=8, groups=2, head_dim=8, max_positions=32768, window=4096),
        Tiny("mistral-v0.2", "mistral", heads=8, groups=2, head_dim=8, max_positions=32768, theta=1e6),
        Tiny("mistral-v0.3", "mistral", heads=8, groups=2, head_dim=8, max_positions=32768, theta=1e6, vocab=352),
        Tiny("llama2-linear", "llama2", linear_factor=4.0, max_positions=16384),
        Tiny("llama2-wide-heads", "llama2", heads=4, groups=2, head_dim=24, vocab=331),
        Tiny("mistral-wide-heads", "mistral", heads=4, groups=2, head_dim=32, max_positions=1024, theta=1e6, vocab=333),
    )
}

# What people train with Megatron-Core; Megatron-LLM has most of them not.
DENSE: dict[str, Tiny] = {
    model.name: model
    for model in (
        Modern(
            "llama3",
            "llama3",
            heads=8,
            groups=2,
            head_dim=8,
            theta=5e5,
            max_positions=131072,
            dtype=torch.float32,
            rope=LLAMA3_ROPE,
        ),
        Modern("llama3-8b", "llama3", heads=8, groups=2, head_dim=8, theta=5e5, max_positions=8192),
        Modern(
            "llama3-tied",
            "llama3",
            layers=4,
            heads=8,
            groups=4,
            head_dim=8,
            theta=5e5,
            max_positions=131072,
            rope=LLAMA3_ROPE,
            head_is_embedding=True,
        ),
        Modern(
            "qwen2",
            "qwen2",
            heads=8,
            groups=2,
            head_dim=8,
            eps=1e-6,
            theta=1e6,
            model_type="qwen2",
            dtype=torch.float32,
        ),
        Modern(
            "qwen2-tied",
            "qwen2",
            layers=4,
            heads=8,
            groups=4,
            head_dim=8,
            eps=1e-6,
            theta=1e6,
            model_type="qwen2",
            head_is_embedding=True,
        ),
        Modern(
            "qwen3",
            "qwen3",
            heads=4,
            groups=2,
            head_dim=24,
            eps=1e-6,
            theta=1e6,
            model_type="qwen3",
            dtype=torch.float32,
        ),
        Modern(
            "qwen3-tied",
            "qwen3",
            layers=4,
            heads=4,
            groups=4,
            head_dim=24,
            eps=1e-6,
            theta=1e6,
            model_type="qwen3",
            head_is_embedding=True,
        ),
        Modern(
            "qwen3-yarn",
            "qwen3",
            heads=4,
            groups=2,
            head_dim=24,
            eps=1e-6,
            theta=1e6,
            model_type="qwen3",
            dtype=torch.float32,
            max_positions=40960,
            rope=(("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 32768)),
        ),
    )
}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def read_huggingface(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files; one that stands in two files is an error."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        piece = load_file(path)
        assert not piece.keys() & tensors.keys(), f"{path.name} repeats {sorted(piece.keys() & tensors.keys())}"
        tensors |= piece
    assert tensors, f"no safetensors in {folder}"
    return tensors


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(
    folder: Path, tensors: Tensors, parts: int = 1, kind: str = "safetensors", index: bool | None = None
) -> None:
    """`parts` files of `kind` ("safetensors" or "bin"), with an index if `index` says so (default: if parts > 1)."""
    index = parts > 1 if index is None else index
    names = list(tensors)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for number in range(parts):
        piece = {name: tensors[name].contiguous() for name in names[number::parts]}
        file = f"{stem}.{kind}" if parts == 1 else f"{stem}-{number + 1:05d}-of-{parts:05d}.{kind}"
        if kind == "safetensors":
            save_file(piece, folder / file, metadata={"format": "pt"})
        else:
            torch.save(piece, folder / file)
        weight_map |= dict.fromkeys(piece, file)
    if index:
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / f"{stem}.{kind}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_huggingface(
    folder: Path,
    model: Tiny,
    *,
    spelling: int = 5,
    parts: int = 1,
    kind: str = "safetensors",
    index: bool | None = None,
    tokenizer: bool = True,
    changes: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
) -> Path:
    """A Hugging Face folder of `model`; `changes` go into config.json, a value of ... removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config(spelling) | (changes or {})
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not ...})
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    write_weights(folder, model.tensors() if tensors is None else tensors, parts, kind, index)
    if tokenizer:
        write_tokenizer(folder, model)
    return folder


def write_tokenizer(folder: Path, model: Tiny) -> None:
    if model.falcon:
        (folder / "tokenizer.json").write_text(falcon_tokenizer_json())
        special = {"eos_token": "<|endoftext|>", "model_max_length": 2048}
        write_json(folder / "tokenizer_config.json", special | {"tokenizer_class": "PreTrainedTokenizerFast"})
        return
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(min(model.vocab, 320)))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    write_json(
        folder / "tokenizer_config.json", config | {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    )


CORPUS = [
    "The quick brown fox jumps over the lazy dog while 12 cats watch the 345 birds.",
    "In the beginning there was a model, and the model was small; nobody knew its name.",
    "def convert(tensor, layout):\n    return layout.cut(tensor)  # every row goes to one rank",
    "She sells sea shells on the sea shore, and the shells she sells are surely sea shells.",
    "How much wood would a woodchuck chuck if a woodchuck could chuck wood in winter time?",
    "Numbers like 1999, 2048 and 65536 are split into digits before anything else is done.",
] * 20


@functools.lru_cache
def sentencepiece_model(pieces: int = 320) -> bytes:
    """A tokenizer.model with Llama's settings: BPE, byte fallback, split digits, identity normalisation, no pad id."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


@functools.lru_cache
def falcon_tokenizer_json() -> str:
    """A byte-level BPE of 300 tokens with `<|endoftext|>` at 11, as falcon's has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [f">>{number}<<" for number in range(11)] + ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.token_to_id("<|endoftext|>") == 11
    return tokenizer.to_str()


def meta_parts(model: Tiny, parts: int) -> list[Tensors]:
    """Random weights in Meta's own layout: rows or columns cut over `parts` files, q and k in interleaved order."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{model.name} meta".encode()))
    h, d = model.hidden, model.head_dim

    def cut(name: str, rows: int, columns: int, dim: int) -> list[Tensor]:
        return [t.contiguous() for t in random_weight(name, (rows, columns), model.dtype, generator).chunk(parts, dim)]

    whole = {
        "tok_embeddings.weight": cut("embedding", model.vocab, h, 1),
        "output.weight": cut("out", model.vocab, h, 0),
    }
    norms = ["norm.weight"]
    for i in range(model.layers):
        p = f"layers.{i}"
        whole[f"{p}.attention.wq.weight"] = cut("q", model.heads * d, h, 0)
        whole[f"{p}.attention.wk.weight"] = cut("k", model.groups * d, h, 0)
        whole[f"{p}.attention.wv.weight"] = cut("v", model.groups * d, h, 0)
        whole[f"{p}.attention.wo.weight"] = cut("o", h, model.heads * d, 1)
        whole[f"{p}.feed_forward.w1.weight"] = cut("w1", model.ffn, h, 0)
        whole[f"{p}.feed_forward.w2.weight"] = cut("w2", h, model.ffn, 1)
        whole[f"{p}.feed_forward.w3.weight"] = cut("w3", model.ffn, h, 0)
        norms += [f"{p}.attention_norm.weight", f"{p}.ffn_norm.weight"]
    copied = {name: random_weight(name, (h,), model.dtype, generator) for name in norms}
    frequencies = model.theta ** (-torch.arange(0, d, 2).float() / d)
    return [
        {**{name: pieces[part] for name, pieces in whole.items()}, **copied, "rope.freqs": frequencies}
        for part in range(parts)
    ]


def write_meta(folder: Path, model: Tiny, parts: int) -> list[Tensors]:
    """Writes consolidated.NN.pth, params.json and tokenizer.model; returns the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = meta_parts(model, parts)
    for number, content in enumerate(contents):
        torch.save(content, folder / f"consolidated.{number:02d}.pth")
    params = {"dim": model.hidden, "n_layers": model.layers, "n_heads": model.heads, "norm_eps": model.eps}
    if model.groups != model.heads:
        params |= {"n_kv_heads": model.groups}
    write_json(folder / "params.json", params | {"multiple_of": 16, "vocab_size": -1})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(model.vocab))
    return contents


def training_args(model: Tiny, tp: int = 1, pp: int = 1, vpp: int = 1, rows: int | None = None) -> dict[str, Any]:
    """The args that a training run of `model` would save."""
    return {
        "num_layers": model.layers,
        "encoder_num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_attention_heads_kv": model.groups,
        "kv_channels": model.head_dim,
        "seq_length": model.max_positions,
        "max_position_embeddings": model.max_positions,
        "make_vocab_size_divisible_by": 128,
        "padded_vocab_size": rows or model.vocab,
        "tokenizer_type": "FalconTokenizer" if model.falcon else "SentencePieceTokenizer",
        "position_embedding_type": PositionEmbeddingType.rotary,
        "parallel_attn": bool(model.falcon),
        "parallel_layernorm": model.falcon == "40b",
        "use_flash_attn": True,
        "use_rms_norm": not model.falcon,
        "glu_activation": None if model.falcon else "swiglu",
        "tie_embed_logits": model.tied,
        "use_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_gelu_fusion": False,
        "bias_dropout_fusion": False,
        "sliding_window_size": model.window,
        "rope_theta": model.theta,
        "rope_scaling_factor": model.linear_factor or 1.0,
        "layernorm_epsilon": model.eps,
        "params_dtype": model.dtype,
        "bf16": model.dtype == torch.bfloat16,
        "fp16": model.dtype == torch.float16,
        "model_name": model.family,
        "model_type": ModelType.encoder_or_decoder,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "transformer_pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": model.layers // (pp * vpp) if vpp > 1 else None,
        "standalone_embedding_stage": False,
        "use_distributed_optimizer": False,
        "use_cpu_initialization": None,
        "perform_initialization": True,
        "no_save_optim": None,
        "no_save_rng": None,
        "new_tokens": False,
        "vocab_extra_ids": 0,
        "vocab_extra_ids_list": None,
        "vocab_file": None,
        "wandb_api_key": "not-to-be-copied",
    }


def auto_config(model: Tiny) -> Any:
    """The model's transformers config, in the spelling of the transformers that is installed."""
    import transformers

    config = model.config(4 if transformers.__version__.startswith("4.") else 5)
    return transformers.AutoConfig.for_model(config.pop("model_type"), **config)


def transformers_logits(model: Tiny, tensors: Tensors, tokens: Tensor) -> Tensor:
    """[time] -> [time, rows] in float32, weights put into transformers' own modules without touching a file."""
    import transformers

    config = auto_config(model)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    missing, unexpected = network.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.tied else set())
    with torch.no_grad():
        return network(tokens[None]).logits[0]


def folder_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits in float32 of a Hugging Face folder as any user would load it."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        return network(tokens[None]).logits[0]


def with_dtype(model: Tiny, dtype: torch.dtype) -> Tiny:
    return replace(model, dtype=dtype)
