"""The proxy: a causal language model and its tokenizer, from the package, a local folder or the hub.

Whatever the origin, a proxy is loaded from one folder on disk and carries a revision that changes when its
weights do: the commit of a hub snapshot, otherwise a digest of the files that shape a gradient.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.stand_ins import stand_in_at
from gvendi_fast.sketching.gradients.quantised import is_code, parameter_count
from gvendi_fast.sketching.proxy import adapter_folder, coded_weights, gguf
from gvendi_fast.sketching.proxy.attention import resolve_attention
from gvendi_fast.sketching.proxy.hub import (
    PICKLED,
    SAFETENSORS,
    TEMPLATE,
    TOKENIZER,
    VOCABULARY,
    hub_snapshot,
)
from gvendi_fast.sketching.proxy.text_config import positions_of, text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Files whose content decides what a proxy computes.
_OF_A_MODEL = ("config.json", *SAFETENSORS, *PICKLED, *TOKENIZER, *TEMPLATE, "*.py")

DEFAULT_PROXY = "Qwen/Qwen2.5-0.5B-Instruct"
TINY = "tiny"
# transformers keeps its verbosity, its default dtype and its lazy modules for the whole process while it loads.
_loading = threading.Lock()
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
    weights: in what code its weights are or were, such as "bitsandbytes 4-bit nf4"; empty for matrices of floats.
    loading: what `load_proxy` takes beside name, dtype and device to load it again; None where it was made otherwise.
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
    weights: str = ""
    loading: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def vocabulary(self) -> int:
        """Tokens that the embedding has."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def identity(self) -> str:
        """What a fingerprint stores: files alone where their digest is known, else hub name and commit."""
        return self.revision if self.revision.startswith("sha256:") else f"{self.name}@{self.revision}"


@dataclass(frozen=True, eq=False)
class ProxyTokenizer:
    """What tokenises for a proxy, without its weights.

    tokenizer: a fast tokenizer.
    name: what `load_tokenizer` was given.
    vocabulary: tokens that the model's embedding has, None where its config does not say.
    positions: the longest sequence of the model, None for no limit.
    config: the model's.
    """

    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    name: str
    vocabulary: int | None
    positions: int | None
    config: "PretrainedConfig" = field(repr=False)


def load_tokenizer(
    name: str | os.PathLike = DEFAULT_PROXY, *, revision: str | None = None, trust_remote_code: bool = False
) -> ProxyTokenizer:
    """The tokenizer of a proxy and what its config says of sequences; weights are neither fetched nor read.

    Arguments and errors are those of `load_proxy`; a folder needs no weights.
    """
    text = os.fspath(name)
    folder = _local_path(text)
    file = None
    if folder is None:
        folder, _ = hub_snapshot(text, revision, trust_remote_code, with_weights=False)
    elif revision is not None:
        raise _revision_of_a_folder(text, revision)
    elif folder.is_dir() and adapter_folder.is_adapter(folder):
        base = adapter_folder.base_of(folder, text)
        found = load_tokenizer(base, trust_remote_code=trust_remote_code)
        return replace(
            found, name=text, tokenizer=_own_tokenizer(folder, text, trust_remote_code) or found.tokenizer
        )
    else:
        file = gguf.find_gguf(folder, text)
    if file is not None:
        folder = file.parent
    else:
        _check_folder(folder, text, with_weights=False)
        _check_content(folder, text, with_weights=False)
    with _loading, _quiet_transformers():
        config = _load_config(folder, text, trust_remote_code, file)
        tokenizer = _load_tokenizer(folder, text, trust_remote_code, file)
    vocabulary = getattr(text_config(config), "vocab_size", None)
    return ProxyTokenizer(tokenizer, text, vocabulary, positions_of(config), config)


def _revision_of_a_folder(name: str, revision: str) -> GvendiError:
    return GvendiError(
        f"revision={revision!r} was given with the local proxy {name!r}; revisions belong to hub "
        "names: leave it out (the digest of the files is the revision)"
    )


