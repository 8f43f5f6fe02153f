"""Llama models of transformers as GGUF files, as llama.cpp's converter writes them."""

from pathlib import Path

import torch

# Names of transformers and of GGUF, in a block and outside.
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model, tokenizer, kind: str = "F32", architecture: str = "llama") -> dict:
    """Write a Llama with its byte-level BPE tokenizer; matrices as `kind`, such as "Q8_0" or "Q4_0".

    Returns {name in transformers: float32 tensor, as the file has it}.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    config, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), architecture)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    # transformers 4 has it beside the other numbers.
    writer.add_rope_freq_base(getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, gguf, tokenizer, config)
    written = {}
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        values = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp turns pairs of neighbours, transformers the two halves of a head.
            count = heads if "q_proj" in name else groups
            values = values.view(count, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        values = values.contiguous().numpy()
        if values.ndim == 2:
            coded = quantize(values, kind)
            writer.add_tensor(_gguf_name(name), coded, raw_dtype=kind)
            values = dequantize(coded, kind)
        else:
            writer.add_tensor(_gguf_name(name), values)
        values = torch.from_numpy(values.copy())
        if "q_proj" in name or "k_proj" in name:
            values = values.view(count, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        written[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_tokenizer(writer, gguf, tokenizer, config) -> None:
    import json

    inside = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {token["id"] for token in inside["added_tokens"]}
    names = [token for token, _ in tokens]
    names += [f"<unused{i}>" for i in range(len(names), config.vocab_size)]
    kinds = [
        gguf.TokenType.CONTROL
        if i in special
        else gguf.TokenType.NORMAL
        if i < len(tokens)
        else gguf.TokenType.UNUSED
        for i in range(len(names))
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in inside["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    # transformers 4 reads no file without a first token.
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for token, add in (
        (first, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    outside = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outside:
        return outside[name]
    _, _, number, inside = name.split(".", 3)
    return f"blk.{number}.{_IN_BLOCK[inside.removesuffix('.weight')]}.weight"
