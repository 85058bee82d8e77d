"""Replies to many contexts at a time: greedy, sampled, beam search, the best of several."""

from argparse import Namespace
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor

from transfertransfo.data.inputs import Example, build_input_from_segments, context_positions, fit, window
from transfertransfo.data.tokenization import special_ids
from transfertransfo.errors import SettingError
from transfertransfo.model.cache import CachedRows, PrefixCache
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.ranking import agreement, best_first, score_candidates

LEAST = {"rank": 2, "consensus": 3}  # fewest replies to choose from; two agree equally with each other
LEAVE = 4  # ended rows leave a batch when they are one in so many


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a reply is chosen. The fields are the flags of `cli.add_decoding_flags`, with their defaults.

    Raises:
        SettingError: two fields exclude each other.
    """

    no_sample: bool = False  # the likeliest token instead of a sampled one
    max_length: int = 20  # of a reply, in tokens
    min_length: int = 1
    temperature: float = 0.7
    top_k: int = 0  # of `top_filtering`; likewise `top_p`
    top_p: float = 0.9
    num_beams: int = 0  # of `beam_search`; 0 = none, 1 = greedy
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # of `AgainstRepetition`; likewise the next two
    repetition_penalty: float = 1.0
    block_history_ngram: int = 0
    num_samples: int = 1  # replies to draw
    rank: bool = False  # the reply that the choice head scores best comes first
    consensus: bool = False  # the reply that is most like the others comes first, by `agreement`

    def __post_init__(self) -> None:
        if self.num_beams and self.num_samples > 1:
            message = "num_beams and num_samples: beams are not sampled; give one of the two"
            raise SettingError(message, "num_beams", "num_samples")
        if self.no_sample and self.num_samples > 1:
            message = f"num_samples {self.num_samples}: with no_sample they would all be the same"
            raise SettingError(message, "num_samples", "no_sample")
        if self.rank and self.consensus:
            raise SettingError("rank and consensus: each says which reply comes first; give one of the two", *LEAST)
        for name, least in LEAST.items():
            if getattr(self, name) and self.count < least:
                message = f"{name}: this takes several replies; give num_samples or num_beams of at least {least} too"
                raise SettingError(message, name, "num_samples", "num_beams")
        if self.min_length > self.max_length:
            message = f"min_length {self.min_length}: more than max_length {self.max_length}"
            raise SettingError(message, "min_length", "max_length")

    @property
    def count(self) -> int:
        """The number of replies to choose from."""
        return max(self.num_beams, self.num_samples)

    @property
    def chooses(self) -> bool:
        """Whether the first reply is known only when all of them are complete."""
        return self.rank or self.consensus

    def changed(self, **settings: Any) -> "Decoding":
        """The same decoding with other settings.

        `rank` or `consensus` is off where too few replies are left for it, unless these settings ask for it.
        """
        count = max(settings.get("num_beams", self.num_beams), settings.get("num_samples", self.num_samples))
        off = dict.fromkeys((name for name, least in LEAST.items() if count < least), False)
        return replace(self, **off | settings)

    @classmethod
    def of(cls, args: "Namespace | Decoding") -> "Decoding":
        """The decoding of a script's arguments. Fields that they lack have their defaults."""
        given = vars(args)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


class Context(NamedTuple):
    """Persona and history to reply to, as token ids. A plain tuple (persona, history) serves too."""

    persona: list[list[int]]
    history: list[list[int]]  # the partner's last turn at its end
    earlier: Sequence[list[int]] = ()  # the model's own turns from before that history; only to block their n-grams

    @classmethod
    def of(cls, persona: list[list[int]], turns: list[list[int]], max_history: int) -> "Context":
        """The context of a reply to the last of these turns, in which two speakers alternate."""
        kept = window(turns, max_history)
        return cls(persona, kept, turns[len(turns) % 2 : -len(kept) : 2])


def sample_sequence(
    personality: list[list[int]],
    history: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: DoubleHeads,
    args: Namespace | Decoding,
    current_output: list[int] | None = None,
) -> list[int]:
    """The token ids of one reply, without special tokens.

    Args:
        args: fields of `Decoding`; those that it lacks have their defaults.
        current_output: the reply's first tokens, if there are any yet; the result begins with them.
    """
    context = Context(personality, history)
    return candidate_replies(model, [context], tokenizer, Decoding.of(args), current_output)[0][0]


