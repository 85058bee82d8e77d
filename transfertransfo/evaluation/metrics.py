"""ConvAI2's metrics as pure functions: hits@1, F1, the perplexity of words, and distinct-n beside them.

They give the numbers of ConvAI2's official evaluation (ParlAI, `projects/convai2`) to the last digit.
"""

import functools
import itertools
import math
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transfertransfo.files import write_atomically

if TYPE_CHECKING:
    import torch

# Not words of the data: ParlAI's dictionaries hold these four, with counts that keep them on top.
SPECIAL_WORDS = {"__null__": 1000000003, "__start__": 1000000002, "__end__": 1000000001, "__unk__": 1000000000}
SMOOTHING = 5  # added to each word's count; ConvAI2's evaluation of TransferTransfo

_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation, " "))
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_UNTELLING = bytes({*range(256)} - {*b"bcdfgijklmopqrsuvwxyz0123456789"})
_SPACED = re.compile(r"([.,;:!?])")
# Words of grammar, by their kinds, as `normalize` leaves them: it makes two words of "don't" and none of an article.
_FUNCTION_WORDS = """
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
we us our ours ourselves they them their theirs themselves who whom whose which what this that these those
am is are was were be been being have has had having do does did doing done
can could will would shall should may might must ought cannot
s t m d ll re ve don doesn didn isn aren wasn weren haven hasn hadn won wouldn couldn shouldn mustn ain
and or but nor so if because as until while than though although whether
of at by for with about against between into through during before after above below to from up down in out on off
over under again further
not no yes too very just only then there here now when where why how all any both each few more most other some
such own same once also
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
COPIED = 4  # words in a row that are a copy rather than a coincidence


def nll(p: float) -> float:
    """-ln p; inf of a probability that is 0 by underflow."""
    return -math.log(p) if p else math.inf


def perplexity(total: float, count: int) -> float:
    """exp of a sum of -ln p over their number: NaN where there is none, inf where it is too large for a number."""
    if not count:
        return math.nan
    return math.exp(total / count) if total / count < 709 else math.inf


def normalize(text: str) -> list[str]:
    """Words compared by hits@1 and F1: lower case, without ASCII punctuation, without the articles a, an, the.

    Punctuation becomes a space, so "don't" is two words. Source: `_normalize_answer` of ParlAI's
    `parlai/core/metrics.py`, after SQuAD's evaluation script (Rajpurkar et al. 2016).
    """
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION_TO_SPACE)).split()


def f1(prediction: str, labels: Sequence[str]) -> float:
    """F1 of the bags of normalised words, the best over the labels; 0 where no word is shared.

    precision = shared / words of the prediction, recall = shared / words of the label, F1 = 2pr / (p + r).
    Source: `F1Metric` of ParlAI's `parlai/core/metrics.py`.
    """
    words = normalize(prediction)
    return max((_f1_of_words(words, normalize(label)) for label in labels), default=0.0)


def _f1_of_words(prediction: list[str], label: list[str]) -> float:
    shared = (Counter(prediction) & Counter(label)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(label)
    return 2 * precision * recall / (precision + recall)


def rank(scores: Sequence[float]) -> list[int]:
    """Indices of the candidates, the highest score first; equal scores keep the candidates' order."""
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)  # stable in reverse too


def hit(ranking: Sequence[int], candidates: Sequence[str], label: str) -> bool:
    """hits@1 of one example: is the first candidate the label?

    Normalised texts are compared, not indices: a distractor that reads like the label is a hit, as in ParlAI.
    """
    return normalize(candidates[ranking[0]]) == normalize(label)


def right_places(rows: Sequence[Sequence[int]], texts: Sequence[str]) -> list[list[int]]:
    """For each row of candidates, the gold one last, the places of all that read like it: `hit` counts any of them.

    Args:
        rows: the candidates as indices of `texts`; rows share most of them.
    """
    counts = np.array(list(map(len, rows)))
    ends = counts.cumsum()
    used, candidates = np.unique(np.fromiter(itertools.chain(*rows), np.int64), return_inverse=True)
    golds = candidates[ends - 1].repeat(counts)
    right = candidates == golds
    # few others have the gold one's letters: only these are normalised
    numbers: dict[bytes, int] = {}
    letters = np.array([numbers.setdefault(_telling_letters(texts[i]), len(numbers)) for i in used.tolist()])
    words = functools.cache(lambda place: normalize(texts[int(used[place])]))
    for i in np.flatnonzero((letters[candidates] == letters[golds]) & ~right).tolist():
        right[i] = words(candidates[i]) == words(golds[i])
    places = (np.arange(len(right)) - (ends - counts).repeat(counts))[right].tolist()
    ends_of_right = right.cumsum()[ends - 1].tolist()
    return [places[start:end] for start, end in itertools.pairwise([0, *ends_of_right])]


