"""The routes: models, completions, chat completions, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from warploom.data.chat import ChatTemplate
from warploom.data.tokenizer import Tokenizer
from warploom.generate.continuous import Finish, Generation, Token
from warploom.generate.sampler import row_generator
from warploom.serve.batcher import Batcher, BatcherFull, BatcherStopped
from warploom.serve.limits import Guard, RateLimiter, read_body
from warploom.serve.requests import Refused, Request, parse_body, read_request
from warploom.serve.responses import DONE, Choice, Writer, error_event

_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
_PAGE_HEADERS = {
    # The page runs its own script and talks to its own server, and nothing else.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

_Events = asyncio.Queue[tuple[int, Token | Finish]]


@dataclass(frozen=True)
class ServedModel:
    """A model under its name."""

    batcher: Batcher
    tokenizer: Tokenizer
    template: ChatTemplate | None


def build_app(
    models: Mapping[str, ServedModel],
    *,
    token: str | None,
    hosts: frozenset[str] | None,
    requests_per_minute: int,
    max_body_bytes: int,
    read_timeout_s: float,
) -> Starlette:
    """Return the ASGI application; the first of the models is the one that is meant when none is named. It starts the
    batchers and stops them."""
    started = int(time.time())

    async def list_models(request: HttpRequest) -> Response:
        entries = [
            {
                "id": name,
                "object": "model",
                "created": started,
                "owned_by": "warploom",
                "context": model.batcher.model.config.max_seq_len,
                "chat": model.template is not None,
            }
            for name, model in models.items()
        ]
        return JSONResponse({"object": "list", "data": entries})

    async def health(request: HttpRequest) -> Response:
        stopped = [model.batcher.stopped for model in models.values() if model.batcher.stopped is not None]
        return JSONResponse({"status": "stopped" if stopped else "ok"}, 503 if stopped else 200)

    async def complete(request: HttpRequest, kind: Literal["completions", "chat"]) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be declared as Content-Type: application/json", code="not_json")
        body = parse_body(await read_body(request, max_body_bytes, read_timeout_s))
        name = body.get("model", next(iter(models)))
        if not isinstance(name, str) or name not in models:
            message = f"there is no model {name!r:.80}; there are {', '.join(models)}"
            raise Refused(404, message, param="model", code="model_not_found")
        model = models[name]
        context = model.batcher.model.config.max_seq_len
        # Long texts take a while to encode, and the others shall not wait for it.
        checked = await anyio.to_thread.run_sync(read_request, kind, body, model.tokenizer, model.template, context)
        events: _Events = asyncio.Queue()
        generations = _generations(checked, events)
        try:
            model.batcher.submit(generations)
        except BatcherFull:
            raise Refused(503, "too many requests wait already; try again", code="queue_full") from None
        except BatcherStopped as error:
            raise Refused(503, str(error), code="stopped") from None
        writer = Writer(checked, name, model.tokenizer)
        if checked.stream:
            stream = _stream(generations, events, writer)
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        return await _whole(request, generations, events, writer)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for model in models.values():
            model.batcher.start()
        try:
            yield
        finally:
            for model in models.values():
                await anyio.to_thread.run_sync(model.batcher.stop)

    return Starlette(
        routes=[
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/completions", functools.partial(complete, kind="completions"), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(complete, kind="chat"), methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            *(Route(path, _page_file(name), methods=["GET"]) for path, name in _PAGE_FILES.items()),
        ],
        middleware=[
            Middleware(
                Guard,
                rate=RateLimiter(requests_per_minute, burst=max(1, requests_per_minute // 4)),
                token=token,
                hosts=hosts,
            )
        ],
        exception_handlers={Refused: _refused, HTTPException: _http_error, 500: _failed},
        lifespan=lifespan,
    )


def _generations(request: Request, events: _Events) -> list[Generation]:
    loop = asyncio.get_running_loop()

    def sender(index: int):
        return lambda event: loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return [
        Generation(
            prompt=prompt,
            sampling=request.sampling,
            end_ids=request.end_ids,
            generator=row_generator(request.sampling.seed, number, sample),
            num_top=request.num_top,
            on_event=sender(number * request.n + sample),
        )
        for number, prompt in enumerate(request.prompts)
        for sample in range(request.n)
    ]


async def _whole(request: HttpRequest, generations: Sequence[Generation], events: _Events, writer: Writer) -> Response:
    """Wait for all choices, or for the client to go away."""
    collecting = asyncio.ensure_future(_collect(len(generations), events))
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # as nginx logs it; nobody reads it
        return JSONResponse(writer.whole(collecting.result()))
    finally:
        _cancel(generations)
        collecting.cancel()
        leaving.cancel()


async def _collect(num_choices: int, events: _Events) -> list[Choice]:
    choices = [Choice() for _ in range(num_choices)]
    while any(choice.finish is None for choice in choices):
        index, event = await events.get()
        if isinstance(event, Finish) and event.reason == "error":
            raise Refused(500, event.message, code="server_error")
        choices[index].add(event)
    return choices


async def _until_gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(generations: Sequence[Generation], events: _Events, writer: Writer) -> AsyncIterator[str]:
    choices = [Choice() for _ in generations]
    try:
        for index in range(len(choices)):
            opening = writer.first(index)
            if opening is not None:
                yield opening
        while any(choice.finish is None for choice in choices):
            index, event = await events.get()
            if isinstance(event, Finish) and event.reason == "error":
                yield error_event(event.message)
                return
            choices[index].add(event)
            chunk = writer.event(index, event)
            if chunk is not None:
                yield chunk
        usage = writer.last(choices)
        if usage is not None:
            yield usage
        yield DONE
    finally:  # also when the client has gone away
        _cancel(generations)


def _cancel(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.cancelled = True


def _page_file(name: str):
    async def page_file(request: HttpRequest) -> Response:
        return FileResponse(_PAGE / name, headers=_PAGE_HEADERS)

    return page_file


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = Refused(error.status_code, str(error.detail), code=str(error.detail).lower().replace(" ", "_"))
    return JSONResponse(refused.body(), error.status_code, error.headers)


async def _failed(request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed; its log says how", code="server_error").body(), 500)
