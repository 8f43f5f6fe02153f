"""What a configuration says of text: a model that also sees or hears has those settings one level down."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The configuration of a model's language model: the part that it names, or the whole."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get()


def positions_of(config: Any) -> int | None:
    """Tokens of the longest sequence that the model reads, None where it says no limit."""
    return getattr(text_config(config), "max_position_embeddings", None)
