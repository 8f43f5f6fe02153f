"""The configuration of a synthesis run: its sections, their defaults and the errors that name a key.

A file is YAML with the sections below; `section.key=value` on the command line goes over it. A key that is not known
is an error, for a run takes hours and a misspelt limit would be found out too late.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.listing import find_files
from gvendi_fast.synthesis.config.schema import Field, Section, Texts, model_validator, shown, validated
from gvendi_fast.synthesis.config.yaml_text import dumped, parse, read_text


class PoolConfig(Section):
    """Where growth starts."""

    data: Texts
    """Files, folders or globs, or one run directory of `gvendi sketch`."""
    corpus: str | None = None
    """The folder that holds the files which a run directory was made from, if they have moved."""
    limit: int | None = Field(None, ge=1)
    """Take the first so many rows only; null takes all."""


class TaskConfig(Section):
    """What is written."""

    name: str
    """"math", "nli" or "generic"."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Those of the task; `gvendi synthesize --keys` ends with them."""


class GeneratorConfig(Section):
    """Who writes."""

    model: str
    """Its name at the endpoint, or a local model's folder or name on the hub."""
    kind: Literal["openai", "local"] = "openai"
    """openai: an endpoint at base_url that speaks OpenAI's chat completions; local: a model in this process."""
    base_url: str | None = None
    """Address of the endpoint, such as "http://localhost:8000/v1"; a local model needs none."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Name of the environment variable with the API key; null for an endpoint without keys. The key is read from there
    only and written nowhere."""
    prices: list[float] | None = None
    """What a million prompt tokens and a million completion tokens cost, for the cost of the run."""
    max_tokens: int | None = Field(None, ge=1)
    """Most tokens of an answer; null leaves that to the endpoint, and gives a local model 512."""
    limit_field: str = "max_tokens"
    """What the endpoint calls the limit of an answer's tokens ("max_completion_tokens" for some models)."""
    send_seed: bool = False
    """Send a `seed` made from the key of each request, for endpoints that sample reproducibly with one."""
    answer_mb: float = Field(16.0, ge=0.001, le=1024)
    """Megabytes (2^20 bytes) of an answer's body, unpacked; a longer one is not read, and never asked for again."""
    concurrency: int = Field(8, ge=1)
    """Requests under way at the start; the number then follows what the endpoint bears."""
    max_concurrency: int = Field(64, ge=1, le=1000)
    """Most requests under way at once; the client opens no more connections than a thousand."""
    retries: int = Field(6, ge=0)
    """Further tries after a server error, a broken connection or a time-out; being told to wait and finding nobody
    there do not count."""
    time_limit: float = Field(600.0, ge=0.001)
    """Seconds for one try."""
    patience: float = Field(900.0, ge=0.001)
    """Seconds: how long the endpoint may serve nothing at all while it fails, the longest Retry-After that is obeyed,
    and how long one request is tried while others are served."""
    first_delay: float = Field(0.5, ge=0.001)
    """Seconds before the second try, at most; doubled with each failure after it."""
    longest_delay: float = Field(60.0, ge=0.001)
    """Seconds that no delay exceeds, unless the endpoint asks for more."""
    batch: int = Field(8, ge=1)
    """Prompts that a local model answers together."""

    @model_validator(mode="after")
    def _of_an_endpoint(self) -> GeneratorConfig:
        if self.kind == "openai" and self.base_url is None:
            raise ValueError("base_url is missing; wanted an address such as http://localhost:8000/v1")
        if self.prices is not None and (len(self.prices) != 2 or min(self.prices) < 0):
            raise ValueError(
                f"prices is {self.prices}; wanted two numbers of at least 0: per million prompt and completion tokens"
            )
        if self.concurrency > self.max_concurrency:
            raise ValueError(
                f"concurrency is {self.concurrency}; wanted at most generator.max_concurrency, {self.max_concurrency}"
            )
        return self


class ProxyConfig(Section):
    """The model whose gradients are sketched, and how; as the options of `gvendi sketch`."""

    name: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """The model's folder or name on the hub."""
    dim: int = Field(1024, ge=64, le=8192)
    """Numbers of a sketch (K): a power of two, or a multiple of 64 for rademacher."""
    sketch: Literal["hadamard", "rademacher"] = "hadamard"
    """Kind of sketch; rademacher is dense, slower, and there to verify hadamard."""
    seed: int = 0
    """Seed of the sketch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights of the proxy; auto: bfloat16 where the hardware has it, else float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention of the proxy; auto: flash-attn where `gvendi info` says it can be used, else PyTorch's sdpa."""
    max_tokens: int | None = Field(None, ge=2)
    """Longest sequence. A longer prompt is cut on the left; a completion that does not fit is rejected. null: what the
    proxy reads, at most 4096."""
    batch_tokens: int | None = Field(None, ge=1)
    """Tokens of one batch, padding included; null: 2048 on a CPU, what fits into a GPU's free memory."""
    mask: Literal["completion", "released"] = "completion"
    """Supervised tokens; released masks as the released G-Vendi code does."""
    exclude: Texts = Field(default_factory=list)
    """Patterns: parameters whose name matches one are left out."""
    process: bool | None = None
    """Candidates are sketched in a process of their own, which loads the proxy once more; null does so for an endpoint
    and not for a local model, which would wait anyway."""


