"""The commands of a chat. Each gets the text after its name, and returns text to show, or a reply in pieces.

A command's docstring is its line in `/help`.
"""

import difflib
import json
import shlex
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from transfertransfo.chat.conversation import Chat
from transfertransfo.cli import ArgumentParser, add_decoding_flags, add_model_flags, add_seed_flag
from transfertransfo.data.inputs import Example
from transfertransfo.decoding import LEAST, check_room, fit_context
from transfertransfo.errors import SettingError, UserError, printable
from transfertransfo.files import write_atomically
from transfertransfo.ranking import descending, score_candidates


def answer(chat: Chat, line: str) -> str | Generator[str]:
    """The answer to a line of the user: the output of a command, or a reply in pieces.

    Raises:
        UserError: the command cannot be carried out.
        EOFError: the chat is over.
    """
    line = line.encode("utf-8", "replace").decode()  # a terminal can give half of a surrogate pair
    if meant := BARE.get(line.rstrip().lower()):
        raise UserError(f"{line.rstrip()}: did you mean {meant}? To say it, put a blank before it")
    if not line.lstrip().startswith("/"):
        return chat.say(line)
    name, *rest = line.split(maxsplit=1)
    if name not in COMMANDS:
        raise UserError(f"{printable(name)}: no such command{nearest(name, COMMANDS)}; /help lists them")
    chat.record(command=line.strip())
    return COMMANDS[name](chat, "".join(rest).strip())


def nearest(name: str, names: Iterable[str]) -> str:
    name = name.lower()
    found = [BARE[name.strip("/")]] if name.strip("/") in BARE else difflib.get_close_matches(name, names, 1, 0.5)
    return f" (nearest: {found[0]})" if found else ""


def show_help(chat: Chat, rest: str) -> str:
    """: this list"""
    return "\n".join(f"{name} {command.__doc__}".replace(" :", ":", 1) for name, command in COMMANDS.items())


def change_persona(chat: Chat, rest: str) -> str:
    """["SENTENCE" ...]: show the persona, or begin again with another: quoted sentences, or one a line"""
    if not rest:
        return chat.introduction()
    try:
        return chat.begin(unquoted(rest))
    except ValueError as error:
        raise UserError(f"/persona: {str(error).lower()}") from error


def unquoted(text: str) -> list[str]:
    """The parts of a text that stand in quotes, or its lines where it does not begin with one.

    Raises:
        ValueError: a quote is not closed.
    """
    return shlex.split(text) if text[:1] in ("'", '"') else text.splitlines()


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
    return f"(taken back: {printable(chat.exchanges.pop().text)})"


def retry(chat: Chat, rest: str) -> Generator[str] | str:
    """: another reply to your last turn"""
    return chat.say_again() if chat.exchanges else "(nothing was said yet)"


def show_history(chat: Chat, rest: str) -> str:
    """: all that was said, and by whom"""
    lines = []
    for exchange in chat.exchanges:
        marks = " (stopped)" * exchange.stopped + f" (rated {exchange.rating})" * bool(exchange.rating)
        lines += [f"you:   {printable(exchange.text)}", f"model: {chat.text_of(exchange.reply)}{marks}"]
    return "\n".join(lines) or "(nothing was said yet)"


def rate(chat: Chat, rest: str) -> str:
    """1..5: rate the last reply; the rating goes into the transcript and into what /save writes"""
    if rest not in ("1", "2", "3", "4", "5"):
        raise UserError(f"/rate: expected a number from 1 to 5, got {printable(rest)!r}")
    if not chat.exchanges:
        return "(nothing was said yet)"
    chat.rate(int(rest))
    return f"(rated {rest}: {chat.text_of(chat.exchanges[-1].reply)})"


