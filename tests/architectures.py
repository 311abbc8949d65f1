"""A tiny random model of every architecture that transformers builds as a causal LM, in memory."""

import inspect
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 48
"""Tokens that layers with a sliding window, or in chunks, look back."""
LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_routed_experts": 2,
}
"""Sizes; every configuration gets those that its constructor knows."""
ALTERNATING = [["sliding_attention", "full_attention"][layer % 2] for layer in range(LAYERS)]
STATE_SPACE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.5, 2.0],
    "short_factor": [1.0, 1.1],
    "original_max_position_embeddings": 256,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {**STATE_SPACE, "attn_layer_indices": [1, 3], "mamba_chunk_size": 16},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "layer_types": ALTERNATING},
    "bloom": {"n_head": 4},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    | {"n_group": 1, "topk_group": 1},
    "falcon_h1": {
        **STATE_SPACE,
        "mamba_d_ssm": 64,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.5,
        "ssm_multipliers": [0.5, 0.8, 1.2, 0.9, 0.7],
        "ssm_in_multiplier": 1.5,
        "attention_in_multiplier": 0.8,
    },
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12},
    "gemma3_text": {"layer_types": ALTERNATING, "query_pre_attn_scalar": 12},
    "gemma3n_text": {
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 4, "altup_num_inputs": 2},
        **{"layer_types": ALTERNATING, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * LAYERS},
    },
    "gpt_oss": {"rope_parameters": YARN, "layer_types": ALTERNATING},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 3.0},
    "granitemoe": {"logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 3.0},
    "granitemoehybrid": {
        **STATE_SPACE,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_chunk_size": 16,
        "position_embedding_type": "nope",
        "logits_scaling": 4.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
    },
    "granitemoeshared": {"logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 3.0},
    "jamba": {"n_mamba_heads": 2, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"] * 2},
    "minimax": {"layer_types": ["full_attention"] * LAYERS},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "smollm3": {"no_rope_layer_interval": 2, "sliding_window": None},
}
"""Settings of an architecture that its defaults leave neutral, or too large for a tiny model."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "phi4-mini": ("phi3", {"rope_parameters": LONGROPE, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
}
"""Name -> model type and settings, for families that share their model type with another."""


def architecture(name: str, seed: int = 0, **settings: Any) -> hf.PreTrainedModel:
    """Build the tiny model of a model type, or of a variant, in float32 and evaluation mode."""
    kind, own = VARIANTS.get(name, (name, {}))
    model_class = getattr(hf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: hf.PreTrainedModel = model_class(configuration(kind, **(own | settings))).eval()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # a factor of 1 hides that it is left out; some norms add 1 to their weight
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            elif parameter_name.endswith(("bias", "sinks")):
                parameter.uniform_(-1, 1)
            elif parameter.unique().numel() == 1:  # made neutral, to be learnt
                parameter.uniform_(-0.5, 1)
            elif parameter.ndim == 3:  # experts in one parameter: empty in some architectures, tiny in others
                parameter.normal_(std=0.2)
    return model


def configuration(kind: str, **settings: Any) -> hf.PreTrainedConfig:
    """Build the configuration of a model type, tiny."""
    config_class: Any = CONFIG_MAPPING[kind]
    known = inspect.signature(config_class.__init__).parameters
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return config_class(**(sizes | SETTINGS.get(kind, {}) | settings))
