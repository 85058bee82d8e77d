"""A conversation with a model that has a persona: its turns and the commands that change it, without a terminal."""

import difflib
import json
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from transformers import PreTrainedTokenizerBase

from transfertransfo.cli import ArgumentParser, UserError, add_decoding_flags, add_model_flags
from transfertransfo.data.tokenization import tokenize
from transfertransfo.decoding import Context, candidate_replies, decode, fit_context, score_replies, with_defaults
from transfertransfo.files import write_atomically
from transfertransfo.model.loading import DoubleHeads


class Exchange(NamedTuple):
    """What the partner said and what the model answered."""

    text: str
    heard: list[int]  # token ids of the text
    reply: list[int]
    candidates: list[list[int]]  # all replies that there were to give; the one that was given is among them


class Chat:
    """What was said so far, and to whom.

    Args:
        args: the decoding flags and `max_history`; `/set` changes them.
        persona: its sentences; there may be none.
        draw: gives another persona.
        tell: shows the user a line that is no part of the dialog.
        transcript: a file open for writing, where each turn goes as a line of JSON.
    """

    def __init__(
        self,
        model: DoubleHeads,
        tokenizer: PreTrainedTokenizerBase,
        args: Namespace,
        persona: list[str],
        draw: Callable[[], list[str]],
        tell: Callable[[str], None] = print,
        transcript: TextIO | None = None,
    ):
        self.model, self.tokenizer, self.args = model, tokenizer, with_defaults(args)
        self.draw, self.tell, self.transcript = draw, tell, transcript
        self.told_of_cut = False
        self.begin(persona)

    def begin(self, persona: list[str]) -> str:
        """Begin a dialog with this persona; returns `introduction`."""
        self.persona = [text for text in map(readable, persona) if text.strip()]
        self.persona_ids = tokenize(self.tokenizer, self.persona)
        self.exchanges: list[Exchange] = []
        self.record(persona=self.persona)
        return self.introduction()

    def introduction(self) -> str:
        return f"Persona: {' '.join(self.persona) or '(none)'}"

    def say(self, text: str) -> Generator[str]:
        """The model's reply to a text, in pieces as it is produced.

        A reply that is stopped, by an exception or by closing the iterator, is one as far as it had come.
        """
        (heard,) = tokenize(self.tokenizer, [text] if text.strip() else [""])
        if not heard:  # control characters alone are no tokens of GPT's
            self.tell("(say something, or leave with Ctrl-D)")
            return
        context = self.context(self.exchanges, heard)
        if fit_context(self.model, context, self.args) != context and not self.told_of_cut:
            self.tell(f"(more than the model's {self.model.n_positions} positions: the oldest is left out now)")
            self.told_of_cut = True
        self.record(speaker="user", text=text)
        candidates: list[list[int]] = []
        reply: list[int] = []
        whole = False
        try:
            if self.args.num_beams or self.args.num_samples > 1:
                (candidates,) = candidate_replies(self.model, [context], self.tokenizer, self.args)
                reply = candidates[0]
                yield self.text_of(reply)
            else:
                yield from self.stream(context, reply)
            if not reply:
                self.tell("(the model ends its reply at once)")
            whole = True
        finally:
            if reply or whole:
                self.exchanges.append(Exchange(text, heard, reply, candidates or [reply]))
                self.record(speaker="model", text=self.text_of(reply), **({} if whole else {"stopped": True}))

    def say_again(self) -> Generator[str]:
        """Another reply in place of the last one, which stays where none comes."""
        last = self.exchanges.pop()
        kept = len(self.exchanges)
        try:
            yield from self.say(last.text)
        finally:
            if len(self.exchanges) == kept:
                self.exchanges.append(last)

    def stream(self, context: Context, reply: list[int]) -> Generator[str]:
        """Pieces of a reply's text whenever they are certain; its tokens are added to `reply`.

        The last word is not: a later token may go on with it. Nor is an `n` before it, which may yet become `n't` and
        join the word before.
        """
        shown = ""
        with closing(decode(self.model, [context], self.tokenizer, self.args)) as steps:
            for (tokens,) in steps:
                reply += tokens
                certain = re.sub(r"( n)? \S*$|^\S*$", "", self.text_of(reply))
                if len(certain) > len(shown):
                    yield certain[len(shown) :]
                    shown = certain
        yield self.text_of(reply)[len(shown) :]

    def context(self, before: list[Exchange], heard: list[int]) -> Context:
        """What the model sees when `heard` has just been said."""
        turns = [*chain.from_iterable((exchange.heard, exchange.reply) for exchange in before), heard]
        window = turns[-(2 * self.args.max_history + 1) :]
        return Context(self.persona_ids, window, turns[1 : -len(window) : 2])

    def text_of(self, ids: list[int]) -> str:
        """Text as people write it, without spaces before punctuation and within contractions, on one line."""
        (text,) = self.tokenizer.batch_decode([ids], skip_special_tokens=True)
        return readable(self.tokenizer.clean_up_tokenization(text))

    def record(self, **turn: Any) -> None:
        """Add a line to the transcript, if there is one."""
        if self.transcript is None:
            return
        try:
            time = datetime.now().isoformat(timespec="seconds")
            self.transcript.write(json.dumps({"time": time} | turn, ensure_ascii=False) + "\n")
            self.transcript.flush()
        except OSError as error:
            raise UserError(f"--transcript {self.transcript.name}: {error.strerror}") from error


