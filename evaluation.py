"""What ConvAI2's metrics ask of a model, many dialog turns at a time: rankings, replies, probabilities of words.

Every backend's figures are made of these three, so they agree to the digit.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import OpenAIGPTTokenizer, PreTrainedTokenizerBase

from decoding import generate
from inputs import Example, Row, build_input_from_segments, context_length, fit, make_row, pack
from metrics import WordProbabilities, rank, split_words
from model import DoubleHeads
from utils import tokenize


class Turn(NamedTuple):
    """A dialog turn to be evaluated. Persona, history and candidates are token ids."""

    persona: list[list[int]]
    history: list[list[int]]
    candidates: list[list[int]]
    candidate_texts: list[str]
    label: str  # the gold reply

    @property
    def length(self) -> int:
        """Tokens of the packed row: what it costs."""
        return context_length(self.persona, self.history) + sum(len(candidate) + 1 for candidate in self.candidates)


def make_turns(token_dialogs: list[dict], text_dialogs: list[dict], max_history: int) -> list[Turn]:
    """The turns of a split, from its dialogs as token ids and as text."""
    return [
        Turn(
            dialog["personality"],
            utterance["history"][-(2 * max_history + 1) :],
            utterance["candidates"],
            text_utterance["candidates"],
            text_utterance["candidates"][-1],
        )
        for dialog, text_dialog in zip(token_dialogs, text_dialogs)
        for utterance, text_utterance in zip(dialog["utterances"], text_dialog["utterances"])
    ]


@torch.inference_mode()
def rank_candidates(model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[list[int]]:
    """For each turn the indices of its candidates, the best choice score first."""
    # Equal candidates are scored once: rounding, which depends on the place in a row, must not order them.
    places = [{reply: i for i, reply in enumerate(dict.fromkeys(map(tuple, turn.candidates)))} for turn in turns]
    examples = [
        fit(Example(turn.persona, turn.history, [list(candidate) for candidate in distinct]), model.n_positions)
        for turn, distinct in zip(turns, places)
    ]
    batch = pack([make_row(example, tokenizer) for example in examples], tokenizer.pad_token_id).to(model.device)
    scores = model.choice_scores(model.packed_hidden_states(batch)[batch.last_positions]).tolist()
    return [
        rank([row[distinct[tuple(candidate)]] for candidate in turn.candidates])
        for row, distinct, turn in zip(scores, places, turns)
    ]


def reply(
    model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], args: Namespace
) -> list[str]:
    """For each turn a reply of the model's own, decoded as `args` say; as text with its words spaced as they are."""
    replies = generate(model, [(turn.persona, turn.history) for turn in turns], tokenizer, args)
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in replies]


class WordScorer:
    """Probabilities of the gold replies' words, as ConvAI2's word perplexity needs them.

    The context of a word is the tokenised text of those before it. One forward serves all words of a reply wherever
    these contexts are beginnings of the whole reply's tokens; the others join the packed row as replies of their own.

    Args:
        counts: the dictionary, word -> count (`metrics.count_words`).
        gpt2_words: "original" looks a word's first piece up without the space before it, as the original did; "spaced"
            with that space, except at a reply's beginning. It matters to GPT-2, whose pieces differ by that space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int], gpt2_words: str = "spaced"):
        self.tokenizer = tokenizer
        self.first = WordProbabilities(counts, lambda word: self._first_piece(word))
        spaced = gpt2_words == "spaced" and not isinstance(tokenizer, OpenAIGPTTokenizer)
        self.later = WordProbabilities(counts, lambda word: self._first_piece(" " + word)) if spaced else self.first

    def _first_piece(self, word: str) -> int:
        if isinstance(self.tokenizer, OpenAIGPTTokenizer):  # the word as it stands: BPE without splitting it first
            return self.tokenizer.backend_tokenizer.model.tokenize(word)[0].id
        return tokenize(self.tokenizer, [word])[0][0]

    @torch.inference_mode()
    def probabilities(self, model: DoubleHeads, turns: Sequence[Turn]) -> list[list[tuple[str, float | None]]]:
        """Each word of each turn's label with its probability, None where the dictionary does not have it."""
        words = [split_words(turn.label) for turn in turns]
        contexts = iter(tokenize(self.tokenizer, [" ".join(w[:i]) for w in words for i in range(len(w) + 1)]))
        rows, places = [], []  # of each word: its row, the reply in it, the token of that reply which it is
        for b, (turn, turn_words) in enumerate(zip(turns, words)):
            *befores, whole = (next(contexts) for _ in range(len(turn_words) + 1))
            replies = [whole]
            for before in befores:
                if len(before) < len(whole) and whole[: len(before)] == before:
                    places.append((b, 0, len(before)))
                else:
                    places.append((b, len(replies), len(before)))
                    replies.append(before)
            rows.append(self._row(model, turn, replies))
        next_piece = self._next_piece(model, rows, places)
        found = iter(self._look_up(words, next_piece))
        return [[(word, next(found)) for word in turn_words] for turn_words in words]

    @torch.inference_mode()
    def distribution(self, model: DoubleHeads, turn: Turn, words: list[str]) -> dict[str, float]:
        """Probability of every word of the dictionary as the next one after `words` of a reply."""
        (before,) = tokenize(self.tokenizer, [" ".join(words)])
        (next_piece,) = self._next_piece(model, [self._row(model, turn, [before])], [(0, 0, len(before))])
        return (self.later if words else self.first).distribution(next_piece)

    def _row(self, model: DoubleHeads, turn: Turn, replies: list[list[int]]) -> Row:
        persona, history, replies = fit(Example(turn.persona, turn.history, replies), model.n_positions)
        context = build_input_from_segments(persona, history, [], self.tokenizer, with_eos=False)
        return Row(context["input_ids"], context["token_type_ids"], replies, 0)

    def _next_piece(self, model: DoubleHeads, rows: list[Row], places: list[tuple[int, int, int]]) -> torch.Tensor:
        """Distributions of the piece at each place: (number of places, vocabulary)."""
        batch = pack(rows, self.tokenizer.pad_token_id).to(model.device)
        hidden = model.packed_hidden_states(batch)
        row_length = batch.input_ids.size(1)
        positions = []
        for b, k, token in places:
            context, replies = rows[b].context, rows[b].replies
            start = len(context) + sum(map(len, replies[:k]))
            token = min(token, len(replies[k]))  # a reply cut because the model has no more positions
            positions.append(b * row_length + (start + token - 1 if token else len(context) - 1))
        return model.lm_logits(hidden[torch.tensor(positions, device=model.device)]).float().softmax(-1)

    def _look_up(self, words: list[list[str]], next_piece: torch.Tensor) -> list[float | None]:
        """Probabilities of all words, of which a reply's first ones stand in a dictionary of their own."""
        if self.later is self.first:
            return self.first.probabilities([word for row in words for word in row], next_piece)
        found = []
        for row in words:
            here, next_piece = next_piece[: len(row)], next_piece[len(row) :]
            found += self.first.probabilities(row[:1], here[:1]) + self.later.probabilities(row[1:], here[1:])
        return found


def by_length(turns: Sequence[Turn], size: int) -> Iterator[list[int]]:
    """Indices of turns in batches of like length, the longest first, so that memory that is too small shows at once."""
    order = sorted(range(len(turns)), key=lambda i: -turns[i].length)
    return (order[start : start + size] for start in range(0, len(order), size))
