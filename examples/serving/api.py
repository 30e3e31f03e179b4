"""The HTTP side: requests in OpenAI's format to jobs of the engine, and their pieces back, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from .engine import Engine, Job, Piece, QueueFull, Sampling

RETRY_AFTER_SECONDS = 1
MAX_BODY_BYTES = 8 << 20
DEFAULT_MAX_TOKENS = 16
"""Of a completion; a chat's answer goes on to the end of the slot."""

FAILED = "the request failed in the engine, whose log has the reason, or the server stops"


def whole_characters(text: str) -> str:
    """JSON can spell a surrogate without its other half, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character: a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(whole_characters)]
StopString = Annotated[Text, Field(min_length=1)]


class Strict(BaseModel):
    """Unknown keys and other types are refused: nothing that a client asks for is left out in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False


class Body(Strict):
    """What both endpoints take. A key with a `Literal` is there because clients send it, with the one value that means
    what this server does."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class Completion(Body):
    prompt: Text | list[int] | list[Text]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Text
    content: Text | list[TextPart]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content, **({"name": self.name} if self.name else {})}


class Chat(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None


class Refused(Exception):
    """An answer with an error: its status, its sentence, and the key of the request that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def response(self) -> JSONResponse:
        message = self.message.encode(errors="replace").decode()  # it may quote what the client sent
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status == 429 else None
        return JSONResponse(error_body(self.status, message, self.param), self.status, headers)


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = {404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def make_app(engine: Engine, name: str) -> FastAPI:
    """The application that serves `engine` under the model's `name`."""
    app = FastAPI(openapi_url=None, max_body_size=MAX_BODY_BYTES)
    created = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        status = engine.status()
        return JSONResponse(status, 200 if status["status"] == "ok" else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "local"}
        return {"object": "list", "data": [{**model, "max_model_len": engine.max_length}]}

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        prompt = await asyncio.to_thread(completion_tokens, engine, body.prompt)
        return await answer(engine, name, request, body, prompt, body.max_tokens or DEFAULT_MAX_TOKENS)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        prompt = await asyncio.to_thread(chat_tokens, engine, body.messages)
        room = max(1, engine.max_length - len(prompt))
        return await answer(engine, name, request, body, prompt, body.max_completion_tokens or body.max_tokens or room)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if "json" not in request.headers.get("content-type", ""):
            return Refused(400, "the body has to be JSON, with the header Content-Type: application/json").response()
        problems, key = error.errors(), None
        if problems[0]["type"] == "json_invalid":
            return Refused(400, f"the body is not JSON: {problems[0]['ctx']['error']}").response()
        if len(problems[0]["loc"]) > 1:
            key = str(problems[0]["loc"][1])
        lines = [f"{place(problem['loc'][1:])}: {problem['msg']}" for problem in problems[:4]]
        return Refused(400, "; ".join(lines), key).response()

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return Refused(error.status_code, str(error.detail)).response()

    return app


def place(path: Sequence[str | int]) -> str:
    """Where in a body pydantic found something, without its names for the types of a union that it tried."""
    parts = [str(part) for part in path if not str(part).startswith(("function-after[", "list["))]
    return ".".join(parts) or "the body"


def completion_tokens(engine: Engine, prompt: str | list[int] | list[str]) -> list[int]:
    vocabulary = engine.model.config.vocab_size
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise Refused(400, f"prompt: {len(prompt)} prompts; one a request", "prompt")
        prompt = prompt[0]
    tokens: Any = engine.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    if not tokens:
        raise Refused(400, "prompt: no tokens", "prompt")
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise Refused(400, f"prompt: token ids are from 0 to {vocabulary - 1}", "prompt")
    return tokens


def chat_tokens(engine: Engine, messages: list[Message]) -> list[int]:
    if not engine.tokenizer.chat_template:
        raise Refused(400, "this model's tokenizer has no chat template: use /v1/completions", "messages")
    try:
        return engine.tokenizer.apply_chat_template(
            [message.for_template() for message in messages], add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        raise Refused(400, f"messages: the chat template refuses them: {error}", "messages") from None


async def answer(
    engine: Engine, name: str, request: Request, body: Body, prompt: list[int], max_tokens: int
) -> Response:
    """Run one request on the engine, and answer it whole or as a stream."""
    if body.model not in (None, name):
        raise Refused(404, f"model {body.model!r} is not served here; the one that is: {name!r}", "model")
    sampling = Sampling(
        max_tokens,
        1.0 if body.temperature is None else body.temperature,
        1.0 if body.top_p is None else body.top_p,
        body.seed,
        (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
    )
    pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    job = Job(prompt, sampling, emit)
    try:
        engine.submit(job)
    except ValueError as error:
        raise Refused(400, str(error), "max_tokens") from None
    except QueueFull:
        raise Refused(429, "too many requests are waiting: try again later") from None
    watcher = asyncio.create_task(cancel_when_gone(request, engine, job, pieces))
    stream = follow(engine, job, pieces, watcher)
    form = Form(name, isinstance(body, Chat), len(prompt))
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        events = server_sent(stream, form, with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    text, piece = "", Piece("", 0)
    async for piece in stream:
        text += piece.text
    if piece.finish == "error":
        raise Refused(500, FAILED)
    # Without a finish the client has gone, and nobody reads this.
    return JSONResponse(form.whole(text, piece))


async def cancel_when_gone(request: Request, engine: Engine, job: Job, pieces: asyncio.Queue[Piece | None]) -> None:
    """Free a job's slot when its client closes the connection, and end its pieces."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    engine.cancel(job)
    pieces.put_nowait(None)


async def follow(
    engine: Engine, job: Job, pieces: asyncio.Queue[Piece | None], watcher: asyncio.Task[None]
) -> AsyncIterator[Piece]:
    """A job's pieces up to its last, or until its client has gone."""
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
            if piece.finish:
                return
    finally:
        watcher.cancel()
        engine.cancel(job)


class Form:
    """The fields of one answer, in the form of its endpoint."""

    def __init__(self, model: str, is_chat: bool, prompt_tokens: int) -> None:
        self.is_chat, self.prompt_tokens = is_chat, prompt_tokens
        number = uuid.uuid4().hex
        self.head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{number}", "created": int(time.time()), "model": model}

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choices = [{"index": 0, **content, "logprobs": None, "finish_reason": last.finish}]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage(last)}

    def chunk(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """One event of a stream; text None: the first of a chat, which names the role."""
        delta = {"content": text} if text is not None else {"role": "assistant", "content": ""}
        content = {"delta": delta} if self.is_chat else {"text": text}
        return self.event([{"index": 0, **content, "logprobs": None, "finish_reason": finish}])

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    def usage(self, last: Piece) -> dict[str, int]:
        total = self.prompt_tokens + last.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}


async def server_sent(stream: AsyncIterator[Piece], form: Form, with_usage: bool) -> AsyncIterator[str]:
    """The pieces as server-sent events, and after them [DONE]."""
    if form.is_chat:
        yield sse(form.chunk(None))
    async for piece in stream:
        if piece.finish == "error":
            yield sse(error_body(500, FAILED))
            break
        yield sse(form.chunk(piece.text, piece.finish))
        if piece.finish and with_usage:
            yield sse({**form.event([]), "usage": form.usage(piece)})
    yield "data: [DONE]\n\n"


def sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
