"""The HTTP API of an engine: routers ask who has which tokens, administrators do what `lmcache-blend store` does.

    POST /v1/{operation}   JSON in, JSON out: lookup, ls, usage, pin, unpin, move, compress, verify, clear
    GET  /v1/events        server-sent events; ?after=N or Last-Event-ID goes on where a follower left off
    GET  /metrics          Prometheus
    GET  /healthz          200, to anybody

All but the last want `Authorization: Bearer TOKEN`. Plain HTTP is for the loopback interface; elsewhere a certificate
is needed, since the token would be readable on the way.
"""

import hmac
import ipaddress
import json
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_blend.engine.admin import Admin
from lmcache_blend.errors import ConfigError, LMCacheBlendError, TierError, UnknownNameError
from lmcache_blend.metrics import exposition

if TYPE_CHECKING:
    from lmcache_blend.engine.engine import KVEngine

MAX_BODY_BYTES = 4 << 20
MAX_FOLLOWERS = 16
MIN_TOKEN = 16
KEEP_ALIVE_S = 15.0
USAGE_S = 10.0
"""The gauges of what tiers hold are renewed so often at most: without a capacity a remote store is listed for it."""

log = logging.getLogger("lmcache_blend.http")


def make_app(engine: "KVEngine", token: str) -> Any:
    """The ASGI application. Raises ConfigError for a token that could be guessed."""
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError:
        raise ConfigError("the HTTP API needs starlette and uvicorn: pip install lmcache-blend[admin]") from None
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"the token has to be {MIN_TOKEN} printable ASCII characters at least, without spaces")
    admin, wanted, followers = Admin(engine), f"Bearer {token}".encode(), [0]
    measured = [-USAGE_S]

    def refused(request: Request) -> Response | None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, wanted):
            return None
        return _error(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    async def body(request: Request) -> bytes | None:
        """None where it is too large, however it is sent."""
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > MAX_BODY_BYTES:
                return None
        return bytes(data)

    async def run(request: Request) -> Response:
        if (response := refused(request)) is not None:
            return response
        try:
            data = await body(request)
        except ClientDisconnect:
            return Response(status_code=400)
        if data is None:
            return _error(413, f"a request has {MAX_BODY_BYTES} bytes at most")
        try:
            parsed = json.loads(data or b"{}")
        except (ValueError, RecursionError):
            return _error(400, "the request is not JSON")
        try:
            answer = await run_in_threadpool(admin.run, request.path_params["operation"], parsed)
        except UnknownNameError as error:
            return _error(404 if error.kind == "operation" else 400, str(error))
        except TierError as error:
            return _error(503, str(error))
        except LMCacheBlendError as error:
            return _error(400, str(error))
        return JSONResponse(answer)

    async def events(request: Request) -> Response:
        if (response := refused(request)) is not None:
            return response
        after = request.query_params.get("after") or request.headers.get("last-event-id") or str(engine.events.last)
        if not after.isdecimal() or not after.isascii() or len(after) > 18:
            return _error(400, f"after = {after[:40]!r} is no number of an event")
        if followers[0] >= MAX_FOLLOWERS:
            return _error(503, f"{MAX_FOLLOWERS} followers are as many as this engine serves")
        return StreamingResponse(
            follow(request, int(after)), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def follow(request: Request, number: int) -> AsyncIterator[str]:
        followers[0] += 1
        quiet = 0.0
        try:
            yield ": events\n\n"
            while not await request.is_disconnected():
                found = await run_in_threadpool(engine.events.after, number, 1.0)
                for event in found:
                    yield f"id: {event.number}\ndata: {event.json()}\n\n"
                    number = event.number
                quiet = 0.0 if found else quiet + 1.0
                if quiet >= KEEP_ALIVE_S:
                    yield ": still here\n\n"
                    quiet = 0.0
        finally:
            followers[0] -= 1

    async def metrics(request: Request) -> Response:
        if (response := refused(request)) is not None:
            return response
        # What a tier holds is counted when somebody asks for it.
        if time.monotonic() - measured[0] > USAGE_S:
            measured[0] = time.monotonic()
            await run_in_threadpool(engine.usage)
        return Response(exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        return _error(500, "the request failed; the engine's log says why")

    def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"error": message}, status, headers)

    routes = [
        Route("/v1/events", events, methods=["GET"]),
        Route("/v1/{operation:str}", run, methods=["POST"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/healthz", health, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={Exception: failed})


def serve(
    engine: "KVEngine",
    token: str,
    host: str = "127.0.0.1",
    port: int = 8900,
    certificate: Path | None = None,
    key: Path | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer until interrupted. port: 0 takes a free one. ready: is told the API's URL as soon as it can be asked.

    Raises ConfigError, also for an address that others reach without a certificate.
    """
    app = make_app(engine, token)
    if certificate is None and not _is_loopback(host):
        raise ConfigError(f"host {host!r} is reachable from outside: give a certificate and key, or use 127.0.0.1")
    if key is not None and certificate is None:
        raise ConfigError("a key is of use with its certificate only: give both")
    if certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except OSError as error:  # ssl.SSLError too
            raise ConfigError(f"certificate {str(certificate)!r} and key cannot be used: {error}") from None
    listening = _listen(host, port)
    import uvicorn

    # h11 bounds a request's head; httptools, which uvicorn takes where it is installed, does not.
    settings = partial(
        uvicorn.Config, app, host=host, port=port, http="h11", log_level="warning", limit_concurrency=256
    )
    server = uvicorn.Server(
        settings(ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=2, server_header=False)
    )
    ready(f"http{'s' if certificate else ''}://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1")
    with listening:
        server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
