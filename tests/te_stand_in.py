"""A stand-in for Transformer Engine on a CPU, for Megatron-Core's classes that are made of its modules.

They compute the same in plain torch (forward only), and own the same parameters and extra states as those of the 2.x
series without fp8; names, sharding, experts and checkpoints then come from megatron-core itself. `install` comes before
megatron is imported.
"""

# ruff: noqa
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import enum
import math
import sys
import types
from contextlib import nullcontext

import modules_stand_in
import torch
import torch.nn.functional as F
from torch.nn import Parameter

VERSION = "2.8.0"
NO_STATE = lambda: torch.empty(0, dtype=torch.uint8)  # noqa: E731  what TE 2.x stores where nothing is quantised


class TransformerEngineBaseModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_initialized = self.fp8_parameters = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def get_extra_state(self):
        return NO_STATE()

    def set_extra_state(self, state):
        pass


def _device(device):
    return "cpu" if device in (None, "cuda") or str(device).startswith("cuda") else device


class Linear(TransformerEngineBaseModule):
    def __init__(self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
                 tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False,
                 parallel_mode=None, params_dtype=None, device=None, rng_tracker_name=None, ub_name=None, **_):  # fmt: skip
        super().__init__()
        assert not sequence_parallel
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias, self.ub_name = bias, return_bias, ub_name
        dtype = params_dtype or torch.get_default_dtype()
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=dtype, device=_device(device)))
        if init_method is not None:
            init_method(self.weight)
        if bias:
            self.bias = Parameter(torch.zeros(out_features, dtype=dtype, device=_device(device)))
        else:
            self.bias = torch.Tensor()
        if parallel_mode in ("column", "row"):
            self.weight.tensor_model_parallel, self.weight.partition_dim = True, int(parallel_mode == "row")
            self.weight.partition_stride = 1
            if bias and parallel_mode == "column":
                self.bias.tensor_model_parallel, self.bias.partition_dim, self.bias.partition_stride = True, 0, 1

    def _linear(self, x):
        out = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            out = out.contiguous()
            torch.distributed.all_reduce(out, group=self.tp_group)
        if self.use_bias and not self.return_bias:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out

    def forward(self, x, is_first_microbatch=None, **_):
        return self._linear(x)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", zero_centered_gamma=False,
                 return_layernorm_output=False, **kwargs):  # fmt: skip
        super().__init__(in_features, out_features, **kwargs)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        fill = torch.zeros if zero_centered_gamma else torch.ones
        weight = Parameter(fill(in_features, dtype=self.weight.dtype, device=self.weight.device))
        # TE registers layer_norm_weight before weight: keep its order
        parameters = dict(self._parameters)
        self._parameters.clear()
        self.layer_norm_weight = weight
        if normalization == "LayerNorm":
            self.layer_norm_bias = Parameter(torch.zeros_like(weight))
        self._parameters.update(parameters)

    def forward(self, x, is_first_microbatch=None, **_):
        bias = getattr(self, "layer_norm_bias", None)
        normed = _norm(x, self.layer_norm_weight, bias, self.eps, self.normalization, self.zero_centered_gamma)
        out = self._linear(normed)
        if getattr(self, "return_layernorm_output", False):  # what Bridge's adapters ask for
            return (*out, normed) if isinstance(out, tuple) else (out, normed)
        return out


def _norm(x, weight, bias, eps, kind, zero_centered):
    weight = weight.float() + 1 if zero_centered else weight.float()
    y = x.float()
    if kind == "RMSNorm":
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight
    else:
        y = F.layer_norm(y, y.shape[-1:], weight, None if bias is None else bias.float(), eps)
    return y.to(x.dtype)


class _Norm(TransformerEngineBaseModule):
    kind = "RMSNorm"

    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=False, zero_centered_gamma=False,
                 params_dtype=None, device=None, hidden_size=None, **_):  # fmt: skip
        super().__init__()
        normalized_shape = normalized_shape or hidden_size
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        fill = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = Parameter(fill(normalized_shape, dtype=params_dtype or torch.get_default_dtype()))
        self.bias = None
        if self.kind == "LayerNorm":
            self.bias = Parameter(torch.zeros_like(self.weight))

    def forward(self, x):
        return _norm(x, self.weight, self.bias, self.eps, self.kind, self.zero_centered_gamma)


class RMSNorm(_Norm):
    kind = "RMSNorm"


