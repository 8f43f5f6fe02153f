"""Rollouts -> sketches: the loss gradient of what a policy wrote, under a small frozen proxy.

g = -grad log P(completion | prompt) of the proxy, the prompt unsupervised. The policy's own weights change at every
step, the proxy's do not: its sketches of two steps, two runs or two policies can be compared. It costs about what a
training step of the proxy does on the same tokens.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Fields, Rejected, Row, lone_surrogate, row_reader
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.batch_memory import CPU_BATCH_TOKENS, sketch_batch
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.encode import IGNORED, Encoder, Sample, batches
from gvendi_fast.sketching.proxy.load import TINY, Proxy, load_proxy
from gvendi_fast.sketching.proxy.text_config import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A prompt or a completion: a text, or messages as chat templates take them.
Text = str | list[dict[str, Any]]
Ids = Sequence[int] | np.ndarray | torch.Tensor
# Where a GPU is busy; the trainer needs the rest of the memory, so it is not asked how much there is.
GPU_BATCH_TOKENS = 16384
MOST_TOKENS = 4096
# Share of a sequence that a long completion leaves to its prompt.
PROMPT_SHARE = 4
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


class RolloutSketcher:
    """Sketches of rollouts under a small frozen proxy.

    proxy: "tiny", a local folder, a hub name, or a loaded Proxy.
    spec, layers: of the `GradientSketcher`.
    max_tokens: longest sequence (None: the longest that the proxy reads, at most 4096). A longer rollout loses the
        beginning of its prompt, down to a quarter of the sequence, then the end of its completion.
    batch_tokens: padded tokens of a pass (None: 2048 on a CPU, 16384 on a GPU, halved where they do not fit).
    device: where a proxy that is loaded here runs; "auto": the GPU of this process (LOCAL_RANK), else the CPU.
    A rollout that has no gradient, as its completion is empty, gets a row of zeros. Raises GvendiError as `load_proxy`.
    """

    def __init__(
        self,
        proxy: str | os.PathLike | Proxy = TINY,
        spec: SketchSpec | None = None,
        *,
        layers: str = "all",
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        self.proxy = proxy if isinstance(proxy, Proxy) else load_proxy(proxy, device=_own_device(device))
        self.sketcher = GradientSketcher(self.proxy.model, spec, layers=layers)
        self.max_tokens = _longest(positions_of(self.proxy.model.config), max_tokens)
        self.batch_tokens = batch_tokens
        self._warned: set[str] = set()
        self._make_readers()

    def _make_readers(self) -> None:
        self._encoder = Encoder(self.proxy.tokenizer, vocabulary=self.proxy.vocabulary)
        self._read = row_reader(Fields())

    def __getstate__(self) -> dict[str, Any]:
        # Trainers that score in another process pickle their reward functions; a compiled chat template cannot be.
        return {name: value for name, value in self.__dict__.items() if name not in ("_encoder", "_read")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_readers()

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        tools: Sequence[list[dict[str, Any]] | None] | None = None,
    ) -> torch.Tensor:
        """Sketches float32 [N, K], on the proxy's device, of N rollouts as texts or as messages.

        Of messages the words and the tool calls count; images and sounds are left out, which a group has in common.
        Only what the assistant says in the completion is supervised. tools: JSON schemas of those that a rollout may
        call. Raises GvendiError for messages where the proxy has no chat template.
        """
        _check_counts("completions", completions, len(prompts))
        rows = [
            self._row(i, prompt, completion, None if tools is None else tools[i])
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        samples = []
        for found in self._encoder.stream(rows):
            if isinstance(found, Sample):
                samples.append(found)
            elif found.reason not in ("empty completion", "nothing supervised"):
                self._warn(found.reason)
        return _sketch(
            self.sketcher, samples, len(rows), self.max_tokens, self.batch_tokens, self.proxy.tokenizer
        )

    def of_tokens(
        self,
        prompt_ids: Sequence[Ids],
        completion_ids: Sequence[Ids],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> torch.Tensor:
        """Sketches float32 [N, K], on the proxy's device, of N rollouts as token ids without padding.

        tokenizer: the one that they are of; None where it is the proxy's own. Ids of another one are decoded without
            special tokens, and the texts go through `__call__`.
        """
        if tokenizer is not None:
            _check_counts("completion_ids", completion_ids, len(prompt_ids))
            texts = [
                [tokenizer.decode(_plain(ids), skip_special_tokens=True) for ids in side]
                for side in (prompt_ids, completion_ids)
            ]
            return self(*texts)
        return sketch_tokens(
            self.sketcher,
            prompt_ids,
            completion_ids,
            max_tokens=self.max_tokens,
            batch_tokens=self.batch_tokens,
            tokenizer=self.proxy.tokenizer,
        )

    def _row(
        self, i: int, prompt: Text, completion: Text, tools: list[dict[str, Any]] | None
    ) -> Row | Rejected:
        if isinstance(prompt, str) and isinstance(completion, str):
            # A rollout that writes out a list of messages is a text all the same.
            if not completion.strip():
                return Rejected("rollouts", i, "empty completion")
            if lone_surrogate(prompt) or lone_surrogate(completion):
                return Rejected("rollouts", i, "invalid Unicode: lone surrogate")
            return Row(i, str(i), "", "rollouts", i, prompt=prompt, completion=completion)
        if not self.proxy.tokenizer.chat_template:
            raise GvendiError(
                f"the rollouts are messages, and the proxy {self.proxy.name!r} has no chat template to write them "
                "with; take an instruct model or proxy 'tiny', or set tokenizer.chat_template of a loaded Proxy"
            )
        record = {"prompt": words_only(prompt), "completion": words_only(completion), "tools": tools}
        return self._read(record, i, "rollouts", i)

    def _warn(self, reason: str) -> None:
        if reason in self._warned:
            return
        self._warned.add(reason)
        warnings.warn(
            f"a rollout has no sketch ({reason}) and counts as one that adds nothing to its group",
            RuntimeWarning,
            stacklevel=3,
        )


def sketch_tokens(
    sketcher: GradientSketcher,
    prompt_ids: Sequence[Ids],
    completion_ids: Sequence[Ids],
    *,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    tokenizer: Any = None,
) -> torch.Tensor:
    """Sketches float32 [N, K] of N rollouts, token ids of the sketcher's own vocabulary without padding.

    max_tokens, batch_tokens: as in `RolloutSketcher`. tokenizer: its pad token fills batches, its BOS token stays first
    where a prompt is cut; without one, token 0 fills, which no result depends on.
    Raises GvendiError for as many prompts as completions not being there, and a token beyond the model's embedding.
    """
    _check_counts("completion_ids", completion_ids, len(prompt_ids))
    vocabulary = sketcher.model.get_input_embeddings().weight.shape[0]
    samples = []
    for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        ids = np.array([*_plain(prompt), *_plain(completion)], np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
            raise GvendiError(
                f"rollout {i} holds token {ids.max() if ids.max() >= vocabulary else ids.min()}, and the proxy has the "
                f"tokens 0..{vocabulary - 1}; ids of another tokenizer go through RolloutSketcher.of_tokens with "
                "tokenizer=, that of the policy"
            )
        labels = ids.copy()
        labels[: max(1, len(_plain(prompt)))] = IGNORED
        samples.append(Sample(i, str(i), "", "rollouts", i, ids.astype(np.int32), labels.astype(np.int32)))
    limit = _longest(positions_of(sketcher.model.config), max_tokens)
    return _sketch(sketcher, samples, len(samples), limit, batch_tokens, tokenizer)


def _sketch(
    sketcher: GradientSketcher,
    samples: Sequence[Sample],
    count: int,
    limit: int,
    batch_tokens: int | None,
    tokenizer: Any,
) -> torch.Tensor:
    """z [count, K]: a sample's row is that of its number, the others are 0."""
    weight = sketcher.model.get_input_embeddings().weight
    bos, pad = (getattr(tokenizer, name, None) for name in ("bos_token_id", "pad_token_id"))
    budget = batch_tokens or (GPU_BATCH_TOKENS if weight.is_cuda else CPU_BATCH_TOKENS)
    # What a policy writes again costs no pass of its own, and is the same row to the bit.
    places: dict[tuple[bytes, bytes], int] = {}
    distinct: list[Sample] = []
    of: dict[int, int] = {}
    for sample in _cropped(samples, limit, bos):
        place = places.setdefault((sample.input_ids.tobytes(), sample.labels.tobytes()), len(places))
        of[sample.row] = place
        if place == len(distinct):
            distinct.append(replace(sample, row=place))
    # One row more, which stays 0.
    z = torch.zeros(len(distinct) + 1, sketcher.spec.dim, dtype=torch.float32, device=weight.device)
    # A trainer may call under autocast, which is of the policy.
    with torch.autocast(weight.device.type, enabled=False):
        for batch in batches(distinct, budget):
            z[[sample.row for sample in batch]] = sketch_batch(sketcher, batch, 0 if pad is None else pad).z
    return z[[of.get(i, len(distinct)) for i in range(count)]]