def change_setting(chat: Chat, rest: str) -> str:
    """[NAME VALUE]: show the settings, or change one, as in /set temperature 0.9"""
    settings = asdict(chat.decoding) | {"max_history": chat.max_history}
    name, _, value = rest.partition(" ")
    if name and name not in settings:
        raise UserError(f"/set {printable(name)}: no such setting{nearest(name, settings)}; /set lists them")
    if not value.strip():
        return "\n".join(f"{name} = {settings[name]}" for name in ([name] if name else settings))
    changed = parse_setting(name, value.strip(), is_switch=isinstance(settings[name], bool))
    if name == "max_history":
        chat.max_history = changed
        return f"{name} = {changed}"
    try:
        decoding = chat.decoding.changed(**{name: changed})
        check_room(chat.model, decoding.max_length)
    except SettingError as error:
        raise UserError(f"/set {error}") from error
    chat.decoding = decoding
    off = [order for order in LEAST if order != name and settings[order] and not getattr(decoding, order)]
    return "\n".join([f"{name} = {changed}", *(f"{order} = False (there are too few replies now)" for order in off)])


def parse_setting(name: str, value: str, *, is_switch: bool) -> Any:
    """The value of a setting, checked as that of the flag of its name."""
    if not is_switch:
        return getattr(SettingsParser().parse_args([f"--{name}={value}"]), name)
    if value.lower() not in SWITCH:
        raise UserError(f"/set {name}: expected on or off, got {printable(value)!r}")
    return SWITCH[value.lower()]


SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


class SettingsParser(ArgumentParser):
    """Parses settings as the flags of their names.

    Attributes:
        helps: the help of each setting.
    """

    def __init__(self) -> None:
        self.helps: dict[str, str] = {}
        super().__init__("/set")
        add_decoding_flags(self)
        add_model_flags(self, default="")
        add_seed_flag(self)

    def add_argument(self, *names: str, **options: Any) -> Any:
        self.helps[names[0].lstrip("-")] = options.get("help", "")
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        likeliest = "; /set num_samples 1 and /set no_sample on take the likeliest token each time"
        raise UserError(message.replace("argument --", "/set ", 1) + likeliest * ("--temperature" in message))


def save(chat: Chat, rest: str) -> str:
    """[>>] FILE: write the dialog as one of a dataset that can be trained on (JSON lines); >> adds it to the file"""
    appends, name = rest.startswith(">>"), rest.lstrip(">").strip()
    try:
        names = unquoted(name)
        if len(names) != 1 or not names[0]:
            raise UserError("/save: give one file's name")
        dialog = chat.dialog()
        if not dialog["utterances"]:
            raise UserError("/save: nothing was said yet")
        path = Path(names[0]).expanduser()
        if path.exists() and not path.is_dir() and not appends:
            raise UserError(f"/save {path}: is there already; /save >> {path} adds the dialog to it")
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before and not ends_in_a_dialog(before):
            raise UserError(f"/save {path}: not a file of JSON lines, to which a dialog can be added")
        write_atomically(path, before + "\n" * (before != "" and before[-1] != "\n") + json.dumps(dialog) + "\n")
    except (OSError, ValueError, RuntimeError) as error:  # an impossible name; the folder of an unknown user
        raise UserError(f"/save {printable(name)}: {getattr(error, 'strerror', None) or error}") from error
    return f"({'added' if before else 'written'} to {path})"


def ends_in_a_dialog(text: str) -> bool:
    """Whether a file's last line is a dialog."""
    try:
        return "utterances" in json.loads(text.splitlines()[-1])
    except (ValueError, TypeError):
        return False


def show_candidates(chat: Chat, rest: str) -> str:
    """: the replies that the last one was taken from (*), with the choice head's scores"""
    if not chat.exchanges:
        return "(nothing was said yet)"
    *before, last = chat.exchanges
    context = fit_context(chat.model, chat.context(before, last.heard), chat.decoding.max_length)
    example = Example(context.persona, context.history, last.candidates)
    (scores,) = score_candidates(chat.model, chat.tokenizer, [example])
    order = descending(scores)
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
    "/rate": rate,
    "/set": change_setting,
    "/save": save,
    "/candidates": show_candidates,
    "/quit": leave,
}
BARE = {"quit": "/quit", "exit": "/quit", "help": "/help"}  # words taken for commands that lack their `/`