def load_proxy(
    name: str | os.PathLike = DEFAULT_PROXY,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Proxy:
    """Load a proxy model for gradients: eval mode, nothing fine-tuned.

    name: "tiny" (embedded in the package), the path of a folder in Hugging Face format, of one with a PEFT adapter,
        whose model is loaded with it, or of a GGUF file, or a hub name. Give a local folder called "tiny" as "./tiny".
    dtype: see `resolve_dtype`.
    device: "auto" (the GPU if there is one), or anything that torch.device takes.
    revision: branch, tag or commit of a hub name.
    attention: "sdpa" (PyTorch's), "eager" or "flash_attention_2"; None takes flash-attn if it can be used, else sdpa.
    trust_remote_code: allow code in the model's folder to run.
    quantize: "4bit" (nf4) or "8bit", to code the linear layers by bitsandbytes while they are loaded. Weights that a
        folder has in a code stay in it where its library hands gradients on, and are made matrices elsewhere.

    Threads that load at once take turns; what is loaded is each one's own.
    Raises GvendiError where the folder is incomplete or broken, weights are not finite, the hub cannot serve the
    name, the tokenizer has no fast version, the weights do not fit the architecture, or the attention cannot be used.
    """
    target = resolve_device(device)
    chosen, reason = resolve_dtype(dtype, target)
    text = os.fspath(name)
    coded_weights.check_quantize(quantize)
    loading = {
        "revision": revision,
        "attention": attention,
        "trust_remote_code": trust_remote_code,
        "quantize": quantize,
    }
    local = _local_path(text)
    file = None
    if local is None:
        folder, version = hub_snapshot(text, revision, trust_remote_code)
        _check_folder(folder, text)
    elif revision is not None:
        raise _revision_of_a_folder(text, revision)
    elif local.is_dir() and adapter_folder.is_adapter(local):
        base = load_proxy(
            adapter_folder.base_of(local, text),
            dtype=chosen,
            device=target,
            attention=attention,
            trust_remote_code=trust_remote_code,
            quantize=quantize,
        )
        return _adapted(replace(base, dtype_reason=reason, loading=loading), local, text, trust_remote_code)
    elif (file := gguf.find_gguf(local, text)) is not None:
        folder, version = file.parent, _digest([file])
    else:
        _check_folder(local, text)
        folder, version = local, folder_digest(local)
    if file is None:
        _check_content(folder, text)
    with _loading, _quiet_transformers():
        # The tokenizer's class depends on the config too.
        config = _load_config(folder, text, trust_remote_code, file)
        tokenizer = _load_tokenizer(folder, text, trust_remote_code, file)
        wanted, why = resolve_attention(attention, target, chosen, config)
        # If no name is given, transformers falls back from sdpa to eager for a model that lacks sdpa.
        named = None if attention is None and wanted == "sdpa" else wanted
        options, weights = _coding(config, file, quantize, chosen, target, text)
        if named is not None:
            options["attn_implementation"] = named
        model = _load_model(folder, text, config, chosen, trust_remote_code, options)
    coded_weights.check_coded(model, folder, text)
    # What is coded was put where it belongs, and refuses to be moved.
    model = (model if "device_map" in options else model.to(target)).eval()
    _check_finite(model, folder, text)
    count = parameter_count(model)
    runs = text_config(model.config)._attn_implementation
    why = why if runs == wanted else f"transformers has no {wanted} for this model"
    return Proxy(model, tokenizer, text, version, chosen, target, count, reason, runs, why, weights, loading)


def _adapted(base: Proxy, folder: Path, name: str, code: bool) -> Proxy:
    """A proxy with the adapter of a folder, and with the folder's tokenizer if it has one."""
    with _loading, _quiet_transformers(), _reading("adapter", folder, name):
        model = adapter_folder.with_adapter(base.model, folder, name).to(base.device).eval()
    _check_finite(model, folder, name)
    digest = _digest([path for file in adapter_folder.FILES if (path := folder / file).is_file()])
    return replace(
        base,
        model=model,
        tokenizer=_own_tokenizer(folder, name, code) or base.tokenizer,
        name=name,
        revision=f"{digest} on {base.identity}",
        parameters=parameter_count(model),
    )


def _own_tokenizer(folder: Path, name: str, code: bool) -> "PreTrainedTokenizerBase | None":
    if not (folder / "tokenizer.json").is_file():
        return None
    with _loading, _quiet_transformers():
        return _load_tokenizer(folder, name, code)


def _coding(
    config: "PretrainedConfig",
    file: Path | None,
    quantize: str | None,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> tuple[dict[str, Any], str]:
    """What `from_pretrained` takes for weights that are or become coded, and that code in words."""
    if file is not None and quantize is None:
        return gguf.loading_options(file), gguf.stored_as(file)
    own = getattr(config, "quantization_config", None)
    if quantize is not None and (file is not None or own is not None):
        stored = gguf.stored_as(file) if file is not None else coded_weights.described(own)
        raise GvendiError(
            f"quantize={quantize!r} was given, but the weights of the proxy {name!r} are quantised already ({stored}); "
            "leave it out, or give the model that they were made of"
        )
    if quantize is not None:
        options = coded_weights.quantize_options(quantize, dtype)
        words = coded_weights.described(options["quantization_config"].to_dict())
    elif own is not None:
        words = coded_weights.described(own)
        coded_weights.as_matrices(own)
        options = {"config": config}
    else:
        return {}, ""
    return {**options, "device_map": {"": device}}, words


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
    return _digest(
        [path for path in sorted(folder.iterdir()) if path.is_file() and _matches(path.name, _OF_A_MODEL)]
    )


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
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


def _local_path(name: str) -> Path | None:
    """The folder or the GGUF file that a name means, or None for a hub name."""
    if not name:
        raise GvendiError("The proxy's name is empty; give a hub name, a folder, or 'tiny'")
    if name == TINY:
        return Path(str(files("gvendi_fast") / "assets" / TINY))
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == gguf.SUFFIX):
        return path
    if path.exists():
        raise GvendiError(
            f"The proxy {name!r} is a file and no {gguf.SUFFIX}; give the folder with config.json, weights and "
            "tokenizer"
        )
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise GvendiError(f"The proxy folder {name!r} does not exist; check the path or use proxy 'tiny'")
    return None


def _check_folder(folder: Path, name: str, with_weights: bool = True) -> None:
    present = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    wanted = {
        "config.json": ("config.json",),
        "weights (model.safetensors or pytorch_model.bin)": ("model*.safetensors", "pytorch_model*.bin"),
        "a tokenizer (tokenizer.json)": VOCABULARY,
    }
    if not with_weights:
        wanted = {what: patterns for what, patterns in wanted.items() if not what.startswith("weights")}
    missing = [
        what for what, patterns in wanted.items() if not any(_matches(file, patterns) for file in present)
    ]
    if missing:
        remedy = "save the model and its tokenizer there with save_pretrained"
        if adapter_folder.CONFIG in present:
            remedy = (
                "it holds an adapter: download that and give its folder, or name the model that it is for"
            )
        raise GvendiError(
            f"The proxy {name!r} cannot be loaded: {folder} lacks {' and '.join(missing)}; {remedy}, or use "
            "proxy 'tiny'"
        )


def _check_content(folder: Path, name: str, with_weights: bool = True) -> None:
    """What transformers would pass over, or word as something else.

    That is a pointer in place of a file (a template would be taken as it is), odd quantization, and weights that are
    there twice.
    """
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and _matches(path.name, (*_OF_A_MODEL, "*.json"))
            and (what := stand_in_at(path)) is not None
        ):
            raise GvendiError(f"The proxy {name!r} cannot be loaded: {path} is {what}, or use proxy 'tiny'")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError):
        # transformers says what is wrong with it.
        config = None
    quantized = config.get("quantization_config") if isinstance(config, dict) else None
    if quantized is not None:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if not isinstance(method, str) or not (method in KNOWN or method == "bitsandbytes"):
            raise GvendiError(
                f"The config of the proxy {name!r} cannot be used: its quantization_config in {folder / 'config.json'} "
                f"is {str(quantized)[:80]!r}, which is no known method; take the model that was quantized, or use "
                "proxy 'tiny'"
            )
    where: dict[str, str] = {}
    shards = sorted(folder.glob("model-*-of-*.safetensors")) if with_weights else []
    for shard in shards if not (folder / "model.safetensors").exists() else ():
        for tensor in _tensors_of(shard):
            if tensor in where:
                raise GvendiError(
                    f"The weights of the proxy {name!r} cannot be used: {tensor} is in {where[tensor]} and in "
                    f"{shard.name} of {folder}; download or save the model again, or use proxy 'tiny'"
                )
            where[tensor] = shard.name


