"""A conversation with a model that has a persona: its turns, without a terminal."""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import closing
from datetime import datetime
from itertools import chain
from typing import Any, NamedTuple, TextIO

from transformers import PreTrainedTokenizerBase

from transfertransfo.data.tokenization import tokenize
from transfertransfo.decoding import Context, candidate_replies, decode, fit_context, with_defaults
from transfertransfo.errors import UserError
from transfertransfo.model.double_heads import DoubleHeads


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


# Commands: each gets what follows its name, and returns text to show, or a reply in pieces. The docstring is its help.
