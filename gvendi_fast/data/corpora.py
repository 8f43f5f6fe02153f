"""Which corpora the parts of a run directory may be of, by the digests that they carry."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

from gvendi_fast.data.parts import Stamp
from gvendi_fast.data.run_files import BY_PIECE, digest_of, piece_digests, units_of_pieces


class Corpora:
    """The corpus that units.json records, and those that it was when some of its work units were the same.

    A part has the digest of the corpus up to the end of its own piece, so that files which are indexed later, or come
    behind, leave it as it is; in directories of earlier versions it has the digest of all.
    """

    def __init__(self, manifest: Mapping[str, Any] | None) -> None:
        self._manifest = manifest
        self._any_of: str | None = None

    @classmethod
    def of_stamp(cls, digest: str) -> Corpora:
        """By what most parts say, where units.json is not theirs."""
        found = cls(None)
        found._any_of = digest
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without the digests that were needed so far: ranks know a pass by its bytes."""
        return {"_manifest": self._manifest, "_any_of": self._any_of}

    @cached_property
    def _pieces(self) -> list[str] | None:
        if self._manifest is None or "format" not in self._manifest:
            return None
        return piece_digests(self._manifest)

    @cached_property
    def _ends(self) -> list[int]:
        """Of each piece the number of the first work unit behind it."""
        assert self._manifest is not None
        return list(accumulate(units_of_pieces(self._manifest)))

    @cached_property
    def _whole(self) -> str:
        return "" if self._manifest is None else digest_of(self._manifest)

    @cached_property
    def _earlier(self) -> dict[str, int]:
        """{digest: how many of the work units of a corpus with it are still the same}."""
        found = {}
        for item in (self._manifest or {}).get("earlier", ()):
            for digest in (item["corpus"], *item.get("pieces", ())):
                found[digest] = max(found.get(digest, 0), item["units"])
        return found

    @property
    def last(self) -> str:
        """The digest of all of the corpus, as its last part has it."""
        if self._any_of is not None:
            return self._any_of
        return self._whole if self._pieces is None else (self._pieces or [""])[-1]

    def of(self, unit: int) -> str:
        """The digest that the part of a work unit gets."""
        if self._any_of is not None or self._pieces is None:
            return self.last
        piece = bisect_right(self._ends, unit)
        return self._pieces[piece] if piece < len(self._pieces) else ""

    def __iter__(self) -> Iterator[str]:
        """All digests that a part may have."""
        yield from ([self.last] if self._pieces is None else self._pieces)
        yield from self._earlier

    def __contains__(self, stamp: Stamp) -> bool:
        """Whether a part is of the corpus as it is, or of what it was when the work unit was the same."""
        if self._any_of is not None and self._any_of.startswith(BY_PIECE):
            # Which of them it has to be is not known.
            return stamp.corpus.startswith(BY_PIECE)
        return stamp.corpus == self.of(stamp.unit) or stamp.unit < self._earlier.get(stamp.corpus, 0)
