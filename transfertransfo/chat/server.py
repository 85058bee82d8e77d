"""The chat as a server: an endpoint in OpenAI's form, and what keeps it safe."""

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from types import FrameType
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qs, urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, model_validator
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transfertransfo.chat.conversation import Chat, Growing, unicode_of
from transfertransfo.chat.sharing import (
    MOST_REPLIES,
    MOST_TOKENS,
    MOST_TURNS,
    Busy,
    Failed,
    Finished,
    SharedModel,
    check_length,
)
from transfertransfo.data.tokenization import tokenize
from transfertransfo.decoding import Context, Decoding, fit_context
from transfertransfo.errors import SettingError, UserError, printable

MOST_BYTES = 1 << 20  # of a request
SMALLEST = 1e-6  # temperature, as the flag has it
MOST_CONNECTIONS = 512  # a visitor's page holds two
MOST_SECONDS = 30.0  # until a request's body has come
# What the page loads, and the endpoint. Gradio has more: uploads, files, a proxy, its own interface for programs.
OPEN_PATHS = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/v1/models", "/v1/chat/completions"}
OPEN_PATHS |= {f"/gradio_api/{name}" for name in ("queue/join", "queue/data", "cancel", "reset", "startup-events")}
OPEN_FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
PAGES_OWN = "/gradio_api/"
HEADERS = {
    # Gradio's page makes functions of text (unsafe-eval); all of it comes from this server
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

logger = logging.getLogger(__name__)


# ---- the endpoint ----


class Fields(BaseModel):
    """Fields of a request. A null field is a missing one."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        is_object = isinstance(fields, dict)
        return {name: value for name, value in fields.items() if value is not None} if is_object else fields


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None

    @property
    def text(self) -> str:
        content = self.content or ""
        return unicode_of(content if isinstance(content, str) else " ".join(part.text for part in content))


class StreamOptions(Fields):
    include_usage: bool = False


class Question(Fields, allow_inf_nan=False):
    """The body of `POST /v1/chat/completions`. Other fields have no effect. None = as the server's flags say."""

    model: str = ""
    messages: list[Turn] = Field(min_length=1, max_length=MOST_TURNS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MOST_REPLIES)
    rank: bool | None = None  # our own: the replies that the choice head scores best come first
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def decoding(self, flags: Decoding) -> Decoding:
        """How the replies are chosen: the server's decoding, changed by the fields given.

        Raises:
            SettingError: two settings exclude each other.
        """
        settings: dict[str, Any] = {}
        if length := self.max_completion_tokens or self.max_tokens:
            settings |= {"max_length": length, "min_length": min(flags.min_length, length)}
        if self.top_p is not None:
            settings["top_p"] = max(self.top_p, SMALLEST)  # 0 is the likeliest token here, and no filter to the flag
        if self.temperature is not None:
            settings["no_sample"] = self.temperature < SMALLEST
            settings["temperature"] = max(self.temperature, SMALLEST)
        greedy = settings.get("no_sample", flags.no_sample)
        if greedy and self.n > 1:
            raise SettingError(f"n {self.n}: at temperature 0 they would all be the same", "n")
        if self.n > 1 or self.temperature is not None or self.top_p is not None:
            settings["num_beams"] = 0  # which are not sampled
        if greedy or settings.get("num_beams", flags.num_beams):
            settings["num_samples"] = 1
        else:
            chooses = flags.chooses if self.rank is None else self.rank
            settings["num_samples"] = max(self.n, flags.num_samples if chooses else 1)
        decoding = flags.changed(**settings)
        if self.rank is None:
            return decoding
        return replace(decoding, rank=self.rank and decoding.count > 1, consensus=False)

    def context(self, chat: Chat) -> Context:
        """Persona and history to reply to.

        The system's messages are the persona; without any it is the server's. Messages of one speaker in a row are one
        turn.

        Raises:
            UserError: a message is too long, or the last one is not the user's or says nothing.
        """
        for i, turn in enumerate(self.messages):
            check_length(f"messages.{i}.content", turn.text)
        persona = [
            line for turn in self.messages if turn.role in ("system", "developer") for line in turn.text.split("\n")
        ]
        check_length("messages: a persona", "\n".join(persona))
        spoken = [turn for turn in self.messages if turn.role in ("user", "assistant")]
        turns = [" ".join(turn.text for turn in group) for _, group in groupby(spoken, key=lambda turn: turn.role)]
        if not spoken or spoken[-1].role != "user":
            raise SettingError("messages: the last one must be the user's", "messages")
        heard = tokenize(chat.tokenizer, turns)
        if not heard[-1]:
            raise SettingError("messages: the last one says nothing", "messages")
        persona = [text for text in map(printable, persona) if text.strip()]
        persona_ids = tokenize(chat.tokenizer, persona) if persona else chat.persona_ids
        return Context.of(persona_ids, heard, chat.max_history)


class Endpoint:
    """Answers a `Question`.

    Args:
        chat: has the persona, decoding and `max_history` of questions without their own.
        name: the model's name.
    """

    def __init__(self, shared: SharedModel, chat: Chat, name: str):
        self.shared, self.chat, self.name = shared, chat, name
        self.started = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        # an app of its own refuses a wrong method; the page, mounted beside the routes, would answer it
        api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        api.add_api_route("/models", self.models, methods=["GET", "HEAD"])
        api.add_api_route("/chat/completions", self.complete, methods=["POST"], response_model=None)
        api.add_exception_handler(RequestValidationError, invalid)
        api.add_exception_handler(UserError, refused)
        api.add_exception_handler(HTTPException, denied)
        api.add_exception_handler(Exception, failed)
        app.mount("/v1", api)

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
             "logprobs": None, "finish_reason": finish_reason(reply, decoding)} for i, reply in enumerate(replies)
        ]  # fmt: skip
        usage = self.usage(context, decoding, replies)
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage})

    def usage(self, context: Context, decoding: Decoding, replies: list[list[int]]) -> dict[str, int]:
        """The numbers of tokens that the model was given and that it replied."""
        persona, history, _ = fit_context(self.shared.model, context, decoding.max_length)
        asked, given = (sum(map(len, texts)) for texts in ([*persona, *history], replies))
        return {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}

    async def chunks(
        self,
        question: Question,
        request: Request,
        context: Context,
        decoding: Decoding,
        events: Generator[list[list[int]] | Finished],
        head: dict[str, Any],
    ) -> AsyncGenerator[str]:
        """The replies as server-sent events. Beams, and replies that are to be ordered, come whole."""

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
                elif not decoding.chooses:
                    for reply, tokens in zip(replies, event):
                        reply += tokens
                for i, (text, reply) in enumerate(zip(texts, replies)):
                    if piece := text.piece(reply, whole=whole):
                        yield delta(i, {"content": piece})
        except UserError as error:  # too late for another status
            yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n"
            return
        for i, reply in enumerate(replies):
            yield delta(i, {}, finish_reason(reply, decoding))
        if question.stream_options.include_usage:
            yield chunk(choices=[], usage=self.usage(context, decoding, replies))
        yield "data: [DONE]\n\n"


