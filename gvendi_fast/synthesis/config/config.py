"""The configuration of a synthesis run: its sections, their defaults and the errors that name a key.

A file is YAML with the sections below; `section.key=value` on the command line goes over it. A key that is not known
is an error, for a run takes hours and a misspelt limit would be found out too late.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.sources import find_files
from gvendi_fast.synthesis.config.schema import number, section, shown


@dataclass(frozen=True)
class PoolConfig:
    """Where growth starts. data: files, folders or globs, or one run directory of `gvendi sketch`. limit: rows.

    corpus: the folder that holds the files which a run directory was made from, if they have moved.
    """

    data: list[str]
    corpus: str | None = None
    limit: int | None = number(None, 1)


@dataclass(frozen=True)
class TaskConfig:
    """What is written. name: "math", "nli" or "generic". settings: of that task (see `tasks.make_task`)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GeneratorConfig:
    """Who writes. kind "openai": an endpoint at base_url; "local": a model in this process, in batches of `batch`.

    key_variable: the environment variable with the API key, null for none. prices: per million prompt and completion
    tokens. The rest as in `OpenAIGenerator` and `Pace`.
    """

    model: str
    kind: Literal["openai", "local"] = "openai"
    base_url: str | None = None
    key_variable: str | None = "OPENAI_API_KEY"
    prices: list[float] | None = None
    max_tokens: int | None = number(None, 1)
    limit_field: str = "max_tokens"
    send_seed: bool = False
    concurrency: int = number(8, 1)
    max_concurrency: int = number(64, 1)
    retries: int = number(6, 0)
    time_limit: float = number(600.0, 0.001)
    patience: float = number(900.0, 0.001)
    first_delay: float = number(0.5, 0.001)
    longest_delay: float = number(60.0, 0.001)
    batch: int = number(8, 1)


@dataclass(frozen=True)
class ProxyConfig:
    """The model whose gradients are sketched, and how; as the options of `gvendi sketch`.

    process: candidates are sketched in a process of their own, which loads the proxy once more; null does so for an
    endpoint and not for a local model, which would wait anyway.
    """

    name: str = "Qwen/Qwen2.5-0.5B-Instruct"
    dim: int = number(1024, 64, 8192)
    sketch: Literal["hadamard", "rademacher"] = "hadamard"
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    max_tokens: int | None = number(None, 2)
    batch_tokens: int | None = number(None, 1)
    mask: Literal["completion", "released"] = "completion"
    exclude: list[str] = field(default_factory=list)
    process: bool | None = None


@dataclass(frozen=True)
class FilterConfig:
    """What is kept out before acceptance. tests: files whose questions must not come back, by word n-grams of `ngram`.

    paraphrase: how many of the most similar test questions the generator is asked about, whether the candidate says
    one of them in other words; 0 asks nothing. paraphrase_template: a file in place of this package's question.
    near: sketch cosine to a row of the pool from which a candidate counts as its copy; null takes none for one.
    workers: processes that check answers.
    """

    tests: list[str] = field(default_factory=list)
    ngram: int = number(10, 1)
    paraphrase: int = number(0, 0)
    paraphrase_template: str | None = None
    # Under the embedded proxy at K = 1024, GSM8K: a word more in the prompt 0.979 at least, another name 0.91 in the
    # median, another question 0.22 at most. Templated rows lie closer (MED: one in ten has a neighbour above 0.98).
    near: float | None = number(0.98, 0.0, 1.0)
    workers: int = number(1, 1)


@dataclass(frozen=True)
class AcceptConfig:
    """Which candidates join the pool.

    rule: "cluster", those whose nearest cluster is among the smaller half; "gain", those that raise the entropy by
    more than the `quantile` of `reference`; "all". reference "pool": what each row of the pool adds to the others,
    brought to the size that it has now; "candidates": the gains of the `recent` last candidates (the pool's while there
    are fewer than 100).
    clusters: a share of the pool below 1, or their number. round: growth of the pool, as a share, after which it is
    clustered again; refresh: after which gains refer to the pool as it is then (0: after every block that added rows).
    frozen: counts and gains stay as they are at the start of a round, as in the paper.
    from_sparse: prompts show rows of the sparse clusters only.
    """

    rule: Literal["cluster", "gain", "all"] = "cluster"
    clusters: float = number(0.01, 0.0)
    round: float = number(0.1, 0.0)
    refresh: float = number(0.05, 0.0, 1.0)
    frozen: bool = False
    from_sparse: bool = False
    quantile: float = number(0.5, 0.0, 1.0)
    reference: Literal["pool", "candidates"] = "pool"
    recent: int = number(1000, 100)


@dataclass(frozen=True)
class StopConfig:
    """When a run ends. target: rows of the pool. requests, tokens: over all runs of the directory; seconds: of one.

    floor: share of accepted candidates, among the last `window` or more, below which the run ends.
    """

    target: int = number(least=1)
    requests: int | None = number(None, 1)
    tokens: int | None = number(None, 1)
    seconds: float | None = number(None, 0.001)
    floor: float = number(0.01, 0.0, 1.0)
    window: int = number(1000, 1)


