"""One model for many chats at once. Requests wait in a queue, and like ones are answered in one batch."""

import logging
import secrets
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from transfertransfo.chat.conversation import Chat
from transfertransfo.data.inputs import Example
from transfertransfo.decoding import (
    Context,
    Decoding,
    beam_search,
    decode,
    fit_context,
    in_order,
)
from transfertransfo.errors import SettingError, UserError, first_line
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.ranking import Weighed, weigh_candidates

logger = logging.getLogger(__name__)

# Limits of a server's requests
MOST_CHARACTERS = 4000  # of a message, and of a persona
MOST_TURNS = 400  # of a history
MOST_TOKENS = 256  # of a reply
MOST_REPLIES = 16  # to one message
MOST_WAITING = 128  # jobs
MOST_ROWS = 64  # of a batch
MOST_AT_ONCE = 1 << 15  # tokens of a batch, padding included: some 2 GB of SmolLM2's cache

PATIENCE = 10.0  # seconds that an action waits for the previous one
BEAT = 0.5  # seconds between two looks at whether the client is still there


class Busy(UserError):
    """Too many are waiting already."""


class Failed(UserError):
    """The server has a fault, which `--debug` shows."""


class Stopped(UserError):
    """The visitor stopped the reply."""


class Finished(NamedTuple):
    """The last event of a job."""

    result: list


@dataclass(eq=False)
class Job:
    """A reply to find, or replies to weigh.

    Attributes:
        events: the new tokens of each step, a list for each reply; at last `Finished` or an exception.
        stopped: nobody waits for it any more.
    """

    context: Context
    decoding: Decoding | None = None  # None = weigh `replies`
    seed: int = 0
    replies: list[list[int]] = field(default_factory=list)
    events: SimpleQueue = field(default_factory=SimpleQueue)
    stopped: bool = False

    @property
    def width(self) -> int:
        """The number of rows that it has in a batch."""
        return self.decoding.count if self.decoding else 1

    def length(self, n_positions: int) -> int:
        """The number of tokens of a row, if the model sees `n_positions`."""
        context = sum(map(len, [*self.context.persona, *self.context.history]))
        replies = self.decoding.max_length if self.decoding else sum(map(len, self.replies))
        return min(context, n_positions) + replies


