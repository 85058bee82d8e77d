"""One model for many chats, the endpoint in OpenAI's form, and who is let through."""

import importlib.util
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from urllib.parse import urlsplit

import pytest

if importlib.util.find_spec("fastapi") is None:
    pytest.skip("needs requirements/web.txt", allow_module_level=True)

from fastapi import FastAPI
from starlette.testclient import TestClient

import interact
from transfertransfo.chat import server as server_module
from transfertransfo.chat import sharing
from transfertransfo.chat.server import MOST_BYTES, Endpoint, Guard, Server, is_loopback, listen
from transfertransfo.chat.sharing import Busy, Finished, SharedChat, SharedModel
from transfertransfo.data.tokenization import SPECIAL_TOKENS, tokenize
from transfertransfo.decoding import Context, Decoding, candidate_replies
from transfertransfo.errors import SettingError, UserError
from transfertransfo.model.loading import load_model
from transfertransfo.model.sources import load_tokenizer

PERSONA = ["i like dogs .", "i live in ohio ."]
DECODING = Decoding(max_length=8, min_length=8, temperature=2.0)
HELLO = [{"role": "user", "content": "hello !"}]


@pytest.fixture(scope="module")
def shared(checkpoints):
    made = SharedModel(load_model(checkpoints["gpt2"]), load_tokenizer(checkpoints["gpt2"]))
    yield made
    made.close()


def make_chat(shared: SharedModel, seed: int = 1, decoding: Decoding = DECODING) -> SharedChat:
    return SharedChat(shared, seed, decoding, 2, PERSONA, lambda: ["i was drawn ."])


@pytest.fixture
def app(shared):
    made = FastAPI()
    Endpoint(shared, make_chat(shared), "tiny").add_to(made)
    return made


@pytest.fixture
def client(app):
    return TestClient(Guard(app), base_url="http://127.0.0.1:7860")


def ask(client, messages=HELLO, **fields):
    return client.post("/v1/chat/completions", json={"messages": messages, **fields})


def contents(response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


# ---- one model for many ----


def talk(chat: SharedChat, texts: list[str]) -> list[str]:
    return ["".join(chat.say(text)) for text in texts]


CHANGES = [{}, {"min_length": 1, "max_length": 20}, {"num_samples": 3, "min_length": 1, "rank": True}, {"num_beams": 2},
           {"num_samples": 4, "min_length": 1, "consensus": True},
           {"no_sample": True, "min_length": 1}]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
def test_a_chat_among_many_has_the_replies_that_it_has_alone(shared, changes):
    decoding = replace(DECODING, **changes)
    texts = ["hello !", "do you like dogs ?", "why ? " * 9]
    alone = [talk(make_chat(shared, seed, decoding), texts) for seed in range(1, 5)]
    before = shared.batches
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: talk(make_chat(shared, seed, decoding), texts), range(1, 5)))
    assert together == alone
    assert shared.batches - before < 4 * len(texts)  # some coincide
    assert len(set(map(tuple, alone))) == (1 if {"num_beams", "no_sample"} & {*changes} else 4)


def test_a_seed_of_nought_is_none(shared):
    assert len({tuple(talk(make_chat(shared, 0), ["hello !"])) for _ in range(4)}) > 1


def test_a_reply_that_nobody_wants_is_stopped(shared, monkeypatch):
    steps = []

    def endless(*args, **kwargs):
        try:
            while True:
                steps.append(1)
                time.sleep(0.01)
                yield [[7]]
        finally:
            steps.append("closed")

    monkeypatch.setattr(sharing, "decode", endless)
    with closing(make_chat(shared).tokens(Context([], [[7]]))) as tokens:
        next(tokens)
    end = time.monotonic() + 10
    while steps[-1] != "closed":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_leaves_before_the_first_token_leaves_no_job_behind(shared, monkeypatch):
    """As a client does that asks for a stream and reads none of it. Its place in the queue is free at once."""
    begun, goes_on, widths = threading.Event(), threading.Event(), []

    def one_token(model, contexts, *args, **kwargs):
        widths.append(len(contexts))
        begun.set()
        goes_on.wait(60)
        yield [[7]] * len(contexts)

    monkeypatch.setattr(sharing, "decode", one_token)
    monkeypatch.setattr(sharing, "MOST_WAITING", 2)
    first = shared.reply(Context([], [[7]]), DECODING, 1)
    assert begun.wait(60)
    for _ in range(5):
        shared.reply(Context([], [[7]]), DECODING, 1).close()
    last = shared.reply(Context([], [[7]]), DECODING, 1)
    goes_on.set()
    for events in (first, last):
        *_, end = events
        assert end == Finished([[7]])
    assert widths == [1, 1]


