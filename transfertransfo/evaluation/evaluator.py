"""What ConvAI2's metrics ask of a model, many dialog turns at a time: rankings, replies, probabilities of words.

Every backend's figures are made of these, so they agree to the digit.
"""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import OpenAIGPTTokenizer, PreTrainedTokenizerBase

from transfertransfo.data.inputs import Example, Row, context_length, fit, make_row, pack
from transfertransfo.data.tokenization import tokenize
from transfertransfo.decoding import Context, generate
from transfertransfo.errors import UserError
from transfertransfo.evaluation.metrics import WordProbabilities, rank, read_word_counts, split_words
from transfertransfo.model.double_heads import DoubleHeads

TURNS_OF_THE_HEAD = 4  # whose next pieces are looked at together: 8 MB of probabilities, which stay in a cache


def read_dictionary(path: str) -> dict[str, int]:
    """The words of `--dict_file` with their counts.

    Raises:
        UserError: a file that is not there or is something else.
    """
    try:
        return read_word_counts(path)
    except OSError as error:
        raise UserError(f"--dict_file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--dict_file {error}") from error


class Turn(NamedTuple):
    """A dialog turn to be evaluated. Persona, history and candidates are token ids."""

    persona: list[list[int]]
    history: list[list[int]]
    candidates: list[list[int]]
    candidate_texts: list[str]
    label: str | None  # the gold reply, where it is known
    label_ids: list[int]

    @property
    def example(self) -> Example:
        return Example(self.persona, self.history, self.candidates)


def make_turns(token_dialogs: list[dict], text_dialogs: list[dict], max_history: int) -> list[Turn]:
    """The turns of a split, from its dialogs as token ids and as text."""
    return [
        Turn(
            dialog["personality"],
            utterance["history"][-(2 * max_history + 1) :],
            utterance["candidates"],
            text_utterance["candidates"],
            text_utterance["candidates"][-1],
            utterance["candidates"][-1],
        )
        for dialog, text_dialog in zip(token_dialogs, text_dialogs)
        for utterance, text_utterance in zip(dialog["utterances"], text_dialog["utterances"])
    ]


