"""The page: what it shows is text, what is pressed does what it says; and all of it in a browser."""

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from helpers import ROOT

if importlib.util.find_spec("gradio") is None:
    pytest.skip("needs requirements/web.txt", allow_module_level=True)

from transfertransfo.chat import page, sharing
from transfertransfo.chat.server import Endpoint, Server, listen
from transfertransfo.chat.sharing import SharedChat, SharedModel
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.decoding import Decoding
from transfertransfo.errors import UserError
from transfertransfo.model.loading import load_model
from transfertransfo.model.sources import load_tokenizer

PERSONA = ["i like dogs .", "i live in ohio ."]
ODD = "<b>x</b> <img src=x onerror=alert(1)> ${1+1} {{this}} **bold** `code` [a](javascript:b) <eos> &amp;"


@pytest.fixture(scope="module")
def shared(checkpoints):
    made = SharedModel(load_model(checkpoints["gpt2"]), load_tokenizer(checkpoints["gpt2"]))
    yield made
    made.close()


@pytest.fixture
def chat(shared):
    decoding = Decoding(max_length=8, min_length=8, temperature=2.0)
    return SharedChat(shared, 1, decoding, 2, PERSONA, lambda: ["i was drawn ."])


def test_what_is_said_is_shown_as_text(chat):
    *_, html = page.say(chat, ODD)
    assert "<b>" not in html and "<img" not in html and "&lt;b&gt;x&lt;/b&gt;" in html
    assert "&lt;b&gt;" in page.show(chat, ODD, ODD, ODD) and "<img" not in page.show(chat, ODD, ODD, ODD)


def test_a_reply_grows_and_has_its_candidates(chat):
    *growing, last = page.say(chat, "hello !")
    assert len(growing) > 2 and all("growing" in html for html in growing) and "growing" not in last
    assert last.count("data-candidate=") == 1
    *_, more = page.more(chat, 0, 0)
    assert more.count("data-candidate=") == 1 + page.MORE and " open>" in more
    *_, taken = page.take(chat, 0, 2)
    assert chat.exchanges[0].reply in chat.exchanges[0].candidates and taken.count('aria-pressed="true"') == 1
    for turn, candidate in ((0, 99), (7, 0), (-1, -1)):
        kept = chat.exchanges.copy()
        [*page.take(chat, turn, candidate)]
        assert chat.exchanges == kept


def test_undo_retry_reset(chat):
    assert [*page.retry(chat)] == [*page.undo(chat)] == [page.show(chat)]
    [*page.say(chat, "hello !")]
    first = chat.exchanges[0].reply
    [*page.retry(chat)]
    assert len(chat.exchanges) == 1 and chat.exchanges[0].reply != first
    [*page.say(chat, "why ?")]
    [*page.undo(chat)]
    assert len(chat.exchanges) == 1
    [*page.reset(chat)]
    assert chat.exchanges == [] and chat.persona == PERSONA


def test_a_reply_that_is_stopped_is_kept(chat):
    shown = page.say(chat, "hello !")
    next(shown)
    shown.close()
    assert len(chat.exchanges) == 1 and len(chat.exchanges[0].reply) <= 8


def test_settings_are_those_of_the_terminal(chat):
    assert page.change(chat, "temperature", 0.5) == "temperature = 0.5" and chat.decoding.temperature == 0.5
    assert page.change(chat, "no_sample", True) == "no_sample = True" and page.change(chat, "max_history", 0)
    assert page.change(chat, "seed", 5) == "seed = 5"
    before = chat.decoding
    for name, value in (("temperature", 0), ("top_p", 2), ("num_samples", 9), ("max_length", 10**6), ("top_k", None)):
        with pytest.raises(UserError):
            page.change(chat, name, value)
        assert chat.decoding == before


def test_one_action_of_a_chat_at_a_time(chat):
    made = page.Page(lambda: chat, chat.decoding, 2, "tiny", 1)
    running = made.act(page.say)(chat, "hello !")
    next(running)
    assert len([*made.act(page.say)(chat, "and again")]) == 1 and len(chat.exchanges) == 0
    running.close()
    assert [*made.act(page.say)(chat, "and again")] and len(chat.exchanges) == 2
    chat.decoding = replace(chat.decoding, max_length=200)
    (row,) = made.act(page.say)(chat, "too long")
    assert "--max_length 200: more than" in row[1]
    assert [row[2:] for row in made.use_persona(chat, "i am new .\n<b>")] == [["i am new .\n<b>", "i am new .\n<b>"]]
    assert [row[2] for row in made.draw_persona(chat)] == ["i was drawn ."]


