"""What stands between the network and the models: who may ask, how often, how much, and how slowly."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from warploom.serve.requests import Refused

_MAX_CLIENTS = 4096  # whose rates are remembered


class RateLimiter:
    """A bucket of `burst` requests per client that fills up at `per_minute`."""

    def __init__(self, per_minute: int, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_minute / 60, burst, clock
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, when

    def wait_s(self, client: str) -> float:
        """Take one request of the client and return 0, or return in how many seconds there will be one."""
        now = self._clock()
        left, before = self._clients.pop(client, (float(self._burst), now))
        left = min(self._burst, left + (now - before) * self._per_s)
        wait = 0.0 if left >= 1 else (1 - left) / self._per_s
        self._clients[client] = left - 1 if left >= 1 else left, now
        if len(self._clients) > _MAX_CLIENTS:
            self._clients.popitem(last=False)
        return wait


class Guard:
    """ASGI middleware: the name the server was called by, the rate, the token.

    A page of another site can make a browser on this machine call 127.0.0.1. It cannot read the answer, and the API
    takes only JSON declared as such, which a browser does not send unasked; but a name that the site lets point here
    would count as the same site. So only names of this machine are answered; hosts None: any, where a token is asked.
    """

    def __init__(self, app: ASGIApp, *, rate: RateLimiter, token: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._rate, self._token, self._hosts = app, rate, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused, retry_s = self._judge(scope)
        if refused is None:
            await self._app(scope, receive, send)
        else:
            await _send_json(send, refused, retry_s)

    def _judge(self, scope: Scope) -> tuple[Refused | None, float]:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            return Refused(400, "the Host header names no address of this server", code="wrong_host"), 0.0
        if scope["path"].startswith("/v1/"):
            client = scope["client"][0] if scope.get("client") else ""
            wait_s = self._rate.wait_s(client)
            if wait_s:
                return Refused(429, "too many requests from this address", code="rate_limited"), wait_s
            given = headers.get("authorization", "").encode("latin-1")
            if self._token is not None and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                return Refused(401, "the token is missing or wrong; send Authorization: Bearer", code="no_token"), 0.0
        return None, 0.0


async def _send_json(send: Send, refused: Refused, retry_s: float) -> None:
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_s:
        headers.append((b"retry-after", str(math.ceil(retry_s)).encode()))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """The host without its port."""
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Return the body. Raises Refused if it is too long or too slow."""
    parts, size = [], 0
    try:
        with anyio.fail_after(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise Refused(413, f"the body is longer than {max_bytes:,} bytes", code="body_too_long")
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {timeout_s:g} s", code="body_too_slow") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None
    return b"".join(parts)


def deadline_protocol(timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with a deadline for the head of each request, which uvicorn itself has not: a client
    that sends a byte now and then would hold its connection for ever."""

    class DeadlineProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            if self._deadline is None and self.cycle is not None and self.cycle.response_complete:
                self._expect_head()
            super().data_received(data)
            self._head_may_have_come()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._head_may_have_come()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            self._deadline = self.loop.call_later(timeout_s, self._too_slow)

        def _head_may_have_come(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel_deadline()

        def _cancel_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_slow(self) -> None:
            self._deadline = None
            self.transport.close()

    return DeadlineProtocol
