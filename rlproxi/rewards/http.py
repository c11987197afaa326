"""A scorer behind an HTTP server: for packages that conflict with this environment, another machine, or a service."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import string
import time
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

import numpy as np

from . import wire
from .base import RewardError
from .registry import register

_OWN_HEADERS = ("content-type", "content-length", "transfer-encoding", "host", "accept", "x-request-id")


@register("http")
class HTTPReward:
    """Sends each group to a server and returns its scores; the wire format is in docs/rewards/http.md.

    One request is one connection and one attempt: the caller retries. ``X-Request-Id`` is a hash of the request's
    content, so a server can answer a repeated request without scoring twice. Redirects are not followed and proxies of
    the environment are not used, so the images and the headers go to ``url`` only.

    Args:
        url: http://host[:port]/path or https://...
        format: of the request: npz (small and fast), or json with base64 PNGs (for servers without numpy). The answer
            may have either.
        timeout_s: seconds without an answer until a request fails; also the limit for reading a slow answer.
        headers: more headers. ``$NAME`` or ``${NAME}`` in a value is an environment variable, which keeps a token out
            of the config (``{"Authorization": "Bearer $TOKEN"}``); ``$$`` is a dollar sign.

    Raises ValueError for a parameter that cannot be used, and for an environment variable that is not set.
    """

    def __init__(
        self,
        url: str,
        format: Literal["npz", "json"] = "npz",
        timeout_s: float = 60.0,
        headers: dict[str, str] | None = None,
    ):
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}; it must be above 0")
        self.tls, self.host, self.port, self.target = _parts(url)
        self.shown = url.partition("?")[0]  # a query may hold a key
        self.content_type = wire.CONTENT_TYPES[format]
        self.timeout_s = timeout_s
        self.headers = {name: _header(name, value) for name, value in (headers or {}).items()}

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3] -> float32 [B]. Raises RewardError with the server's message."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(prompts) != len(images):
            raise ValueError(
                f"images {images.dtype} {list(images.shape)} and {len(prompts)} prompts: expected uint8 "
                "[B, H, W, 3] and B"
            )
        if not len(images):
            return np.zeros(0, np.float32)
        status, content_type, answer = self._post(images, prompts)
        if status != 200:
            raise RewardError(f"{self.shown} answered {status}: {_words(answer)}")
        if len(answer) > wire.answer_limit(len(images)):
            raise RewardError(
                f"{self.shown} answered more than the {wire.answer_limit(len(images))} bytes that "
                f"{len(images)} scores may have: {_words(answer)}"
            )
        try:
            return wire.decode_scores(content_type, answer, len(images))
        except wire.WireError as error:
            said = "" if wire.media_type(content_type) == wire.NPZ else f"; it said: {_words(answer)}"
            raise RewardError(f"{self.shown} answered no scores: {error}{said}") from None

    def _post(self, images: np.ndarray, prompts: Sequence[str]) -> tuple[int, str | None, bytes]:
        """(status, content type, body); the body is cut soon after the size that is allowed."""
        headers = {
            **self.headers,
            "Content-Type": self.content_type,
            "Accept": f"{self.content_type}, {wire.JSON}",
            "X-Request-Id": wire.request_id(images, prompts),
        }
        sent = wire.encode_request(self.content_type, images, prompts)
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout_s)
        try:
            # A server that refuses may close the connection before it has read everything; its answer matters more.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", self.target, sent, headers)
            response = connection.getresponse()
            body = self._body(response, wire.answer_limit(len(images)))
            return response.status, response.getheader("Content-Type"), body
        except TimeoutError:
            raise RewardError(f"{self.shown} did not answer within timeout_s = {self.timeout_s:g}") from None
        except (OSError, http.client.HTTPException) as error:
            raise RewardError(f"{self.shown} cannot be asked: {type(error).__name__}: {error}") from None
        finally:
            connection.close()

    def _body(self, response: http.client.HTTPResponse, limit: int) -> bytes:
        body, deadline = b"", time.monotonic() + self.timeout_s
        while len(body) <= limit and (chunk := response.read1(65536)):
            body += chunk
            if time.monotonic() > deadline:
                raise TimeoutError
        return body


def _parts(url: str) -> tuple[bool, str, int, str]:
    """(with TLS, host, port, path and query) of a URL that can be asked; ValueError for another."""
    if not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
        raise ValueError(f"url {url!r} has a character that must be percent-encoded")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url {url!r} is not of the form http://host[:port]/path or https://...")
    if parts.username is not None or parts.password is not None:
        raise ValueError("url holds a user name; use headers: {Authorization: ...} with an environment variable")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    tls = parts.scheme == "https"
    return tls, parts.hostname, parts.port or (443 if tls else 80), target


def _header(name: str, value: str) -> str:
    """The header's value with environment variables put in. No error shows the value: it may be a secret."""
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or name.lower() in _OWN_HEADERS:
        raise ValueError(f"headers: {name!r} is not a header's name, or one that the scorer sets itself")
    try:
        filled = string.Template(value).substitute(os.environ).strip()
    except KeyError as error:
        raise ValueError(
            f"headers: {name} needs the environment variable {error.args[0]}, which is not set here"
        ) from None
    except ValueError:
        raise ValueError(f"headers: {name} has a $ that names no variable; $$ is a dollar sign") from None
    if not (filled.isascii() and filled.isprintable()):
        raise ValueError(f"headers: {name} has a line break or another character that a header cannot have")
    return filled


def _words(body: bytes) -> str:
    """The first 300 characters of an answer as one printable line."""
    text = " ".join(body[:4096].decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() else "?" for c in text)[:300] or "(nothing)"