def test_the_export_can_be_trained_on(chat, tmp_path):
    made = page.Page(lambda: chat, chat.decoding, 2, "tiny", 1)
    assert [row[0] for row in made.export(chat)] == [""]
    [*page.say(chat, "hello !")]
    ((line, *_),) = made.export(chat)
    (tmp_path / "talk.jsonl").write_text(line)
    (dialog,) = read_dialogs([tmp_path / "talk.jsonl"])["train"]
    assert dialog["personality"] == PERSONA
    assert dialog["utterances"][0]["candidates"][-1] == chat.text_of(chat.exchanges[0].reply)


# ---- in a browser ----


@contextmanager
def served(shared, make_chat: Callable[[], SharedChat]):
    """The page on a free port; gives its address and what stops it."""
    chat = make_chat()
    made = page.Page(make_chat, chat.decoding, 2, "tiny", 1)
    with listen("127.0.0.1", 0) as listening:
        server = Server(made.mounted(Endpoint(shared, chat, "tiny"), ""), shared.close)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop() -> None:
            server.handle_exit(signal.SIGINT, None)
            thread.join(60)

        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", stop
        finally:
            stop()


@pytest.fixture
def browser(monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs Chromium and chromedriver: make browser")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1100,800",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


def until(condition: Callable, seconds: float = 180):
    """The condition's value as soon as it is one; what the page shows anew is looked for again."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except WebDriverException:
            pass
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_visit(browser, checkpoints, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    def find(selector: str) -> list:
        return browser.find_elements("css selector", selector)

    def one(selector: str):
        return until(lambda: find(selector))[0]

    def type_message(text: str) -> None:
        one("#message textarea, #message input").send_keys(text, Keys.ENTER)

    own = SharedModel(load_model(checkpoints["gpt2"]), load_tokenizer(checkpoints["gpt2"]))
    decoding = Decoding(max_length=12, min_length=12, temperature=2.0)
    decode = sharing.decode

    def slowly(*args, **kwargs):
        for step in decode(*args, **kwargs):
            time.sleep(0.3)
            yield step

    monkeypatch.setattr(sharing, "decode", slowly)
    with served(own, lambda: SharedChat(own, 1, decoding, 2, PERSONA, list)) as (address, stop):
        browser.get(address)
        one(".talk .note")
        assert one("#persona textarea").get_attribute("value") == "\n".join(PERSONA)
        # a streamed reply, to text that is no markup
        changes = "{childList: true, characterData: true, subtree: true}"
        watch = "window.seen = new Set(); new MutationObserver(() => window.seen.add(document.querySelector('.growing')"
        watch += f"?.textContent.length)).observe(document.getElementById('talk'), {changes})"
        browser.execute_script(watch)
        type_message(ODD)
        until(lambda: len(find(".talk details")) == 1)
        lengths = [length for length in browser.execute_script("return [...window.seen]") if length]
        assert len(lengths) > 1 and lengths == sorted(lengths)
        assert one(".talk .said").text == ODD and not find(".talk b") and not find(".talk img")
        # its candidates, by keyboard alone: one of them is taken
        one(".talk summary").send_keys(Keys.ENTER)
        one(".talk details[open] button.more").send_keys(Keys.ENTER)
        until(lambda: len(find(".talk button[data-candidate]")) == 1 + page.MORE)
        other = one(".talk button[aria-pressed=false]")
        text = other.text.split()
        other.send_keys(Keys.ENTER)
        until(lambda: one(".talk button[aria-pressed=true]").text.split() == text)
        assert one(".talk .reply p").text.split() == text
        # a wrong setting is told
        browser.execute_script("document.querySelector('#decoding button').click()")
        field = until(lambda: [f for f in find("#set_temperature input") if f.is_displayed()])[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("0", Keys.ENTER)
        until(lambda: "expected a number" in one(".talk .note").text)
        # another persona, which is there after a reload
        box = one("#persona textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys("i am <b>new</b> .")
        one("#use").click()
        until(lambda: not find(".talk details"))
        type_message("who are you ?")
        until(lambda: len(find(".talk details")) == 1)
        browser.refresh()
        until(lambda: one("#persona textarea").get_attribute("value") == "i am <b>new</b> .")
        assert not find(".talk details")
        # a narrow window has no scroll bar below
        metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        until(lambda: browser.execute_script("return document.documentElement.scrollWidth <= 400"))
        wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not wrong
        # a reply that is stopped is kept as far as it had come
        type_message("and now ?")
        until(lambda: find(".talk .growing"))
        one("#stop").click()
        until(lambda: len(find(".talk details")) == 1 and not find(".talk .growing"))
        # the server stops though the page is open and waits for a reply
        type_message("and then ?")
        until(lambda: find(".talk .growing"))
        begun = time.monotonic()
        stop()
        assert time.monotonic() - begun < 2


def refuses(address: str) -> bool:
    """Whether nobody listens there any more."""
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname, place.port), timeout=1).close()
        return False
    except OSError:
        return True


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
        begun = time.monotonic()
        until(lambda: refuses(place))
        assert time.monotonic() - begun < 2
        assert process.wait(60) == 0 and "Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
