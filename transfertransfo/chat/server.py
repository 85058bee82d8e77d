"""The chat as a server: an endpoint in OpenAI's form, and what keeps it safe."""

import hmac
import ipaddress
import json
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from types import FrameType
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transfertransfo.chat.conversation import Chat, Growing, readable
from transfertransfo.chat.sharing import (
    MOST_CHARACTERS,
    MOST_REPLIES,
    MOST_TOKENS,
    MOST_TURNS,
    Busy,
    Finished,
    SharedModel,
    check_length,
)
from transfertransfo.data.tokenization import tokenize
from transfertransfo.decoding import Context, Decoding
from transfertransfo.errors import SettingError, UserError

MOST_BYTES = 1 << 20  # of a request
# What the page loads, and the endpoint. Gradio has more: uploads, files, a proxy, its own interface for programs.
OPEN_PATHS = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/v1/models", "/v1/chat/completions"}
OPEN_PATHS |= {f"/gradio_api/{name}" for name in ("queue/join", "queue/data", "cancel", "reset", "startup-events")}
OPEN_FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
HEADERS = {
    # Gradio's page makes its functions of text; nothing of it comes from another place
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


# ---- the endpoint ----


class Part(BaseModel):
    type: Literal["text"]
    text: str = Field(max_length=MOST_CHARACTERS)


class Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = Field(max_length=MOST_CHARACTERS)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else " ".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    include_usage: bool = False


class Question(BaseModel):
    """What `POST /v1/chat/completions` takes; other fields of OpenAI's have no effect. None = as the server's flags."""

    model: str = ""
    messages: list[Turn] = Field(min_length=1, max_length=MOST_TURNS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MOST_REPLIES)
    rank: bool | None = None  # OpenAI has none: whether the choice head says which replies come first
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def decoding(self, flags: Decoding) -> Decoding:
        """How the replies are chosen: as this says, and where it says nothing as the flags do."""
        changed: dict[str, Any] = {}
        if length := self.max_completion_tokens or self.max_tokens:
            changed |= {"max_length": length, "min_length": min(flags.min_length, length)}
        if self.top_p is not None:
            changed["top_p"] = self.top_p
        if self.temperature is not None:
            changed["no_sample"] = self.temperature == 0
            changed["temperature"] = self.temperature or flags.temperature
        if self.n > 1 or self.temperature is not None or self.top_p is not None:
            changed["num_beams"] = 0  # which are not sampled
        rank = flags.rank if self.rank is None else self.rank
        beams = changed.get("num_beams", flags.num_beams)
        samples = max(self.n, flags.num_samples if rank else 1)
        greedy = changed.get("no_sample", flags.no_sample)
        if beams or (greedy and self.n == 1):
            samples = 1
        return replace(flags, num_samples=samples, rank=rank and max(beams, samples) > 1, **changed)

    def context(self, chat: Chat) -> Context:
        """Persona and history: the system's messages, else the server's persona; turns alternate, the user's last."""
        persona = [
            line for turn in self.messages if turn.role in ("system", "developer") for line in turn.text.split("\n")
        ]
        check_length("messages: a persona", "\n".join(persona))
        spoken = [turn for turn in self.messages if turn.role in ("user", "assistant")]
        turns = [" ".join(turn.text for turn in group) for _, group in groupby(spoken, key=lambda turn: turn.role)]
        if not spoken or spoken[-1].role != "user":
            raise SettingError("messages: the last one must be the user's", "messages")
        window = 2 * chat.max_history + 1
        heard = tokenize(chat.tokenizer, turns)
        if not heard[-1]:
            raise SettingError("messages: the last one says nothing", "messages")
        persona = [text for text in map(readable, persona) if text.strip()]
        persona_ids = tokenize(chat.tokenizer, persona) if persona else chat.persona_ids
        return Context(persona_ids, heard[-window:], heard[:-window][::-2])


class Endpoint:
    """Answers `Question`s.

    Args:
        chat: persona, decoding and history where a question has none.
        name: of the model.
    """

    def __init__(self, shared: SharedModel, chat: Chat, name: str):
        self.shared, self.chat, self.name = shared, chat, name
        self.started = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"], response_model=None)
        app.add_exception_handler(RequestValidationError, invalid)
        app.add_exception_handler(UserError, refused)

    def models(self) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "transfertransfo"}
        return {"object": "list", "data": [model]}

    async def complete(self, question: Question, request: Request) -> JSONResponse | StreamingResponse:
        decoding = question.decoding(self.chat.decoding)
        context = await run_in_threadpool(question.context, self.chat)
        # -1 and 2**64 - 1 are one seed to torch
        seed = uuid.uuid4().int >> 66 if question.seed is None else question.seed % 2**63
        events = self.shared.reply(context, decoding, seed)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if question.stream:
            chunks = self.chunks(question, request, context, decoding, events, head)
            return StreamingResponse(chunks, media_type="text/event-stream")
        replies: list[list[int]] = []
        async for event in while_connected(request, events):
            if isinstance(event, Finished):
                replies = event.result[: question.n]
        choices = [
            {"index": i, "message": {"role": "assistant", "content": self.chat.text_of(reply).strip()},
             "logprobs": None, "finish_reason": reason(reply, decoding)} for i, reply in enumerate(replies)
        ]  # fmt: skip
        usage = count(context, replies)
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage})

    async def chunks(
        self,
        question: Question,
        request: Request,
        context: Context,
        decoding: Decoding,
        events: Generator[list[list[int]] | Finished],
        head: dict[str, Any],
    ) -> AsyncGenerator[str]:
        """The replies as server-sent events; those that are ranked or beams come whole."""

        def chunk(**fields: Any) -> str:
            return f"data: {json.dumps(head | {'object': 'chat.completion.chunk'} | fields)}\n\n"

        def delta(i: int, content: dict[str, str], ending: str | None = None) -> str:
            return chunk(choices=[{"index": i, "delta": content, "logprobs": None, "finish_reason": ending}])

        texts = [Growing(self.chat.text_of) for _ in range(question.n)]
        replies: list[list[int]] = [[] for _ in texts]
        for i in range(question.n):
            yield delta(i, {"role": "assistant", "content": ""})
        try:
            async for event in while_connected(request, events):
                whole = isinstance(event, Finished)
                if isinstance(event, Finished):
                    replies = event.result[: question.n]
                elif not decoding.rank:
                    for reply, tokens in zip(replies, event):
                        reply += tokens
                for i, (text, reply) in enumerate(zip(texts, replies)):
                    if piece := text.piece(reply, whole=whole):
                        yield delta(i, {"content": piece})
        except UserError as error:  # too late for another status
            yield f"data: {json.dumps(problem(str(error), 'server_error'))}\n\n"
            return
        for i, reply in enumerate(replies):
            yield delta(i, {}, reason(reply, decoding))
        if question.stream_options.include_usage:
            yield chunk(choices=[], usage=count(context, replies))
        yield "data: [DONE]\n\n"