@torch.inference_mode()
def rank_candidates(model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[list[int]]:
    """For each turn the indices of its candidates, the best choice score first."""
    examples = [fit(turn.example, model.n_positions, model.history_start) for turn in turns]
    # Equal candidates are scored once: rounding, which depends on the place in a row, must not order them.
    distinct = [list(dict.fromkeys(map(tuple, example.candidates))) for example in examples]
    rows = [
        make_row(
            example._replace(candidates=[list(candidate) for candidate in candidates]), tokenizer, model.history_start
        )
        for example, candidates in zip(examples, distinct)
    ]
    batch = pack(rows, tokenizer.pad_token_id).to(model.device)
    scores = model.choice_scores(model.packed_hidden_states(batch)[batch.last_positions]).tolist()
    score_of = [dict(zip(candidates, row)) for candidates, row in zip(distinct, scores)]
    return [
        rank([scores[tuple(candidate)] for candidate in example.candidates])
        for example, scores in zip(examples, score_of)
    ]


def reply(model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], args: Namespace) -> list[str]:
    """For each turn a reply of the model's own, decoded as `args` say; as text with its words spaced as they are."""
    replies = generate(model, [Context(turn.persona, turn.history) for turn in turns], tokenizer, args)
    return tokenizer.batch_decode(replies, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class LabelScorer:
    """Probabilities of the gold replies' words, as ConvAI2's word perplexity needs them, and losses of their tokens.

    The context of a word is the tokenised text of those before it. One forward serves all words of a reply wherever
    these contexts are beginnings of the reply's tokens; the others join the packed row as replies of their own.

    Args:
        counts: the dictionary, word -> count (`metrics.count_words`).
        gpt2_words: "original" looks a word's first piece up without the space before it, as the original did; "spaced"
            with that space, except at a reply's beginning. It matters to GPT-2 and others whose pieces differ by that
            space, unless their tokenizer puts one at a text's beginning too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int], gpt2_words: str = "spaced"):
        self.tokenizer = tokenizer
        self.first = WordProbabilities(counts, lambda word: self._first_piece(word))
        one, two = tokenize(tokenizer, ["a", "a a"])
        spaced = gpt2_words == "spaced" and two != one + one
        self.later = WordProbabilities(counts, lambda word: self._first_piece(" " + word)) if spaced else self.first

    def _first_piece(self, word: str) -> int:
        if isinstance(self.tokenizer, OpenAIGPTTokenizer):  # the word as it stands: BPE without splitting it first
            return self.tokenizer.backend_tokenizer.model.tokenize(word)[0].id
        return tokenize(self.tokenizer, [word])[0][0]

    @torch.inference_mode()
    def score(self, model: DoubleHeads, turns: Sequence[Turn]) -> list[dict]:
        """For each turn's label, from one forward of the batch:

        "words": each word with its probability, None where the dictionary does not have it.
        "token_nll": the sum of -ln p over its tokens with `<eos>`, which training minimises, and their number. It
            depends on the tokenizer: it compares within a family only.
        """
        # far more than the model can see: to lay out each beginning of a label without end would fill memory
        words = [split_words(turn.label or "")[: 4 * model.n_positions] for turn in turns]
        rows, places = self._lay_out(model, turns, words)
        batch = pack(rows, self.tokenizer.pad_token_id)
        positions = iter(_flat_positions(rows, places, batch.input_ids.size(1)))
        at_words = [[next(positions) for _ in turn_words] for turn_words in words]
        at_tokens = [part.tolist() for part in batch.lm_positions.split([len(row.replies[0]) for row in rows])]
        labels = [row.replies[0] for row in rows]
        hidden = model.packed_hidden_states(batch.to(model.device))
        results = []
        for start in range(0, len(turns), TURNS_OF_THE_HEAD):
            part = slice(start, start + TURNS_OF_THE_HEAD)
            results += self._read_off(model, hidden, words[part], at_words[part], at_tokens[part], labels[part])
        return results

    def _read_off(
        self,
        model: DoubleHeads,
        hidden: torch.Tensor,
        words: list[list[str]],
        at_words: list[list[int]],
        at_tokens: list[list[int]],
        labels: list[list[int]],
    ) -> list[dict]:
        """What `score` gives, of some turns: their words and tokens, and the positions that predict them."""
        # the head once for each position: those of the words, then what else the tokens need
        of_words, of_tokens, of_labels = (list(itertools.chain(*parts)) for parts in (at_words, at_tokens, labels))
        positions = of_words + sorted(set(of_tokens) - set(of_words))
        place = {position: i for i, position in enumerate(positions)}
        log_p = model.lm_logits(hidden[positions]).float().log_softmax(-1)
        losses = -log_p[[place[position] for position in of_tokens], of_labels].double().cpu()
        found = iter(self._look_up(words, log_p[: len(of_words)].exp_()))
        return [
            {"words": [(word, next(found)) for word in turn_words], "token_nll": (loss.sum().item(), len(loss))}
            for turn_words, loss in zip(words, losses.split(list(map(len, labels))))
        ]

    @torch.inference_mode()
    def distribution(self, model: DoubleHeads, turn: Turn, words: list[str]) -> dict[str, float]:
        """Probability of every word of the dictionary as the next one after `words` of the turn's label."""
        text = " ".join(words if turn.label is None else split_words(turn.label))
        before, whole = tokenize(self.tokenizer, [" ".join(words), text])
        batch = pack([self._row(model, turn, whole, [before])], self.tokenizer.pad_token_id).to(model.device)
        next_piece = model.lm_logits(model.packed_hidden_states(batch)[-1]).float().softmax(-1)
        return (self.later if words else self.first).distribution(next_piece)

    def _lay_out(
        self, model: DoubleHeads, turns: Sequence[Turn], words: list[list[str]]
    ) -> tuple[list[Row], list[tuple[int, int, int]]]:
        """Rows that begin with the label's own tokens, and for each word its row, the reply in it and the token there.

        The label's text as words, lower-cased and with spaces, mostly has the same tokens; else it is the next reply.
        """
        contexts = iter(tokenize(self.tokenizer, [" ".join(w[:i]) for w in words for i in range(len(w) + 1)]))
        rows, places = [], []
        for b, (turn, turn_words) in enumerate(zip(turns, words)):
            *befores, whole = (next(contexts) for _ in range(len(turn_words) + 1))
            replies = [[*turn.label_ids, self.tokenizer.eos_token_id]] + [whole] * (whole != turn.label_ids)
            texts = len(replies)
            for before in befores:
                n = len(before)
                k = next((k for k in range(texts) if replies[k][:n] == before and n < len(replies[k])), len(replies))
                if k == len(replies):
                    replies.append(before)
                places.append((b, k, n))
            rows.append(self._row(model, turn, whole, replies))
        return rows, places

    def _row(self, model: DoubleHeads, turn: Turn, whole: list[int], replies: list[list[int]]) -> Row:
        """The replies after one context: where the model is too short, that which leaves room for the whole label."""
        example = Example(turn.persona, turn.history, [whole, turn.label_ids])
        example = fit(example, model.n_positions, model.history_start)._replace(candidates=replies)
        row = make_row(example, self.tokenizer, model.history_start, with_eos=False)
        room = model.n_positions - row.positions[-1] - 1
        return row._replace(replies=[reply[:room] for reply in replies], lm_reply=0)

    def _look_up(self, words: list[list[str]], next_piece: torch.Tensor) -> list[float | None]:
        """Probabilities of all words, of which a reply's first ones stand in a dictionary of their own."""
        if self.later is self.first:
            return self.first.probabilities([word for row in words for word in row], next_piece)
        found = []
        for row in words:
            here, next_piece = next_piece[: len(row)], next_piece[len(row) :]
            found += self.first.probabilities(row[:1], here[:1]) + self.later.probabilities(row[1:], here[1:])
        return found


def _flat_positions(rows: list[Row], places: list[tuple[int, int, int]], row_length: int) -> list[int]:
    """Where in a packed batch stands the token before the n-th one of the k-th reply of row b."""
    positions = []
    for b, k, n in places:
        replies = rows[b].replies
        start = b * row_length + len(rows[b].context) + sum(map(len, replies[:k]))
        positions.append(start + min(n, len(replies[k])) - 1)  # less than n where a reply is cut
    return positions


def by_length(turns: Sequence[Turn], size: int, measured: str = "all") -> Iterator[list[int]]:
    """Indices of turns in batches of like length, the longest first, so that memory that is too small shows at once.

    Args:
        measured: the `eval_type`, which decides what of a turn the model reads: without the candidates a batch has
            rows of other lengths, a fifth of them padding if the candidates were counted.
    """
    if measured in ("ppl", "f1"):
        label = measured == "ppl"
        lengths = [context_length(turn.persona, turn.history) + label * len(turn.label_ids) for turn in turns]
    else:
        lengths = [turn.example.row_length for turn in turns]
    order = sorted(range(len(turns)), key=lambda i: -lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))


