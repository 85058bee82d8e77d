"""A page to talk on: persona, streamed replies, and the candidates of each, any of which can be taken instead."""

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from html import escape
from itertools import chain
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when it is imported

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp

from transfertransfo.chat.commands import SettingsParser, change_setting, parse_setting
from transfertransfo.chat.conversation import unicode_of
from transfertransfo.chat.server import Endpoint, Guard
from transfertransfo.chat.sharing import MOST_CHARACTERS, SharedChat, check_limits
from transfertransfo.errors import UserError, in_flags
from transfertransfo.ranking import descending

MORE = 4  # candidates drawn at a press of the button
SESSIONS = 256  # visitors' chats kept at once
HINT = "Say something, and the model answers out of its persona. Under each reply are the others that it weighed."

GROWING = '<div class="reply growing">'
CSS = """
.gradio-container { max-width: 72rem !important; margin: auto; }
.gradio-container main { padding: 1rem !important; }
.dark { color-scheme: dark; }
#title h1 { font-size: 1.25rem; margin: 0; }
#title small { font-size: .875rem; font-weight: 400; color: var(--body-text-color-subdued); margin-left: .5rem; }
#talk { height: max(20rem, calc(100vh - 13.5rem)); overflow-y: auto !important; padding: 1rem; box-sizing: border-box;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--block-background-fill); }
#talk > * { padding: 0 !important; }
.talk { display: flex; flex-direction: column; gap: .6rem; color: var(--body-text-color); line-height: 1.45; }
.talk p { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.talk .said, .talk .reply { max-width: min(85%, 38rem); padding: .5rem .85rem; border-radius: 1.1rem; }
.talk .said { align-self: flex-end; background: var(--primary-600); color: #fff; border-bottom-right-radius: .3rem; }
.talk .reply { align-self: flex-start; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-bottom-left-radius: .3rem; }
.talk .note { align-self: center; color: var(--body-text-color-subdued); font-size: .875rem; text-align: center; }
.talk .growing p::after { content: "\\258d"; color: var(--primary-500); }
.talk details { margin-top: .35rem; font-size: .8125rem; }
.talk summary { cursor: pointer; color: var(--body-text-color-subdued); width: fit-content; border-radius: .3rem; }
.talk table { border-collapse: collapse; margin: .4rem 0; width: 100%; }
.talk th { text-align: right; font-weight: 500; color: var(--body-text-color-subdued); padding: 0 .5rem .2rem 0; }
.talk th:last-child { text-align: left; padding-left: .5rem; }
.talk td { padding: .1rem .5rem .1rem 0; text-align: right; font-variant-numeric: tabular-nums; }
.talk td:last-child { text-align: left; width: 100%; padding-right: 0; }
.talk button { font: inherit; color: inherit; background: none; border: 1px solid transparent; border-radius: .5rem;
  padding: .2rem .5rem; text-align: left; cursor: pointer; overflow-wrap: anywhere; }
.talk button:hover { border-color: var(--primary-500); }
.talk button[aria-pressed=true] { background: var(--background-fill-primary); font-weight: 600;
  border-color: var(--border-color-accent); }
.talk button.more { border-color: var(--border-color-primary); }
.talk :is(button, summary):focus-visible { outline: 2px solid var(--primary-500); outline-offset: 1px; }
@media (max-width: 640px) {
  #talk { height: 65vh; padding: .6rem; }
  .gradio-container main { padding: .5rem !important; }
  .talk :is(.said, .reply) { max-width: 94%; }
}
"""
# A press in the talk becomes an event. Focus and view stay there when the talk is shown anew.
PRESSED = """
let turn = null;
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-turn]');
  if (!button) return;
  turn = button.dataset.turn;
  const data = {turn: +turn, candidate: +(button.dataset.candidate ?? 0)};
  button.classList.contains('more') ? trigger('more', data) : trigger('take', data);
});
watch('value', () => {
  const log = document.getElementById('talk');
  const summary = turn !== null && element.querySelector(`details[data-turn="${turn}"] summary`);
  if (summary) summary.focus({preventScroll: true}); else log.scrollTop = log.scrollHeight;
  if (element.querySelector('.growing')) turn = null;
});
"""
DOWNLOAD = """text => {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
  link.download = 'talk.jsonl';
  link.click();
}"""


# ---- the talk as HTML; whatever was said is escaped ----