class LayerNorm(_Norm):
    kind = "LayerNorm"


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False,
                 tp_group=None, tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False,
                 parallel_mode=None, params_dtype=None, device=None, rng_tracker_name=None, ub_name=None, **_):  # fmt: skip
        super().__init__()
        self.num_gemms, self.parallel_mode, self.tp_size, self.tp_group = num_gemms, parallel_mode, tp_size, tp_group
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features, self.use_bias, self.return_bias = (
            in_features,
            out_features,
            bias,
            return_bias,
        )
        dtype = params_dtype or torch.get_default_dtype()
        for i in range(num_gemms):
            weight = Parameter(torch.empty(out_features, in_features, dtype=dtype))
            if init_method is not None:
                init_method(weight)
            self.register_parameter(f"weight{i}", weight)
            if bias:
                self.register_parameter(f"bias{i}", Parameter(torch.zeros(out_features, dtype=dtype)))

    def forward(self, x, m_splits, is_first_microbatch=None, **_):
        splits = [int(n) for n in m_splits]
        outs = []
        for i, part in enumerate(torch.split(x, splits)):
            y = F.linear(part, getattr(self, f"weight{i}"))
            if self.use_bias and not self.return_bias:
                y = y + getattr(self, f"bias{i}")
            outs.append(y)
        out = torch.cat(outs)
        if self.return_bias:
            return out, [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        return out


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
                 qkv_format="sbhd", attn_mask_type="causal", window_size=None, sequence_parallel=False, tp_size=1,
                 get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self",
                 softmax_scale=None, softmax_type="vanilla", **_):  # fmt: skip
        super().__init__()
        self.qkv_format, self.softmax_scale, self.window_size = qkv_format, softmax_scale, window_size
        self.softmax_type, self.attn_mask_type = softmax_type, attn_mask_type
        self.heads = num_attention_heads // tp_size
        self.channels = kv_channels[0] if isinstance(kv_channels, tuple) else kv_channels
        if softmax_type == "learnable":
            self.softmax_offset = Parameter(torch.zeros(self.heads))
        # TE loads files without this module's extra state: torch_dist files have none
        self.register_load_state_dict_post_hook(DotProductAttention._forgive)

    @staticmethod
    def _forgive(module, keys):
        keys.missing_keys[:] = [k for k in keys.missing_keys if "core_attention._extra_state" not in k]

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, **_):
        """[s, b, heads, d], [s, b, groups, d], [s, b, groups, dv] -> [s, b, heads * dv]."""
        assert self.qkv_format == "sbhd" and (attn_mask_type or self.attn_mask_type) == "causal"
        s, b, n, d = query.shape
        key, value = (t.repeat_interleave(n // t.shape[2], dim=2) for t in (key, value))
        scores = torch.einsum("sbnd,tbnd->bnst", query.float(), key.float())
        scores = scores * (self.softmax_scale or 1.0 / math.sqrt(d))
        row, column = torch.arange(s)[:, None], torch.arange(key.shape[0])[None]
        hidden = column > row
        if self.window_size is not None and self.window_size[0] >= 0:
            hidden |= column < row - self.window_size[0]
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.softmax_type == "learnable":
            sink = self.softmax_offset.float().view(1, n, 1, 1).expand(b, n, s, 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out = torch.einsum("bnst,tbnd->sbnd", weights.to(value.dtype), value)
        return out.reshape(s, b, -1)

    def set_context_parallel_group(self, *args, **kwargs):
        pass


class CudaRNGStatesTracker:
    def __init__(self):
        self.states_ = {}

    def reset(self):
        self.states_ = {}

    def get_states(self):
        return self.states_

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        self.states_[name] = seed

    def fork(self, name="model-parallel-rng"):
        return nullcontext()


class DelayedScaling:
    def __init__(self, **kwargs):
        self.__dict__.update(kwargs)


class Format(enum.Enum):
    E4M3, HYBRID, E5M2 = range(3)


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False

    @staticmethod
    def is_fp8_calibration():
        return False

    @staticmethod
    def reset():
        pass

    @staticmethod
    def set_skip_fp8_weight_update_tensor(*_):
        pass


class _Stub(types.ModuleType):
    """A module in which every capitalised name is an empty class, and no other name exists."""

    def __getattr__(self, name):
        if name.startswith("__") or not name[0].isupper():
            raise AttributeError(f"{self.__name__} has no {name}")
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def install() -> None:
    if "transformer_engine" in sys.modules:
        return
    context = lambda *args, **kwargs: nullcontext()  # noqa: E731
    contents = {
        "transformer_engine": {"__version__": VERSION},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {"DelayedScaling": DelayedScaling, "Format": Format},
        "transformer_engine.pytorch": {
            "Linear": Linear, "LayerNormLinear": LayerNormLinear, "RMSNorm": RMSNorm, "LayerNorm": LayerNorm,
            "GroupedLinear": GroupedLinear, "DotProductAttention": DotProductAttention, "fp8_autocast": context,
            "autocast": context, "quantized_model_init": context, "fp8_model_init": context,
            "TransformerLayer": torch.nn.Module,
        },
        "transformer_engine.pytorch.fp8": {
            "FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": context, "fp8_model_init": context,
        },
        "transformer_engine.pytorch.distributed": {
            "CudaRNGStatesTracker": CudaRNGStatesTracker, "activation_recompute_forward": context,
            "is_fp8_activation_recompute_enabled": lambda: False, "checkpoint": None,
        },
        "transformer_engine.pytorch.module": {},
        "transformer_engine.pytorch.module.base": {"TransformerEngineBaseModule": TransformerEngineBaseModule},
        "transformer_engine.pytorch.router": {
            "fused_compute_score_for_moe_aux_loss": None, "fused_moe_aux_loss": None,
            "fused_topk_with_score_function": None,
        },
        "transformer_engine.pytorch.ops": {},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.float8_tensor": {},
    }  # fmt: skip
    modules_stand_in.install(contents, _Stub)
