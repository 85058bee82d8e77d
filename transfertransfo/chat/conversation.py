"""A conversation with a model that has a persona: its turns, without a terminal."""

import json
import re
from collections.abc import Callable, Generator
from contextlib import closing
from datetime import datetime
from itertools import chain
from typing import Any, NamedTuple, TextIO

from transformers import PreTrainedTokenizerBase

from transfertransfo.data.tokenization import count_unknown, text_of, tokenize
from transfertransfo.decoding import Context, Decoding, candidate_replies, decode, fit_context
from transfertransfo.errors import SettingError, printable
from transfertransfo.model.cache import PrefixCache
from transfertransfo.model.double_heads import DoubleHeads


class Exchange(NamedTuple):
    """A turn of the partner and the model's reply to it."""

    text: str
    heard: list[int]  # token ids of the text
    reply: list[int]
    candidates: list[list[int]]  # all replies to choose from, the given one too
    stopped: bool = False  # the reply was stopped before its end
    rating: int | None = None  # of the reply, 1 to 5, if the user gave one


class Chat:
    """A dialog with a model that has a persona.

    Args:
        decoding: how replies are chosen; `/set` changes it.
        max_history: earlier exchanges that the model sees; `/set` changes it.
        persona: its sentences; there may be none.
        draw: gives another persona.
        tell: shows the user a line that is no part of the dialog.
        transcript: a file open for writing; each turn becomes a line of JSON in it.
    """

    def __init__(
        self,
        model: DoubleHeads,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        max_history: int,
        persona: list[str],
        draw: Callable[[], list[str]],
        tell: Callable[[str], None] = print,
        transcript: TextIO | None = None,
    ):
        self.model, self.tokenizer, self.decoding, self.max_history = model, tokenizer, decoding, max_history
        self.draw, self.tell, self.transcript = draw, tell, transcript
        self.told_of_cut = self.told_of_unknown = False
        self.memory = PrefixCache()
        self.begin(persona)

    def begin(self, persona: list[str]) -> str:
        """Begin a dialog with this persona; returns `introduction`."""
        texts = [text for text in map(unicode_of, persona) if re.search(r"[^\s\x00-\x1f\x7f-\x9f]", text)]
        self.persona = [printable(text) for text in texts]
        self.persona_ids = tokenize(self.tokenizer, texts)
        self.persona_note = self.note_of_unknown("of it", texts, self.persona_ids)
        self.told_of_cut_persona = False
        self.exchanges: list[Exchange] = []
        self.record(persona=self.persona)
        return self.introduction()

    def introduction(self) -> str:
        """A line with the persona as the model sees it, and a note of what it cannot see or read."""
        context = self.context(self.exchanges[:-1], self.exchanges[-1].heard if self.exchanges else [])
        seen = fit_context(self.model, context, self.decoding.max_length).persona
        shown = " ".join(self.persona) or "(none)"
        if seen != self.persona_ids:
            self.told_of_cut_persona = True
            shown = f"{self.text_of_persona(seen)} (the rest of it is more than the model can see)"
        return f"Persona: {shown} {self.persona_note}".rstrip()

    def text_of_persona(self, sentences: list[list[int]]) -> str:
        return " ".join(map(self.text_of, sentences)) or "nothing"

    def note_of_unknown(self, what: str, texts: list[str], tokens: list[list[int]]) -> str:
        """A note of how much of these texts the tokenizer cannot write; "" where it can write all."""
        count = sum(count_unknown(self.tokenizer, texts, tokens))
        total = sum(len(ids) or 1 for ids in tokens)
        return (
            f"({what} the model cannot read {count} of {total} tokens: its tokenizer cannot write them)"
            if count
            else ""
        )

    def say(self, text: str) -> Generator[str]:
        """The model's reply to a text, in pieces as it is produced.

        An exception, or closing the iterator, stops the reply. What it has so far is kept.
        """
        (heard,) = tokenize(self.tokenizer, [text] if text.strip() else [""])
        if not heard:  # GPT's tokenizer drops control characters
            self.tell("(say something, or leave with Ctrl-D)")
            return
        if not self.told_of_unknown and (note := self.note_of_unknown("of this", [text], [heard])):
            self.tell(note)
            self.told_of_unknown = True
        context = self.context(self.exchanges, heard)
        seen = fit_context(self.model, context, self.decoding.max_length)
        if seen.history != context.history and not self.told_of_cut:
            self.tell(f"(more than the model's {self.model.n_positions} positions: the oldest is left out now)")
            self.told_of_cut = True
        if seen.persona != context.persona and not self.told_of_cut_persona:
            self.tell(f"(too long for the model: of its persona it sees: {self.text_of_persona(seen.persona)})")
            self.told_of_cut_persona = True
        self.record(speaker="user", text=text)
        candidates: list[list[int]] = []
        reply: list[int] = []
        stopped = {"stopped": True}
        try:
            if self.decoding.num_beams or self.decoding.num_samples > 1:
                candidates = self.candidates(context)
                reply = candidates[0]
                yield self.text_of(reply)
            else:
                yield from self.stream(context, reply)
            if not reply:
                self.tell("(the model ends its reply at once)")
            stopped = {}
        finally:
            if reply or not stopped:
                self.exchanges.append(Exchange(text, heard, reply, candidates or [reply], bool(stopped)))
                self.record(speaker="model", text=self.text_of(reply), **stopped)

    def say_again(self) -> Generator[str]:
        """Another reply in place of the last one. The last one stays where no other comes."""
        last = self.exchanges.pop()
        kept = len(self.exchanges)
        try:
            yield from self.say(last.text)
        finally:
            if len(self.exchanges) == kept:
                self.exchanges.append(last)

    def candidates(self, context: Context) -> list[list[int]]:
        """All replies to a context, the one to give first."""
        (found,) = candidate_replies(self.model, [context], self.tokenizer, self.decoding, memory=self.memory)
        return found

    def tokens(self, context: Context) -> Generator[list[list[int]]]:
        """The reply to a context, a token a step, as `decode` gives it."""
        return decode(self.model, [context], self.tokenizer, self.decoding, memory=self.memory)

    def stream(self, context: Context, reply: list[int]) -> Generator[str]:
        """Pieces of a reply's text as they become certain. Its tokens are added to `reply`."""
        growing = Growing(self.text_of)
        with closing(self.tokens(context)) as steps:
            for (tokens,) in steps:
                reply += tokens
                if piece := growing.piece(reply):
                    yield piece
        yield growing.piece(reply, whole=True)

    def take(self, turn: int, candidate: int) -> None:
        """Have another candidate be the reply of a turn; the dialog goes on from there."""
        exchange = self.exchanges[turn]
        reply = exchange.candidates[candidate]
        others = [*exchange.candidates[:candidate], *exchange.candidates[candidate + 1 :]]
        self.exchanges[turn:] = [Exchange(exchange.text, exchange.heard, reply, [reply, *others])]
        self.record(speaker="model", text=self.text_of(reply), taken=True)

    def context(self, before: list[Exchange], heard: list[int]) -> Context:
        """Persona and history as the model sees them when `heard` has just been said."""
        turns = [*chain.from_iterable((exchange.heard, exchange.reply) for exchange in before), heard]
        return Context.of(self.persona_ids, turns, self.max_history)

    def text_of(self, ids: list[int]) -> str:
        """The text of token ids on one line."""
        return printable(text_of(self.tokenizer, ids))

    def rate(self, rating: int) -> None:
        """Rate the last reply, from 1 to 5."""
        self.exchanges[-1] = self.exchanges[-1]._replace(rating=rating)
        self.record(rating=rating, text=self.text_of(self.exchanges[-1].reply))

    def dialog(self) -> dict[str, Any]:
        """The chat as a dialog of a dataset that can be trained on. It has no utterances before the first reply."""
        turns, utterances = [], []
        for exchange in self.exchanges:
            turns.append(printable(exchange.text))
            reply = self.text_of(exchange.reply)
            if reply.strip():  # a dataset has no empty ones
                rated = {"rating": exchange.rating} if exchange.rating else {}
                utterances.append({"history": turns.copy(), "reply": reply} | rated)
            turns.append(reply)
        return {"personality": self.persona, "utterances": utterances}

    def record(self, **turn: Any) -> None:
        """Add a line to the transcript, if there is one."""
        if self.transcript is None:
            return
        try:
            time = datetime.now().isoformat(timespec="seconds")
            self.transcript.write(json.dumps({"time": time} | turn, ensure_ascii=False) + "\n")
            self.transcript.flush()
        except OSError as error:
            raise SettingError(f"transcript {self.transcript.name}: {error.strerror}", "transcript") from error


class Growing:
    """The text of a growing reply, in pieces as they become certain.

    The last word is not certain: a later token may continue it. Nor is an `n` before it: it may become `n't` and join
    the word before.
    """

    def __init__(self, text_of: Callable[[list[int]], str]):
        self.text_of, self.shown = text_of, ""

    def piece(self, reply: list[int], *, whole: bool = False) -> str:
        """The text that has become certain since the last call; all the rest if the reply is whole."""
        text = self.text_of(reply)
        certain = text if whole else re.sub(r"( n)? \S*$|^\S*$", "", text)
        piece = certain[len(self.shown) :]
        self.shown += piece
        return piece


def unicode_of(text: str) -> str:
    """Text with `?` for each half of a surrogate pair, which is no Unicode."""
    return text.encode("utf-8", "replace").decode()
