"""A string a row for millions of rows, held as Arrow holds them: some 20 bytes where one of Python's takes 70."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

# Strings that are made into Python's at once.
_AT_ONCE = 4096
# Bytes that an array with offsets of 32 bits holds; joined ones are kept well below.
_MOST = 1 << 30


class Strings(Sequence[str]):
    """A string a row, read only.

    values: strings that are Unicode text. Raises UnicodeEncodeError for others, such as lone surrogates.
    """

    def __init__(self, values: Iterable[str] | Any) -> None:
        import pyarrow as pa

        self._array = values if isinstance(values, pa.Array) else pa.array(list(values), pa.string())

    @classmethod
    def joined(cls, parts: Iterable[Strings]) -> Strings:
        """The strings of many parts, one after the other."""
        import pyarrow as pa

        arrays = [part.arrow() for part in parts]
        if sum(array.nbytes for array in arrays) > _MOST:
            arrays = [array.cast(pa.large_string()) for array in arrays]
        whole = cls(pa.concat_arrays(arrays) if arrays else [])
        del parts, arrays
        pa.default_memory_pool().release_unused()
        return whole

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Strings: ...
    def __getitem__(self, place: int | slice) -> str | Strings:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        return self._array[int(place)].as_py()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_ONCE):
            yield from self._array.slice(first, _AT_ONCE).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return self._array.equals(other._array.cast(self._array.type))
        if isinstance(other, list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def arrow(self) -> Any:
        """The strings as an Arrow array; nothing is copied."""
        return self._array

    def take(self, numbers: np.ndarray) -> Strings:
        """The strings with these numbers, in their order."""
        import pyarrow as pa

        return Strings(self._array.take(pa.array(np.asarray(numbers, np.int64))))

    def order(self) -> np.ndarray:
        """Numbers of the strings in ascending order of their code points, int64 [N]; equal ones keep their order."""
        import pyarrow.compute as pc

        # The order of UTF-8 bytes is that of code points.
        return pc.sort_indices(self._array).to_numpy().view(np.int64)

    def codes(self) -> tuple[np.ndarray, list[str]]:
        """(int64 [N], the different strings by code, in the order of their first rows)."""
        coded = self._array.dictionary_encode()
        return coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist()


def rank_of(ids: Sequence[str]) -> np.ndarray:
    """Place of every id in their sorted order, int64 [N]; equal ones keep their order."""
    rank = np.empty(len(ids), np.int64)
    rank[_order(ids)] = np.arange(len(ids))
    return rank


def codes_of(labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(int64 [N], the different labels by code, in the order of their first rows)."""
    if isinstance(labels, Strings):
        return labels.codes()
    code = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.fromiter((code[label] for label in labels), np.int64, len(labels)), list(code)


def taken(values: Sequence[str], numbers: np.ndarray) -> Sequence[str]:
    """The strings with these numbers, in their order."""
    return values.take(numbers) if isinstance(values, Strings) else [values[i] for i in numbers]


def arrow_strings(values: Sequence[str]) -> Any:
    """The strings as an Arrow array."""
    import pyarrow as pa

    return values.arrow() if isinstance(values, Strings) else pa.array(values, pa.string())


def _order(ids: Sequence[str]) -> np.ndarray | list[int]:
    return ids.order() if isinstance(ids, Strings) else sorted(range(len(ids)), key=ids.__getitem__)
