"""The proxy: a causal language model and its tokenizer, from the package, a local folder or the hub.

Whatever the origin, a proxy is loaded from one folder on disk and carries a revision that changes when its
weights do: the commit of a hub snapshot, otherwise a digest of the files that shape a gradient.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.proxy.attention import resolve_attention
from gvendi_fast.sketching.proxy.hub import (
    PICKLED,
    SAFETENSORS,
    TEMPLATE,
    TOKENIZER,
    VOCABULARY,
    first_line,
    hub_snapshot,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_PROXY = "Qwen/Qwen2.5-0.5B-Instruct"
TINY = "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Linux's names: x86 AMX and AVX-512, then arm64.
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True, eq=False)
class Proxy:
    """A loaded proxy model.

    model: causal LM in eval mode on `device`, with parameters in `dtype`.
    tokenizer: a fast tokenizer.
    name: what `load_proxy` was given.
    revision: commit of the hub snapshot, or "sha256:..." of the files.
    dtype, device: of the model.
    parameters: their count, a tied embedding and head counted once.
    dtype_reason: why `dtype` was chosen.
    attention: transformers' name of the attention that the model runs.
    attention_reason: why it was chosen.
    """

    model: "PreTrainedModel" = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    name: str
    revision: str
    dtype: torch.dtype
    device: torch.device
    parameters: int
    dtype_reason: str = ""
    attention: str = ""
    attention_reason: str = ""

    @property
    def identity(self) -> str:
        """What a fingerprint stores: files alone where their digest is known, else hub name and commit."""
        return self.revision if self.revision.startswith("sha256:") else f"{self.name}@{self.revision}"


def load_proxy(
    name: str | os.PathLike = DEFAULT_PROXY,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Proxy:
    """Load a proxy model for gradients: eval mode, nothing fine-tuned.

    name: "tiny" (embedded in the package), the path of a folder in Hugging Face format, or a hub name. Give a local
        folder called "tiny" as "./tiny".
    dtype: see `resolve_dtype`.
    device: "auto" (the GPU if there is one), or anything that torch.device takes.
    revision: branch, tag or commit of a hub name.
    attention: "sdpa" (PyTorch's), "eager" or "flash_attention_2"; None takes flash-attn if it can be used, else sdpa.
    trust_remote_code: allow code in the model's folder to run.

    Raises GvendiError where the folder is incomplete, the hub cannot serve the name, the tokenizer has no
    fast version, the weights do not cover the architecture, or the attention cannot be used.
    """
    target = resolve_device(device)
    chosen, reason = resolve_dtype(dtype, target)
    text = os.fspath(name)
    local = _local_folder(text)
    if local is None:
        folder, version = hub_snapshot(text, revision, trust_remote_code)
        _check_folder(folder, text)
    else:
        if revision is not None:
            raise GvendiError(
                f"revision={revision!r} was given with the local proxy {text!r}; revisions belong to hub "
                "names: leave it out (the digest of the files is the revision)"
            )
        _check_folder(local, text)
        folder, version = local, folder_digest(local)
    with _quiet_transformers():
        tokenizer = _load_tokenizer(folder, text, trust_remote_code)
        config = _load_config(folder, text, trust_remote_code)
        wanted, why = resolve_attention(attention, target, chosen, config)
        # If no name is given, transformers falls back from sdpa to eager for a model that lacks sdpa.
        named = None if attention is None and wanted == "sdpa" else wanted
        model = _load_model(folder, text, chosen, named, trust_remote_code)
    model = model.to(target).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    runs = model.config._attn_implementation
    why = why if runs == wanted else f"transformers has no {wanted} for this model"
    return Proxy(model, tokenizer, text, version, chosen, target, count, reason, runs, why)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device for "auto" (CUDA where available, else the CPU) or for a name that torch knows."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise GvendiError(
            f"device={device!r} is not a torch device; give 'auto', 'cpu' or 'cuda:0'"
        ) from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise GvendiError(f"device={str(device)!r} was requested but torch sees no GPU; give device='cpu'")
    return target


def resolve_dtype(
    dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[torch.dtype, str]:
    """The precision of the model and one clause that says why.

    dtype: "auto", "float32", "bfloat16", "float64" or the torch.dtype of that name. "auto" takes bf16 where
    the device multiplies it in hardware and fp32 elsewhere. fp16 is refused: small gradients vanish in it.
    """
    target = torch.device(device)
    native, why = _bf16_hardware(target)
    if isinstance(dtype, str) and dtype == "auto":
        return (torch.bfloat16 if native else torch.float32), why
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise GvendiError(
            f"dtype={dtype!r} cannot be used for gradients; give 'auto', {', '.join(map(repr, DTYPES))}"
        )
    if chosen is torch.bfloat16 and not native:
        return chosen, f"requested, though {why}"
    return chosen, "requested"


def folder_digest(folder: Path) -> str:
    """Names and contents of config, weights, tokenizer, template and code, as "sha256:" and 16 digits."""
    patterns = ("config.json", *SAFETENSORS, *PICKLED, *TOKENIZER, *TEMPLATE, "*.py")
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and _matches(path.name, patterns):
            total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    total.update(block)
    return f"sha256:{total.hexdigest()[:16]}"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _bf16_hardware(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if torch.version.hip is None:
            known = "has" if major >= 8 else "has no"
            return major >= 8, f"compute capability {major}.{minor} {known} bf16 tensor cores"
        return torch.cuda.is_bf16_supported(), "as torch.cuda.is_bf16_supported() says of this AMD GPU"
    if device.type != "cpu":
        return False, f"bf16 is not known to be fast on {device.type!r}"
    flags = _cpu_flags()
    flag = next((name for name in _BF16_FLAGS if name in flags), None)
    if flag is None:
        return False, "this CPU lists no bf16 instructions"
    if not torch.backends.mkldnn.is_available():
        return False, f"this CPU has {flag}, but this torch was built without oneDNN and would not use it"
    return True, f"this CPU has {flag}"


def _cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux lists them; empty on other systems."""
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return frozenset()
    found = re.search(
        r"^(?:flags|Features)\s*:(.*)$", listing.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    return frozenset(found.group(1).split()) if found else frozenset()


def _local_folder(name: str) -> Path | None:
    """The folder that a name means, or None for a hub name."""
    if name == TINY:
        return Path(str(files("gvendi_fast") / "assets" / TINY))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise GvendiError(
            f"The proxy {name!r} is a file; give the folder with config.json, weights and tokenizer"
        )
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise GvendiError(f"The proxy folder {name!r} does not exist; check the path or use `--proxy tiny`")
    return None


def _check_folder(folder: Path, name: str) -> None:
    present = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    wanted = {
        "config.json": ("config.json",),
        "weights (model.safetensors or pytorch_model.bin)": ("model*.safetensors", "pytorch_model*.bin"),
        "a tokenizer (tokenizer.json)": VOCABULARY,
    }
    missing = [
        what for what, patterns in wanted.items() if not any(_matches(file, patterns) for file in present)
    ]
    if missing:
        raise GvendiError(
            f"The proxy {name!r} cannot be loaded: {folder} lacks {' and '.join(missing)}; save the model "
            "and its tokenizer there with save_pretrained, or use `--proxy tiny`"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and warnings while loading: what they could say of missing weights is checked below."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_tokenizer(folder: Path, name: str, code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise GvendiError(
            f"The tokenizer of the proxy {name!r} cannot be loaded: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise GvendiError(
            f"The proxy {name!r} has only a slow tokenizer ({type(tokenizer).__name__}), and supervised "
            "tokens are found by the character offsets of fast ones; take a proxy with a tokenizer.json, or "
            "use `--proxy tiny`"
        )
    return tokenizer


def _load_config(folder: Path, name: str, code: bool) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise GvendiError(
            f"The config of the proxy {name!r} cannot be loaded: {first_line(error)}"
        ) from error


def _load_model(
    folder: Path, name: str, dtype: torch.dtype, attention: str | None, code: bool
) -> "PreTrainedModel":
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise GvendiError(f"The model of the proxy {name!r} cannot be loaded: {first_line(error)}") from error
    # transformers fills absent weights with random numbers; gradients of those would mean nothing.
    absent = sorted(loading["missing_keys"])
    if absent:
        raise GvendiError(
            f"The weights of the proxy {name!r} lack {len(absent)} of its parameters (first: {absent[0]}); "
            "the files and config.json do not belong together: download the model again, or "
            "use `--proxy tiny`"
        )
    return model
