"""The page: what it shows is text, what is pressed does what it says; and all of it in a browser."""

import importlib.util
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import Mock

import pytest
from helpers import ROOT

if importlib.util.find_spec("gradio") is None:
    pytest.skip("needs requirements/web.txt", allow_module_level=True)

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import interact
from transfertransfo.chat import server, sharing
from transfertransfo.chat.commands import answer
from transfertransfo.chat.server import Endpoint, Server, listen
from transfertransfo.chat.sharing import SharedChat, SharedModel
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.tokenization import tokenize
from transfertransfo.decoding import Decoding
from transfertransfo.errors import UserError
from transfertransfo.model.loading import load_model
from transfertransfo.model.sources import load_tokenizer

PERSONA = ["i like dogs .", "i live in ohio ."]
ODD = "<b>x</b> <img src=x onerror=alert(1)> ${1+1} {{this}} **bold** `code` [a](javascript:b) <eos> &amp;"


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """The page is imported by what runs its tests alone: gradio takes seconds, and each worker collects this module."""
    global page
    from transfertransfo.chat import page


@pytest.fixture(scope="module")
def shared(checkpoints):
    made = SharedModel(load_model(checkpoints["gpt2"]), load_tokenizer(checkpoints["gpt2"]))
    yield made
    made.close()


@pytest.fixture
def chat(shared):
    decoding = Decoding(max_length=8, min_length=8, temperature=2.0)
    return SharedChat(shared, 1, decoding, 2, PERSONA, lambda: ["i was drawn ."])


@pytest.fixture
def made(chat):
    return page.Page(lambda: chat, page.settings_of(chat), "tiny")


def say(chat: SharedChat, text: str) -> str:
    """Say something; the talk as it is shown then."""
    [*page.say(chat, text)]
    return page.show(chat)


def test_what_is_said_is_shown_as_text(chat):
    html = say(chat, ODD)
    assert "<b>" not in html and "<img" not in html and "&lt;b&gt;x&lt;/b&gt;" in html
    assert "&lt;b&gt;" in page.show(chat, ODD, ODD, ODD) and "<img" not in page.show(chat, ODD, ODD, ODD)


def test_a_reply_grows_and_has_its_candidates(chat):
    growing = [*page.say(chat, "hello !")]
    assert len(growing) > 2 and all(page.GROWING in html for html in growing)
    assert page.GROWING not in page.show(chat) and page.show(chat).count("data-candidate=") == 1
    more = page.more(chat, 0, 0)
    assert more.count("data-candidate=") == 1 + page.MORE and " open>" in more
    candidates = chat.exchanges[0].candidates
    say(chat, "why ?")
    taken = page.take(chat, 0, 2)
    assert [exchange.reply for exchange in chat.exchanges] == [candidates[2]]
    assert taken.count('aria-pressed="true"') == 1
    say(chat, "why ?")
    kept = chat.exchanges.copy()
    for turn, candidate in ((0, 0), (0, 99), (7, 0), (-1, -1), ("0", "1"), (0, [1]), (None, None), (0, 1.0)):
        page.take(chat, turn, candidate)
        page.more(chat, 7 if turn == 0 else turn, candidate)
        assert chat.exchanges == kept


def test_undo_retry_reset(chat):
    assert [*page.retry(chat)] == [] and page.undo(chat) == page.show(chat)
    say(chat, "hello !")
    first = chat.exchanges[0].reply
    [*page.retry(chat)]
    assert len(chat.exchanges) == 1 and chat.exchanges[0].reply != first
    say(chat, "why ?")
    page.undo(chat)
    assert len(chat.exchanges) == 1
    page.reset(chat)
    assert chat.exchanges == [] and chat.persona == PERSONA


def test_a_retry_shows_the_message_once(chat):
    say(chat, "hello !")
    frames = [*page.retry(chat)]
    assert len(frames) > 1 and all(frame.count("hello !") == 1 and page.GROWING in frame for frame in frames)