async def while_connected(request: Request, events: Generator) -> AsyncGenerator[Any]:
    """The events of a reply; it is stopped when the client leaves."""
    with closing(events):
        async for event in iterate_in_threadpool(events):
            if await request.is_disconnected():
                return
            yield event


def reason(reply: list[int], decoding: Decoding) -> str:
    return "length" if len(reply) >= decoding.max_length else "stop"


def count(context: Context, replies: list[list[int]]) -> dict[str, int]:
    """The tokens of a question and of its replies."""
    asked = sum(map(len, [*context.persona, *context.history]))
    given = sum(map(len, replies))
    return {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}


def problem(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


async def invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"][1:]))
    return JSONResponse(problem(f"{field}: {first['msg']}", param=field), 400)


async def refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Busy):
        return JSONResponse(problem(str(error), "server_error"), 503, {"retry-after": "1"})
    names = error.names if isinstance(error, SettingError) else ()
    return JSONResponse(problem(str(error), param=names[0] if names else None), 400)


# ---- who may ask, and for what ----


class Guard:
    """Lets through what page and endpoint need, from whoever has the token, or from this machine where there is none.

    A browser that comes with `/?token=TOKEN` gets a cookie; a program sends `Authorization: Bearer TOKEN`. Without a
    token the server must be called by a name of this machine: a page from elsewhere may have a name of its own that
    leads here.
    """

    def __init__(self, app: ASGIApp, token: str = ""):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path, query = scope["path"], parse_qs(scope["query_string"].decode("latin-1"))
        if self.token and path == "/" and self.fits(query.get("token", [""])[0]):
            cookie = f"token={self.token}; Path=/; HttpOnly; SameSite=Lax"
            return await JSONResponse({}, 303, {"location": "/", "set-cookie": cookie})(scope, receive, send)
        if refusal := self.refusal(path, headers):
            status, message = refusal
            response = JSONResponse(problem(message), status, {"www-authenticate": "Bearer"} if status == 401 else None)
            return await response(scope, receive, send)
        await self.app(scope, bounded(receive), with_headers(send))

    def refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and message for a request that is not let through."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if origin and urlsplit(origin).netloc != host:
            return 403, "asked from a page of another site"
        if not self.token and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return 403, "called by a name that is not this machine's"
        if self.token and not self.knows(headers):
            return 401, "needs the token: open the address that the server shows, or send it as Authorization: Bearer"
        if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS):
            return 404, f"{readable(path)[:100]}: there is nothing"
        if int(headers.get("content-length", "0")) > MOST_BYTES:
            return 413, f"more than {MOST_BYTES} bytes"
        return None

    def knows(self, headers: dict[str, str]) -> bool:
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        cookies = [cookie.strip() for cookie in headers.get("cookie", "").split(";")]
        return any(map(self.fits, [bearer, *(text[6:] for text in cookies if text.startswith("token="))]))

    def fits(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())


def bounded(receive: Receive) -> Receive:
    """Gives the messages of a request of at most `MOST_BYTES`; where it is longer, the client is as good as gone."""
    received = 0

    async def receive_at_most() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return message if received <= MOST_BYTES else {"type": "http.disconnect"}

    return receive_at_most


def with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return send_with_headers


def is_loopback(host: str) -> bool:
    """Whether an address, or a name, is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- the server ----


class Server(uvicorn.Server):
    """Stops within two seconds, whoever is connected."""

    def __init__(self, app: ASGIApp, close: Callable[[], None]):
        super().__init__(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, ws="none"))
        self.close = close

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.close()
        self.force_exit = self.should_exit  # the second time
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        SettingError: it cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SettingError(f"web {host}:{port}: {error.strerror or error}", "web") from error
