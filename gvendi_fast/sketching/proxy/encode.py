"""Rows to tokens: which tokens are supervised, what is cut and what is refused, and padded batches.

How a row becomes one sequence:

- a prompt/completion pair, tokenizer with a chat template: a user turn and an assistant turn, rendered by it;
- `messages`: the conversation, rendered by the chat template; every assistant turn is supervised that is not to be left
  out (`messages.supervision`), no other;
- a pair without a template: the tokenizer's own leading tokens (BOS), the prompt, the completion, EOS if the
  tokenizer has one. The two are tokenised on their own, with a newline behind the prompt unless it ends, or the
  completion begins, with white space;
- `text`: as the tokenizer encodes it, with the special tokens that are its own habit; all of it supervised.

A rendered conversation is tokenised once, without adding special tokens (the template writes its own BOS), and what
others than the assistant say holds no control tokens (`control_tokens`). A token is supervised if it holds a character
of an assistant's turn as `chat.ChatTemplate` tells it: its words and its end-of-turn marker, neither the header before
nor the white space after; or of what a template's own marks enclose. `mask="released"` follows the published G-Vendi
code instead: content and the white space after the marker, not the marker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason, Rejected, Row, lone_surrogate
from gvendi_fast.sketching.proxy.control_tokens import ControlTokens
from gvendi_fast.sketching.proxy.pieces import PIECE, Pieces, pieces_of

if TYPE_CHECKING:
    import torch

    from gvendi_fast.sketching.proxy.chat import ChatTemplate, Rendered

# A label that takes no part in the loss, as torch and transformers have it.
IGNORED = -100
MASKS = ("completion", "released")
CONTROL_TOKENS = ("text", "tokens")
# Rows and characters that are tokenised at a time: an encoding takes 130 to 280 bytes a byte of text.
_CHUNK, _CHUNK_CHARACTERS = 256, 1 << 20
# A GPU is busy with this many tokens; from there on a longer batch gains less than its padding costs. A unit of 512
# GSM8K rows in batches of 65,536 tokens was 29 % padding without this bound, and is 7 % with it.
BUSY_TOKENS, MOST_PADDING = 8192, 1 / 16
_NEEDS = {"pair": "completion needs", "messages": "the supervised turns need", "text": "text needs"}
_NO_TEMPLATE = Reason(
    "the tokenizer has no chat template, which messages need; set tokenizer.chat_template, take an instruct model or "
    "give prompt/completion rows"
)


@dataclass(slots=True, eq=False)
class Sample:
    """One tokenised row.

    row: its ordinal within the work unit.
    id, group, file, line: those of the row.
    input_ids: int32 [T]. Tokens after the last supervised one are left out, as no loss depends on them.
    labels: int32 [T], the token itself where it is supervised and -100 elsewhere, not shifted (a causal LM of
        transformers shifts). labels[0] is always -100: nothing predicts the first token.
    """

    row: int
    id: str
    group: str
    file: str
    line: int
    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def length(self) -> int:
        """Number of tokens T."""
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Number of tokens the loss is summed over."""
        return int(np.count_nonzero(self.labels != IGNORED))


@dataclass(slots=True, eq=False)
class Preview:
    """One row as it is tokenised, before anything is cut.

    text: what is tokenised, the pieces of a pair joined; ids that the tokenizer itself sets before and after it are in
        `ids` only.
    spans: ascending character ranges of it that are supervised.
    ids, labels: int32 [T], as in `Sample`, of the whole text.
    notes: kinds of what the row holds and the text lacks, such as "reasoning dropped".
    """

    text: str
    spans: list[tuple[int, int]]
    ids: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Piece:
    """A text that is tokenised on its own.

    spans: the character ranges of it that are supervised.
    hidden: the text with control tokens hidden that it spells out (see control_tokens.py), None where it has none.
    """

    text: str
    spans: list[tuple[int, int]]
    hidden: str | None = None

    def between(self, start: int, end: int) -> _Piece:
        """The part of it from character `start` to `end`."""
        inside = ((max(first, start) - start, min(last, end) - start) for first, last in self.spans)
        kept = [(first, last) for first, last in inside if first < last]
        return _Piece(self.text[start:end], kept, None if self.hidden is None else self.hidden[start:end])