def test_a_reply_is_stopped_that_waits_for_the_action_before_it(chat, made, monkeypatch):
    monkeypatch.setattr(chat, "busy", Mock(acquire=lambda timeout: made.stop(chat) or True))
    *_, (_, html, boxed) = made.say(chat, "hello !")
    assert chat.exchanges == [] and "(stopped)" in html and boxed == "hello !"
    monkeypatch.undo()
    [*made.say(chat, "hello !")]
    assert len(chat.exchanges) == 1 and not chat.exchanges[0].stopped


def test_a_reply_that_is_stopped_is_kept(chat):
    shown = page.say(chat, "hello !")
    next(shown)
    shown.close()
    assert chat.exchanges == []
    shown = page.say(chat, "hello !")
    assert next(shown) != next(shown)
    shown.close()
    assert len(chat.exchanges) == 1 and chat.exchanges[0].stopped


def test_settings_are_those_of_the_terminal(chat):
    assert page.change(chat, "temperature", 0.5) == "temperature = 0.5" and chat.decoding.temperature == 0.5
    assert page.change(chat, "no_sample", True) == "no_sample = True" and page.change(chat, "max_history", 0)
    assert page.change(chat, "seed", 5) == "seed = 5"
    before = chat.decoding
    for name, value in (("temperature", 0), ("top_p", 2), ("num_samples", 9), ("max_length", 10**6), ("top_k", None),
                        ("top_p", "nan"), ("seed", "x"), ("seed", 2**99), ("no_sample", "maybe"), ("top_k", "1\n2"),
                        ("max_history", "9" * 5000), ("num_beams", 10**6), ("length_penalty", [])):  # fmt: skip
        with pytest.raises(UserError, match=f"^(num_samples and |rank|{name})"):
            page.change(chat, name, value)
        assert chat.decoding == before and chat.max_history == 0 and chat.seed == 5


def test_an_action_waits_for_the_one_before_or_stops_it(chat, made, monkeypatch):
    """What was pressed while Gradio had not yet asked whether a reply goes on was lost."""
    running = made.stream(page.say)(chat, "hello !")
    assert next(running) != next(running)
    monkeypatch.setattr(sharing, "PATIENCE", 0.01)
    assert "still goes on" in made.export(chat)[1] and len(chat.exchanges) == 0
    chat.stop()  # as all other buttons do
    assert page.GROWING not in [*running][-1][1]
    assert [exchange.stopped for exchange in chat.exchanges] == [True]
    *_, last = made.stream(page.say)(chat, "and again")
    assert made.act(page.undo)(chat)[1] != last[1] and len(chat.exchanges) == 1
    left = made.stream(page.say)(chat, "and again")
    assert next(left) != next(left)
    left.close()  # the visitor left
    assert len(chat.exchanges) == 2 and made.act(page.reset)(chat) and chat.exchanges == []


def test_a_message_that_is_refused_stays_in_the_box(chat, made):
    assert [row[2] for row in made.say(chat, "hello !")][:1] == [""]
    chat.decoding = replace(chat.decoding, max_length=200)
    first, last = made.say(chat, "hello again !")
    assert first[2] == "" and "--max_length 200: more than" in last[1] and last[2] == "hello again !"


def test_what_no_page_sends(chat, made):
    """Numbers, lists and halves of a character where a page sends text; no event, or another one."""
    from gradio import EventData

    for text in (None, 5, 1.5, True, "\ud800", "\x00\x1b[31m", float("nan")):
        *_, (_, html, _) = made.say(chat, text)
        html.encode()
        for value in made.use_persona(chat, text)[1:]:
            value.encode()
        made.begin(text)
    for data in (None, 5, "x", [], {}, {"turn": 0}, {"turn": "0", "candidate": {}}, {"turn": 1e99, "candidate": 0}):
        assert len(made.pressed(page.take)(chat, EventData(None, data))) == 2
    for name in made.fields:
        for value in (None, "x", float("nan"), "\ud800"):
            chat, html, *_ = made.set(name)(chat, value)
            assert not isinstance(html, str) or html.encode()


def test_personas(chat, made):
    assert made.use_persona(chat, "i am new .\n<b>")[2:] == ["i am new .\n<b>", "i am new .\n<b>"]
    assert "<b>" not in made.use_persona(chat, "i am new .\n<b>")[1]
    assert made.draw_persona(chat)[2] == "i was drawn ." and made.begin("")[2] == "i was drawn ."