def test_an_exception_goes_to_who_asked_and_the_next_is_answered(shared):
    chat = make_chat(shared, decoding=replace(DECODING, max_length=200))
    with pytest.raises(SettingError, match="max_length 200: more than the model's 128"):
        talk(chat, ["hello !"])
    assert chat.exchanges == []
    chat.decoding = DECODING
    assert talk(chat, ["hello !"])


def test_limits(shared, monkeypatch):
    for changes in ({"max_length": 10**6}, {"num_samples": 1000}, {"num_beams": 1000}):
        (name,) = changes
        with pytest.raises(SettingError, match=f"^{name} 10+: .* at most here"):
            talk(make_chat(shared, decoding=replace(DECODING, **changes)), ["hello !"])
    with pytest.raises(UserError, match=r"^a message of 5000 characters"):
        make_chat(shared).say("x" * 5000)
    with pytest.raises(UserError, match=r"^a persona of 5000 characters"):
        make_chat(shared).begin(["x" * 5000])
    monkeypatch.setattr(sharing, "MOST_AT_ONCE", 100)
    with pytest.raises(UserError, match=r"^4 replies to so long a dialog are \d+ tokens: 100 at most here"):
        talk(make_chat(shared, decoding=replace(DECODING, num_samples=4)), ["hello ! " * 9])
    monkeypatch.setattr(sharing, "MOST_WAITING", 0)
    with pytest.raises(Busy):
        talk(make_chat(shared), ["hello !"])


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}])
def test_all_ends_when_it_is_closed(checkpoints, changes):
    """The model's thread was still within torch when Python ended, and the process was aborted."""
    own = SharedModel(load_model(checkpoints["gpt2"]), load_tokenizer(checkpoints["gpt2"]))
    begun, closed = threading.Event(), threading.Event()
    own.model.pretrained.base_model.register_forward_hook(lambda *_: begun.set() or (closed.wait() and None))
    events = own.reply(Context([], [[7]]), replace(DECODING, max_length=100, min_length=100, **changes), 1)
    assert begun.wait(60)
    own.close()
    closed.set()
    own.thread.join(60)
    assert not own.thread.is_alive()
    with pytest.raises(Busy):
        list(events)
    with pytest.raises(Busy):
        own.reply(Context([], [[7]]), DECODING, 1)


def test_many_threads_tokenize_control_tokens_as_text(shared):
    """A tokenizer's setting was changed and put back by each call: of two at once one saw the other's."""
    special = set(shared.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: tokenize(shared.tokenizer, ["<eos> hi <bos>"] * 20), range(100))
        assert not any(special & {*ids} for texts in found for ids in texts)


def test_another_candidate_is_taken(shared):
    chat = make_chat(shared, decoding=replace(DECODING, num_samples=4, rank=True))
    talk(chat, ["hello !", "why ?", "and you ?"])
    weights, candidates = chat.weighed(1), chat.exchanges[1].candidates
    chat.take(1, 2)
    assert len(chat.exchanges) == 2 and chat.exchanges[1].reply == candidates[2]
    assert sorted(chat.exchanges[1].candidates) == sorted(candidates)
    again = dict(zip(map(tuple, chat.exchanges[1].candidates), chat.weighed(1)))
    for reply, entry in zip(candidates, weights):
        assert again[tuple(reply)] == pytest.approx(entry, abs=1e-3)
    chat.add_candidates(1, replace(DECODING, num_samples=4))
    assert chat.exchanges[1].reply == candidates[2] and len(chat.exchanges[1].candidates) == 8
    said = chat.text_of(candidates[2])
    assert chat.dialog()["utterances"][1]["reply"] == said
    assert chat.context(chat.exchanges, [7]).history[-2] == candidates[2]


# ---- the endpoint ----