@dataclass(slots=True)
class _Draft:
    """A sequence before tokenising: leading ids, texts, closing ids. `rendered` says a template wrote it."""

    form: str
    pieces: list[_Piece]
    lead: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    tail_supervised: bool = True
    rendered: bool = False
    notes: tuple[str, ...] = ()


class Encoder:
    """Turns rows into samples with one tokenizer.

    tokenizer: a fast tokenizer of transformers.
    max_tokens: the longest sequence, None for no limit; a longer one loses tokens before the first supervised one, from
        the left (a leading BOS stays, and at least one token of context), never a supervised one.
    mask: "completion" or "released", see the module.
    vocabulary: tokens that the model's embedding has, None where not known; a row with another one is rejected (the
        tokenizer of Gemma 3 has an image token beyond the embedding of its text models).
    control_tokens: what a control token is that a conversation's content spells out, such as <|im_end|> that a user
        types: "text", or the "tokens" that a template's own markers are. In what the assistant says it is the token
        either way, as markers of a tool call are meant; so it is in `text` rows and without a chat template, where
        people give conversations that are rendered already.

    Threads may share an encoder, and use its tokenizer for themselves meanwhile: what they set there (truncation,
    padding, tokens added later) does not reach it.

    Raises GvendiError for a tokenizer that is not a fast one, an unknown mask, a limit below 2.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int | None = None,
        mask: str = "completion",
        vocabulary: int | None = None,
        control_tokens: str = "text",
    ) -> None:
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise GvendiError(
                f"tokenizer '{self.name}' is {type(tokenizer).__name__}; wanted a fast one, which knows the place of "
                "each token in the text: load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        if mask not in MASKS:
            raise GvendiError(f"mask is {mask!r}; wanted one of {', '.join(MASKS)}")
        if control_tokens not in CONTROL_TOKENS:
            raise GvendiError(
                f"control_tokens is {control_tokens!r}; wanted one of {', '.join(CONTROL_TOKENS)}"
            )
        if max_tokens is not None and max_tokens < 2:
            raise GvendiError(
                f"max_tokens is {max_tokens}; wanted at least 2, one to predict and one before it"
            )
        self.tokenizer, self.max_tokens, self.mask = tokenizer, max_tokens, mask
        self.vocabulary, self._backend = vocabulary, _own_backend(tokenizer)
        self._lead, self._trail = self._habit()
        self._chat: ChatTemplate | None = None
        self._with_tools: ChatTemplate | None = None
        self._control: ControlTokens | None = None
        if tokenizer.chat_template:
            # Here, as it needs Jinja, and who reads a corpus does not.
            from gvendi_fast.sketching.proxy.chat import ChatTemplate

            if control_tokens == "text" and not self._backend.encode_special_tokens:
                self._control = ControlTokens(self._backend, _copy)
            self._chat = self._with_tools = ChatTemplate(tokenizer, self.name, mask, self._control)
            if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
                self._with_tools = ChatTemplate(tokenizer, self.name, mask, self._control, with_tools=True)

    @property
    def method(self) -> str | None:
        """How the supervised part of a conversation is found (see ChatTemplate), None without a chat template."""
        return None if self._chat is None else self._chat.method

    def encode(self, rows: Iterable[Row]) -> list[Sample | Rejected]:
        """One sample or rejection per row, in order."""
        return list(self.stream(rows))

    def stream(self, rows: Iterable[Row | Rejected]) -> Iterator[Sample | Rejected]:
        """As `encode`, but only a bounded amount of text is held at a time; a row that is rejected stays so."""
        held: list[tuple[Row | Rejected, _Draft | Reason]] = []
        size = 0
        for row in rows:
            draft = Reason() if isinstance(row, Rejected) else self._bounded(self._draft(row))
            held.append((row, draft))
            size += sum(len(piece.text) for piece in draft.pieces) if isinstance(draft, _Draft) else 0
            if len(held) == _CHUNK or size >= _CHUNK_CHARACTERS:
                yield from self._samples(held)
                held, size = [], 0
        yield from self._samples(held)

    def preview(self, row: Row) -> Preview | Rejected:
        """One row as it is tokenised, whatever its length; refused where `encode` refuses it for its contents."""
        draft = self._draft(row, with_notes=True)
        if isinstance(draft, Reason):
            return Rejected(row.file, row.line, str(draft), row.id)
        ids, mask = self._joined(draft, self._tokens(draft.pieces))
        if not mask[1:].any():
            return Rejected(row.file, row.line, "nothing supervised", row.id)
        labels = np.where(mask, ids, np.int32(IGNORED))
        labels[0] = IGNORED
        spans, start = [], 0
        for piece in draft.pieces:
            spans += [(start + first, start + last) for first, last in piece.spans if first < last]
            start += len(piece.text)
        return Preview("".join(piece.text for piece in draft.pieces), spans, ids, labels, draft.notes)

    def _samples(self, held: list[tuple[Row | Rejected, _Draft | Reason]]) -> Iterator[Sample | Rejected]:
        drafts = (draft for _, draft in held if isinstance(draft, _Draft))
        tokens = self._tokens(piece for draft in drafts for piece in draft.pieces)
        for row, draft in held:
            yield row if isinstance(row, Rejected) else self._finish(row, draft, tokens)

    @cached_property
    def _pieces(self) -> Pieces:
        # Only texts that are long need it, and a large vocabulary takes a second to look through.
        return pieces_of(self._backend)

    def _bounded(self, draft: _Draft | Reason) -> _Draft | Reason:
        """The draft, or why its supervised part cannot fit, where its length alone tells."""
        if isinstance(draft, Reason) or self.max_tokens is None:
            return draft
        for piece in draft.pieces:
            if piece.spans and len(piece.text) > PIECE:
                start, end = piece.spans[0][0], piece.spans[-1][1]
                fewest = self._pieces.fewest_tokens(piece.text, start, end)
                if fewest > self.max_tokens:
                    needs = _NEEDS[draft.form]
                    return Reason(
                        f"too long: {needs} at least {fewest} tokens, --max-tokens is {self.max_tokens}"
                    )
        return draft

    def _tokens(self, pieces: Iterable[_Piece]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, which are supervised) of each piece; a long one is cut where that changes no token."""
        parts_of: deque[int] = deque()
        waiting: list[_Piece] = []
        done: deque[tuple[np.ndarray, np.ndarray]] = deque()
        size = 0
        for piece in pieces:
            parts = self._parts(piece)
            parts_of.append(len(parts))
            for part in parts:
                waiting.append(part)
                size += len(part.text)
                if size >= _CHUNK_CHARACTERS:
                    done.extend(self._tokenize(waiting))
                    waiting, size = [], 0
        done.extend(self._tokenize(waiting))
        for count in parts_of:
            ids, masks = zip(*(done.popleft() for _ in range(count)), strict=True)
            yield (ids[0], masks[0]) if count == 1 else (np.concatenate(ids), np.concatenate(masks))

    def _parts(self, piece: _Piece) -> list[_Piece]:
        if len(piece.text) <= PIECE:
            return [piece]
        edges = sorted(edge for span in piece.spans for edge in span)
        ends = [*self._pieces.cuts(piece.text, edges), len(piece.text)]
        return [piece.between(start, end) for start, end in pairwise([0, *ends])]

    def _tokenize(self, pieces: list[_Piece]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not pieces:
            return
        texts = [piece.text for piece in pieces if piece.hidden is None]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        for piece in pieces:
            spelt = piece.hidden is not None
            encoding = self._control.encode(piece.text, piece.hidden) if spelt else next(encodings)
            yield np.asarray(encoding.ids, np.int32), _supervised(encoding, piece)

    def _habit(self) -> tuple[list[int], list[int]]:
        """Ids the tokenizer itself puts before and after a text that is no conversation."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a").ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        raise GvendiError(
            f"tokenizer '{self.name}' encodes 'a' as {full} with special tokens and {plain} without; wanted the latter "
            "inside the former: set its post-processor to add tokens at the ends only"
        )

    def _draft(self, row: Row, with_notes: bool = False) -> _Draft | Reason:
        if row.text is not None:
            return _Draft("text", [_whole(row.text)], self._lead, self._trail)
        chat = self._chat if row.tools is None else self._with_tools
        if row.messages is not None:
            if chat is None:
                return _NO_TEMPLATE
            return self._rendered("messages", chat.render(row.messages, row.tools, with_notes))
        if chat is not None:
            turns = [
                {"role": "user", "content": row.prompt},
                {"role": "assistant", "content": row.completion},
            ]
            return self._rendered("pair", chat.render(turns, row.tools, with_notes))
        separated = not row.prompt or row.prompt[-1].isspace() or row.completion[0].isspace()
        prompt = _Piece(row.prompt if separated else row.prompt + "\n", [])
        eos = self.tokenizer.eos_token_id
        tail = [] if eos is None else [eos]
        pieces = [prompt, _whole(row.completion)]
        return _Draft("pair", pieces, self._lead, tail, tail_supervised=self.mask != "released")

    def _rendered(self, form: str, rendered: Rendered | Reason) -> _Draft | Reason:
        if isinstance(rendered, Reason):
            return rendered
        # Arguments of a call that are a JSON string may spell one, which is read where a template wants an object.
        if lone_surrogate(rendered.text):
            return Reason("invalid Unicode: lone surrogate in the rendered conversation")
        piece = _Piece(rendered.text, rendered.spans, rendered.hidden)
        return _Draft(form, [piece], rendered=True, notes=rendered.notes)

    def _finish(
        self, row: Row, draft: _Draft | Reason, tokens: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> Sample | Rejected:
        if isinstance(draft, Reason):
            return Rejected(row.file, row.line, str(draft), row.id)
        result = self._fit(*self._joined(draft, tokens), draft)
        if isinstance(result, Reason):
            return Rejected(row.file, row.line, str(result), row.id)
        return Sample(row.row, row.id, row.group, row.file, row.line, *result)

    def _joined(
        self, draft: _Draft, tokens: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, which are supervised) of a draft, whose pieces' tokens come next."""
        ids, masks = [np.asarray(draft.lead, np.int32)], [np.zeros(len(draft.lead), bool)]
        for _ in draft.pieces:
            found, mask = next(tokens)
            ids.append(found)
            masks.append(mask)
        ids.append(np.asarray(draft.tail, np.int32))
        masks.append(np.full(len(draft.tail), draft.tail_supervised))
        return np.concatenate(ids), np.concatenate(masks)

    def _fit(
        self, ids: np.ndarray, mask: np.ndarray, draft: _Draft
    ) -> tuple[np.ndarray, np.ndarray] | Reason:
        where = np.flatnonzero(mask)
        # The first token has no prediction, so it cannot be the only supervised one.
        if len(where) == 0 or where[-1] == 0:
            return Reason("nothing supervised")
        ids, mask, first = ids[: where[-1] + 1], mask[: where[-1] + 1], int(where[0])
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            bos = len(draft.lead)
            if draft.rendered and first and ids[0] == self.tokenizer.bos_token_id:
                bos = 1
            needed = len(ids) - first + (max(bos, 1) if first else 0)
            if needed > self.max_tokens:
                return Reason(
                    f"too long: {_NEEDS[draft.form]} {needed} tokens, --max-tokens is {self.max_tokens}"
                )
            cut = len(ids) - (self.max_tokens - bos)
            ids = np.concatenate([ids[:bos], ids[cut:]])
            mask = np.concatenate([mask[:bos], mask[cut:]])
        if self.vocabulary is not None and ids.max() >= self.vocabulary:
            return Reason(
                f"token {ids.max()} of the tokenizer is beyond the model's embedding of {self.vocabulary} tokens"
            )
        labels = np.where(mask, ids, np.int32(IGNORED))
        labels[0] = IGNORED
        return ids, labels


def _own_backend(tokenizer: Any) -> Any:
    """The tokenizer behind a fast one of transformers, with settings of its own and without truncation and padding.

    The shared one keeps both from call to call, so that a call in another thread would change what this one returns.
    """
    own = _copy(tokenizer.backend_tokenizer)
    own.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return own


def _copy(shared: Any) -> Any:
    """A tokenizer of the library `tokenizers` with the steps of another one, without truncation and padding."""
    from tokenizers import Tokenizer

    # Vocabulary and steps are shared: they take up to a gigabyte, and seconds to copy.
    own = Tokenizer(shared.model)
    for step in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(shared, step) is not None:
            setattr(own, step, getattr(shared, step))
    added = shared.get_added_tokens_decoder()
    own.add_tokens([added[number] for number in sorted(added)])
    if own.get_added_tokens_decoder() != added:
        # Numbers with gaps between them, which adding does not give.
        own = Tokenizer.from_str(shared.to_str())
        own.no_truncation()
        own.no_padding()
    return own


def _whole(text: str) -> _Piece:
    return _Piece(text, [(0, len(text))])


def _supervised(encoding: Any, piece: _Piece) -> np.ndarray:
    """Which tokens hold a character of the piece's spans, bool [T]."""
    count = len(encoding.ids)
    if not piece.spans or piece.spans == [(0, len(piece.text))]:
        return np.full(count, bool(piece.spans))
    offsets = np.asarray(encoding.offsets, np.int64).reshape(count, 2)
    start, end = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(count, bool)
    for first, last in piece.spans:
        # A byte-level tokenizer trims a token of spaces to the empty range at its end.
        mask |= np.where(start < end, (start < last) & (end > first), (first < end) & (end <= last))
    return mask


def batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Samples of similar length together, longest first, ties by row, then as given.

    The same samples, of one work unit or of several, give the same batches. A batch's padded size (longest length
    times rows) stays within `batch_tokens`; a sample that is longer alone forms a batch of its own. A batch of 8192
    padded tokens or more takes no sample that makes more than 1/16 of it padding.
    Raises GvendiError for a budget below 1.
    """
    if batch_tokens < 1:
        raise GvendiError(f"batch_tokens is {batch_tokens}; wanted at least 1")
    ordered = sorted(samples, key=lambda sample: (-sample.length, sample.row))
    start = 0
    while start < len(ordered):
        longest, real = ordered[start].length, 0
        end = min(len(ordered), start + max(1, batch_tokens // longest))
        for place in range(start, end):
            before, real = longest * (place - start), real + ordered[place].length
            if before >= BUSY_TOKENS and real < (1 - MOST_PADDING) * (before + longest):
                end = place
                break
        yield ordered[start:end]
        start = end


def collate(batch: Sequence[Sample], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, labels, attention_mask), each torch.long [B, T], padded on the right with (pad_id, -100, 0)."""
    import torch

    if not batch:
        raise GvendiError("collate: the batch is empty; wanted at least one sample")
    shape = len(batch), max(sample.length for sample in batch)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    attention = np.zeros(shape, np.int64)
    for index, sample in enumerate(batch):
        input_ids[index, : sample.length] = sample.input_ids
        labels[index, : sample.length] = sample.labels
        attention[index, : sample.length] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(attention)