class SharedModel:
    """A model behind a queue. One thread uses it; any thread may ask."""

    def __init__(self, model: DoubleHeads, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.waiting: list[Job] = []
        self.batches = 0
        self.changed = threading.Condition()
        self.closed = False
        self.jobs: list[Job] = []  # the present batch
        model.pretrained.base_model.register_forward_pre_hook(self._check_wanted)
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    def reply(
        self, context: Context, decoding: Decoding, seed: int
    ) -> Generator[list[list[int]] | Finished, None, None]:
        """The new tokens of each step, a list for each reply; at last all replies, best first.

        An empty list comes while nothing is new. Closing the generator stops the reply. A sampled reply depends on the
        seed, not on other requests.

        Raises:
            UserError: a limit is exceeded.
            Busy: too many requests are waiting.
        """
        check_limits(decoding)
        job = Job(context, decoding, seed)
        if (tokens := job.width * job.length(self.model.n_positions)) > MOST_AT_ONCE:
            raise UserError(f"{job.width} replies to so long a dialog are {tokens} tokens: {MOST_AT_ONCE} at most here")
        events = self._events(self._enqueue(job))
        next(events)  # a generator that has not begun runs no `finally` when it is closed
        return events

    def weigh(self, context: Context, replies: list[list[int]]) -> list[Weighed]:
        """Score and log-probability of each of these replies to a context."""
        *_, last = self._events(self._enqueue(Job(context, replies=replies)))
        assert isinstance(last, Finished)
        return last.result

    def close(self) -> None:
        """End all jobs."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _enqueue(self, job: Job) -> Job:
        with self.changed:
            self.waiting = [waiting for waiting in self.waiting if not waiting.stopped]
            if len(self.waiting) >= MOST_WAITING or self.closed:
                raise Busy("too many are waiting for a reply; try again later")
            self.waiting.append(job)
            self.changed.notify()
        return job

    def _events(self, job: Job) -> Generator[list[list[int]] | Finished, None, None]:
        """An empty step, then the events of a job."""
        try:
            event: Any = []
            yield event
            while not isinstance(event, Finished):
                try:
                    event = job.events.get(timeout=BEAT)
                except Empty:
                    event = Busy("the server stops") if self.closed else []
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            job.stopped = True

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                self.jobs = jobs = self._next_batch()
            try:
                if jobs:
                    self._answer(jobs)
            except Exception as error:  # raised where the jobs' events are read
                if not isinstance(error, UserError):
                    logger.debug("a batch failed", exc_info=True)
                for job in jobs:
                    job.events.put(error if isinstance(error, UserError) else Failed(f"failed: {first_line(error)}"))
            self.jobs = []
            if self.closed:
                break
        for job in self.waiting:
            job.events.put(Busy("the server stops"))

    def _check_wanted(self, *_: object) -> None:
        """Raise an error if nobody waits for the present batch. This is called before each forward of the model."""
        if self.jobs and (self.closed or all(job.stopped for job in self.jobs)):
            raise Busy("the server stops")

    def _next_batch(self) -> list[Job]:
        """Take the oldest job, and those that are decoded alike, out of the queue."""
        self.waiting = [job for job in self.waiting if not job.stopped]
        alike = [job for job in self.waiting if job.decoding == self.waiting[0].decoding]
        batch: list[Job] = []
        rows = longest = 0
        for job in alike:
            rows, longest = rows + job.width, max(longest, job.length(self.model.n_positions))
            if batch and (rows > MOST_ROWS or rows * longest > MOST_AT_ONCE):
                break
            batch.append(job)
        self.waiting = [job for job in self.waiting if job not in batch]
        return batch

    def _answer(self, jobs: list[Job]) -> None:
        self.batches += 1
        contexts, decoding = [job.context for job in jobs], jobs[0].decoding
        if decoding is None:
            examples = [Example(job.context.persona, job.context.history, job.replies) for job in jobs]
            results: list[list] = weigh_candidates(self.model, self.tokenizer, examples)
        else:
            if decoding.num_beams:
                results = beam_search(self.model, contexts, self.tokenizer, decoding)
            else:
                results = self._sample(jobs, decoding)
            results = in_order(self.model, contexts, results, self.tokenizer, decoding)
        for job, result in zip(jobs, results):
            job.events.put(Finished(result))

    def _sample(self, jobs: list[Job], decoding: Decoding) -> list[list[list[int]]]:
        """The replies to each job's context. Each step becomes an event of its job."""
        generators = [torch.Generator(self.model.device).manual_seed(job.seed) for job in jobs]
        found: list[list[list[int]]] = [[[] for _ in range(decoding.num_samples)] for _ in jobs]
        contexts = [job.context for job in jobs]
        with closing(decode(self.model, contexts, self.tokenizer, decoding, generators=generators)) as steps:
            for step in steps:
                self._check_wanted()
                for i, (job, replies) in enumerate(zip(jobs, found)):
                    news = step[i * decoding.num_samples : (i + 1) * decoding.num_samples]
                    for reply, tokens in zip(replies, news):
                        reply += tokens
                    if any(news):
                        job.events.put(news)
        return found


def check_limits(decoding: Decoding) -> None:
    """Check that decoding is within the limits of a server.

    Raises:
        SettingError: a setting exceeds its limit.
    """
    limits = {"max_length": MOST_TOKENS, "num_samples": MOST_REPLIES, "num_beams": MOST_REPLIES}
    for name, most in limits.items():
        if getattr(decoding, name) > most:
            raise SettingError(f"{name} {getattr(decoding, name)}: {most} at most here", name)


class SharedChat(Chat):
    """A chat over a model that others use too.

    Args:
        seed: of the replies; 0 = other ones each time.
        decoding, max_history, persona, draw, transcript: as those of `Chat`.

    Attributes:
        told: lines that are no part of the dialog, to be shown and cleared.
    """

    def __init__(
        self,
        shared: SharedModel,
        seed: int,
        decoding: Decoding,
        max_history: int,
        persona: list[str],
        draw: Callable[[], list[str]],
        transcript: TextIO | None = None,
    ):
        self.shared, self.id = shared, secrets.token_hex(4)
        self.busy = threading.Lock()
        # how often `stop` was called, and how often before the present action was asked for
        self.stops = self.stops_before = 0
        self.weights: dict[int, tuple[Any, list[Weighed]]] = {}  # of each turn, with the context and candidates weighed
        self.told: list[str] = []
        self.seed_with(seed)
        super().__init__(
            shared.model, shared.tokenizer, decoding, max_history, persona, draw, self.told.append, transcript
        )

    def stop(self) -> None:
        """Stop the reply; what it has so far is kept. A reply that waits for another action is stopped too."""
        self.stops += 1

    @contextmanager
    def one_action(self) -> Iterator[None]:
        """Make a visitor's actions wait for one another.

        Raises:
            Busy: the previous action takes too long.
        """
        stops = self.stops
        if not self.busy.acquire(timeout=PATIENCE):
            raise Busy("what you asked for before still goes on")
        try:
            self.stops_before = stops
            yield
        finally:
            self.busy.release()

    def seed_with(self, seed: int) -> None:
        """Seed the replies from now on."""
        self.seed = seed
        self.draws = torch.Generator()
        self.draws.manual_seed(seed) if seed else self.draws.seed()

    def next_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.draws))

    def begin(self, persona: list[str]) -> str:
        check_length("a persona", "\n".join(persona))
        return super().begin(persona)

    def say(self, text: str) -> Generator[str]:
        check_length("a message", text)
        if len(self.exchanges) >= MOST_TURNS // 2:
            raise UserError(f"the dialog has {MOST_TURNS} turns, which is the most here; begin again")
        return super().say(text)

    def tokens(self, context: Context) -> Generator[list[list[int]]]:
        with closing(self.events(context, self.decoding)) as events:
            yield from (event for event in events if not isinstance(event, Finished) and event)

    def candidates(self, context: Context) -> list[list[int]]:
        return self.draw_replies(context, self.decoding)

    def draw_replies(self, context: Context, decoding: Decoding) -> list[list[int]]:
        *_, last = self.events(context, decoding)
        assert isinstance(last, Finished)
        return last.result

    def events(self, context: Context, decoding: Decoding) -> Generator[list[list[int]] | Finished]:
        """As `SharedModel.reply`.

        Raises:
            Stopped: `stop` was called.
        """
        with closing(self.shared.reply(context, decoding, self.next_seed())) as events:
            for event in events:
                if self.stops > self.stops_before:
                    raise Stopped("(stopped)")
                yield event

    def add_candidates(self, turn: int, decoding: Decoding) -> None:
        """Draw more candidates for a turn, so that one of them can be taken."""
        exchange = self.exchanges[turn]
        more = self.draw_replies(self.context(self.exchanges[:turn], exchange.heard), decoding)
        new = [reply for i, reply in enumerate(more) if reply not in exchange.candidates + more[:i]]
        self.exchanges[turn] = exchange._replace(candidates=[*exchange.candidates, *new][: 2 * MOST_REPLIES])

    def weighed(self, turn: int) -> list[Weighed]:
        """Score and log-probability of each candidate of a turn. They are kept until candidates or context change."""
        exchange = self.exchanges[turn]
        context = self.context(self.exchanges[:turn], exchange.heard)
        context = fit_context(self.model, context, self.decoding.max_length)
        known, weights = self.weights.get(turn, (None, []))
        if known != (context, exchange.candidates):
            weights = self.shared.weigh(context, exchange.candidates)
            self.weights[turn] = (context, exchange.candidates), weights
        return weights

    def record(self, **turn: Any) -> None:
        super().record(chat=self.id, **turn)


def check_length(name: str, text: str) -> None:
    """Check the length of a visitor's text.

    Raises:
        UserError: it is too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name} of {len(text)} characters: {MOST_CHARACTERS} at most here")