def test_the_export_is_what_save_writes_and_can_be_trained_on(chat, made, tmp_path):
    assert made.export(chat)[-1] == ""
    say(chat, "hello !")
    page.more(chat, 0, 0)
    page.take(chat, 0, 1)
    say(chat, "why ?")
    chat.rate(4)
    line = made.export(chat)[-1]
    answer(chat, f"/save {tmp_path / 'saved.jsonl'}")
    assert (tmp_path / "saved.jsonl").read_text() == line and '"rating": 4' in line
    (dialog,) = read_dialogs([tmp_path / "saved.jsonl"])["train"]
    assert dialog["personality"] == PERSONA
    for utterance, exchange in zip(dialog["utterances"], chat.exchanges, strict=True):
        assert utterance["candidates"][-1] == chat.text_of(exchange.reply)


@pytest.mark.parametrize("flag", ["--num_samples", "--max_length"])
def test_flags_beyond_the_limits_are_refused_before_the_server_listens(checkpoints, monkeypatch, flag):
    """The address was shown, and then each message was refused."""
    monkeypatch.setattr(server, "listen", lambda *_: pytest.fail("it listens"))
    monkeypatch.setattr(sharing, "MOST_TOKENS", 32)
    flags = ["--model", str(checkpoints["gpt2"]), "--personality", "x", "--device", "cpu", "--web"]
    with pytest.raises(UserError, match=rf"^{flag} 33: \d+ at most here$"):
        interact.run([*flags, flag, "33"])


def test_the_transcript_has_no_chat_before_a_visitor_comes(checkpoints, monkeypatch, tmp_path):
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: self.close())
    monkeypatch.setattr("gc.freeze", lambda: None)
    path = tmp_path / "talk.jsonl"
    interact.run(["--model", str(checkpoints["gpt2"]), "--personality", "x", "--device", "cpu",
                  "--web", "127.0.0.1:0", "--transcript", str(path)])  # fmt: skip
    assert path.read_text() == ""


# ---- as a hostile client meets it ----


@pytest.fixture
def client(chat, made, shared):
    with TestClient(made.mounted(Endpoint(shared, chat, "tiny"), ""), base_url="http://127.0.0.1:7860") as client:
        yield client


def join(client, **body):
    """Ask for what a press of a button asks for."""
    return client.post("/gradio_api/queue/join", json={"session_hash": "s", **body})


def number_of(made, name: str) -> int:
    """Of the handler of that name, as Gradio counts."""
    return next(i for i, fn in made.blocks.fns.items() if fn.name == name)


def test_a_press_is_answered_though_nonsense_came_before(client, made, capfd):
    begin = number_of(made, "begin")
    wrong = [{"data": [["deep"]]}, {"data": [{"path": "/etc/passwd"}]}, {"data": "x"}, {"data": []},
             {"data": [1, 2, 3]}, {"fn_index": 10**6}, {"fn_index": -1}, {"fn_index": "x"}, {"event_data": [[1]]},
             {"trigger_id": 9}, {"trigger_id": 10**6}, {"trigger_id": "x"}, {"session_hash": 5}]  # fmt: skip
    for fields in wrong:
        response = join(client, **{"fn_index": begin, "data": [""], "session_hash": "wrong", **fields})
        assert response.status_code < 500
    for body in (b"[" * 100_000, b"{", b"[]", b"\xff", b"5"):
        response = client.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"]
    assert join(client, fn_index=begin, data=[""]).status_code == 200
    events = client.get("/gradio_api/queue/data?session_hash=s").text
    assert '"success":true' in events and PERSONA[0] in events
    assert "Traceback" not in capfd.readouterr().err