@dataclass(frozen=True)
class Config:
    """A synthesis run. out: its directory. block: prompts that are decided together; ahead: blocks under way at once.

    Prompts of a block show the pool as it was at the start of the round that was current `ahead` blocks before.
    Relative paths are seen from the working directory in which a run begins. Its config.yaml has them as absolute
    ones, so that it is resumed from anywhere.
    """

    out: str
    pool: PoolConfig
    task: TaskConfig
    generator: GeneratorConfig
    stop: StopConfig
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    accept: AcceptConfig = field(default_factory=AcceptConfig)
    seed: int = 0
    block: int = number(64, 1)
    ahead: int = number(4, 1)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, as the file has them."""
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The settings that another result follows from; a run goes on under the same ones only."""
        whole = self.to_dict()
        # The pool counts by its rows.
        for name in ("out", "stop", "pool"):
            del whole[name]
        # The check on paraphrases describes itself, where there is one.
        for name in ("workers", "paraphrase", "paraphrase_template"):
            del whole["filter"][name]
        del whole["proxy"]["process"]
        whole["generator"] = {key: whole["generator"][key] for key in ("kind", "model", "max_tokens")}
        # A folder counts by its digest, wherever it lies.
        whole["proxy"]["name"] = _name_of_model(self.proxy.name)
        if self.generator.kind == "local":
            whole["generator"]["model"] = _name_of_model(self.generator.model)
        settings = whole["task"]["settings"]
        whole["task"]["settings"] = {key: settings[key] for key in settings if not is_path_setting(key)}
        # Their content counts, wherever they lie.
        del whole["filter"]["tests"]
        whole["tests"] = (
            [_digest(path) for path in find_files(self.filter.tests)] if self.filter.tests else []
        )
        return whole


def is_path_setting(name: str) -> bool:
    """Whether the setting of a task or a filter is a path."""
    return name in ("template", "verifier_folder") or name.endswith("_template")


def load_config(path: str | os.PathLike, overrides: Sequence[str] = (), **values: Any) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides and top-level values on top.

    Raises GvendiError that names the key, what it was and what is allowed.
    """
    yaml = _yaml()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GvendiError(f"the configuration '{path}' cannot be read: {error}") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GvendiError(
            f"the configuration '{path}' is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(found, dict):
        raise GvendiError(
            f"the configuration '{path}' holds {shown(found)}; wanted sections such as pool and task"
        )
    for override in overrides:
        _override(found, override)
    return config_from({**found, **values})


def config_from(values: Mapping[str, Any]) -> Config:
    """The configuration of nested dicts; GvendiError as in `load_config`."""
    config = section(Config, values)
    generator = config.generator
    if generator.kind == "openai" and generator.base_url is None:
        raise GvendiError("generator.base_url is missing; wanted an address such as http://localhost:8000/v1")
    if generator.prices is not None and (len(generator.prices) != 2 or min(generator.prices) < 0):
        raise GvendiError(
            f"generator.prices is {generator.prices}; wanted two numbers of at least 0: per million prompt and "
            "completion tokens"
        )
    if generator.concurrency > generator.max_concurrency:
        raise GvendiError(
            f"generator.concurrency is {generator.concurrency}; wanted at most generator.max_concurrency, "
            f"{generator.max_concurrency}"
        )
    filter_ = config.filter
    if filter_.paraphrase and not filter_.tests:
        raise GvendiError(
            f"filter.paraphrase is {filter_.paraphrase} but filter.tests names no file; name the test files there, or "
            "set filter.paraphrase to 0"
        )
    if filter_.paraphrase_template is not None and not filter_.paraphrase:
        raise GvendiError(
            f"filter.paraphrase_template is '{filter_.paraphrase_template}' but filter.paraphrase is 0, which asks "
            "nothing; wanted at least 1, or no template"
        )
    return config


def dump_config(config: Config) -> str:
    """The configuration as a file that `load_config` reads."""
    return _yaml().safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise GvendiError(
            f"A configuration needs PyYAML ({error}); install it with `pip install gvendi-fast[synthesis]`"
        ) from error
    return yaml


def _override(values: dict[str, Any], text: str) -> None:
    yaml = _yaml()
    name, equals, value = text.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise GvendiError(f"{text!r} is no setting; wanted section.key=value, such as stop.target=5000")
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise GvendiError(f"{text!r}: '{key}' is {shown(inner)}, not a section")
        values = inner
    try:
        values[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise GvendiError(f"{text!r}: the value is not YAML ({' '.join(str(error).split())})") from error


def _name_of_model(name: str) -> str:
    return os.path.basename(name) if os.path.isabs(name) else name


def _digest(path: str) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