def test_a_reply_is_the_one_that_its_seed_gives(client, shared):
    messages = [{"role": "system", "content": "i like tea .\ni am old ."}, {"role": "user", "content": "hello !"},
                {"role": "assistant", "content": "hi ."}, {"role": "user", "content": "why ?"}]  # fmt: skip
    first, again, other = (contents(ask(client, messages, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other
    turns = tokenize(shared.tokenizer, ["hello !", "hi .", "why ?"])
    context = Context(tokenize(shared.tokenizer, ["i like tea .", "i am old ."]), turns)
    *_, last = shared.reply(context, DECODING, 3)
    assert isinstance(last, Finished)
    assert first == [make_chat(shared).text_of(last.result[0]).strip()]
    assert contents(ask(client, [{"role": "user", "content": [{"type": "text", "text": "hello !"}]}], seed=3))


def test_without_a_system_message_the_persona_is_the_servers(client):
    said = {"role": "system", "content": "\n".join(PERSONA)}
    assert contents(ask(client, [said, *HELLO], seed=3)) == contents(ask(client, seed=3))


def test_greedy_and_ranked_replies(client, shared):
    context = Context(*(tokenize(shared.tokenizer, texts) for texts in (PERSONA, ["hello !"])))
    text_of = make_chat(shared).text_of
    (greedy,) = candidate_replies(
        shared.model, [context], shared.tokenizer, Decoding(no_sample=True, max_length=5, min_length=5)
    )
    assert contents(ask(client, temperature=0, max_tokens=5)) == [text_of(greedy[0]).strip()]
    plain, ranked = (contents(ask(client, n=5, seed=3, rank=rank)) for rank in (False, True))
    assert sorted(plain) == sorted(ranked) != ranked
    assert len(contents(ask(client, n=1, rank=True))) == 1


@pytest.mark.parametrize(("flags", "fields", "expected"), [
    ({"num_samples": 8, "consensus": True}, {}, {"num_samples": 8, "consensus": True}),
    ({"num_samples": 8, "consensus": True}, {"n": 9}, {"num_samples": 9, "consensus": True}),
    ({"num_samples": 8, "consensus": True}, {"rank": True}, {"num_samples": 8, "consensus": False, "rank": True}),
    ({"num_samples": 8, "consensus": True}, {"rank": False, "n": 2}, {"num_samples": 2, "consensus": False}),
    ({"num_beams": 3, "consensus": True}, {"n": 2}, {"num_samples": 2, "num_beams": 0, "consensus": False}),
    ({"num_beams": 3, "consensus": True}, {"rank": True}, {"num_beams": 3, "consensus": False, "rank": True}),
    ({"num_samples": 4, "rank": True}, {"temperature": 0}, {"num_samples": 1, "no_sample": True, "rank": False}),
    ({}, {"rank": True}, {"num_samples": 1, "rank": False}),
])  # fmt: skip
def test_how_the_first_of_several_replies_is_chosen(flags, fields, expected):
    question = server_module.Question(messages=[{"role": "user", "content": "hello"}], **fields)
    decoding = asdict(question.decoding(Decoding(**flags)))
    assert {name: decoding[name] for name in expected} == expected


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"n": 2, "rank": True}])
def test_a_streamed_reply_is_the_whole_one(client, fields):
    whole = contents(ask(client, seed=5, **fields))
    chunks = events(ask(client, seed=5, stream=True, stream_options={"include_usage": True}, **fields))
    texts = [""] * len(whole)
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert [text.strip() for text in texts] == whole
    assert chunks[-1]["usage"]["completion_tokens"] == 8 * len(whole)
    assert fields or len(chunks) > 5


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 2500}] * 2}]},
            "",
            "5001 characters",
        ),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"max_tokens": 10**9}, "max_tokens", "less than or equal"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": HELLO * 401}, "messages", "at most 400"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "", "messages.0.content of 5000 characters: 4000"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "messages", "must be the user's"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "says nothing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "says nothing"),
        ({"messages": None}, "messages", "Field required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "Input should be"),
        ({"temperature": 0, "n": 3}, "n", "n 3: at temperature 0 they would all be the same"),
        ({"max_tokens": 200}, "max_length", "more than the model's 128"),
    ],
)
def test_what_cannot_be_answered(client, fields, param, message):
    response = ask(client, **{"messages": HELLO, **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and message in error["message"], error
    assert (error["param"] or "").startswith(param) and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", sorted(server_module.Question.model_fields))
def test_wrong_types(client, field):
    """A temperature of 1e-300 made the model draw from no numbers, and so did NaN."""
    for value in ("null", "[]", "{}", '"x"', "NaN", "1e999", "-1", "1e-300", "0.5", "9" * 5000, "true", "[[[",
                  '"\\ud800"', '[{"role": "user", "content": "\\ud800"}]',
                  '[{"role": ["user"], "content": 5}]'):  # fmt: skip
        fields = {"messages": json.dumps(HELLO), "max_tokens": "2"} | {field: value}
        body = "{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}"
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), (value, response.text)
        assert response.status_code == 200 or response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'{"messages": ' * 50_000, b"\xff\xfe", b"null", b'"x"', b"a=1&b=2"]
)
def test_what_is_no_question(client, body):
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "/"):
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{", "application/json", "the request is not JSON: Expecting property name enclosed in double quotes"),
        (b'{"messages": []}', "text/plain", "send content-type: application/json"),
        (b"[]", "application/json", "the request: Input should be a valid dictionary"),
    ],
)
def test_how_a_body_that_is_no_question_is_named(client, body, kind, message):
    error = client.post("/v1/chat/completions", content=body, headers={"content-type": kind}).json()["error"]
    assert error["message"].startswith(message) and error["param"] is None