def show(
    chat: SharedChat,
    said: str = "",
    growing: str | None = None,
    note: str = "",
    opened: int = -1,
    turns: int | None = None,
) -> str:
    """The conversation.

    Args:
        said: a message that is being replied to.
        growing: the reply to it, as far as it has come.
        opened: the turn whose candidates are unfolded.
        turns: how many turns to show before that message; None = all.
    """
    parts = [
        f'<p class="said">{escape(exchange.text)}</p>{show_reply(chat, turn, opened=turn == opened)}'
        for turn, exchange in enumerate(chat.exchanges[:turns])
    ]
    if growing is not None:
        parts.append(f'<p class="said">{escape(said)}</p>{GROWING}<p>{escape(growing)}</p></div>')
    if note or not parts:
        parts.append(f'<p class="note" role="status">{escape(note or HINT)}</p>')
    return f'<div class="talk" role="log" aria-label="conversation">{"".join(parts)}</div>'


def show_reply(chat: SharedChat, turn: int, *, opened: bool) -> str:
    """A reply with its candidates, the best of the choice head first."""
    exchange = chat.exchanges[turn]
    try:
        weighed = chat.weighed(turn)
    except UserError:  # too many are waiting
        weighed = []
    rows = []
    for i in descending([each.score for each in weighed]):
        text = escape(chat.text_of(exchange.candidates[i]).strip() or "(nothing)")
        button = (
            f'<button data-turn="{turn}" data-candidate="{i}" aria-pressed="{str(i == 0).lower()}"'
            f' title="{"the reply" if i == 0 else "take this one; the dialog goes on from here"}">{text}</button>'
        )
        rows.append(f"<tr><td>{weighed[i].score:.2f}<td>{weighed[i].log_p:.1f}<td>{button}")
    one = len(exchange.candidates) == 1
    return (
        f'<div class="reply"><p>{escape(chat.text_of(exchange.reply).strip() or "(nothing)")}</p>'
        f'<details data-turn="{turn}"{" open" if opened else ""}>'
        f"<summary>{len(exchange.candidates)} candidate{'' if one else 's'}</summary>"
        "<table><tr><th title='of the choice head'>score<th title='log-probability'>log p<th>reply"
        f'{"".join(rows)}</table><button class="more" data-turn="{turn}">{MORE} more</button></details></div>'
    )


# ---- what a visitor does ----


def say(chat: SharedChat, text: str) -> Generator[str]:
    """The talk in HTML, again and again while the reply grows; likewise `retry`."""
    yield from grow(chat, text, chat.say(text), len(chat.exchanges))


def retry(chat: SharedChat) -> Generator[str]:
    if chat.exchanges:
        yield from grow(chat, chat.exchanges[-1].text, chat.say_again(), len(chat.exchanges) - 1)


def grow(chat: SharedChat, said: str, pieces: Generator[str], turns: int) -> Generator[str]:
    growing = ""
    with closing(pieces):
        for piece in chain([""], pieces):
            growing += piece
            yield show(chat, said, growing, turns=turns)


def undo(chat: SharedChat) -> str:
    """Take back the last turn. The result is the talk in HTML, as that of `reset`, `take` and `more`."""
    if chat.exchanges:
        chat.exchanges.pop()
    return show(chat)


def reset(chat: SharedChat) -> str:
    chat.begin(chat.persona)
    return show(chat)


def take(chat: SharedChat, turn: Any, candidate: Any) -> str:
    if is_index(turn, chat.exchanges) and is_index(candidate, chat.exchanges[turn].candidates) and candidate:
        chat.take(turn, candidate)
    return show(chat, opened=turn)


def more(chat: SharedChat, turn: Any, _: Any) -> str:
    if is_index(turn, chat.exchanges):
        chat.add_candidates(turn, chat.decoding.changed(num_beams=0, no_sample=False, num_samples=MORE))
    return show(chat, opened=turn)


def is_index(i: Any, of: list) -> bool:
    """Whether a value from a browser is an index of this list."""
    return isinstance(i, int) and i in range(len(of))


def settings_of(chat: SharedChat) -> dict[str, Any]:
    return asdict(chat.decoding) | {"max_history": chat.max_history, "seed": chat.seed}