async def while_connected(request: Request, events: Generator) -> AsyncGenerator[Any]:
    """The events of a reply. It stops when the client leaves."""
    with closing(events):
        async for event in iterate_in_threadpool(events):
            if await request.is_disconnected():
                return
            yield event


def finish_reason(reply: list[int], decoding: Decoding) -> str:
    return "length" if len(reply) >= decoding.max_length else "stop"


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


async def invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if isinstance(error.body, bytes):  # FastAPI did not read it as JSON
        return JSONResponse(error_body("send content-type: application/json"), 400)
    if first["type"] == "json_invalid":
        return JSONResponse(error_body(f"the request is not JSON: {first['ctx']['error']}"), 400)
    name = printable(".".join(map(str, first["loc"][1:])))[:100] or None
    return JSONResponse(error_body(f"{name or 'the request'}: {first['msg']}", param=name), 400)


async def denied(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)


async def failed(request: Request, error: Exception) -> JSONResponse:
    logger.debug("a request failed", exc_info=error)
    return JSONResponse(error_body("the server failed", "server_error"), 500)


async def refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Failed):
        return JSONResponse(error_body(str(error), "server_error"), 500)
    if isinstance(error, Busy):
        return JSONResponse(error_body(str(error), "server_error"), 503, {"retry-after": "1"})
    names = error.names if isinstance(error, UserError) else ()
    return JSONResponse(error_body(str(error), param=names[0] if names else None), 400)


# ---- access ----


