"""The client's HTTP library with bounds: how much of a reply is read, where it may send to, what it tells of us.

reply       read as it comes; refused once it is longer than `most` bytes, unpacked
packing     gzip and deflate are unpacked here, up to the bound; others are not asked for and refused
redirects   none is followed: base_url says where the requests go
headers     those that the exchange needs; what the client takes from further variables (OPENAI_ORG_ID,
            OPENAI_PROJECT_ID, OPENAI_CUSTOM_HEADERS) goes to OpenAI's own hosts only
proxies     as the environment says, but none before this machine itself
"""

from __future__ import annotations

import ipaddress
import zlib
from typing import Any

from gvendi_fast.synthesis.generators.key import Key

# Of an error's body.
_MOST_TOLD = 1 << 20
_NEEDED = {
    "host",
    "accept",
    "accept-encoding",
    "connection",
    "content-length",
    "content-type",
    "user-agent",
    "authorization",
}
# Key of a response's extensions: why its body was not read to the end.
UNREAD = "gvendi_fast.unread"


def make_client(key: Key, host: str, most: int, timeout: Any) -> Any:
    """An AsyncClient of the library that the openai package uses, whose replies have at most `most` bytes."""
    from openai import DefaultAsyncHttpxClient

    class Bounded(DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            # The client looks in them for what it noted there for itself.
            whole = request.headers.copy()
            _prepare(request, key)
            try:
                response = await super().send(
                    request, **{**options, "stream": True, "follow_redirects": False}
                )
            finally:
                request.headers = whole
            try:
                body, unread = await _read(
                    response, most if response.status_code == 200 else min(most, _MOST_TOLD)
                )
            finally:
                await response.aclose()
            # The body lies unpacked and whole in the new one.
            headers = [
                (name, value)
                for name, value in response.headers.multi_items()
                if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
            ]
            extensions = {} if unread is None else {UNREAD: unread}
            return type(response)(
                response.status_code, headers=headers, content=body, request=request, extensions=extensions
            )

    return Bounded(timeout=timeout, trust_env=not is_this_machine(host))


def is_this_machine(host: str) -> bool:
    """Whether a host is the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _prepare(request: Any, key: Key) -> None:
    host = request.url.host
    if not (request.url.scheme == "https" and (host == "api.openai.com" or host.endswith(".api.openai.com"))):
        for name in list(request.headers):
            if name.lower() not in _NEEDED:
                del request.headers[name]
    request.headers["Authorization"] = key.bearer
    request.headers["Accept-Encoding"] = "gzip, deflate"


async def _read(response: Any, most: int) -> tuple[bytes, str | None]:
    """The body, unpacked; or nothing, and why."""
    packings = [name.strip().lower() for name in response.headers.get("content-encoding", "").split(",")]
    packings = [name for name in packings if name not in ("", "identity")]
    if packings and packings not in (["gzip"], ["x-gzip"], ["deflate"]):
        return b"", f"its content-encoding is {', '.join(packings)}, which was not asked for"
    long = f"it is longer than {_megabytes(most)} MB"
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
        return b"", long
    # 32: with the header of gzip or zlib, whichever is there.
    unpack = zlib.decompressobj(32 + zlib.MAX_WBITS) if packings else None
    body = bytearray()
    async for piece in response.aiter_raw():
        if unpack is not None:
            try:
                piece = unpack.decompress(piece, most - len(body) + 1)
            except zlib.error as error:
                return b"", f"it cannot be unpacked ({error})"
        body += piece
        if len(body) > most:
            return b"", long
    return bytes(body), None


def _megabytes(size: int) -> str:
    return f"{size / 2**20:g}"