def change(chat: SharedChat, name: str, value: Any) -> str:
    """Change a setting as `/set` does. The result is a line to show."""
    before = chat.decoding
    try:
        if name == "seed":
            chat.seed_with(parse_setting(name, str(value), is_switch=False))
            return f"seed = {chat.seed}"
        told = change_setting(chat, f"{name} {value}")
        check_limits(chat.decoding)
        return told
    except UserError as error:
        chat.decoding = before
        raise UserError(str(error).replace("/set ", "")) from error


# ---- the page ----


class Page:
    """The components of the page, and the handlers of their events.

    Args:
        make_chat: gives the chat of a new visitor.
        settings: `settings_of` such a chat.
        name: the model's name.
    """

    def __init__(self, make_chat: Callable[[], SharedChat], settings: dict[str, Any], name: str):
        self.make_chat, self.settings = make_chat, settings
        with gr.Blocks(title="TransferTransfo", analytics_enabled=False, fill_width=True) as self.blocks:
            self.chat = gr.State()
            self.saved = gr.BrowserState("", storage_key="persona", secret="transfertransfo")
            gr.HTML(f"<h1>TransferTransfo<small>{escape(name)}</small></h1>", elem_id="title")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self.lay_out_talk()
                with gr.Column(scale=1, min_width=300):
                    self.lay_out_persona()
                    self.lay_out_settings()
            self.connect()
        self.blocks.queue(default_concurrency_limit=None, max_size=2 * SESSIONS, api_open=False)
        self.blocks.state_session_capacity = SESSIONS

    def lay_out_talk(self) -> None:
        self.talk = gr.HTML(elem_id="talk", js_on_load=PRESSED, apply_default_css=False)
        with gr.Row(equal_height=True):
            self.box = gr.Textbox(
                placeholder="Say something", label="message", show_label=False, container=False, autofocus=True,
                scale=8, max_length=MOST_CHARACTERS, elem_id="message", min_width=160,
            )  # fmt: skip
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
        with gr.Row():
            names = ("Stop", "Retry", "Undo", "Reset", "Export")
            self.buttons = {n: gr.Button(n, size="sm", min_width=48, elem_id=n.lower()) for n in names}
        self.exported = gr.Textbox(visible="hidden")

    def lay_out_persona(self) -> None:
        self.persona = gr.Textbox(
            label="Persona", info="A sentence a line. Yours is kept in this browser.", lines=5, max_lines=12,
            max_length=MOST_CHARACTERS, elem_id="persona",
        )  # fmt: skip
        with gr.Row():
            self.use = gr.Button("Begin with it", size="sm", min_width=100, elem_id="use")
            self.another = gr.Button("Another", size="sm", min_width=100, elem_id="another")

    def lay_out_settings(self) -> None:
        helps = SettingsParser().helps
        self.fields: dict[str, gr.components.Component] = {}
        with gr.Accordion("Decoding", open=False, elem_id="decoding"):
            for name, value in self.settings.items():
                kind: Any = gr.Checkbox if isinstance(value, bool) else gr.Number
                whole = {"precision": 0} if isinstance(value, int) and kind is gr.Number else {}
                self.fields[name] = kind(value, label=name, info=helps[name], elem_id=f"set_{name}", **whole)

    def connect(self) -> None:
        # the handlers check what a browser sends: Gradio shows a traceback at a wrong type
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        shown = [self.chat, self.talk]
        persona = [*shown, self.persona, self.saved]
        self.blocks.load(self.begin, [self.saved], persona, **options)
        gr.on([self.box.submit, self.send.click], self.say, [self.chat, self.box], [*shown, self.box], **options)
        self.buttons["Retry"].click(self.stream(retry), self.chat, shown, **options)
        self.buttons["Stop"].click(self.stop, self.chat, None, **options)
        self.buttons["Undo"].click(self.act(undo), self.chat, shown, **options)
        self.buttons["Reset"].click(self.act(reset), self.chat, shown, **options)
        self.buttons["Export"].click(self.export, self.chat, [*shown, self.exported], **options).then(
            None, self.exported, None, js=DOWNLOAD
        )
        self.talk.take(self.pressed(take), self.chat, shown, **options)
        self.talk.more(self.pressed(more), self.chat, shown, **options)
        self.use.click(self.use_persona, [self.chat, self.persona], persona, **options)
        self.another.click(self.draw_persona, self.chat, persona, **options)
        for name, field in self.fields.items():
            events = [field.input] if isinstance(field, gr.Checkbox) else [field.blur, field.submit]
            gr.on(events, self.set(name), [self.chat, field], [*shown, *self.fields.values()], **options)

    # Handlers. Each returns chat and talk first. The chat is None after a restart of the server

    def stream(self, action: Callable[..., Generator[str]]) -> Callable[..., Iterator[list[Any]]]:
        """A handler that shows the talk as a reply grows in it."""

        def handler(chat: SharedChat | None, *values: Any) -> Iterator[list[Any]]:
            chat = chat or self.make_chat()
            try:
                with chat.one_action(), closing(action(chat, *values)) as growing:
                    chat.told.clear()
                    for html in growing:
                        yield [chat, html]
                    html = show(chat, note=" ".join(chat.told))
            except UserError as error:
                html = show(chat, note=in_flags(error))
            yield [chat, html]  # after the lock was released

        return handler

    def act(self, action: Callable[..., str], *, stops: bool = True) -> Callable[..., list[Any]]:
        """A handler that shows the talk after an action.

        Args:
            stops: whether the action stops a reply that grows.
        """

        def handler(chat: SharedChat | None, *values: Any) -> list[Any]:
            chat = chat or self.make_chat()
            try:
                if stops:
                    chat.stop()
                with chat.one_action():
                    return [chat, action(chat, *values)]
            except UserError as error:
                return [chat, show(chat, note=in_flags(error))]

        return handler

    def pressed(self, action: Callable[..., str]) -> Callable[..., list[Any]]:
        def handler(chat: SharedChat | None, event: gr.EventData) -> list[Any]:
            try:
                place = event.turn, event.candidate
            except (AttributeError, TypeError):  # not sent by the page
                place = None, None
            return self.act(action)(chat, *place)

        return handler

    def stop(self, chat: SharedChat | None) -> None:
        if chat:
            chat.stop()

    def say(self, chat: SharedChat | None, text: Any) -> Iterator[list[Any]]:
        text = unicode_of(str(text or ""))
        boxed: Any = ""  # emptied once: later the next message may be in it
        for now, html in self.stream(say)(chat, text):
            if GROWING not in html and not (now.exchanges and now.exchanges[-1].text == text):
                boxed = text  # it was not answered
            yield [now, html, boxed]
            boxed = gr.skip()

    def begin(self, saved: Any) -> list[Any]:
        return self.use_persona(None, saved or None)

    def use_persona(self, chat: SharedChat | None, text: Any) -> list[Any]:
        """Begin again with a persona, which the browser keeps. None = the server's own persona."""

        def action(chat: SharedChat) -> str:
            return show(chat, note="" if text is None else chat.begin(text.splitlines()))

        text = None if text is None else unicode_of(str(text))
        now, html = self.act(action)(chat)
        return [now, html, "\n".join(now.persona), text or ""]

    def draw_persona(self, chat: SharedChat | None) -> list[Any]:
        now, html = self.act(lambda chat: show(chat, note=chat.begin(chat.draw())))(chat)
        return [now, html, "\n".join(now.persona), ""]

    def export(self, chat: SharedChat | None) -> list[Any]:
        """The talk as a line of a dataset that can be trained on, as `/save` writes it."""
        dialog = chat.dialog() if chat else {"utterances": []}
        line = json.dumps(dialog) + "\n" if dialog["utterances"] else ""
        note = "" if line else "There is nothing to export yet."
        return [*self.act(lambda chat: show(chat, note=note), stops=False)(chat), line]

    def set(self, name: str) -> Callable[..., list[Any]]:
        def handler(chat: SharedChat | None, value: Any) -> list[Any]:
            chat = chat or self.make_chat()
            if settings_of(chat)[name] == value:  # the field was only visited
                return [chat, gr.skip(), *(gr.skip() for _ in self.fields)]
            now, html = self.act(lambda chat: show(chat, note=change(chat, name, value)), stops=False)(chat)
            return [now, html, *settings_of(now).values()]  # one may have changed another

        return handler

    def mounted(self, endpoint: Endpoint, token: str) -> ASGIApp:
        """Page and endpoint behind the guard."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        endpoint.add_to(app)
        fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme = gr.themes.Soft(primary_hue="indigo", **fonts)
        gr.mount_gradio_app(app, self.blocks, path="/", footer_links=[], run_history=False, show_error=False,
                            max_file_size=0, theme=theme, css=CSS)  # fmt: skip
        return Guard(app, token, {number: len(handler.inputs) for number, handler in self.blocks.fns.items()})
