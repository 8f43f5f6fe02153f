"""Small models of the architectures that people use, odd samples, and the sketch of an autograd gradient."""

import pytest
import torch
import transformers

from gvendi_fast.kernels import reference
from gvendi_fast.kernels.sketch_matrix import SketchSpec

COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64}
CONFIGS = {
    "qwen2_tied": ("Qwen2Config", {**GATED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**GATED, "head_dim": 8, "tie_word_embeddings": False}),
    "llama_untied": ("LlamaConfig", {**GATED, "tie_word_embeddings": False}),
    "llama_wide": ("LlamaConfig", {**GATED, "intermediate_size": 300, "vocab_size": 331}),
    "mistral": ("MistralConfig", {**GATED, "head_dim": 8, "sliding_window": 5}),
    "gemma2": ("Gemma2Config", {**GATED, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 5}),
    "gemma3": ("Gemma3TextConfig", {**GATED, "head_dim": 8, "sliding_window": 5}),
    "phi3": ("Phi3Config", {**GATED, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**COMMON, "intermediate_size": 80, "max_position_embeddings": 64}),
    "opt": (
        "OPTConfig",
        {**COMMON, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "opt_projected": (
        "OPTConfig",
        {**COMMON, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 24},
    ),
    "granite_scaled": ("GraniteConfig", {**GATED, "logits_scaling": 3.0}),
    # A biased head is left to autograd.
    "phi_biased_head": ("PhiConfig", {**COMMON, "intermediate_size": 80, "max_position_embeddings": 64}),
}
SPEC = SketchSpec(dim=128, seed=3)
DENSE = SketchSpec(dim=192, seed=3, kind="rademacher")
# Tied and capped head, transposed weights and learned positions, a head left to autograd, a width above K.
DENSE_NAMES = ["gemma2", "gpt2", "phi_biased_head", "llama_wide"]
BOTH_KINDS = pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(pytest.param(name, SPEC, id=name) for name in CONFIGS),
        *(pytest.param(name, DENSE, id=f"{name}-dense") for name in DENSE_NAMES),
    ],
)
# fp32 rounding of two different summation orders over a few hundred products.
FP32_RELATIVE = 1e-5


def build(name: str, configs: dict[str, tuple[str, dict]] = CONFIGS) -> torch.nn.Module:
    config_class, values = configs[name]
    torch.manual_seed(1)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config_class)(**values, **ends)
    )
    # Norm weights and biases of a fresh model are constants, which would hide a wrong formula.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def samples(vocab: int = 61) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length, prompt in ((17, 6), (9, 0), (2, 1), (12, 11), (23, 3)):
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append((ids, labels))
    # A gap in the supervised tokens, and an unsupervised tail.
    rows[0][1][9:11] = -100
    rows[4][1][15:] = -100
    return rows


def pad(rows, side: str = "right", to: int | None = None):
    width = to or max(len(ids) for ids, _ in rows)
    shape = (len(rows), width)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, (row_ids, row_labels) in enumerate(rows):
        where = slice(0, len(row_ids)) if side == "right" else slice(width - len(row_ids), width)
        ids[i, where], labels[i, where], mask[i, where] = row_ids, row_labels, 1
    return ids, labels, mask


def autograd_sketch(model, sketcher, ids, labels) -> tuple[torch.Tensor, float]:
    model.zero_grad()
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n in sketcher.parameters}
    assert all(g is not None for g in gradients.values())
    z = reference.sketch_of_gradient(gradients, sketcher.spec, sketcher.transposed)
    model.zero_grad()
    return z, loss.item()


def state_of(model):
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules()
    ]
    flags = [m.training for m in model.modules()]
    return hooks, flags, [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]
