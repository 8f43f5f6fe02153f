"""What counts as the same text: its words and its normal form.

Words are the runs of letters and digits of the text in NFKC form and lower case (a Han or Kana character is a word of
its own); everything else separates them.
"""

from __future__ import annotations

import re
import unicodedata

_ONE_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_ONE_CHARACTER}]|[^\\W_{_ONE_CHARACTER}]+")
_SPACE = re.compile(r"\s+")


def words(text: str) -> list[str]:
    """The words of a text: NFKC, lower case (full case folding), letters and digits only."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normal_form(text: str) -> str:
    """The text in NFKC form and lower case with single spaces; signs are kept, for 3 - 5 is not 3 + 5."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
