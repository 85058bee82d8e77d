"""A model's rankings, replies and probabilities of words, as ConvAI2's metrics need them, many dialog turns at a time.

Every backend's figures are made of these, so they agree to the digit.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import OpenAIGPTTokenizer, PreTrainedTokenizerBase

from transfertransfo.data.inputs import (
    BucketSampler,
    Example,
    fit,
    make_fork,
    make_trees,
    tree_length,
    window,
)
from transfertransfo.data.tokenization import tokenize
from transfertransfo.data.trees import Fork, pack
from transfertransfo.decoding import Context, Decoding, generate
from transfertransfo.errors import SettingError
from transfertransfo.evaluation.metrics import WordProbabilities, rank, read_word_counts, split_words
from transfertransfo.model.double_heads import DoubleHeads, finite
from transfertransfo.ranking import score_candidates

TURNS_OF_THE_HEAD = 4  # whose next pieces are looked at together: 8 MB of probabilities, which stay in a cache


def read_dictionary(path: str) -> dict[str, int]:
    """The words of ParlAI's dictionary file with their counts.

    Raises:
        SettingError: a file that is not there or is something else.
    """
    try:
        return read_word_counts(path)
    except OSError as error:
        raise SettingError(f"dict_file {path}: {error.strerror}", "dict_file") from error
    except ValueError as error:
        raise SettingError(f"dict_file {error}", "dict_file") from error


class Turn(NamedTuple):
    """A dialog turn to be evaluated."""

    example: Example  # its persona, history and candidates; the gold reply need not be among these
    candidate_texts: list[str]
    label: str | None  # the gold reply, where it is known
    label_ids: list[int]


def make_turns(token_dialogs: list[dict], text_dialogs: list[dict], max_history: int) -> list[Turn]:
    """The turns of a split, from its dialogs as token ids and as text."""
    turns = []
    for dialog, text_dialog in zip(token_dialogs, text_dialogs):
        for utterance, text_utterance in zip(dialog["utterances"], text_dialog["utterances"]):
            history, candidates = window(utterance["history"], max_history), utterance["candidates"]
            texts = text_utterance["candidates"]
            turns.append(Turn(Example(dialog["personality"], history, candidates), texts, texts[-1], candidates[-1]))
    return turns


def rank_candidates(model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[list[int]]:
    """The indices of each turn's candidates, the best choice score first."""
    return list(map(rank, score_candidates(model, tokenizer, [turn.example for turn in turns])))


