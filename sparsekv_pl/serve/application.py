"""The endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from sparsekv_pl.serve.api_key import ApiKey
from sparsekv_pl.serve.bounded_requests import BoundedRequests
from sparsekv_pl.serve.prompts import SplitPrompt, chat_prompt, completion_prompt
from sparsekv_pl.serve.refusals import Refusal, refusal_of
from sparsekv_pl.serve.replies import ReplyShape, event
from sparsekv_pl.serve.request_fields import MOST_PROMPTS, AskedFields, ChatFields, CompletionFields
from sparsekv_pl.serve.served_model import ReplyContent, ServedModel
from sparsekv_pl.serve.turns import Cancelled, ModelTurn, ModelTurns

log = logging.getLogger(__name__)

BYTES_PER_TOKEN, BYTES_BESIDES = 64, 65_536
"""The longest body of a request, by the longest prompt in tokens: JSON may write a character in six bytes."""
CLIENT_LEFT = 499
"""nginx's status code for a request whose client left; nobody reads it."""


def application(served: ServedModel, turns: ModelTurns, key: ApiKey | None = None) -> FastAPI:
    """Return the application; ``turns`` run its requests, of clients that send ``key``, if there is one."""
    app = FastAPI(title="sparsekv_pl", docs_url=None, redoc_url=None, openapi_url=None)
    most = BYTES_PER_TOKEN * served.limits.prompt + BYTES_BESIDES
    app.add_middleware(BoundedRequests, most_bytes=most, metrics=served.metrics, key=key)
    _refuse_in_openais_shape(app)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatFields, request: Request) -> Response:
        served.check_name(asked.model)
        prompt = await asyncio.to_thread(chat_prompt, served.model, asked.messages)
        shape = ReplyShape(served.name, "chat", asked.streams_usage)
        return await _reply(served, turns, [prompt], asked, request, shape)

    @app.post("/v1/completions")
    async def completions(asked: CompletionFields, request: Request) -> Response:
        served.check_name(asked.model)
        _check_prompts(asked)
        prompts = [await asyncio.to_thread(completion_prompt, served.model, one) for one in asked.prompts]
        shape = ReplyShape(served.name, "text", asked.streams_usage)
        return await _reply(served, turns, prompts, asked, request, shape)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(served)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_name(name)
        return _described(served)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests_under_way": len(turns)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def _check_prompts(asked: CompletionFields) -> None:
    """Raise ``Refusal`` for prompts, or options beside them, that cannot be answered in one request."""
    if not asked.prompts:
        raise Refusal("prompt is empty: give some text", param="prompt")
    if len(asked.prompts) > MOST_PROMPTS:
        what = f"the request has {len(asked.prompts):,} prompts, and {MOST_PROMPTS} go together: send several requests"
        raise Refusal(what, param="prompt")
    if asked.stream and (len(asked.prompts) > 1 or asked.echo):
        raise Refusal("stream goes with one prompt, and without echo", param="stream")
    if asked.logprobs is not None and not asked.echo:
        raise Refusal("logprobs needs echo: only prompts are scored", param="logprobs", code="unsupported_value")


def _described(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "sparsekv_pl",
        "max_model_len": served.limits.prompt,
        "press": str(served.documents.origin),
    }


async def _reply(
    served: ServedModel,
    turns: ModelTurns,
    prompts: list[SplitPrompt],
    asked: AskedFields,
    request: Request,
    shape: ReplyShape,
) -> Response:
    """Answer all prompts in one turn, whole or streamed."""
    most = [served.new_tokens(asked, prompt) for prompt in prompts]

    def work(turn: ModelTurn) -> list[ReplyContent]:
        return [served.answer(prompt, asked, tokens, turn) for prompt, tokens in zip(prompts, most, strict=True)]

    turn = turns.take(work)
    streamed = False
    try:
        first = await _first_event(turn, request)
        if not asked.stream:
            return JSONResponse(await asyncio.to_thread(shape.whole, first, served.model))
        streamed = True
        events = _events(turn, first, shape)
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(events, 200, headers, "text/event-stream", BackgroundTask(turn.cancel))
    except Cancelled:
        return PlainTextResponse("", CLIENT_LEFT)
    finally:
        if not streamed:
            turn.cancel()


async def _first_event(turn: ModelTurn, request: Request) -> Any:
    """Return the turn's first event; raise what it failed with, and ``Cancelled`` if the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waiting = [asyncio.ensure_future(turn.events.get()), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not waiting[0].done():
            raise Cancelled
        first = waiting[0].result()
    finally:
        for task in waiting:
            task.cancel()
    if isinstance(first, Cancelled):
        raise first
    if isinstance(first, BaseException):
        _log(first)
        raise refusal_of(first) from first
    return first


async def _events(turn: ModelTurn, first: Any, shape: ReplyShape) -> AsyncIterator[str]:
    """Yield the parts of a streamed reply. An error after the first part is a part too: the status has been sent."""
    try:
        for line in shape.opening():
            yield line
        happened = first
        while isinstance(happened, str):
            yield shape.piece(happened)
            happened = await turn.events.get()
        if isinstance(happened, BaseException):
            _log(happened)
            yield event(refusal_of(happened).body)
            return
        for line in shape.ending(happened[0]):
            yield line
    finally:
        turn.cancel()


def _log(error: BaseException) -> None:
    if not isinstance(error, Refusal | ValueError | Cancelled):
        log.error("a request failed", exc_info=error)


def _refuse_in_openais_shape(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(ValueError)
    async def impossible(_: Request, error: ValueError) -> Response:
        return refusal_of(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = max(error.errors(), key=lambda one: len(one["loc"]))  # of several forms, the one that fits farthest
        places = [place for place in found["loc"] if isinstance(place, int) or place.isidentifier()]
        param = ".".join(map(str, places[1:])).removesuffix(".str")
        given = "" if found["type"] == "missing" else f" (it is {str(found.get('input'))[:60]!r})"
        return Refusal(f"{param or 'the body'}: {found['msg']}{given}", param=param or None).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return Refusal(what, status=error.status_code, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return refusal_of(error).response()