def _telling_letters(text: str) -> bytes:
    """The letters and digits of a text that no article has, in ASCII. Texts that read alike have the same."""
    return text.lower().encode().translate(None, _UNTELLING)


def split_words(text: str) -> list[str]:
    """Words whose perplexity is measured: lower case, each of . , ; : ! ? a word of its own, split on white space.

    Source: the `split` tokenizer of ParlAI's `parlai/core/dict.py`.
    """
    return _SPACED.sub(r" \1 ", text.lower()).split()


def count_words(dialogs: Mapping[str, Sequence[dict]]) -> dict[str, int]:
    """ConvAI2's dictionary of a dataset of text: each word with its count, the special words included.

    `dialogs` maps "train" and "valid" (either may be missing) to dialogs `{"personality": [text], "utterances":
    [{"candidates": [text], "history": [text]}]}`, the gold reply last among the candidates. Counted are what the
    partner says in both splits, with the persona before the first turn as lines `your persona: ...`, and the gold
    replies of "train" alone. Source: `projects/convai2/build_dict.py` of ParlAI.
    """
    counts = Counter(SPECIAL_WORDS)
    for split in ("train", "valid"):
        for dialog in dialogs.get(split, ()):
            for text in _counted_texts(dialog, with_replies=split == "train"):
                counts.update(split_words(text))
    return dict(counts)


def _counted_texts(dialog: dict, with_replies: bool) -> Iterable[str]:
    yield from (f"your persona: {line}" for line in dialog["personality"])
    known = 0  # turns of the history that earlier examples have brought
    for utterance in dialog["utterances"]:
        history = utterance["history"]
        yield from history[min(known, len(history) - 1) :]  # at least the last turn: a history may be a short window
        if with_replies:
            yield utterance["candidates"][-1]
        known = len(history) + 1


def read_word_counts(path: str | os.PathLike) -> dict[str, int]:
    """Read a dictionary in ParlAI's format: a word, a tab and its count on each line.

    Raises ValueError, in one line that names the file, where a line is something else, and OSError.
    """
    counts = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                word, count = line.decode().rstrip("\r\n").split("\t")
                counts[word] = int(count)
            except ValueError:  # a UnicodeDecodeError is one
                word = ""
            if not word or counts[word] < 0:
                raise ValueError(f"{os.fspath(path)}: line {number} is not a word, a tab and its count")
    if not counts:
        raise ValueError(f"{os.fspath(path)}: the dictionary is empty")
    return counts


def write_word_counts(path: str | os.PathLike, counts: Mapping[str, int]) -> None:
    """Write a dictionary in ParlAI's format and order: the highest count first, equal counts by word."""
    lines = (f"{word}\t{count}\n" for word, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])))
    write_atomically(Path(path), "".join(lines))


