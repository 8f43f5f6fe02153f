"""A tiny random model of every causal-LM family that the installed transformers can build from a configuration.

A family's own default configuration says which settings it has; those of SMALL that it has are made small, and OWN
holds what a family needs beside them. What is written here is about sizes alone: no family is treated otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 61
HIDDEN, LAYERS, HEADS, PAIRS, WIDE, LONG = 32, 2, 4, 2, 48, 64

SMALL: dict[str, Any] = {
    # Width and depth.
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_dim", "emb_dim"), HIDDEN),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(
        ("num_decoder_attention_heads", "num_encoder_attention_heads", "attention_heads", "num_heads"), HEADS
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups"), PAIRS
    ),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "swa_head_dim", "kv_channels"), 8),
    "swa_num_attention_heads": HEADS,
    # Feed-forward widths.
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "dim_ff",
            "dff",
            "ffn_hidden_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
        ),
        WIDE,
    ),
    **dict.fromkeys(("n_inner", "d_inner", "feed_forward_size", "dense_intermediate_size"), WIDE),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp"), WIDE),
    # Lengths.
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "context_length",
            "max_target_positions",
        ),
        LONG,
    ),
    **dict.fromkeys(("sliding_window", "local_attention", "window_size", "sliding_window_size"), 5),
    **dict.fromkeys(("attention_chunk_size", "attention_window_size"), 64),
    # Experts.
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16
    ),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "moe_layer_end_index": LAYERS - 1,
    "zero_expert_num": 2,
    # Latent attention, and attention over chosen tokens.
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    # State spaces and linear attention.
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("lru_width", "attention_hidden_size"), HIDDEN),
    # What else is wide.
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "rotary_dim": 4,
    "embedding_size": HIDDEN,
    "input_embedding_size": HIDDEN,
    "output_embedding_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "laurel_rank": 8,
    "d_rel": 4,
    "hc_mult": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "router_hidden_size": 8,
    "adapter_rank": 4,
    "gated_norm_rank": 4,
    "is_decoder": True,
    "use_cache": False,
}
# Beside that: what a family's own shapes ask for.
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8}
OWN: dict[str, dict[str, Any]] = {
    "bamba": STATES,
    "granitemoehybrid": STATES,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "n_mamba_heads": 8,
        "attention_hidden_size": 2 * HIDDEN,
    },
    "cohere_compass_text": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "lfm2": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "num_buckets": 4,
        "hash_seed": 1,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 7,
        "shape_vocab_size": 7,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "num_hidden_layers": 4},
}


class NotBuiltError(Exception):
    """A tiny model of the family cannot be made here, for the reason given."""


def families() -> list[str]:
    """Every model type that AutoModelForCausalLM knows, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, **more: Any) -> Any:
    """The smallest configuration of a family; `more` are settings of a test's own."""
    config_class = CONFIG_MAPPING[kind]
    own = {**OWN.get(kind, {}), **more}
    try:
        default = config_class()
    except Exception as error:
        raise NotBuiltError(f"its default configuration: {_first_line(error)}") from error
    has = default.to_dict()
    names = {**has, **{name: None for name in getattr(default, "attribute_map", {})}}
    alias = set(getattr(default, "attribute_map", {}))
    values = {name: value for name, value in SMALL.items() if name in names and name not in alias}
    for name in ("bos_token_id", "eos_token_id"):
        values[name] = 1 + (name == "eos_token_id")
    if isinstance(has.get("pad_token_id"), int):
        values["pad_token_id"] = 0
    values.update(_layers_of_each_kind(has))
    for name in getattr(config_class, "sub_configs", {}):
        inner = getattr(default, name, None)
        if inner is not None and getattr(inner, "model_type", "") in CONFIG_MAPPING:
            values[name] = tiny_config(inner.model_type)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS
    values.update(own)
    try:
        return config_class(**values)
    except Exception as error:
        raise NotBuiltError(f"its configuration: {_first_line(error)}") from error


def _layers_of_each_kind(has: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that a family mixes, at least two in all; settings that go by layer are left to it."""
    depth_name = next((name for name in ("num_hidden_layers", "num_layers") if name in has), None)
    lists = {
        name: value
        for name, value in has.items()
        if isinstance(value, (list, tuple)) and len(value) > LAYERS and "layer" in name
        if depth_name is None or len(value) == has[depth_name]
    }
    values: dict[str, Any] = dict.fromkeys(lists)
    named = {
        name: list(dict.fromkeys(value))
        for name, value in lists.items()
        if name.endswith("layer_types") and all(isinstance(kind, str) for kind in value)
    }
    if named and depth_name is not None:
        depth = max(LAYERS, *map(len, named.values()))
        values[depth_name] = depth
        values.update({name: (kinds * depth)[:depth] for name, kinds in named.items()})
    return values


def tiny_model(kind: str, **more: Any) -> torch.nn.Module:
    """A tiny random model of a family in eval mode, of which no parameter is a constant. Raises NotBuiltError."""
    config = tiny_config(kind, **more)
    torch.manual_seed(1)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:
        raise NotBuiltError(f"its model: {type(error).__name__}: {_first_line(error)}") from error
    randomise(model)
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Move every parameter from where it starts: zeros and ones hide a wrong formula, and tiny ones a wrong sketch."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif float(parameter.std()) < 0.05:
                parameter.add_(0.1 * torch.randn_like(parameter))


def version() -> str:
    """That of transformers."""
    return transformers.__version__


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
