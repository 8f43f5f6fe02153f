"""Which source a sample of a training batch comes from: a number that travels with the batch.

A trainer drops the columns that its model does not take, and a collator knows a few names only. So the collator is
wrapped: the source leaves the rows before they are collated and joins the batch as int64 under a tag of the callback's
own, which the tap takes out of the arguments of the model's forward. Names stay behind; `SourceNames` knows them by
their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError

# How the keys of the batch begin, one a callback; no model has an argument of such a name.
TAG = "gvendi_tag"
# Of padding in a batch whose tags are by token.
PADDING = -1
# Names that are numbered as they are met begin here, apart from integers that a column has.
_MET = 1 << 62


class SourceNames:
    """The sources of a data set's column, numbered.

    column: the column of the data set.
    names: what the numbers 0, 1, ... stand for; None numbers the names as they are met, which workers of a data loader
        cannot do, as each has its own copy. Integers in the column are taken as they are.
    """

    def __init__(self, column: str, names: Sequence[str] | None = None) -> None:
        self.column = column
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self.is_closed = False
        if names is not None:
            self.close(names)

    def close(self, names: Sequence[str]) -> None:
        """These are all the names. Raises GvendiError where one is there twice."""
        self.names = [str(name) for name in names]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self.is_closed = True
        if len(self._numbers) != len(self.names):
            raise GvendiError(f"sources is {list(names)}, with one name twice; give each source once")

    def number_of(self, value: Any) -> int:
        """The number of one value of the column. Raises GvendiError for a value that is no source."""
        if isinstance(value, Integral) and not isinstance(value, bool):
            if not 0 <= value < _MET:
                raise GvendiError(f"column '{self.column}' has the source {value}; wanted 0 to 2^62")
            return int(value)
        if not isinstance(value, str):
            raise GvendiError(
                f"column '{self.column}' has a {type(value).__name__} for a source; wanted a string or an integer a row"
            )
        if value not in self._numbers:
            self._add(value)
        return self._numbers[value]

    def name_of(self, number: int) -> str:
        """The name behind a number; an integer of the column is its own where it has none."""
        if number < _MET:
            return self.names[number] if self.is_closed and number < len(self.names) else str(number)
        if number - _MET < len(self.names):
            return self.names[number - _MET]
        raise GvendiError(
            f"the names in column '{self.column}' were numbered by another process, which gave this one its batches; "
            "give sources=[...] with all of them"
        )

    def _add(self, name: str) -> None:
        if self.is_closed and not self.names:
            raise GvendiError(
                f"column '{self.column}' has sources of text, such as {name!r}, and their names are not known before "
                "it is read; give sources=[...] with all of them"
            )
        if self.is_closed:
            known = ", ".join(map(repr, self.names[:8]))
            raise GvendiError(
                f"column '{self.column}' has the source {name!r}, which is none of {known}; give sources=[...] with "
                "all of them"
            )
        if torch.utils.data.get_worker_info() is not None:
            raise GvendiError(
                f"the names in column '{self.column}' cannot be numbered by several workers of a data loader; give "
                "sources=[...] with all of them, or dataloader_num_workers=0"
            )
        self._numbers[name] = _MET + len(self.names)
        self.names.append(name)


def names_in(dataset: Any, column: str) -> list[str] | None:
    """The names of a column's sources as a data set knows them, None where it does not: one of text that is read as it
    comes, and one of integers."""
    features = getattr(dataset, "features", None)
    feature = features.get(column) if isinstance(features, Mapping) else None
    # A list of class labels, token by token, in a packed data set.
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names is not None:
        return list(names)
    if getattr(feature, "dtype", None) == "string" and hasattr(dataset, "unique"):
        found = dataset.unique(column)
        if None in found:
            raise GvendiError(
                f"column '{column}' has rows without a source (None); give each row one, or filter those rows out"
            )
        return sorted(found)
    return None


class SourceCollator:
    """A data collator that adds the sources of its rows to the batch of another.

    A row's source is a string or an integer, or, of a packed row, an integer a token. In the batch they are int64: [B],
    [2 B] where a row gives two sequences (chosen, then rejected), or one a token of a row that holds several samples.
    tag: the key that they get. One may stand around another, for two callbacks, of one column too.
    removes: whether the column is kept from the collator, as a trainer does with one that its model does not take.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        names: SourceNames,
        remedy: str = "",
        tag: str = TAG,
        removes: bool = True,
    ) -> None:
        self.collate, self.names, self.remedy, self.tag, self.removes = collate, names, remedy, tag, removes

    def removed(self) -> set[str]:
        """The columns that the collator inside does not get."""
        inside = self.collate.removed() if isinstance(self.collate, SourceCollator) else set()
        return inside | ({self.names.column} if self.removes else set())

    def __call__(self, rows: list[Any]) -> Any:
        return self._collated(rows, set())

    def _collated(self, rows: list[Any], apart: set[str]) -> Any:
        """The batch; `apart` are the columns of those around this one, which the collator inside does not get."""
        column = self.names.column
        for row in rows:
            if not isinstance(row, Mapping) or column not in row:
                found = ", ".join(map(repr, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
                raise GvendiError(f"source is {column!r}, but a row of the data set has {found}{self.remedy}")
        values = [row[column] for row in rows]
        apart = apart | {column} if self.removes else apart
        if isinstance(self.collate, SourceCollator):
            batch = self.collate._collated(rows, apart)
        else:
            batch = self.collate([{key: row[key] for key in row if key not in apart} for row in rows])
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            what = (
                f"has {', '.join(map(repr, batch))}"
                if isinstance(batch, Mapping)
                else f"is a {type(batch).__name__}"
            )
            raise GvendiError(
                f"source is {column!r}, but the collator's batch {what}, without 'input_ids' to tell its samples by (a "
                "trainer on rollouts makes them later); leave source out"
            )
        batch[self.tag] = self._tags(rows, values, batch["input_ids"], batch.get("attention_mask"))
        return batch

    def _tags(
        self, rows: list[Any], values: list[Any], ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        order = self._order(rows, ids, mask)
        is_by_token = [isinstance(value, list | tuple | torch.Tensor) for value in values]
        if not any(is_by_token) and len(ids) in (len(rows), 2 * len(rows)):
            numbers = torch.tensor([self.names.number_of(value) for value in values], dtype=torch.int64)
            return numbers[[place % len(rows) for place in order]]
        tokens = [
            torch.as_tensor(value, dtype=torch.int64)
            if by_token
            else torch.full((len(row["input_ids"]),), self.names.number_of(value), dtype=torch.int64)
            for row, value, by_token in zip(rows, values, is_by_token, strict=True)
        ]
        if len(ids) == 1:
            tokens = [torch.cat(tokens)]
        elif len(ids) == len(rows):
            tokens = [tokens[place] for place in order]
        if len(tokens) != len(ids) or max(map(len, tokens)) > ids.shape[1]:
            raise GvendiError(
                f"source is {self.names.column!r}, but {len(rows)} rows became a batch of shape {tuple(ids.shape)}, "
                "and nothing says which sample is which row's; leave source out, or collate rows one after the other"
            )
        tags = torch.full(tuple(ids.shape), PADDING, dtype=torch.int64)
        for number, of_tokens in enumerate(tokens):
            real = None if mask is None else mask[number].bool()
            if real is not None and real.dim() == 1 and int(real.sum()) == len(of_tokens):
                tags[number, real] = of_tokens
            else:
                tags[number, : len(of_tokens)] = of_tokens
        return tags

    def _order(self, rows: list[Any], ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        """Which row each row of the batch is of, by its tokens; where two sequences come of each, chosen ones first.

        A collator that changes tokens, so that no row is found in another's place, is taken to keep the order.
        """
        own = _texts(rows, len(ids))
        in_order = list(range(len(ids)))
        if own is None:
            return in_order
        has_mask = mask is not None and mask.shape == ids.shape
        given = [(row[mask[n].bool()] if has_mask else row).tolist() for n, row in enumerate(ids)]
        if len(given) != len(own):
            flat = [token for text in own for token in text]
            found = given[0][: len(flat)]
            if len(given) == 1 and found != flat and sorted(found) == sorted(flat):
                raise self._disordered(ids)
            return in_order
        if given == own:
            return in_order
        free = set(in_order)
        places: list[int] = []
        moved = False
        for n, text in enumerate(given):
            found = [(abs(len(own[m]) - len(text)), m != n, m) for m in free if _is_of(text, own[m])]
            # The nearest in length, since one text may begin another.
            for _, is_other, m in sorted(found)[:1]:
                places.append(m)
                free.remove(m)
                moved = moved or (is_other and not _is_of(text, own[n]))
        if len(places) == len(given):
            return places
        if moved:
            raise self._disordered(ids)
        return in_order

    def _disordered(self, ids: torch.Tensor) -> GvendiError:
        return GvendiError(
            f"source is {self.names.column!r}, but the collator's batch of shape {tuple(ids.shape)} has its rows in "
            "another order than they came, and not all are found by their tokens; keep the order, or leave source out"
        )


def _texts(rows: list[Any], count: int) -> list[list[int]] | None:
    """The tokens of the rows, or of their chosen and then their rejected answers; None where they do not say."""
    pair = ("prompt_ids", "chosen_ids", "rejected_ids")
    if count == 2 * len(rows) and all(isinstance(row, Mapping) and set(pair) <= set(row) for row in rows):
        return [[*row["prompt_ids"], *row[answer]] for answer in pair[1:] for row in rows]
    if count == 2 * len(rows) or not all("input_ids" in row for row in rows):
        return None
    return [torch.as_tensor(row["input_ids"]).flatten().tolist() for row in rows]


def _is_of(text: list[int], whole: list[int]) -> bool:
    """Whether a row of a batch is a text, cut or lengthened at an end."""
    n = min(len(text), len(whole))
    return n > 0 and (text[:n] == whole[:n] or text[-n:] == whole[-n:])


def without_sources() -> GvendiError:
    """The error of a model that is called without the tags of its batch."""
    return GvendiError(
        "source is given, but the model was called without the sources of its batch; pass the whole batch on where the "
        "loss is computed, model(**inputs), and let the callback be among those that the trainer is made with"
    )


def keep_tags_from(model: nn.Module, tag: str, is_taken: Callable[[], bool]) -> Any:
    """Take a tag out of the arguments of a model's forward where nobody else does; returns the hook's handle."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not is_taken():
            kwargs = {key: value for key, value in kwargs.items() if key != tag}
        elif tag not in kwargs:
            raise without_sources()
        return args, kwargs

    return model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def pack_with_sources(
    dataset: Any,
    max_length: int,
    source: str = "source",
    *,
    strategy: str = "bfd",
    sources: Sequence[str] | None = None,
) -> Any:
    """Pack a tokenised data set as TRL does, with every token's source.

    SFTTrainer keeps `input_ids` and `labels` alone when it packs, so that sources are lost; a data set that was packed
    here keeps them. It is given to the trainer with `packing=True` and
    `dataset_kwargs={"skip_prepare_dataset": True}` in its SFTConfig.

    dataset: of the package datasets, with the columns `input_ids`, `labels` (or not: all tokens are supervised) and
        `source`; `SFTTrainer(..., packing=False).train_dataset` is one.
    max_length, strategy: as SFTConfig has them; "bfd", "bfd_split" or "wrapped", where a row is a sample whose source
        is that of its first token.
    sources: their names, where the column has text and the data set is iterable.
    Raises GvendiError for columns that are missing and sources that have no number.
    """
    from datasets import ClassLabel, Features, Sequence, Value
    from trl import pack_dataset

    columns = list(dataset.column_names or next(iter(dataset)))
    for name in ("input_ids", source):
        if name not in columns:
            raise GvendiError(
                f"dataset has no column '{name}' (it has {', '.join(columns)}); tokenise it first, as SFTTrainer does "
                "with packing=False, whose train_dataset keeps the other columns"
            )
    known = sources if sources is not None else names_in(dataset, source)
    table = SourceNames(source, () if known is None else known)
    # Of an iterable data set, which would say so when its first row is read.
    if known is None and isinstance(value := next(iter(dataset))[source], str):
        table.number_of(value)

    def by_token(row: dict[str, Any]) -> dict[str, Any]:
        return {source: [table.number_of(row[source])] * len(row["input_ids"])}

    kept = [name for name in ("input_ids", "labels") if name in columns]
    # A column of strings is no place for lists of integers.
    numbered = dataset.map(
        lambda row: {"gvendi_source": by_token(row)[source]},
        remove_columns=[c for c in columns if c not in kept],
    ).rename_column("gvendi_source", source)
    packed = pack_dataset(numbered.select_columns([*kept, source]), max_length, strategy)
    if known is None:
        return packed
    labelled = Sequence(ClassLabel(names=[str(name) for name in known]))
    if packed.features is not None:
        return packed.cast_column(source, labelled)
    # An iterable data set forgets what its columns are, which are all lists of integers here.
    whole = {name: Sequence(Value("int64")) for name in next(iter(packed))}
    return packed.cast(Features({**whole, source: labelled}))