def test_null_is_a_field_that_is_missing(client):
    """OpenAI's clients send it."""
    nulls = dict.fromkeys(set(server_module.Question.model_fields) - {"messages", "seed"})
    assert contents(ask(client, seed=3, **nulls)) == contents(ask(client, seed=3))
    assert events(ask(client, stream=True, stream_options={"include_usage": None}))
    empty, null = ([*HELLO, {"role": "assistant", "content": content}, *HELLO] for content in ("", None))
    assert contents(ask(client, null, seed=3)) == contents(ask(client, empty, seed=3))


def test_usage_counts_what_the_model_was_given(client):
    def prompt_tokens(text: str) -> int:
        return ask(client, [{"role": "user", "content": text}]).json()["usage"]["prompt_tokens"]

    assert 0 < prompt_tokens("hello !") < prompt_tokens("hello ! why ?") < prompt_tokens("hello ! " * 400) < 128


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_ours_is_told_in_a_line(client, monkeypatch, stream):
    def broken(*args, **kwargs):
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(sharing, "decode", broken)
    response = ask(client, stream=stream)
    assert response.status_code == 200 if stream else 500
    error = json.loads(response.text.split("data: ")[-1])["error"]
    assert error["message"] == "failed: no memory" and error["type"] == "server_error"


def test_a_top_p_of_nought_is_the_likeliest_token(client):
    assert contents(ask(client, top_p=0, seed=1)) == contents(ask(client, temperature=0))
    assert contents(ask(client, temperature=1e-300)) == contents(ask(client, temperature=0))


def test_too_many_at_once(client, monkeypatch):
    monkeypatch.setattr(sharing, "MOST_WAITING", 0)
    response = ask(client)
    assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"


# ---- who is let through ----


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://x", "/docs", "/openapi.json",
     "/gradio_api/call/x", "/gradio_api/component_server", "/monitoring", "/v1/files", "/gradio_api/stream/1"],
)  # fmt: skip
def test_nothing_else_is_there(client, path):
    for method in ("GET", "POST", "PUT"):
        response = client.request(method, path)
        assert response.status_code == 404 and "error" in response.json()


