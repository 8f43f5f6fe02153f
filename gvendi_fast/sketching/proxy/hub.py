"""The Hugging Face hub: which files of a model are needed, and one clear sentence where they cannot be had."""

import warnings
from pathlib import Path

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.hub_errors import refused

SAFETENSORS = ("model*.safetensors", "*.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.*",
    "*.spm",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
)
TOKENIZER = (
    *VOCABULARY,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE = ("chat_template.*",)
REMEDY = "use proxy 'tiny' (built in, needs no network) or give the path of a local model folder"


def hub_snapshot(name: str, revision: str | None, code: bool, with_weights: bool = True) -> tuple[Path, str]:
    """Download, or find in the cache, what a causal LM needs, or its tokenizer; returns its folder and commit hash."""
    from huggingface_hub import HfApi, constants, snapshot_download

    # HTTPError is re-exported there by every release: requests' own below 1.0, httpx's since.
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [
        "*.json",
        "*.jinja",
        *TOKENIZER,
        *(SAFETENSORS if with_weights else ()),
        *(["*.py"] if code else []),
    ]
    offline, why = constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set"
    try:
        if not offline:
            # One request, timed, not retried: from_pretrained takes 23 s and more to notice a dead network.
            try:
                HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                raise
            except (OSError, HTTPError) as error:
                offline, why = True, f"the Hugging Face hub cannot be reached ({type(error).__name__})"

        def fetch(patterns: list[str]) -> Path:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*"],
                    local_files_only=offline,
                )
            )

        folder = fetch(wanted)
        if with_weights and not any(folder.glob("model*.safetensors")):
            folder = fetch([*wanted, *PICKLED])
    except HFValidationError as error:
        raise GvendiError(
            f"The proxy {name!r} is neither a folder nor a possible hub name: {REMEDY}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise GvendiError(
            f"The proxy {name!r} is not (wholly) in the local cache and {why}: {REMEDY}"
        ) from error
    except (OSError, HTTPError) as error:
        raise GvendiError(refused(f"The proxy {name!r}", error, REMEDY, revision)) from error
    if offline and not constants.HF_HUB_OFFLINE:
        warnings.warn(f"{why}; using {name!r} as cached at commit {folder.name}", stacklevel=3)
    return folder, folder.name
