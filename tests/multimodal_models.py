"""Small checkpoints that also see or hear, and rows of text that they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, **HEADS}
TEXT |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {**TEXT, "head_dim": 8}
SEES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SEES |= {"image_size": 28, "patch_size": 14}
QWEN_SEES = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24}
QWEN_TOKENS = {
    "image_token_id": 57,
    "video_token_id": 58,
    "vision_start_token_id": 59,
    "vision_end_token_id": 60,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def turned(**more: object) -> dict:
    """Rotary positions of text, height and width, as both lines of transformers name them."""
    kinds = {"rope_type": "default", "mrope_section": [2, 1, 1], **more}
    return {"rope_scaling": dict(kinds), "rope_parameters": {**kinds, "rope_theta": 1e4}}


def _qwen2_vl() -> transformers.PretrainedConfig:
    sees = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config={**WIDE, **turned()}, vision_config=sees, **QWEN_TOKENS)


def _qwen2_5_vl() -> transformers.PretrainedConfig:
    sees = {**QWEN_SEES, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLConfig(text_config={**WIDE, **turned()}, vision_config=sees, **QWEN_TOKENS)


def _qwen3_vl() -> transformers.PretrainedConfig:
    sees = {**QWEN_SEES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**WIDE, **turned(mrope_interleaved=True)}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=sees, **QWEN_TOKENS)


def _qwen3_vl_moe() -> transformers.PretrainedConfig:
    sees = {**QWEN_SEES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**WIDE, **EXPERTS, **turned(mrope_interleaved=True)}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=sees, **QWEN_TOKENS)


def _qwen3_omni() -> transformers.PretrainedConfig:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    hears = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    hears |= {"num_mel_bins": 8, "max_source_positions": 16, "output_dim": 32, "n_window": 4}
    hears |= {"downsample_hidden_size": 16}
    sees = {**QWEN_SEES, "depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**WIDE, **EXPERTS, **turned(mrope_interleaved=True)}
    tokens = {"image_token_id": 57, "video_token_id": 58, "audio_token_id": 59}
    return Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=sees, audio_config=hears, **tokens)


def _llama4() -> transformers.PretrainedConfig:
    text = {**WIDE, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1}
    sees = {**SEES, "intermediate_size": 64, "vision_output_dim": 16}
    sees |= {"projector_input_dim": 16, "projector_output_dim": 16}
    return transformers.Llama4Config(text_config={**text, "interleave_moe_layer_step": 2}, vision_config=sees)


def _gemma3() -> transformers.PretrainedConfig:
    text = {**WIDE, "sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
    ends = {"boi_token_index": 57, "eoi_token_index": 58, "image_token_index": 59, "mm_tokens_per_image": 4}
    return transformers.Gemma3Config(text_config=text, vision_config=SEES, **ends)


def _llava(config: str, text: str, **more: object) -> Callable[[], transformers.PretrainedConfig]:
    def made() -> transformers.PretrainedConfig:
        values = TEXT if text == "Qwen2Config" else WIDE
        reads = getattr(transformers, text)(**values)
        return getattr(transformers, config)(
            text_config=reads, vision_config=transformers.CLIPVisionConfig(**SEES), **more
        )

    return made


def _paligemma() -> transformers.PretrainedConfig:
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**WIDE, use_bidirectional_attention=False),
        vision_config=transformers.SiglipVisionConfig(**SEES),
        image_token_index=60,
        projection_dim=32,
    )
    return config


def _qwen2_audio() -> transformers.PretrainedConfig:
    hears = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    hears |= {"num_mel_bins": 8, "max_source_positions": 16}
    text = transformers.Qwen2Config(**TEXT)
    return transformers.Qwen2AudioConfig(text_config=text, audio_config=hears, audio_token_index=60)


IMAGE = {"image_token_index": 60}
MULTIMODAL: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava("LlavaConfig", "LlamaConfig", **IMAGE),
    "llava_next": _llava("LlavaNextConfig", "MistralConfig", **IMAGE),
    "llava_onevision": _llava("LlavaOnevisionConfig", "Qwen2Config", video_token_index=59, **IMAGE),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**WIDE),
        vision_config={**SEES, "model_type": "pixtral", "head_dim": 8},
        **IMAGE,
    ),
    "paligemma": _paligemma,
    "idefics3": lambda: transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**WIDE),
        vision_config=dict(SEES),
        image_token_id=60,
        scale_factor=2,
    ),
    "smolvlm": lambda: transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**WIDE),
        vision_config=dict(SEES),
        image_token_id=60,
        scale_factor=2,
    ),
    "internvl": lambda: transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config={**SEES, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=60,
    ),
    "qwen2_audio": _qwen2_audio,
}
# Towers beside experts.
WITH_EXPERTS = {"qwen3_vl_moe": _qwen3_vl_moe, "llama4": _llama4, "qwen3_omni": _qwen3_omni}


NEEDED = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_omni": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


def class_of(config: transformers.PretrainedConfig) -> type[torch.nn.Module]:
    """The class of transformers with a vision or audio tower for a configuration."""
    from transformers.models.auto import modeling_auto

    names = ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING")
    maps = [getattr(modeling_auto, name, {}) for name in names]
    found = next((known[type(config)] for known in maps if type(config) in known), None)
    # Configurations of a part, and in earlier versions of models that hear, are in none.
    named = type(config).__name__.removesuffix("Config") + "ForConditionalGeneration"
    return found or getattr(transformers, named)


def multimodal(name: str) -> torch.nn.Module:
    """A model with random weights, norms and biases among them; skips where this transformers has no such model."""
    if (needed := NEEDED.get(name)) and not hasattr(transformers, needed):
        pytest.skip(f"transformers {transformers.__version__} has no {needed}")
    if name == "paligemma" and transformers.__version__ < "5":
        pytest.skip("in transformers 4 PaliGemma reads a text in both directions, whatever its configuration")
    config = {**MULTIMODAL, **WITH_EXPERTS}[name]()
    torch.manual_seed(1)
    model = class_of(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