def test_who_is_let_through_without_a_token(client):
    models = "/v1/models"
    assert client.get(models).json()["data"][0]["id"] == "tiny"
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert client.get(models, headers={"host": host}).status_code == 200
    for headers in ({"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"origin": "http://evil.example"},
                    {"origin": "null"}, {"host": ""}, {"origin": "http://[x"}, {"host": "[::1"}, {"host": "[x]:1"},
                    {"host": "127.0.0.1@evil.example"}, {"origin": "http://127.0.0.1:1"}):  # fmt: skip
        assert client.get(models, headers=headers).status_code == 403
    assert client.get(models, headers={"origin": "http://127.0.0.1:7860"}).status_code == 200


def test_the_token(app):
    client = TestClient(Guard(app, "a-long-token"), base_url="http://somewhere.example", follow_redirects=False)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": "token=wrong"}, {"authorization": "Bearer é"}):
        headers = {name: value.encode("latin-1") for name, value in headers.items()}
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 401 and "token" in response.json()["error"]["message"]
    assert client.get("/v1/models", headers={"authorization": "Bearer a-long-token"}).status_code == 200
    assert client.get("/?token=wrong").status_code == 401
    entered = client.get("/?token=a-long-token")
    assert entered.status_code == 303 and "HttpOnly" in entered.headers["set-cookie"]
    assert client.get("/v1/models").status_code == 200  # with the cookie


def test_a_body_that_does_not_end(client, app, monkeypatch):
    pieces = (b"x" * 65536 for _ in range(1 + MOST_BYTES // 65536))  # without its length
    for content in (b"x" * (MOST_BYTES + 1), pieces):
        response = client.post("/v1/chat/completions", content=content)
        assert response.status_code == 413 and response.json()["error"]["message"] == "more than 1048576 bytes"
    monkeypatch.setattr(server_module, "MOST_SECONDS", 0.1)
    with serving(app) as address, socket.create_connection(("127.0.0.1", urlsplit(address).port), timeout=60) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert b"408" in slow.recv(100).split(b"\r\n")[0]


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.0.1", "::", "", "localhost.evil.example")))


# ---- a real server ----


@contextmanager
def serving(app, close=lambda: None):
    """A server on a free port, in a thread; gives its address."""
    with listen("127.0.0.1", 0) as listening:
        running = Server(Guard(app), close)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.handle_exit(2, None)
            thread.join(60)
            assert not thread.is_alive()


def test_openais_own_client(app):
    openai = pytest.importorskip("openai")
    with serving(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.chat.completions.create(model="tiny", messages=HELLO, seed=3, n=2, extra_body={"rank": True})
        assert len(whole.choices) == 2 and whole.choices[0].finish_reason == "length"
        (one,) = client.chat.completions.create(model="tiny", messages=HELLO, seed=4).choices
        stream = client.chat.completions.create(model="tiny", messages=HELLO, seed=4, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces).strip() == one.message.content and len([*filter(None, pieces)]) > 1
        with pytest.raises(openai.BadRequestError, match="n: Input should be"):
            client.chat.completions.create(model="tiny", messages=HELLO, n=1000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_reply(app, monkeypatch, stream):
    httpx = pytest.importorskip("httpx")
    ended = threading.Event()

    def endless(*args, **kwargs):
        try:
            while True:
                time.sleep(0.01)
                yield [[7]]
        finally:
            ended.set()

    monkeypatch.setattr(sharing, "decode", endless)
    with serving(app) as address:
        request = {"url": f"{address}/v1/chat/completions", "json": {"messages": HELLO, "stream": stream}}
        if stream:
            with httpx.stream("POST", **request):
                pass  # it leaves
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(**request, timeout=1)
        assert ended.wait(5)


def test_the_server_stops_though_the_model_does_not(checkpoints, monkeypatch):
    httpx = pytest.importorskip("httpx")
    own = SharedModel(load_model(checkpoints["gpt2"]), load_tokenizer(checkpoints["gpt2"]))
    goes_on = threading.Event()
    monkeypatch.setattr(sharing, "decode", lambda *args, **kwargs: iter(goes_on.wait, True))
    served = FastAPI()
    Endpoint(own, make_chat(own), "tiny").add_to(served)
    body = {"messages": HELLO, "stream": True}
    with (
        serving(served, own.close) as address,
        httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as got,
    ):
        assert next(got.iter_lines())
    goes_on.set()


def test_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as taken, pytest.raises(SettingError, match=r"^web 127\.0\.0\.1:\d+: .*in use"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("text", "found"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("8000", ("127.0.0.1", 8000)), (":8000", ("127.0.0.1", 8000)),
     ("0.0.0.0", ("0.0.0.0", 7860)), ("my-host.local:1", ("my-host.local", 1)), ("[::1]:5", ("::1", 5)),
     ("[::1]", ("::1", 7860))],
)  # fmt: skip
def test_addresses(text, found):
    assert interact.parse_args(["--web", text]).web == found


def test_flags_of_the_page(capsys):
    assert interact.parse_args(["--web"]).web == ("127.0.0.1", 7860) and interact.parse_args([]).web is None
    for flags in (["--web", "a:b"], ["--web", "host:99999"], ["--web_token", "short"], ["--web_token", "with; blank"]):
        with pytest.raises(SystemExit):
            interact.parse_args(flags)
        assert "expected" in capsys.readouterr().err


def test_gradio_is_asked_for_in_a_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--web: needs gradio .*; pip install -r requirements/web\.txt$"):
        interact.run(["--web", "--personality", "x"])