def _tensors_of(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError:
        # transformers says what is wrong with it.
        return []


@contextmanager
def _reading(what: str, folder: Path, name: str) -> Iterator[None]:
    """Whatever transformers raises of a folder's content comes out as one sentence with the remedy."""
    try:
        yield
    except GvendiError:
        raise
    except OSError as error:
        # The system's, such as a permission, and no fault of the content.
        if error.errno is not None and error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        raise _broken(what, folder, name, error) from error
    except pickle.UnpicklingError as error:
        raise GvendiError(
            f"The {what} of the proxy {name!r} cannot be loaded: a pytorch_model.bin in {folder} holds more than "
            "tensors, which may be code and is not run, or is damaged; save the model as safetensors "
            "(save_pretrained), or use proxy 'tiny'"
        ) from error
    except Exception as error:
        # Numbers and types that a config cannot have end in as many kinds of errors as there are models.
        raise _broken(what, folder, name, error) from error


def _broken(what: str, folder: Path, name: str, error: Exception) -> GvendiError:
    said = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:300]
    return GvendiError(
        f"The {what} of the proxy {name!r} cannot be loaded from {folder}: {type(error).__name__}: {said}; download or "
        "save the model again, or use proxy 'tiny'"
    )


def _check_finite(model: "PreTrainedModel", folder: Path, name: str) -> None:
    for parameter, weight in model.named_parameters():
        # A sum is finite unless an entry is not, or it leaves its range.
        if is_code(weight):
            continue
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise GvendiError(
                f"The weights of the proxy {name!r} are not finite: {parameter} in {folder} has NaN or infinite "
                "entries, so no gradient would be; download the model again, or use proxy 'tiny'"
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


def _load_tokenizer(
    folder: Path, name: str, code: bool, file: Path | None = None
) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    with _reading("tokenizer", folder, name):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=code, **_of_file(file)
        )
    if not tokenizer.is_fast:
        raise GvendiError(
            f"The proxy {name!r} has only a slow tokenizer ({type(tokenizer).__name__}), and supervised "
            "tokens are found by the character offsets of fast ones; take a proxy with a tokenizer.json, or "
            "use proxy 'tiny'"
        )
    return tokenizer