def reply(
    model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], decoding: Decoding
) -> list[str]:
    """A reply of the model's own to each turn, as text with its words spaced as they are."""
    contexts = [Context(turn.example.persona, turn.example.history) for turn in turns]
    replies = generate(model, contexts, tokenizer, decoding)
    return tokenizer.batch_decode(replies, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class LabelScorer:
    """Probabilities of the gold replies' words, as ConvAI2's word perplexity needs them, and losses of their tokens.

    The context of a word is the tokenised text of those before it. Mostly it is a beginning of the reply's tokens, and
    so costs nothing in a tree.

    Args:
        counts: the dictionary, word -> count (`metrics.count_words`).
        gpt2_words: "original" looks a word's first piece up without the space before it, as the original did; "spaced"
            with that space, except at a reply's beginning. It matters to GPT-2 and others whose pieces differ by that
            space, unless their tokenizer puts one at a text's beginning too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int], gpt2_words: str = "spaced"):
        self.tokenizer = tokenizer
        self.first = WordProbabilities(counts, self._first_piece)
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
        n_positions, history_start = model.n_positions, model.history_start  # each searches the configuration
        # far more than the model can see: to lay out each beginning of a label without end would fill memory
        words = [split_words(turn.label or "")[: 4 * n_positions] for turn in turns]
        beginnings = []
        for row in words:
            beginnings += [" ".join(row[:i]) for i in range(len(row) + 1)]
        contexts = iter(tokenize(self.tokenizer, beginnings))
        eos = self.tokenizer.eos_token_id
        examples, forks = [], []
        for turn, row in zip(turns, words):
            *befores, whole = itertools.islice(contexts, len(row) + 1)
            replies = [[*turn.label_ids, eos], *befores]
            example, fork = self._fork(turn, whole, replies, n_positions, history_start)
            examples.append(example)
            forks.append(fork)
        batch = pack(forks, self.tokenizer.pad_token_id, sizes=list(map(len, make_trees(examples))))
        at_words = [places[1 : 1 + len(row)] for places, row in zip(batch.last_positions.tolist(), words)]
        labels = [fork.replies[0] for fork in forks]
        at_tokens = [part.tolist() for part in batch.lm_positions.split(list(map(len, labels)))]
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
        """The results of `score` for some turns, from their words and tokens and the positions that predict them."""
        # the head once a position: first those of the words, then the others that the tokens need
        of_words, of_tokens, of_labels = (list(itertools.chain(*parts)) for parts in (at_words, at_tokens, labels))
        positions = of_words + sorted(set(of_tokens) - set(of_words))
        place = {position: i for i, position in enumerate(positions)}
        log_p = model.lm_logits(hidden[positions]).float().log_softmax(-1)
        finite(log_p[:, self.tokenizer.eos_token_id])  # a logit that is none has made its whole row NaN
        losses = -log_p[[place[position] for position in of_tokens], of_labels].double().cpu()
        found = iter(self._look_up(words, log_p[: len(of_words)].exp_()))
        results = []
        for turn_words, loss in zip(words, losses.split(list(map(len, labels)))):
            p = itertools.islice(found, len(turn_words))
            results.append({"words": list(zip(turn_words, p)), "token_nll": (loss.sum().item(), len(loss))})
        return results

    @torch.inference_mode()
    def distribution(self, model: DoubleHeads, turn: Turn, words: list[str]) -> dict[str, float]:
        """Probability of every word of the dictionary as the next one after `words` of the turn's label."""
        text = " ".join(words if turn.label is None else split_words(turn.label))
        before, whole = tokenize(self.tokenizer, [" ".join(words), text])
        _, fork = self._fork(turn, whole, [before], model.n_positions, model.history_start)
        batch = pack([fork], self.tokenizer.pad_token_id).to(model.device)
        next_piece = finite(model.lm_logits(model.packed_hidden_states(batch)[-1]).float()).softmax(-1)
        return (self.later if words else self.first).distribution(next_piece)

    def _fork(
        self, turn: Turn, whole: list[int], replies: list[list[int]], n_positions: int, history_start: int
    ) -> tuple[Example, Fork]:
        """Replies after the turn's context, which is shortened as far as the whole label needs the room."""
        example = turn.example._replace(candidates=[whole, turn.label_ids])
        example = fit(example, n_positions, history_start)
        fork = make_fork(example._replace(candidates=replies), self.tokenizer, history_start, with_eos=False)
        room = n_positions - fork.positions[-1] - 1
        return example, fork._replace(replies=[reply[:room] for reply in replies], lm_reply=0)

    def _look_up(self, words: list[list[str]], next_piece: torch.Tensor) -> list[float | None]:
        """Probabilities of all words, of which a reply's first ones stand in a dictionary of their own."""
        if self.later is self.first:
            return self.first.probabilities(list(itertools.chain(*words)), next_piece)
        found = []
        for row in words:
            here, next_piece = next_piece[: len(row)], next_piece[len(row) :]
            found += self.first.probabilities(row[:1], here[:1]) + self.later.probabilities(row[1:], here[1:])
        return found


def by_length(turns: Sequence[Turn], size: int, measured: str = "all") -> Iterator[list[int]]:
    """Indices of turns in batches of about `size`, those of a dialog together, the longest first.

    Memory that is too small then shows at once, and a batch has rows of like length.

    Args:
        measured: as in `Evaluator`. It decides which tokens of a turn the model reads.
    """
    examples = [turn.example for turn in turns]
    if measured in ("ppl", "f1"):
        examples = [turn.example._replace(candidates=[turn.label_ids]) for turn in turns]
    trees = make_trees(examples)
    counts = list(map(len, trees))
    starts = [0, *itertools.accumulate(counts)]
    for batch in reversed(list(BucketSampler(list(map(tree_length, trees)), size, shuffle=False, counts=counts))):
        yield [i for tree in reversed(batch) for i in range(starts[tree], starts[tree + 1])]


class Evaluator:
    """Measures a model on batches of turns.

    Args:
        measured: "hits@1", "ppl", "f1" or "all".
        decoding: how the replies are chosen.
        counts: gives the dictionary; called only for "ppl".
        gpt2_words: as in `LabelScorer`.
    """

    def __init__(
        self,
        model: DoubleHeads,
        tokenizer: PreTrainedTokenizerBase,
        measured: str,
        decoding: Decoding,
        *,
        counts: Callable[[], dict[str, int]],
        gpt2_words: str = "spaced",
    ):
        self.model, self.tokenizer, self.measured, self.decoding = model, tokenizer, measured, decoding
        self.scorer = LabelScorer(tokenizer, counts(), gpt2_words) if measured in ("ppl", "all") else None

    def __call__(self, turns: Sequence[Turn]) -> list[dict]:
        """Each turn's results, all computed in one batch: as far as the turn allows, and a reply if that is nothing.

        "ranking": indices of the candidates, the best first. "words": each word of the label with its probability.
        "token_nll": sum of -ln p over the label's tokens, and their number. "reply": a text.
        """
        model, tokenizer = self.model, self.tokenizer
        results: list[dict] = [{} for _ in turns]

        if self.measured in ("hits@1", "all"):
            chosen = [i for i, turn in enumerate(turns) if turn.example.candidates]
            if chosen:
                for i, ranking in zip(chosen, rank_candidates(model, tokenizer, [turns[i] for i in chosen])):
                    results[i]["ranking"] = ranking
        if self.scorer:
            chosen = [i for i, turn in enumerate(turns) if turn.label is not None]
            if chosen:
                for i, scored in zip(chosen, self.scorer.score(model, [turns[i] for i in chosen])):
                    results[i].update(scored)
        chosen = [i for i, result in enumerate(results) if self.measured in ("f1", "all") or not result]
        if chosen:
            for i, text in zip(chosen, reply(model, tokenizer, [turns[i] for i in chosen], self.decoding)):
                results[i]["reply"] = text
        return results
