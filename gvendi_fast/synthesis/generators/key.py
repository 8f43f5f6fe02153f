"""The API key, and what keeps it out of texts: it is cut where it stands plainly and noticed in other spellings.

An endpoint is sent the key with each request, so an answer may hold it, by accident or design, and answers are kept,
shown and trained on. A spelling that is noticed is what a JSON, HTML or URL reader, or one of the usual encoders, makes
the key of; no look at a text can notice every transformation of it.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from typing import NoReturn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.checks.environment import withhold

# Shorter keys are placeholders for local servers, such as EMPTY, and may be words of an answer.
_SECRET = 12
# Letters and digits from which a key is looked for without its other characters; fewer may be words.
_LETTERS = 16
# Characters written as something else, in JSON, Python, C, URLs (escaped once more at each level) and HTML.
_ESCAPES = re.compile(
    r"\\+(?:u\{?([0-9a-fA-F]{4})\}?|x([0-9a-fA-F]{2})|([0-7]{3})|[nrtbf]|(.))"
    r"|%(?:25)*([0-9a-fA-F]{2})|&#0*([0-9]{1,6});|&#[xX]0*([0-9a-fA-F]{1,5});|&(amp|quot|apos|sol|plus|hyphen|lowbar);",
    re.DOTALL,
)
_BASES = (16, 16, 8, 0, 16, 10, 16)
_NAMED = {"amp": "&", "quot": '"', "apos": "'", "sol": "/", "plus": "+", "hyphen": "-", "lowbar": "_"}
# Escapes of escapes, such as JSON in JSON.
_LEVELS = 4
_NO_INK = re.compile("[^\x21-\x7e]+")
_NO_LETTER = re.compile("[^0-9a-z]+")
_URL_SAFE = str.maketrans("-_", "+/")
_CUT, _HIDDEN = "[API key]", "[a text that holds the API key]"
# Whose loggers tell of requests and replies.
_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


class Key:
    """The key in the environment variable `variable`; None is no key. Neither shown nor pickled."""

    def __init__(self, variable: str | None) -> None:
        self.variable = variable
        self._value = None if variable is None else _read(variable)
        value = self._value or ""
        self._looked_for = len(value) >= _SECRET
        letters = _NO_LETTER.sub("", value.lower())
        self._plain = [value.lower(), value.lower()[::-1]]
        # Where escapes are read, a backslash of the key is taken for one.
        bare = value.lower().replace("\\", "")
        if len(bare) >= _SECRET:
            self._plain.append(bare)
        self._letters = [value.encode().hex()]
        if len(letters) >= _LETTERS and not letters.isalpha():
            self._letters += [letters, letters[::-1]]
        once = list(_base64(value.encode()))
        self._encoded = once + [twice for core in once for twice in _base64(core.encode())]
        self._encoded32 = list(_base32(value.encode()))

    def __reduce__(self) -> NoReturn:
        raise GvendiError("an API key is not pickled; read it again from its environment variable")

    @property
    def bearer(self) -> str:
        """What stands in the header of a request; endpoints without keys do not look at it."""
        return f"Bearer {self._value or 'none'}"

    @property
    def for_client(self) -> str:
        """What the client is made with, which insists on a key."""
        return self._value or "none"

    def cut(self, text: str) -> str:
        """The text with [API key] wherever the key stands as it is."""
        return text.replace(self._value, _CUT) if self._looked_for else text

    def hides_in(self, text: str) -> bool:
        """Whether the key stands in the text in any spelling.

        Noticed: escapes of JSON, Python, URLs and HTML, also of one another; other case; white space, invisible or
        any other characters between its letters; full-width and mathematical letters; backwards; hexadecimal; base64
        (both alphabets, once and twice) and base32 of any text that it is part of.
        """
        if not self._looked_for:
            return False
        for _ in range(_LEVELS + 1):
            text = _plain(text)
            if self._stands_in(_NO_INK.sub("", text)):
                return True
            following = _ESCAPES.sub(_character, text)
            if following == text:
                return False
            text = following
        return False

    def clean(self, text: str) -> str:
        """The text without the key: cut, or replaced as a whole where it hides."""
        text = self.cut(text)
        return _HIDDEN if self.hides_in(text) else text

    def _stands_in(self, ink: str) -> bool:
        lower = ink.lower()
        letters = _NO_LETTER.sub("", lower)
        encoded = ink.translate(_URL_SAFE)
        return (
            any(spelling in lower for spelling in self._plain)
            or any(spelling in letters for spelling in self._letters)
            or (("0x" in letters) and self._letters[0] in letters.replace("0x", ""))
            or any(spelling in encoded for spelling in self._encoded)
            or any(spelling in lower for spelling in self._encoded32)
        )


class LogFilter(logging.Filter):
    """Takes a key out of what the client and its HTTP library log, from `attach` to `detach`."""

    def __init__(self, key: Key) -> None:
        super().__init__()
        self._key = key
        self._loggers: list[logging.Logger] = []

    def attach(self) -> None:
        # A filter of a logger does not see what the loggers below it are told.
        names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _LOGGERS]
        self._loggers = [logging.getLogger(name) for name in names]
        for logger in self._loggers:
            logger.addFilter(self)

    def detach(self) -> None:
        for logger in self._loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        told = record.getMessage()
        cleaned = self._key.clean(told)
        if cleaned != told:
            record.msg, record.args = cleaned, ()
        return True


def _read(variable: str) -> str:
    """Error messages never show it."""
    withhold(variable)
    key = os.environ.get(variable, "").strip()
    if not key:
        raise GvendiError(
            f"The environment variable {variable} holds no API key; set it, name another one with key_variable, or "
            "give key_variable=None for an endpoint without keys"
        )
    # Anything else cannot stand in a header, and the HTTP library would show it in its complaint.
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise GvendiError(
            f"The environment variable {variable} holds white space or characters outside ASCII, so it is no API key; "
            "set it again"
        )
    return key


def _plain(text: str) -> str:
    """Full-width, mathematical and other forms of letters as the letters; pairs of surrogates joined."""
    if text.isascii():
        return text
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return unicodedata.normalize("NFKC", joined)


def _character(found: re.Match[str]) -> str:
    for base, group in zip(_BASES, found.groups(), strict=False):
        if group is not None:
            if not base:
                return group
            number = int(group, base)
            return chr(number) if number <= 0x10FFFF else ""
    return _NAMED.get(found[8] or "", "")


def _base64(secret: bytes) -> Iterator[str]:
    """The base64 of a text that holds the secret holds one of these: by how many bytes stand before it, modulo 3."""
    for before in range(3):
        whole = base64.b64encode(bytes(before) + secret).decode()
        yield whole[-(-8 * before // 6) : 8 * (before + len(secret)) // 6]


def _base32(secret: bytes) -> Iterator[str]:
    for before in range(5):
        whole = base64.b32encode(bytes(before) + secret).decode().lower()
        yield whole[-(-8 * before // 5) : 8 * (before + len(secret)) // 5]
