"""The kinds of Megatron-Core's args, by hand: what each of core_fields.json is to a model. core_table.py reads it.

Deciding is the rule: a field that a new release adds decides the forward pass until it is listed here.
"""

from __future__ import annotations

from typing import Any

# What the converter reads itself, and refuses or converts by value.
READ = frozenset({
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("group_query_attention", "layernorm_epsilon", "rotary_base", "seq_length", "max_position_embeddings"),
    *("max_sequence_length", "vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by", "should_pad_vocab"),
    *("untie_embeddings_and_output_weights", "share_embeddings_and_output_weights", "window_size"),
    *("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling"),
    *("rope_scaling_factor", "rotary_scaling_factor", "mscale", "yarn_original_max_position_embeddings"),
    *("yarn_beta_fast", "yarn_beta_slow", "yarn_correction_range_round_to_int", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage"),
    *("num_layers_in_last_pipeline_stage", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("pipeline_model_parallel_layout", "expert_model_parallel_size", "expert_tensor_parallel_size"),
})  # fmt: skip
# Parallelism, precision, fusions, initialization, recomputation, inference and losses.
IDLE = frozenset({
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("activation_func_fp8_input_store", "activation_offload_fraction"),
    *("apply_query_key_layer_scaling", "apply_rope_fusion"),
    *("async_tensor_model_parallel_allreduce", "attention_backend", "attention_dropout", "attention_softmax_in_fp32"),
    *("autocast_dtype", "barrier_with_L1_time", "batch_invariant_mode", "batch_p2p_comm", "batch_p2p_sync", "bf16"),
    *("bias_activation_fusion", "bias_dropout_fusion", "bias_gelu_fusion", "bias_swiglu_fusion", "builder"),
    *("cache_mla_latents", "calculate_per_token_loss", "clone_scatter_output_in_embedding", "config"),
    *("config_logger_dir", "context_parallel_size", "cp_comm_type", "cross_entropy_fusion_impl"),
    *("cross_entropy_loss_fusion", "cuda_graph_impl", "cuda_graph_modules", "cuda_graph_retain_backward_graph"),
    *("cuda_graph_scope", "cuda_graph_use_single_mempool", "cuda_graph_warmup_steps", "deallocate_pipeline_outputs"),
    *("defer_embedding_wgrad_compute", "delay_offload_until_cuda_graph", "delay_wgrad_compute"),
    *("delta_offload_bytes_across_pp_ranks", "deterministic_mode", "disable_bf16_reduced_precision_matmul"),
    *("disable_parameter_transpose_cache", "distribute_saved_activations", "embedding_init_method"),
    *("embedding_init_method_std", "enable_autocast", "enable_cuda_graph", "ep_overlap_early_attn_memory_release"),
    *("experimental_attention_variant_loss_scale_func", "expert_gtp_weight_remat_size"),
    *("expert_tensor_parallel_num_weight_shards", "external_cuda_graph", "finalize_model_grads_func"),
    *("fine_grained_activation_offloading", "fine_grained_offloading_max_inflight_offloads"),
    *("first_last_layers_bf16", "flash_attention_version", "flash_decode", "fp16", "fp16_lm_cross_entropy"),
    *("fp32_residual_connection", "fused_residual_rmsnorm", "fused_single_qkv_rope", "grad_scale_func"),
    *("grad_sync_func", "gradient_accumulation_fusion", "gtp_weight_remat_size", "hetereogenous_dist_checkpoint"),
    *("hidden_dropout", "hierarchical_context_parallel_sizes", "high_priority_a2a_comm_stream"),
    *("hybrid_context_parallel", "init_method", "init_method_std", "init_method_xavier_uniform"),
    *("init_model_with_meta_device", "kitchen_attention_backend", "kitchen_config_file", "kitchen_recipe_number"),
    *("log_max_attention_logit", "masked_softmax_fusion", "max_seqlen_per_dp_cp_rank", "memory_efficient_layer_norm"),
    *("microbatch_group_size_per_vp_stage", "min_offloaded_tensor_size", "mlp_chunks_for_prefill"),
    *("mlp_chunks_for_training", "moe_extended_tp", "mtp_block_spec", "nccl_all_reduce_for_prefill"),
    *("no_persist_layer_norm", "no_sync_func", "num_layers_at_end_in_bf16", "num_layers_at_start_in_bf16"),
    *("num_microbatches_with_partial_activation_checkpoints", "offload_modules", "output_layer_init_method"),
    *("overlap_dispatch_backward_with_experts_wgrad", "overlap_moe_expert_parallel_comm", "overlap_p2p_comm"),
    *("overlap_p2p_comm_warmup_flush", "parallel_output", "param_sync_func", "params_dtype", "perform_initialization"),
    *("persist_layer_norm", "pg_collection", "pipeline_dtype", "pipeline_model_parallel_comm_backend", "post_process"),
    *("pre_process", "qk_clip", "qk_clip_alpha", "qk_clip_threshold", "quant_recipe"),
    *("scatter_embedding_sequence_parallel", "seed", "sequence_parallel", "symmetric_ar_type"),
    *("te_precision_config_file", "tensor_parallel_num_weight_shards", "test_mode", "timers", "tp_only_amax_red"),
    *("transformer", "transformer_impl", "use_arbitrary_attention_mask", "use_cpu_initialization"),
    *("use_fused_weighted_squared_relu", "use_grouped_gemm_for_dense_mlp", "use_inference_optimized_layers"),
    *("use_kitchen", "use_kitchen_attention", "use_mamba_mem_eff_path", "use_ring_exchange_p2p"),
    *("use_te_activation_func", "use_te_rng_tracker", "use_transformer_engine_op_fuser", "variable_seq_lengths"),
    *("vp_stage", "wgrad_deferral_limit", "_cpu_offloading_context"),
})  # fmt: skip
# Of a mixture of experts: losses, dispatch, and how its parts are stored.
IDLE |= {
    *("moe_aux_loss_coeff", "moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_flex_dispatcher_num_sms"),
    *("moe_deepep_num_sms", "moe_grad_scale_func", "moe_grouped_gemm", "moe_layer_recompute", "moe_per_layer_logging"),
    *("moe_permute_fusion", "moe_permute_fusion_into_hybridep", "moe_router_bias_update_rate", "moe_router_dtype"),
    *("moe_router_fusion", "moe_router_padding_for_fp8", "moe_router_padding_for_quantization", "moe_z_loss_coeff"),
    *("moe_shared_expert_overlap", "moe_single_grouped_bias", "moe_single_grouped_weight"),
    *("moe_token_dispatcher_type", "moe_use_legacy_grouped_gemm", "mla_down_proj_fusion", "mtp_detach_heads"),
    *("mtp_grad_scale_func", "mtp_loss_scaling_factor", "mtp_standalone", "use_grouped_gemm_for_shared_expert"),
}  # fmt: skip
IDLE_PREFIXES = (
    "moe_hybridep_",
    "moe_ncclep_",
    "moe_paged_stash",
    "cpu_offloading",
    "fp4",
    "fp8",
    "inference_",
    "recompute_",
    "tp_comm_",
)
# Args that count only where the one named here is set (and is not its plain value).
GATES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("moe_", ("num_experts", "num_moe_experts")),
    ("mtp_", ("mtp_num_layers",)),
    ("mup_", ("use_mup",)),
    ("dsa_", ("experimental_attention_variant",)),
    ("linear_", ("experimental_attention_variant", "linear_attention_freq")),
    ("mamba_", ("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model")),
    ("window_attn_skip_freq", ("window_size",)),
    ("rope_type", ("multi_latent_attention",)),
    *((name, ("multi_latent_attention",)) for name in (
        "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
        "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale_all_dim",
    )),
)  # fmt: skip
# What the plain model has, where that is not the default of the release (None and the default go without saying), and
# the deciding args that are read elsewhere than in the functions which the table is made from, or that forks add.
PLAIN: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "activation_func": ("silu", "torch.nn.functional.silu"),
    "gated_linear_unit": (True,),
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "multi_latent_attention": (False,),
    "position_embedding_type": ("rope", "yarn"),
    "rotary_percent": (1.0,),
    "num_experts": (0, 1),  # what such a layer has, its tensors show
    "num_moe_experts": (0, 1),
    "mtp_num_layers": (0,),
    "apply_layernorm_1p": (False,),
    "use_legacy_models": (False,),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "hybrid_override_pattern": (),
    "hybrid_attention_ratio": (0.0,),
    "hybrid_mlp_ratio": (0.0,),
    "attn_layernorm": (True,),  # of swiss-ai's fork, as the next ones
    "mlp_layernorm": (True,),
    "post_layer_norm": (False,),
    "xielu": (False,),
    "sandwich_norm": (False,),
    "post_norm": (False,),
    "use_post_norm": (False,),
    "post_attention_layernorm": (False,),
    "pre_norm": (True,),
    "parallel_attn_mlp_res": (False,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "attention_logit_cap": (),
}
# Where code of a release stands that builds the plain model's layers.
OWN_SPECS = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.bridge.models.gpt_provider",
    "megatron.bridge.models.transformer_config",
    "local",
    "transformer_engine",
)
WORDS = {
    "moe_": "mixture of experts",
    "num_experts": "mixture of experts",
    "num_moe_experts": "mixture of experts",
    "multi_latent_attention": "multi-latent attention",
    "add_bias_linear": "biases of linear layers",
    "apply_layernorm_1p": "norm weights around zero",
    "layernorm_zero_centered_gamma": "norm weights around zero",
    "apply_residual_connection_post_layernorm": "residual connections behind the norms",
    "attention_output_gate": "gated attention",
    "softmax_type": "a softmax with an offset",
    "softmax_scale": "a softmax scale of its own",
    "window_attn_skip_freq": "windows on some layers only",
    "no_rope_freq": "layers without rotary embedding",
    "rotary_interleaved": "interleaved rotary embedding",
    "mtp_num_layers": "multi-token prediction",
    "squared_relu": "squared ReLU",
    "swiglu": "an MLP without SwiGLU",
    "gated_linear_unit": "an MLP without SwiGLU",
    "activation_func": "an MLP without SwiGLU",
    "quick_geglu": "an MLP without SwiGLU",
    "xielu": "an MLP without SwiGLU",
    "glu_linear_offset": "an offset in its GLU",
    "activation_func_clamp_value": "a clamped activation",
    "normalization": "LayerNorm",
    "rotary_percent": "rotary embedding on a part of each head",
    "position_embedding_type": "position embeddings other than rotary",
    "hybrid_override_pattern": "state-space layers",
    "hybrid_layer_pattern": "state-space layers",
    "is_hybrid_model": "state-space layers",
    "use_mup": "muP's multipliers",
    "qk_l2_norm": "L2 norms of q and k",
    "spec": "layers of its own code",
    "transformer_layer_spec": "layers of its own code",
    "post_layer_norm": "norms behind its layers",
}
# Names of training's that the sources do not spell out, or that other releases had.
TRAINING = (
    "adam_", "async_", "bert_", "ckpt_", "consumed_", "data_", "dataloader_", "ddp_", "dino_", "dist_ckpt_", "encoder_",
    "eval_", "fault_injector_", "fim_", "hf_", "inference_", "langrl_", "log_", "lr_", "muon_", "no_load_", "no_save_",
    "one_logger_", "optimizer_", "overlap_", "profile", "rerun_", "retro_", "rl_", "sft_", "straggler_", "te_",
    "tensorboard_", "tiktoken_", "tokenizer_", "train_", "use_checkpoint_",
    "valid_", "vision_", "wandb_", "weight_decay", "_is_",
)  # fmt: skip
TRAINING_NAMES = frozenset({
    "rank", "world_size", "iteration", "local_rank", "legacy_tokenizer", "scatter_gather_tensors_in_pipeline",
    "enable_gloo_process_groups", "disable_chunked_prefill", "use_rotary_position_embeddings", "add_position_embedding",
    "transformer_pipeline_model_parallel_size", "norm_epsilon", "num_layers_per_virtual_pipeline_stage", "qknorm_impl",
    "start_weight_decay", "end_weight_decay", "data_parallel_size", "model_name", "use_dist_ckpt", "rope_theta",
    "num_attention_heads_kv", "sliding_window_size", "tie_embed_logits", "decoder_num_layers", "old_context_len",
    "scale_factor", "low_freq_factor", "high_freq_factor", "yarn_attention_factor", "yarn_rotary_scaling_factor",
    "yarn_mscale", "yarn_mscale_all_dim", "moe_use_legacy_grouped_gemm", "padded_vocab_size", "_target_",
})  # fmt: skip