def generate(
    model: DoubleHeads, contexts: Sequence[Context], tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> list[list[int]]:
    """The token ids of one reply to each context, without special tokens, all decoded in one batch."""
    return [replies[0] for replies in candidate_replies(model, contexts, tokenizer, decoding)]


def candidate_replies(
    model: DoubleHeads,
    contexts: Sequence[Context],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    prefix: list[int] | None = None,
    memory: "PrefixCache | None" = None,
) -> list[list[list[int]]]:
    """All replies to each context. The first of them is the one to give.

    Samples come in the order drawn, beams by score. `rank` or `consensus` then reorders them.

    Args:
        prefix: the first tokens of every reply, if there are any yet.
        memory: as in `decode`.
    """
    if decoding.num_beams:
        found = beam_search(model, contexts, tokenizer, decoding, prefix, memory)
    else:
        rows = [list(prefix or []) for _ in range(len(contexts) * decoding.num_samples)]
        for step in decode(model, contexts, tokenizer, decoding, prefix, memory):
            for reply, tokens in zip(rows, step):
                reply += tokens
        found = [rows[start : start + decoding.num_samples] for start in range(0, len(rows), decoding.num_samples)]
    return in_order(model, contexts, found, tokenizer, decoding)


def in_order(
    model: DoubleHeads,
    contexts: Sequence[Context],
    replies: list[list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
) -> list[list[list[int]]]:
    """The replies to each context, reordered by `rank` or `consensus`. Without these they stay as they are."""
    if decoding.consensus:
        return list(map(best_first, replies, map(agreement, replies)))
    if decoding.rank:
        seen = [fit_context(model, context, decoding.max_length) for context in contexts]
        examples = [Example(context.persona, context.history, row) for context, row in zip(seen, replies)]
        return list(map(best_first, replies, score_candidates(model, tokenizer, examples)))
    return replies


def fit_context(model: DoubleHeads, context: Context, max_length: int) -> Context:
    """The context as the model sees it. It is shortened, the oldest turns first, to leave room for a reply.

    Args:
        max_length: of the reply, in tokens.
    """
    persona, history, *_ = context
    reply = [0] * min(max_length, model.n_positions)  # any tokens
    example = fit(Example(persona, history, [reply]), model.n_positions, model.history_start)
    return Context(*context)._replace(persona=example.persona, history=example.history)


def top_filtering(
    logits: Tensor,
    top_k: float = 0.0,
    top_p: float = 0.9,
    threshold: float = -float("inf"),
    filter_value: float = -float("inf"),
) -> Tensor:
    """Keep only the likeliest tokens, the others set to `filter_value`, in place.

    Args:
        logits: (..., vocabulary).
        top_k: keep the k likeliest (0 = off).
        top_p: then keep the smallest set of the likeliest whose probability exceeds this (0 = off), at least one:
            nucleus sampling (Holtzman et al. 2019, section 3.1).
        threshold: then keep logits of at least this.

    Returns:
        The same tensor.
    """
    if top_k > 0:
        k = min(int(top_k), logits.size(-1))
        logits.masked_fill_(logits < logits.topk(k).values[..., -1:], filter_value)
    if top_p > 0.0:
        probabilities = logits.softmax(-1)
        # tokens less likely than this have less than 1 - top_p together: none is kept, so none need be sorted
        k = int((probabilities * logits.size(-1) >= 1 - top_p).sum(-1).max())
        ordered, indices = probabilities.topk(k)
        before = ordered.cumsum(-1)[..., :-1]  # for each token but the first, the probability of all likelier ones
        excess = torch.ones_like(logits, dtype=torch.bool)
        excess.scatter_(-1, indices[..., :1], False).scatter_(-1, indices[..., 1:], before > top_p)
        logits.masked_fill_(excess, filter_value)
    return logits.masked_fill_(logits < threshold, filter_value)


class AgainstRepetition:
    """Lowers or forbids tokens that repeat something, by transformers' processors.

    `repetition_penalty` (Keskar et al. 2019, section 4.1) and `no_repeat_ngram_size` look at the reply alone: it may
    repeat words of the persona and of the partner. `block_history_ngram` looks at the model's own earlier turns.
    """

    def __init__(self, contexts: Sequence[Context], decoding: Decoding, copies: int):
        self.reply = LogitsProcessorList()
        if decoding.repetition_penalty != 1:
            self.reply.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
        if decoding.no_repeat_ngram_size:
            self.reply.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        self.history = []  # for each reply a list of processors; a context has `copies` replies
        if size := decoding.block_history_ngram:
            for _, history, earlier in (Context(*context) for context in contexts):
                turns = [turn for turn in [*earlier, *history[-2::-2]] if len(turn) >= size]
                # one for each turn, so that no n-gram spans two turns
                processors = (EncoderNoRepeatNGramLogitsProcessor(size, torch.LongTensor(turn)) for turn in turns)
                self.history += [LogitsProcessorList(processors)] * copies

    def select_(self, rows: Tensor) -> None:
        """Keep the rows of these indices."""
        if self.history:
            self.history = [self.history[i] for i in rows.tolist()]

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Logits of the next tokens, (R, vocabulary), after `tokens` of the replies, (R, T)."""
        logits = self.reply(tokens, logits)  # type: ignore[arg-type]  # takes any tensor of whole numbers
        if any(self.history):
            rows = zip(self.history, tokens.split(1), logits.split(1))
            logits = torch.cat([processors(*row) for processors, *row in rows])
        return logits


def check_room(model: DoubleHeads, max_length: int) -> None:
    """Check that the model has room for a reply of this many tokens.

    Raises:
        SettingError: it has none, even without persona and history.
    """
    if context_positions([], [[]], model.history_start)[-1] + max_length >= model.n_positions:
        message = f"max_length {max_length}: more than the model's {model.n_positions} positions hold"
        raise SettingError(message, "max_length")


def _begin(
    model: DoubleHeads,
    contexts: Sequence[Context],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    prefix: list[int],
    copies: int,
    memory: PrefixCache | None,
) -> tuple[CachedRows, Tensor, AgainstRepetition]:
    """Encode each context once, for `copies` rows.

    Returns:
        The rows, the replies' tokens so far (R, T), and the processors against repetition.
    """
    check_room(model, len(prefix) + decoding.max_length)
    sequences = []
    for context in contexts:
        persona, history, _ = fit_context(model, context, len(prefix) + decoding.max_length)
        sequence = build_input_from_segments(persona, history, prefix, tokenizer, with_eos=False)
        positions = context_positions(persona, history, model.history_start)
        sequence["position_ids"] = positions + [positions[-1] + 1 + i for i in range(len(prefix))]
        sequences.append(sequence)
    rows = (memory or PrefixCache()).encode(model, sequences, decoding.max_length)
    rows.repeat_(copies)
    tokens = torch.tensor([prefix] * len(rows.logits), dtype=torch.long, device=model.device)
    return rows, tokens, AgainstRepetition(contexts, decoding, copies)


@torch.inference_mode()
def decode(
    model: DoubleHeads,
    contexts: Sequence[Context],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    prefix: list[int] | None = None,
    memory: PrefixCache | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Generator[list[list[int]]]:
    """Each reply's next token, step by step, sampled or greedy: a list of one token, or an empty one after its end.

    Each context has `num_samples` replies, which stand side by side. A reply ends before a special token or at
    `max_length` tokens.

    Args:
        prefix: the first tokens of every reply, if there are any yet.
        memory: the cache of a chat, kept from reply to reply. It saves time and changes no reply.
        generators: one for each context, so that its samples do not depend on the batch; None = torch's own.

    Raises:
        SettingError: the model has no room for a reply of `max_length` tokens.
    """
    special = torch.tensor(special_ids(tokenizer), device=model.device)
    # 1) prefill 2) repeat the cache
    rows, tokens, penalize = _begin(model, contexts, tokenizer, decoding, prefix or [], decoding.num_samples, memory)
    # 3) state of the rows, and which reply each of them is
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=model.device)
    replies = list(range(len(tokens)))
    n_replies = len(replies)
    # 4) a token a step
    for step in range(decoding.max_length):
        noise = None if decoding.no_sample else _noise(rows.logits, n_replies, generators)[replies]
        chosen = _choose(penalize(tokens, rows.logits), decoding, special, noise, go_on=step < decoding.min_length)
        ended |= torch.isin(chosen, special)
        if ended.all():
            return
        gained: list[list[int]] = [[] for _ in range(n_replies)]
        for reply, token, done in zip(replies, chosen.tolist(), ended.tolist()):
            if not done:
                gained[reply] = [token]
        yield gained
        if step + 1 == decoding.max_length:
            return
        # 5) rows that have ended leave, some at a time since the cache of the others is copied
        if len(ended) <= LEAVE * ended.sum():
            stay = (~ended).nonzero().flatten()
            rows.select_(stay)
            penalize.select_(stay)
            replies = [replies[i] for i in stay.tolist()]
            tokens, chosen, ended = tokens[stay], chosen[stay], ended[stay]
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        rows.append_(chosen)


def _noise(logits: Tensor, n_replies: int, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Exponential noise of one step, (replies, vocabulary).

    Ended replies get a row too, so that the others' draws do not change when a row leaves.

    Args:
        generators: as in `decode`.
    """
    noise = logits.new_empty(n_replies, logits.size(-1))
    if generators is None:
        return noise.exponential_()
    for rows, generator in zip(noise.split(n_replies // len(generators)), generators):
        rows.exponential_(generator=generator)
    return noise


def _choose(logits: Tensor, decoding: Decoding, special: Tensor, noise: Tensor | None, *, go_on: bool) -> Tensor:
    """The next token of each row: (R, vocabulary) -> (R,).

    Args:
        special: ids of the tokens that end a reply.
        noise: exponential, (R, vocabulary). The token of the greatest probability / noise is drawn, as by
            `torch.multinomial` (an exponential race). None = the likeliest token.
        go_on: the reply is too short to end. It ends all the same where filtering leaves no word.
    """
    if noise is None and not go_on:
        return logits.argmax(-1)  # every filter keeps it
    probabilities = _probabilities(logits, decoding)
    if go_on:
        words = probabilities.index_fill(-1, special, 0.0)
        # original: draws again until it is a word, for ever where several end tokens share all probability
        probabilities = torch.where(words.any(-1, keepdim=True), words, probabilities)
    return (probabilities if noise is None else probabilities / noise).argmax(-1)


def _probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    return top_filtering(logits / decoding.temperature, decoding.top_k, decoding.top_p).softmax(-1)


@torch.inference_mode()
def beam_search(
    model: DoubleHeads,
    contexts: Sequence[Context],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    prefix: list[int] | None = None,
    memory: PrefixCache | None = None,
) -> list[list[list[int]]]:
    """The `num_beams` best replies that the search meets for each context, best first, without special tokens.

    A reply's score is the sum of its tokens' log-probabilities divided by their number ** `length_penalty`. The special
    token that ends it counts too. A reply that has ended keeps its place in the beam until better ones push it out, so
    one beam is greedy choice. Temperature and filters only decide whether a reply shorter than `min_length` may end.

    Raises:
        SettingError: as `decode`.
    """
    special = torch.tensor(special_ids(tokenizer), device=model.device)
    n, width, prefix = len(contexts), decoding.num_beams, prefix or []
    # 1) prefill 2) repeat the cache
    rows, tokens, penalize = _begin(model, contexts, tokenizer, decoding, prefix, width, memory)
    vocabulary = rows.logits.size(-1)
    # 3) state of the beams, (n, width); a context's beams are equal at first, so only one of them counts
    sums = torch.full((n, width), -torch.inf, dtype=torch.double, device=model.device)
    sums[:, 0] = 0.0
    lengths = torch.zeros_like(sums, dtype=torch.long)
    ended = torch.zeros_like(sums, dtype=torch.bool)
    first_row = torch.arange(0, n * width, width, device=model.device)[:, None]
    stay = torch.full((vocabulary,), -torch.inf, device=model.device).index_fill(0, special[:1], 0.0)
    # 4) a token a step
    for step in range(decoding.max_length):
        log_p = _log_probabilities(penalize(tokens, rows.logits), decoding, special, go_on=step < decoding.min_length)
        totals = sums[..., None] + torch.where(ended[..., None], stay, log_p.view(n, width, vocabulary))
        lengths = torch.where(ended, lengths, step + 1)
        scores = totals / lengths[..., None] ** decoding.length_penalty  # (n, width, vocabulary)
        best = scores.flatten(1).topk(width).indices  # (n, width)
        beams, chosen = best // vocabulary, best % vocabulary
        sums, lengths = totals.flatten(1).gather(1, best), lengths.gather(1, beams)
        ended = ended.gather(1, beams) | torch.isin(chosen, special)
        origins = (first_row + beams).flatten()
        tokens = torch.cat([tokens[origins], chosen.view(-1, 1)], dim=1)
        if (ended | sums.isneginf()).all() or step + 1 == decoding.max_length:
            break
        rows.select_(origins)
        rows.append_(chosen.flatten())
    # 5) the words of each reply; where there are fewer continuations than beams, some beams hold none
    ends = (len(prefix) + lengths - ended.long()).flatten().tolist()
    found: list[list[list[int]]] = [[] for _ in contexts]
    for row, (reply, end, is_one) in enumerate(zip(tokens.tolist(), ends, sums.isfinite().flatten().tolist())):
        if is_one:
            found[row // width].append(reply[:end])
    return found


def _log_probabilities(logits: Tensor, decoding: Decoding, special: Tensor, *, go_on: bool) -> Tensor:
    """Log-probabilities of each row's next token, (R, vocabulary). Special tokens are ruled out as in `_choose`."""
    log_p = logits.log_softmax(-1)
    if go_on:
        words = _probabilities(logits, decoding).index_fill(-1, special, 0.0)
        log_p = torch.where(words.any(-1, keepdim=True), log_p.index_fill(-1, special, -torch.inf), log_p)
    return log_p
