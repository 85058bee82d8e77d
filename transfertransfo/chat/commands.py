"""The commands of a chat. Each gets the text after its name, and returns text to show, or a reply in pieces.

A command's docstring is its line in `/help`.
"""

import difflib
import json
import shlex
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from transfertransfo.chat.conversation import Chat, readable
from transfertransfo.cli import ArgumentParser, add_decoding_flags, add_model_flags
from transfertransfo.decoding import fit_context, score_replies
from transfertransfo.errors import UserError, flags_named
from transfertransfo.files import write_atomically


def answer(chat: Chat, line: str) -> str | Generator[str]:
    """The answer to a line of the user: the output of a command, or a reply in pieces.

    Raises:
        UserError: a command that cannot be carried out.
        EOFError: the chat is over.
    """
    line = line.encode("utf-8", "replace").decode()  # a terminal can give what is no Unicode
    if not line.lstrip().startswith("/"):
        return chat.say(line)
    name, *rest = line.split(maxsplit=1)
    if name not in COMMANDS:
        raise UserError(f"{readable(name)}: no such command{nearest(name, COMMANDS)}; /help lists them")
    chat.record(command=line.strip())
    return COMMANDS[name](chat, "".join(rest).strip())


def nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (nearest: {found[0]})" if found else ""


def show_help(chat: Chat, rest: str) -> str:
    """: this list"""
    return "\n".join(f"{name} {command.__doc__}".replace(" :", ":", 1) for name, command in COMMANDS.items())


def change_persona(chat: Chat, rest: str) -> str:
    """["SENTENCE" ...]: show the persona, or begin again with another: quoted sentences, or one a line"""
    if not rest:
        return chat.introduction()
    try:
        return chat.begin(shlex.split(rest) if rest[0] in "\"'" else rest.splitlines())
    except ValueError as error:
        raise UserError(f"/persona: {str(error).lower()}") from error


def draw_another(chat: Chat, rest: str) -> str:
    """: begin again with a persona drawn from the dataset"""
    return chat.begin(chat.draw())


def reset(chat: Chat, rest: str) -> str:
    """: begin again with the same persona"""
    chat.exchanges.clear()
    return "(the dialog begins again)"


def undo(chat: Chat, rest: str) -> str:
    """: take back your last turn and the reply to it"""
    if not chat.exchanges:
        return "(nothing was said yet)"
    return f"(taken back: {readable(chat.exchanges.pop().text)})"


def retry(chat: Chat, rest: str) -> Generator[str] | str:
    """: another reply to your last turn"""
    return chat.say_again() if chat.exchanges else "(nothing was said yet)"


def show_history(chat: Chat, rest: str) -> str:
    """: all that was said"""
    turns = ((readable(exchange.text), chat.text_of(exchange.reply)) for exchange in chat.exchanges)
    return "\n".join(f">>> {text}\n{reply}" for text, reply in turns) or "(nothing was said yet)"


def change_setting(chat: Chat, rest: str) -> str:
    """[NAME VALUE]: show the settings, or change one, as in /set temperature 0.9"""
    settings = asdict(chat.decoding) | {"max_history": chat.max_history}
    name, _, value = rest.partition(" ")
    if name and name not in settings:
        raise UserError(f"/set {readable(name)}: no such setting{nearest(name, settings)}; /set lists them")
    if not value.strip():
        return "\n".join(f"{name} = {settings[name]}" for name in ([name] if name else settings))
    changed = parse_setting(name, value.strip(), is_switch=isinstance(settings[name], bool))
    if name == "max_history":
        chat.max_history = changed
    else:
        with flags_named():
            chat.decoding = replace(chat.decoding, **{name: changed})
    return f"{name} = {changed}"


def parse_setting(name: str, value: str, *, is_switch: bool) -> Any:
    """The value of a setting, checked as that of the flag of its name."""
    if not is_switch:
        parser = SettingsParser("/set")
        add_decoding_flags(parser)
        add_model_flags(parser, default="")
        return getattr(parser.parse_args([f"--{name}={value}"]), name)
    if value.lower() not in SWITCH:
        raise UserError(f"/set {name}: expected on or off, got {readable(value)!r}")
    return SWITCH[value.lower()]


SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


class SettingsParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("argument --", "/set ", 1))


def save(chat: Chat, rest: str) -> str:
    """FILE: write the dialog as one of a dataset that can be trained on (JSON lines)"""
    if not rest:
        raise UserError("/save: give a file's name")
    turns, utterances = [], []
    for exchange in chat.exchanges:
        turns.append(readable(exchange.text))
        reply = chat.text_of(exchange.reply)
        if reply.strip():  # a dataset has no empty ones
            utterances.append({"history": turns.copy(), "reply": reply})
        turns.append(reply)
    if not utterances:
        raise UserError("/save: nothing was said yet")
    try:
        path = Path(rest).expanduser()
        if path.exists():
            raise UserError(f"/save {path}: is there already; give another name")
        write_atomically(path, json.dumps({"personality": chat.persona, "utterances": utterances}) + "\n")
    except (OSError, ValueError, RuntimeError) as error:  # no such file can be; no such user's folder
        raise UserError(f"/save {readable(rest)}: {getattr(error, 'strerror', None) or error}") from error
    return f"(written to {path})"


def show_candidates(chat: Chat, rest: str) -> str:
    """: the replies that the last one was taken from (*), with the choice head's scores"""
    if not chat.exchanges:
        return "(nothing was said yet)"
    *before, last = chat.exchanges
    context = fit_context(chat.model, chat.context(before, last.heard), chat.decoding.max_length)
    (scores,) = score_replies(chat.model, [context], [last.candidates], chat.tokenizer)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    lines = [f"{' ' if i else '*'} {scores[i]:8.3f}  {chat.text_of(last.candidates[i])}" for i in order]
    if len(scores) == 1:
        lines.append("(one reply only: /set num_samples 8 gives more to choose from)")
    return "\n".join(lines)


def leave(chat: Chat, rest: str) -> str:
    """: leave, as Ctrl-D does"""
    raise EOFError


COMMANDS: dict[str, Callable[[Chat, str], str | Generator[str]]] = {
    "/help": show_help,
    "/persona": change_persona,
    "/random": draw_another,
    "/reset": reset,
    "/undo": undo,
    "/retry": retry,
    "/history": show_history,
    "/set": change_setting,
    "/save": save,
    "/candidates": show_candidates,
    "/quit": leave,
}