class WordProbabilities:
    """Probabilities of a dictionary's words from a model of word pieces, read off the first piece of each word.

    Words with the same first piece share its probability in proportion to their counts, and the pieces that begin
    no word are left out:

        p(w) = P[first(w)] * ratio(w) / sum of P over the distinct first pieces
        ratio(w) = (count(w) + 5) / sum of (count + 5) over the words with the same first piece

    P is the model's float32 distribution of the next piece; the rest is in double precision. So the words of the
    dictionary have a probability of 1 together. Source: `next_word_probability` of TransferTransfo's ConvAI2
    evaluation, normalised as in ParlAI's `projects/convai2/eval_ppl.py`.

    `counts` is the dictionary, `first_piece` gives a word's first piece as a token id.
    """

    def __init__(self, counts: Mapping[str, int], first_piece: Callable[[str], int]):
        self.index = {word: i for i, word in enumerate(counts)}
        self.first = np.fromiter(map(first_piece, counts), np.int64, len(counts))  # (words,)
        self.pieces, group = np.unique(self.first, return_inverse=True)
        smoothed = np.fromiter(counts.values(), np.float64, len(counts)) + SMOOTHING
        self.ratio = smoothed / np.bincount(group, smoothed)[group]  # (words,)

    def probabilities(self, words: Sequence[str], next_piece: "torch.Tensor | np.ndarray") -> list[float | None]:
        """p of each word after its own context; None for a word outside the dictionary.

        `next_piece` (N, V) holds in row i the distribution of the piece that follows the context of `words[i]`, as a
        float32 softmax on any device. A probability may be 0.0 by underflow.
        """
        import torch  # not at the top: nothing else here needs it

        next_piece = torch.as_tensor(next_piece)
        index = np.array([self.index.get(word, 0) for word in words], dtype=np.int64)  # 0 stands in for None
        first = torch.from_numpy(self.first[index]).to(next_piece.device)
        chosen = next_piece.gather(1, first[:, None])[:, 0].double()  # (N,)
        p = chosen.cpu().numpy() * self.ratio[index] / self._mass(next_piece)
        return [value if word in self.index else None for word, value in zip(words, p.tolist(), strict=True)]

    def distribution(self, next_piece: "torch.Tensor | np.ndarray") -> dict[str, float]:
        """p of every word of the dictionary after one context, whose next piece is distributed as `next_piece` (V,)."""
        import torch

        next_piece = torch.as_tensor(next_piece)[None]  # (1, V)
        p = next_piece[0].double().cpu().numpy()[self.first] * self.ratio / self._mass(next_piece)
        return dict(zip(self.index, p.tolist(), strict=True))

    def _mass(self, next_piece: "torch.Tensor") -> np.ndarray:
        """Sum of each row of (N, V) over the distinct first pieces, in double precision: (N,)."""
        import torch

        pieces = torch.from_numpy(self.pieces).to(next_piece.device)
        return next_piece.index_select(1, pieces).sum(1, dtype=torch.float64).cpu().numpy()


def distinct_n(replies: Iterable[Sequence[str]], n: int) -> float:
    """Distinct n-grams over all n-grams of the replies together; 0 where there is none.

    A reply is given as its words, here `reply.lower().split()`; no n-gram crosses two replies. The figure falls with
    the number of replies, so only equal numbers compare. After Li et al. 2016, "A Diversity-Promoting Objective
    Function for Neural Conversation Models", who divide by the number of words; n-grams, as here, are today's habit.
    """
    ngrams = [ngram for words in replies for ngram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def content_words(text: str) -> list[str]:
    """The words of a text that say what it is about: those of `normalize` without English words of grammar."""
    return [word for word in normalize(text) if word not in FUNCTION_WORDS]


def persona_overlap(reply: str, persona: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of the bags of a reply's and its persona's content words; 0 where none is shared.

    It tells how much a reply takes from the persona, not whether it agrees with it. After the "Knowledge R/P/F1" of
    Lian et al. 2019, "Learning to Select Knowledge for Response Generation in Dialog Systems".
    """
    said, given = content_words(reply), content_words(" ".join(persona))
    shared = (Counter(said) & Counter(given)).total()
    if not shared:
        return 0.0, 0.0, 0.0
    precision, recall = shared / len(said), shared / len(given)
    return precision, recall, 2 * precision * recall / (precision + recall)


def word_ngrams(text: str, n: int = COPIED) -> set[tuple[str, ...]]:
    """The n-grams of a text's words, as `normalize` gives them."""
    words = normalize(text)
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def copies(reply: str, texts: Iterable[str]) -> bool:
    """Whether a reply has four words in a row from one of the texts."""
    ngrams = word_ngrams(reply)
    return any(not ngrams.isdisjoint(word_ngrams(text)) for text in texts)


def mean_error(values: Sequence[float]) -> float:
    """Standard error of the mean of examples' values: their deviation over the root of their number; NaN of one."""
    n = len(values)
    return float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def perplexity_error(nlls: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of exp(sum of nlls / sum of counts) over examples, each with its sum of -ln p and its number.

    An example's words are not independent, so that examples count, not words: the error of a ratio of two sums
    (Cochran 1977, "Sampling Techniques", section 6.4), times the perplexity by the delta method; NaN of one example.
    """
    n, total = len(nlls), sum(counts)
    if n < 2 or not total or not math.isfinite(sum(nlls)):
        return math.nan
    deviations = np.array(nlls) - sum(nlls) / total * np.array(counts)
    return perplexity(math.fsum(nlls), total) * math.sqrt(n / (n - 1) * float((deviations**2).sum())) / total