def readable(text: str) -> str:
    """Text that any file and terminal takes: control characters are blanks; what is no Unicode becomes `?`."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).encode("utf-8", "replace").decode()


def answer(chat: Chat, line: str) -> str | Generator[str]:
    """What there is to show for a line of the user: the output of a command, or a reply in pieces.

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


# Commands: each gets what follows its name, and returns text to show, or a reply in pieces. The docstring is its help.


def show_help(chat: Chat, rest: str) -> str:
    """: this list"""
    return "\n".join(f"{name}{command.__doc__}" for name, command in COMMANDS.items())


def change_persona(chat: Chat, rest: str) -> str:
    """ ["SENTENCE" ...]: show the persona, or begin again with another: quoted sentences, or one a line"""
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
    """ [NAME VALUE]: show the settings, or change one, as in /set temperature 0.9"""
    parser = SettingsParser("/set")
    add_decoding_flags(parser)
    settings = [*vars(parser.parse_args([])), "max_history"]
    add_model_flags(parser, default="")
    name, _, value = rest.partition(" ")
    if name and name not in settings:
        raise UserError(f"/set {readable(name)}: no such setting{nearest(name, settings)}; /set lists them")
    if not value.strip():
        return "\n".join(f"{name} = {getattr(chat.args, name)}" for name in ([name] if name else settings))
    changed = SWITCH.get(value.strip().lower())
    if not isinstance(getattr(chat.args, name), bool):
        changed = getattr(parser.parse_args([f"--{name}={value.strip()}"]), name)
    elif changed is None:
        raise UserError(f"/set {name}: expected on or off, got {readable(value)!r}")
    chat.args = with_defaults(Namespace(**vars(chat.args) | {name: changed}))
    return f"{name} = {changed}"


SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


class SettingsParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("argument --", "/set ", 1))


def save(chat: Chat, rest: str) -> str:
    """ FILE: write the dialog as one of a dataset that can be trained on (JSON lines)"""
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
    context = fit_context(chat.model, chat.context(before, last.heard), chat.args)
    (scores,) = score_replies(chat.model, [context], [last.candidates], chat.tokenizer)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    lines = [f"{'*' if i == 0 else ' '} {scores[i]:8.3f}  {chat.text_of(last.candidates[i])}" for i in order]
    more = ["(one reply only: /set num_samples 8 gives more to choose from)"] if len(scores) == 1 else []
    return "\n".join(lines + more)


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
