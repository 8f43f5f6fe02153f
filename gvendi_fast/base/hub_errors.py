"""What the Hugging Face hub refused, in one sentence with its remedy: the same words for models and for data."""

from __future__ import annotations

from gvendi_fast.base.os_errors import sentence

_LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


def refused(what: str, error: BaseException, remedy: str, revision: str | None = None) -> str:
    """Why the hub does not give `what`, with which the sentence begins, and what to do; `remedy` is another way.

    revision: that was asked for. An error of another library is told by the hub's own one that led to it.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    told = (GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError, OfflineModeIsEnabled)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, told):
        cause = cause.__cause__
    if isinstance(cause, GatedRepoError):
        return gated(what, remedy)
    if isinstance(cause, RevisionNotFoundError):
        return without_revision(what, revision)
    if isinstance(cause, RepositoryNotFoundError):
        return unknown(what, remedy)
    if isinstance(cause, OfflineModeIsEnabled):
        return f"{what} cannot be asked for, as HF_HUB_OFFLINE is set: unset it, or {remedy}"
    return f"{what} could not be downloaded from the Hugging Face hub ({first_line(error)}): try again, or {remedy}"


def gated(what: str, remedy: str) -> str:
    """The sentence on what its owner gives to those who accept terms."""
    return f"{what} is gated on the Hugging Face hub: accept its terms there and {_LOG_IN}, or {remedy}"


def without_revision(what: str, revision: str | None) -> str:
    """The sentence on a branch, tag or commit that there is not."""
    return f"{what} has no revision {revision!r} on the Hugging Face hub"


def unknown(what: str, remedy: str) -> str:
    """The sentence on what the hub does not have, or does not show."""
    return (
        f"{what} is unknown to the Hugging Face hub, or private to another account: check the spelling, {_LOG_IN}, or "
        f"{remedy}"
    )


def first_line(error: BaseException) -> str:
    """The error's kind and the first line of its words; a system's error in the house's words."""
    if isinstance(error, OSError) and error.errno is not None:
        return sentence(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