def _cropped(samples: Sequence[Sample], limit: int, bos: int | None) -> Iterator[Sample]:
    """The samples that something of is supervised, each in at most `limit` tokens (see `RolloutSketcher`)."""
    for sample in samples:
        supervised = np.flatnonzero(sample.labels != IGNORED)
        if not len(supervised):
            continue
        if sample.length > limit:
            first = int(supervised[0])
            answer = sample.length - first
            before = min(first, max(limit // PROMPT_SHARE, limit - answer))
            kept = slice(first - before, first - before + limit)
            ids, labels = sample.input_ids[kept].copy(), sample.labels[kept].copy()
            if before and sample.input_ids[0] == bos:
                ids[0] = bos
            labels[0] = IGNORED
            sample = replace(sample, input_ids=ids, labels=labels)
        if sample.supervised:
            yield sample


def words_only(text: Text) -> Text:
    """A prompt or a completion without what is no text: images and sounds of messages, and empty fields."""
    if isinstance(text, str):
        return text
    messages = []
    for message in text:
        kept = {name: value for name, value in message.items() if value is not None}
        content = kept.get("content", "")
        if isinstance(content, list):
            content = "".join(_words_of_part(part) for part in content)
        messages.append({**kept, "content": content})
    return messages


def _words_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    is_text = isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS
    return part["text"] if is_text and isinstance(part.get("text"), str) else ""


def _plain(ids: Ids) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray | torch.Tensor) else list(ids)


def _check_counts(name: str, values: Sequence[Any], prompts: int) -> None:
    if len(values) != prompts:
        raise GvendiError(f"{name} has {len(values)} entries for {prompts} prompts; give one for each")


def _longest(positions: int | None, asked: int | None) -> int:
    most = min(positions or MOST_TOKENS, MOST_TOKENS)
    if asked is None:
        return most
    if asked < 4 or (positions and asked > positions):
        raise GvendiError(
            f"max_tokens is {asked}; wanted at least 4, and at most the {positions} tokens that the proxy reads"
            if positions
            else f"max_tokens is {asked}; wanted at least 4"
        )
    return asked


def _own_device(device: str | torch.device) -> str | torch.device:
    """The GPU of this process where several processes share a machine's; as given otherwise."""
    rank = os.environ.get("LOCAL_RANK", "")
    if device == "auto" and rank.isdigit() and int(rank) < torch.cuda.device_count():
        return torch.device("cuda", int(rank))
    return device