def test_no_file_comes_in_or_out(client, made, monkeypatch):
    """Gradio fetches what an object among the values names, from anywhere."""
    fetched = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *_: fetched.append(1))
    for path in ("http://example.org/x", "/etc/passwd"):
        value = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        assert join(client, fn_index=number_of(made, "begin"), data=[value]).status_code == 400
    assert not fetched
    for path in ("/static/../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/assets//etc/passwd",
                 "/static//etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd",
                 "/gradio_api/heartbeat/../file=/etc/passwd", "/gradio_api/heartbeat/%2e%2e/upload",
                 "/gradio_api/proxy=http://example.org", "/gradio_api/deep_link", "/gradio_api/info",
                 "/gradio_api/vibe-code", "/gradio_api/run/begin", "/monitoring"):  # fmt: skip
        assert client.get(path).status_code in (403, 404) and "root:" not in client.get(path).text
    assert client.get("/?deep_link=../../etc/passwd").status_code == 200
    assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_another_method_is_refused_in_openais_form(client):
    """It was the page's to answer, which knows no such place."""
    for method, path, allowed in (
        ("GET", "chat/completions", {"POST"}),
        ("PUT", "chat/completions", {"POST"}),
        ("POST", "models", {"GET", "HEAD"}),
    ):
        response = client.request(method, f"/v1/{path}")
        assert response.status_code == 405 and {*response.headers["allow"].split(", ")} == allowed
        assert response.json()["error"]["message"] == "Method Not Allowed"
    assert client.head("/v1/models").status_code == 200


def test_the_page_wants_the_token_for_all_that_it_does(chat, made, shared):
    guarded = made.mounted(Endpoint(shared, chat, "tiny"), "a-long-token")
    with TestClient(guarded, base_url="http://somewhere.example") as client:
        assert join(client, fn_index=0, data=[""]).status_code == 401
        for path in ("/", "/config", "/gradio_api/queue/data?session_hash=s", "/gradio_api/heartbeat/s", "/theme.css"):
            assert client.get(path).status_code == 401
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/gradio_api/queue/join"):
            pass


def test_a_page_of_another_site_presses_nothing(client, made):
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example:7860"}):
        body = {"session_hash": "s", "fn_index": number_of(made, "begin"), "data": [""]}
        assert client.post("/gradio_api/queue/join", json=body, headers=headers).status_code == 403
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy


# ---- in a browser ----