class Guard:
    """Lets requests of page and endpoint through, of whoever has the token. Without a token, of this machine.

    A browser that comes with `/?token=TOKEN` gets a cookie. A program sends `Authorization: Bearer TOKEN`. Without a
    token the request must name this machine as its host: another site's name may point here (DNS rebinding).

    Args:
        inputs: the number of values that each of the page's handlers takes, by the handler's number.
    """

    def __init__(self, app: ASGIApp, token: str = "", inputs: Mapping[int, int] | None = None):
        self.app, self.token, self.inputs = app, token, inputs or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path, query = scope["path"], parse_qs(scope["query_string"].decode("latin-1"))
        if self.token and path == "/" and self.fits(query.get("token", [""])[0]):
            cookie = f"token={self.token}; Path=/; HttpOnly; SameSite=Lax"
            return await JSONResponse({}, 303, {"location": "/", "set-cookie": cookie})(scope, receive, send)
        try:
            self.check(path, headers)
            body = await body_of(receive)
            if path.startswith(PAGES_OWN) and body:
                check_press(path, body, self.inputs)
        except HTTPException as refusal:
            response = JSONResponse(error_body(refusal.detail), refusal.status_code, refusal.headers)
            return await response(scope, receive, send)
        except ClientDisconnect:
            return None
        if path in ("/", "/config"):  # Gradio opens files that its query names
            scope = {**scope, "query_string": b""}
        await self.app(scope, given(body, receive), with_headers(send))

    def check(self, path: str, headers: dict[str, str]) -> None:
        """Check path, host, origin and token.

        Raises:
            HTTPException: the request is not let through.
        """
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if origin and split(origin).netloc != host:
            raise HTTPException(403, "asked from a page of another site")
        if not self.token and not is_loopback(split(f"//{host}").hostname or ""):
            raise HTTPException(403, "called by a name that is not this machine's")
        if self.token and not self.knows(headers):
            message = "needs the token: open the address that the server shows, or send it as Authorization: Bearer"
            raise HTTPException(401, message, {"www-authenticate": "Bearer"})
        if (path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS)) or ".." in path:
            raise HTTPException(404, f"{printable(path)[:100]}: there is nothing")

    def knows(self, headers: dict[str, str]) -> bool:
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        cookies = [cookie.strip() for cookie in headers.get("cookie", "").split(";")]
        return any(map(self.fits, [bearer, *(text[6:] for text in cookies if text.startswith("token="))]))

    def fits(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())


async def body_of(receive: Receive) -> bytes:
    """The whole body of a request.

    Raises:
        HTTPException: it is too long, or takes too long to come.
        ClientDisconnect: the client left.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(MOST_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > MOST_BYTES:
                    raise HTTPException(413, f"more than {MOST_BYTES} bytes")
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise HTTPException(408, f"more than {MOST_SECONDS:.0f} seconds") from error
    return bytes(body)


def given(body: bytes, receive: Receive) -> Receive:
    """A function that receives a body that is here already, and then further messages."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return first.pop() if first else await receive()

    return receive_again


def check_press(path: str, body: bytes, inputs: Mapping[int, int]) -> None:
    """Check that a request to Gradio has the shape that our page sends.

    That is a flat list of texts and numbers, as many as the handler takes. Gradio reads an object in it as a file, and
    fetches it from the address in the object. Too few values, or an unknown handler, make it show a traceback.

    Raises:
        HTTPException: the request has another shape.
    """

    def is_flat(value: Any, depth: int) -> bool:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return depth >= 0 if not inner else depth > 0 and all(is_flat(item, depth - 1) for item in inner)

    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "not JSON") from error
    if not isinstance(request, dict) or not is_flat(request, 2):
        raise HTTPException(400, "not what the page sends")
    if path == f"{PAGES_OWN}queue/join":
        handler, values = request.get("fn_index"), request.get("data")
        if not isinstance(handler, int) or not isinstance(values, list) or len(values) != inputs.get(handler):
            raise HTTPException(400, "not what the page sends")


def split(address: str) -> SplitResult:
    """The parts of an address; empty ones where it cannot be parsed."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return send_with_headers


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- the server ----


class Server(uvicorn.Server):
    """Stops within two seconds, whoever is connected."""

    def __init__(self, app: ASGIApp, close: Callable[[], None]):
        config = uvicorn.Config(
            app, log_level="critical", timeout_graceful_shutdown=1, ws="none", limit_concurrency=MOST_CONNECTIONS
        )
        super().__init__(config)
        self.close = close

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.close()
        self.force_exit = self.should_exit  # at the second signal
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        SettingError: the system refuses it.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SettingError(f"web {host}:{port}: {error.strerror or error}", "web") from error