class Evaluator:
    """Answers what `args.eval_type` asks of a model: "hits@1", "ppl", "f1" or "all".

    Args:
        args: the flags of the model, of decoding, and `gpt2_ppl`.
        counts: gives the dictionary; called only for "ppl".
    """

    def __init__(
        self,
        model: DoubleHeads,
        tokenizer: PreTrainedTokenizerBase,
        args: Namespace,
        counts: Callable[[], dict[str, int]],
    ):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.scorer = LabelScorer(tokenizer, counts(), args.gpt2_ppl) if args.eval_type in ("ppl", "all") else None

    def __call__(self, turns: Sequence[Turn]) -> list[dict]:
        """Each turn's results, all computed in one batch: as far as the turn allows, and a reply if that is nothing.

        "ranking": indices of the candidates, the best first. "words": each word of the label with its probability.
        "token_nll": sum of -ln p over the label's tokens, and their number. "reply": a text.
        """
        model, tokenizer, measured = self.model, self.tokenizer, self.args.eval_type
        results: list[dict] = [{} for _ in turns]

        def add(chosen: list[int], function: Callable[[list[Turn]], Iterable[dict]]) -> None:
            for i, result in zip(chosen, function([turns[i] for i in chosen]) if chosen else ()):
                results[i].update(result)

        if measured in ("hits@1", "all"):
            add(
                [i for i, turn in enumerate(turns) if turn.candidates],
                lambda batch: ({"ranking": ranking} for ranking in rank_candidates(model, tokenizer, batch)),
            )
        if self.scorer:
            add([i for i, turn in enumerate(turns) if turn.label is not None], partial(self.scorer.score, model))
        add(
            [i for i, result in enumerate(results) if measured in ("f1", "all") or not result],
            lambda batch: ({"reply": text} for text in reply(model, tokenizer, batch, self.args)),
        )
        return results