@contextmanager
def served(shared, make_chat: Callable[[], SharedChat]):
    """The page on a free port; gives its address and what stops it."""
    chat = make_chat()
    made = page.Page(make_chat, page.settings_of(chat), "tiny")
    with listen("127.0.0.1", 0) as listening:
        server = Server(made.mounted(Endpoint(shared, chat, "tiny"), ""), shared.close)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop() -> None:
            server.handle_exit(signal.SIGINT, None)
            thread.join(60)
            assert not thread.is_alive()

        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", stop
        finally:
            stop()


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs Chromium and chromedriver: make browser")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1100,800"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.mark.slow
def test_a_visit(browser, checkpoints, monkeypatch):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def until(condition: Callable):
        """The condition's value as soon as it is one; what the page shows anew is looked for again."""
        return WebDriverWait(browser, 120, 0.05, [WebDriverException]).until(lambda _: condition())

    def find(selector: str) -> list:
        return browser.find_elements("css selector", selector)

    def one(selector: str):
        return until(lambda: find(selector))[0]

    def press(*keys: str):
        """Press keys where the focus is; gives where it is then."""
        for key in keys:
            browser.switch_to.active_element.send_keys(key)
        return browser.switch_to.active_element

    def script(expression: str):
        return browser.execute_script(f"return {expression}")

    own = SharedModel(load_model(checkpoints["gpt2"]), load_tokenizer(checkpoints["gpt2"]))
    decoding = Decoding(max_length=12, min_length=12, temperature=2.0)
    decode, steps = sharing.decode, threading.Semaphore(0)
    beginning, whole = tokenize(own.tokenizer, ["one two three", "one two three four"])

    def step_by_step(model, contexts, tokenizer, decoding, **options):
        if decoding.num_samples > 1:
            yield from decode(model, contexts, tokenizer, decoding, **options)
        else:
            for token in whole:
                steps.acquire()
                yield [[token]]

    monkeypatch.setattr(sharing, "decode", step_by_step)
    chats = []

    def make_chat() -> SharedChat:
        chats.append(SharedChat(own, 1, decoding, 2, PERSONA, list))
        return chats[-1]

    with served(own, make_chat) as (address, stop):
        browser.get(address)
        one(".talk .note")
        assert one("#persona textarea").get_attribute("value") == "\n".join(PERSONA)
        # a streamed reply, to text that is no markup
        box = "#message textarea, #message input"
        one(box).send_keys(ODD, Keys.ENTER)
        until(lambda: find(".talk .growing"))
        steps.release(len(beginning))
        until(lambda: one(".growing p").text == "one two")
        assert one(box).get_attribute("value") == ""
        steps.release(len(whole) - len(beginning))
        until(lambda: find(".talk details"))
        assert one(".talk .reply p").text == "one two three four"
        assert one(".talk .said").text == ODD and not find(".talk b") and not find(".talk img")
        # its candidates, by the keyboard alone; one of them is taken
        assert press(Keys.SHIFT + Keys.TAB).tag_name == "summary"
        press(Keys.ENTER)
        until(lambda: one(".talk button.more").is_displayed())
        assert "more" in press(Keys.TAB, Keys.TAB).get_attribute("class")
        press(Keys.ENTER)
        until(lambda: len(find(".talk button[data-candidate]")) == 1 + page.MORE)
        until(lambda: script("document.activeElement.tagName") == "SUMMARY")
        other = press(Keys.TAB)
        if other.get_attribute("aria-pressed") == "true":
            other = press(Keys.TAB)
        text = other.text.split()
        press(Keys.ENTER)
        until(lambda: one(".talk .reply p").text.split() == text)
        assert one(".talk button[aria-pressed=true]").text.split() == text
        # a wrong setting is told
        script("document.querySelector('#decoding button').click()")
        field = until(lambda: [f for f in find("#set_temperature input") if f.is_displayed()])[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("0", Keys.ENTER)
        until(lambda: "temperature: expected a number" in one(".talk .note").text)
        # another persona, which is there after a reload, on a dark page
        light = script("getComputedStyle(document.querySelector('#talk')).backgroundColor")
        persona = one("#persona textarea")
        persona.send_keys(Keys.CONTROL, "a")
        persona.send_keys("i am <b>new</b> .")
        one("#use").click()
        until(lambda: "i am <b>new</b> ." in one(".talk .note").text)
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        browser.refresh()
        until(lambda: one("#persona textarea").get_attribute("value") == "i am <b>new</b> .")
        assert not find(".talk details")
        until(lambda: script("getComputedStyle(document.querySelector('#talk')).backgroundColor") != light)
        # a narrow window has no scroll bar below
        metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        until(lambda: script("document.documentElement.scrollWidth") <= 400)
        assert not [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        # a reply that is stopped is kept as far as it had come
        one(box).send_keys("and now ?", Keys.ENTER)
        steps.release(len(beginning))
        until(lambda: one(".growing p").text == "one two")
        one("#stop").click()
        until(lambda: chats[-1].exchanges)
        steps.release()  # the model notices
        until(lambda: find(".talk details") and not find(".talk .growing"))
        assert one(".talk .reply p").text == "one two three"
        # the server stops though the page is open and waits for a reply
        one(box).send_keys("and then ?", Keys.ENTER)
        until(lambda: find(".talk .growing"))
        stop()
        steps.release(len(whole))


@pytest.mark.slow
def test_the_script_on_another_host_needs_the_token_and_stops_at_ctrl_c(checkpoints):
    httpx = pytest.importorskip("httpx")
    command = [sys.executable, ROOT / "interact.py", "--model", checkpoints["gpt2"], "--personality", "x", "--device",
               "cpu", "--web", "0.0.0.0:0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = process.stdout.readline().split()[0].replace("0.0.0.0", "127.0.0.1")
        place, token = address.split("?token=")
        assert httpx.get(place, timeout=60).status_code == 401
        with httpx.Client(follow_redirects=True, timeout=60) as client:
            assert "gradio" in client.get(address).text and client.get(f"{place}v1/models").status_code == 200
        body = {"messages": [{"role": "user", "content": "hi"}]}
        bearer = {"authorization": f"Bearer {token}"}
        answer = httpx.post(f"{place}v1/chat/completions", json=body, headers=bearer, timeout=60)
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