class FilterConfig(Section):
    """What is kept out before acceptance."""

    tests: Texts = Field(default_factory=list)
    """Files whose questions must not come back."""
    ngram: int = Field(10, ge=1)
    """Words in succession that a candidate must not share with a question of the tests."""
    paraphrase: int = Field(0, ge=0)
    """How many of the most similar test questions the generator is asked about: does the candidate say one of them in
    other words? 0 asks nothing."""
    paraphrase_template: str | None = None
    """A file in place of this package's question."""
    # Under the embedded proxy at K = 1024, GSM8K: a word more in the prompt 0.979 at least, another name 0.91 in the
    # median, another question 0.22 at most. Templated rows lie closer (MED: one in ten has a neighbour above 0.98).
    near: float | None = Field(0.98, ge=0, le=1)
    """Sketch cosine to a row of the pool from which a candidate counts as its copy; null takes none for one."""
    workers: int = Field(1, ge=1, le=1024)
    """Processes that check answers."""

    @model_validator(mode="after")
    def _paraphrases(self) -> FilterConfig:
        if self.paraphrase and not self.tests:
            raise ValueError(
                f"paraphrase is {self.paraphrase} but filter.tests names no file; name the test files there, or set "
                "filter.paraphrase to 0"
            )
        if self.paraphrase_template is not None and not self.paraphrase:
            raise ValueError(
                f"paraphrase_template is '{self.paraphrase_template[:80]}' but filter.paraphrase is 0, which asks "
                "nothing; "
                "wanted at least 1, or no template"
            )
        return self


class AcceptConfig(Section):
    """Which candidates join the pool."""

    rule: Literal["cluster", "gain", "all"] = "cluster"
    """cluster: those whose nearest cluster is among the smaller half; gain: those that raise the entropy by more than
    the `quantile` of `reference`; all."""
    clusters: float = Field(0.01, ge=0)
    """A share of the pool below 1, or their number."""
    round: float = Field(0.1, ge=0)
    """Growth of the pool, as a share, after which it is clustered again."""
    refresh: float = Field(0.05, ge=0, le=1)
    """Growth of the pool, as a share, after which gains refer to the pool as it is then; 0: after every block that
    added rows."""
    frozen: bool = False
    """Counts and gains stay as they are at the start of a round, as in the paper."""
    from_sparse: bool = False
    """Prompts show rows of the sparse clusters only."""
    quantile: float = Field(0.5, ge=0, le=1)
    """Which quantile of the gains of `reference` a candidate must exceed."""
    reference: Literal["pool", "candidates"] = "pool"
    """pool: what each row of the pool adds to the others, brought to the size that it has now; candidates: the gains
    of the last candidates (the pool's while there are fewer than 100)."""
    recent: int = Field(1000, ge=100, le=100_000)
    """How many candidates `reference: candidates` looks back."""


class StopConfig(Section):
    """When a run ends."""

    target: int = Field(ge=1)
    """Rows of the pool, its seeds among them."""
    requests: int | None = Field(None, ge=1)
    """Answers of an endpoint, over all runs of the directory; a local model has no such limit, nor the next two."""
    tokens: int | None = Field(None, ge=1)
    """Tokens of prompts and answers, over all runs of the directory."""
    seconds: float | None = Field(None, ge=0.001)
    """Seconds of one run."""
    floor: float = Field(0.01, ge=0, le=1)
    """Share of accepted candidates, among the last `window` or more, below which the run ends."""
    window: int = Field(1000, ge=1)
    """Candidates that `floor` is a share of."""


class Config(Section):
    """A synthesis run.

    Relative paths are seen from the working directory in which a run begins. Its config.yaml has them as absolute
    ones, so that it is resumed from anywhere.
    """

    out: str
    """The directory of the run."""
    pool: PoolConfig
    task: TaskConfig
    generator: GeneratorConfig
    stop: StopConfig
    proxy: ProxyConfig = Field(default_factory=ProxyConfig)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    accept: AcceptConfig = Field(default_factory=AcceptConfig)
    seed: int = 0
    """Seed of the draws of the run, such as the rows that a prompt shows."""
    block: int = Field(64, ge=1)
    """Prompts that are decided together."""
    ahead: int = Field(4, ge=1, le=64)
    """Blocks under way at once. Prompts of a block show the pool as it was at the start of the round that was current
    this many blocks before."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, as the file has them."""
        return self.model_dump()

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
    found = parse(read_text(path), f"the configuration '{path}'")
    if not isinstance(found, dict):
        raise GvendiError(
            f"the configuration '{path}' holds {shown(found)}; wanted sections such as pool and task"
        )
    for override in overrides:
        _override(found, override)
    return config_from({**found, **values})


def config_from(values: Mapping[str, Any]) -> Config:
    """The configuration of nested dicts; GvendiError as in `load_config`, a line for each wrong key."""
    return validated(Config, values)


def dump_config(config: Config) -> str:
    """The configuration as a file that `load_config` reads."""
    return dumped(config.to_dict())


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise GvendiError(f"{text!r} is no setting; wanted section.key=value, such as stop.target=5000")
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise GvendiError(f"{text!r}: '{key}' is {shown(inner)}, not a section")
        values = inner
    values[keys[-1]] = parse(value, f"{text!r}: the value")


def _name_of_model(name: str) -> str:
    return os.path.basename(name) if os.path.isabs(name) else name


def _digest(path: str) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