def _load_config(folder: Path, name: str, code: bool, file: Path | None = None) -> "PretrainedConfig":
    from transformers import AutoConfig

    with _reading("config", folder, name):
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=code, **_of_file(file)
        )


def _of_file(file: Path | None) -> dict[str, str]:
    return {} if file is None else {"gguf_file": file.name}


def _loader(config: "PretrainedConfig", name: str) -> Any:
    """What of transformers loads a model of this configuration with its head over text."""
    import transformers

    code = getattr(config, "auto_map", None) or {}
    # A model that also sees is under another name than a causal one, and in earlier versions under fewer names.
    for auto in ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText"):
        loader = getattr(transformers, auto, None)
        if loader is None or not (type(config) in loader._model_mapping or auto in code):
            continue
        if auto != "AutoModelForCausalLM" and getattr(config, "is_encoder_decoder", False):
            raise GvendiError(
                f"The proxy {name!r} is a {config.model_type}, which encodes one text and decodes another; a proxy "
                "must be a causal language model, by itself or inside one that sees: take another, or use proxy 'tiny'"
            )
        return loader
    classes = (getattr(transformers, one, None) for one in getattr(config, "architectures", None) or ())
    # A class of another model would be made of this one's numbers.
    named = (found for found in classes if isinstance(config, getattr(found, "config_class", None) or ()))
    # Without any, the error of this one names what it takes.
    return next(filter(None, named), transformers.AutoModelForCausalLM)


def _load_model(
    folder: Path,
    name: str,
    config: "PretrainedConfig",
    dtype: torch.dtype,
    code: bool,
    options: dict[str, Any],
) -> "PreTrainedModel":
    if hasattr(config, "thinker_config"):
        # Qwen's Omni models: the part that reads and writes text, beside those that speak.
        config = config.thinker_config
        options = {**options, "config": config}
    if config.model_type == "paligemma":
        # It sees its whole prompt in both directions, an answer only what is before it, which is how a text that its
        # logits are to predict must be read.
        config.text_config.use_bidirectional_attention = False
        options = {**options, "config": config}
    with _reading("model", folder, name):
        model, loading = _loader(config, name).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=code,
            output_loading_info=True,
            # Its own error only points at a report that was logged.
            ignore_mismatched_sizes=True,
            **options,
        )
    if others := sorted(loading["mismatched_keys"]):
        key, stored, wanted = others[0]
        raise GvendiError(
            f"The weights of the proxy {name!r} are not of the sizes that its config.json gives: {key} is "
            f"{list(stored)} in place of {list(wanted)}"
            + f" (and {len(others) - 1} others)" * (len(others) > 1)
            + "; the files do not belong together: download the model again, or use proxy 'tiny'"
        )
    # transformers fills absent weights with random numbers; gradients of those would mean nothing.
    absent = sorted(loading["missing_keys"])
    if absent:
        raise GvendiError(
            f"The weights of the proxy {name!r} lack {len(absent)} of its parameters (first: {absent[0]}); "
            "the files and config.json do not belong together: download the model again, or "
            "use proxy 'tiny'"
        )
    return model
