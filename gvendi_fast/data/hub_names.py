"""Names of data sets on the Hugging Face hub as inputs of a corpus: `owner/name:configuration:split@revision`.

Configuration, split and revision may be left out. The same spelling with all of them, the revision being a commit, is
the name under which rows are recorded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.kinds import kind_of

# A configuration has no character that names of folders lack somewhere; what a split may be is said when it is looked
# for, as a slice such as train[:100] is meant for one.
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?::(?P<config>[^\s:@/\\|*?<>\"]*)(?::(?P<split>[^\s@/\\|*?<>\"]*))?)?"
    r"(?:@(?P<revision>[^\s:@]+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
# Files of a run directory that hold the rows of a data set, and what they were fetched from.
_KEPT = re.compile(r"hub-.+-[0-9a-f]{8}\.jsonl?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set of the hub: `repo` is owner/name; what was left out is ""."""

    repo: str
    config: str = ""
    split: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.unpinned}@{self.revision}" if self.revision else self.unpinned

    @property
    def unpinned(self) -> str:
        """The name without its revision."""
        return f"{self.repo}:{self.config}:{self.split}".rstrip(":")

    @property
    def is_recorded(self) -> bool:
        """Whether nothing is left out, and the revision is a commit."""
        return bool(self.config and self.split and _COMMIT.fullmatch(self.revision))

    def place_in(self, folder: Path) -> Path:
        """The file of a folder that holds its rows, of whatever revision."""
        digest = hashlib.blake2b(self.unpinned.encode(), digest_size=4).hexdigest()
        return folder / f"hub-{self.repo.replace('/', '--')}-{digest}.jsonl"


def hub_name(text: str) -> HubName | None:
    """What `text` names on the hub, if it is spelled as such a name; a path with the suffix of a known kind is not."""
    match = _NAME.fullmatch(text)
    if match is None or kind_of(match["repo"]) is not None or kind_of(text) is not None:
        return None
    return HubName(*(part or "" for part in match.groups()))


def is_kept_file(name: str) -> bool:
    """Whether a file of a run directory with this name keeps rows of the hub, or says of them."""
    return _KEPT.fullmatch(name) is not None


def check_installed(text: str) -> None:
    """GvendiError where the package that reads the hub is missing; `text` names what is no path here."""
    if importlib.util.find_spec("datasets") is None:
        raise GvendiError(
            f"corpus: '{text}' does not exist here; if it is a data set of the Hugging Face hub, install what reads "
            "it: pip install 'gvendi-fast[hub]'"
        )
