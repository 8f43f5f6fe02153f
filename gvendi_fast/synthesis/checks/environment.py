"""What processes that run other people's code see of this process's environment: no keys, tokens or passwords."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

# Parts of a variable's name, between underscores.
_SECRET = re.compile(
    r"(^|_)(API_?KEYS?|KEYS?|TOKENS?|SECRETS?|PASS|PASSWD|PASSWORDS?|PASSPHRASE|PWD|PAT|CREDENTIALS?|AUTH|AUTHORIZATION|"
    r"BEARER|COOKIES?|SESSION|DSN|HEADERS)(_|$)|APIKEY|ACCESSKEY|PASSWORD|SECRET",
    re.IGNORECASE,
)
# Paths, in spite of their names.
_HARMLESS = {"PWD", "OLDPWD"}
# What loads a model from the hub.
HUB = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_")
_withheld: set[str] = set()


def withhold(variable: str) -> None:
    """From now on no child process of the checks is given this variable, nor another one with its value in it."""
    _withheld.add(variable)


def without_secrets(keep: Iterable[str] = ()) -> dict[str, str]:
    """The environment without variables whose name says that they hold a secret, and without those withheld.

    keep: beginnings of names that stay unless they are withheld. What counts as a secret: a part of the name that is
    KEY, TOKEN, SECRET, PASSWORD, CREDENTIALS, AUTH and the like, an address with a password in it, or the value of a
    withheld variable.
    """
    values = {value for name in _withheld if (value := os.environ.get(name, "").strip())}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _withheld
        and not any(secret in value for secret in values if len(secret) >= 8)
        and (name.startswith(tuple(keep)) or not _is_secret(name, value))
    }


def _is_secret(name: str, value: str) -> bool:
    if name.upper() in _HARMLESS:
        return False
    return _SECRET.search(name) is not None or re.search(r"://[^/\s:@]*:[^/\s@]+@", value) is not None
