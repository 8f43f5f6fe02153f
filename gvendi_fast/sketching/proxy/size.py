"""How large a proxy is, by its configuration alone: no weights are fetched or read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gvendi_fast.sketching.proxy.text_config import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What configurations call the number of experts, and of those that a token meets.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class ProxySize:
    """stored: parameters, a tied head once. multiplied: as many of them as a token is multiplied with."""

    stored: int
    multiplied: int


def proxy_size(config: PretrainedConfig) -> ProxySize:
    """The size of the causal language model of a configuration.

    An embedding of its own multiplies nothing, and of experts a token meets a few. Raises what transformers raises for
    a configuration that it has no such model for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = text_config(config)
    # On the meta device a model of any size is made without its memory.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    every, chosen = (_first(text, names) for names in (_EXPERTS, _CHOSEN))
    share = chosen / every if every and chosen else 1.0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    stored = multiplied = 0
    for name, parameter in model.named_parameters():
        stored += parameter.numel()
        if parameter is embedding.weight and not is_tied:
            continue
        multiplied += round(parameter.numel() * (share if ".experts." in name else 1.0))
    return ProxySize(stored, multiplied)


def _first(config: PretrainedConfig, names: tuple[str, ...]) -> int:
    return next((value for name in names if (value := getattr(config, name, None))), 0)
