"""Proxies that are an adapter: a folder with adapter_config.json, whose model lies elsewhere."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvendi_fast.base.errors import GvendiError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What of a folder decides what its adapter computes.
FILES = (CONFIG, *WEIGHTS)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(folder: Path, name: str) -> str:
    """The model that an adapter is for, as its config names it: a path or a name of the hub.

    A path that is not absolute is looked for beside the folder too. Raises GvendiError where there is none, or no PEFT.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise GvendiError(
            f"The proxy {name!r} cannot be loaded: {folder / CONFIG} is no JSON ({error}); save the adapter again"
        ) from error
    if not isinstance(config, dict):
        raise GvendiError(
            f"The proxy {name!r} cannot be loaded: {folder / CONFIG} holds {str(config)[:60]!r} and no JSON object; "
            "save the adapter again"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise GvendiError(
            f"The proxy {name!r} is an adapter whose {folder / CONFIG} names no model (base_model_name_or_path is "
            f"{base!r}); write there the folder or the hub name of the model that it was trained on"
        )
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise GvendiError(
            f"The proxy {name!r} is an adapter without weights: {folder} lacks {WEIGHTS[0]}; save the adapter again"
        )
    if importlib.util.find_spec("peft") is None:
        raise GvendiError(
            f'The proxy {name!r} is an adapter, for which peft is needed: pip install "gvendi-fast[adapters]"'
        )
    beside = folder / base
    if not Path(base).expanduser().exists() and beside.is_dir():
        base = str(beside)
    path = Path(base).expanduser()
    if path.is_dir() and is_adapter(path):
        what = "itself" if path.resolve() == folder.resolve() else f"{base!r}, which is an adapter too"
        raise GvendiError(
            f"The proxy {name!r} is an adapter whose {folder / CONFIG} names {what} as its model "
            "(base_model_name_or_path); write there the folder or the hub name of the model that it was trained on"
        )
    if not path.exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise GvendiError(
            f"The proxy {name!r} is an adapter, and the model that it is for does not exist: {folder / CONFIG} has "
            f"{base!r} as base_model_name_or_path; write there where that model lies, or its hub name"
        )
    return base


def with_adapter(model: PreTrainedModel, folder: Path, name: str) -> PreTrainedModel:
    """A model with the adapter of a folder in its layers.

    Raises GvendiError for an adapter of another model, for absent weights, and for one that is no adapter of layers.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise GvendiError(
            f"The proxy {name!r} is an adapter of kind {kind}, which puts virtual tokens before the text, so that "
            "positions of the model are no longer those of the batch; give the model that it is for, or a LoRA"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, autocast_adapter_dtype=False)
    absent = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if absent:
        raise GvendiError(
            f"The adapter of the proxy {name!r} lacks weights ({' '.join(absent[0].split())[:200]}); they do not "
            "belong to its adapter_config.json, or to this model: save the adapter again"
        )
    # PEFT passes over tensors that the config has no place for: half of an adapter is another model.
    said: Any = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    if said.unexpected_keys:
        first, count = said.unexpected_keys[0], len(said.unexpected_keys)
        raise GvendiError(
            f"The adapter of the proxy {name!r} has {count} weights that its adapter_config.json names no layers for "
            f"(first: {first}); they do not belong together (target_modules, modules_to_save): save the adapter again"
        )
    return adapted.get_base_model()
