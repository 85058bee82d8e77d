"""How a dialog becomes what the model sees: segments, one sequence, examples, the trees and batches that hold them.

One sequence is `<bos> persona | <speaker2> turn | <speaker1> turn | ... | <speaker1> reply <eos>`: the speakers
alternate back from the reply, token types alternate by segment, labels are on the reply only (Wolf et al. 2019,
section 3). What sequences have in common is computed once: `trees.pack`.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.dataset import paused_collector
from transfertransfo.data.tokenization import special_ids
from transfertransfo.data.trees import IGNORED, Fork

logger = logging.getLogger(__name__)

MODEL_INPUTS = ["input_ids", "mc_token_ids", "lm_labels", "mc_labels", "token_type_ids"]
PADDED_INPUTS = ["input_ids", "lm_labels", "token_type_ids"]
LONGEST_TREE = 1024  # tokens; attention costs their square


def build_input_from_segments(
    persona: list[list[int]],
    history: list[list[int]],
    reply: list[int],
    tokenizer: PreTrainedTokenizerBase,
    lm_labels: bool = False,
    with_eos: bool = True,
) -> dict:
    """One sequence from its segments: persona, history and one reply, all as token ids.

    Args:
        lm_labels: whether the reply is the one to be learnt: labels on its words and `<eos>`, -100 elsewhere.
        with_eos: whether the reply is complete.

    Returns:
        `input_ids`, `token_type_ids` and `lm_labels`, lists of the sequence's length, and `mc_token_ids`, the index of
        its last token, which the choice head reads.
    """
    bos, eos, speaker1, speaker2, _ = special_ids(tokenizer)
    turns = [*history, reply + [eos] * with_eos]
    speakers = [speaker1 if (len(turns) - i) % 2 else speaker2 for i in range(len(turns))]
    segments = [[bos, *chain(*persona)], *([speaker, *turn] for speaker, turn in zip(speakers, turns))]
    input_ids = list(chain(*segments))
    labels = [IGNORED] * len(input_ids)
    if lm_labels:
        labels[len(labels) - len(turns[-1]) :] = turns[-1]
    return {
        "input_ids": input_ids,
        # original: the persona has the type of <speaker1>, and the types alternate on from there
        "token_type_ids": [(speaker1, speaker2)[i % 2] for i, segment in enumerate(segments) for _ in segment],
        "mc_token_ids": len(input_ids) - 1,
        "lm_labels": labels,
    }


def pad_dataset(dataset: dict[str, list], padding: int = 0) -> dict[str, list]:
    """Pad the `PADDED_INPUTS` of a dict of lists of sequences, in place, to the longest of `input_ids`.

    The original's way to batch, kept for scripts that import it; training here packs trees instead.
    """
    longest = max(map(len, dataset["input_ids"]), default=0)
    for name in PADDED_INPUTS:
        value = IGNORED if name == "lm_labels" else padding
        dataset[name] = [sequence + [value] * (longest - len(sequence)) for sequence in dataset[name]]
    return dataset


class Example(NamedTuple):
    """A dialog turn in token ids: what is known before the reply, and the candidate replies, the gold one last."""

    persona: list[list[int]]
    history: list[list[int]]
    candidates: list[list[int]]
    right: Sequence[int] = ()  # places of all candidates that read like the gold one, where it is known

    @property
    def row_length(self) -> int:
        """Tokens of its tree, candidates that begin alike counted apart."""
        candidates = self.candidates
        return context_length(self.persona, self.history) + sum(map(len, candidates)) + len(candidates)


@paused_collector()
def make_examples(
    dialogs: list[dict],
    max_history: int,
    n_positions: int,
    num_candidates: int = 0,
    personality_permutations: int = 1,
    history_start: int = 0,
) -> list[Example]:
    """The examples of a split of `utils.get_dataset`.

    Args:
        max_history: exchanges kept (`window`).
        n_positions: the model's longest sequence; what does not fit is cut by `fit`, said once with a count.
        num_candidates: the last candidates kept, gold included; 0 = all.
        personality_permutations: how often each dialog occurs, its persona rotated by one sentence each time.
        history_start: as in `context_positions`.
    """
    examples = []
    cut = 0
    for dialog in dialogs:
        persona = dialog["personality"]
        for _ in range(personality_permutations):
            for utterance in dialog["utterances"]:
                history = window(utterance["history"], max_history)
                example = Example(persona, history, utterance["candidates"][-num_candidates:])
                examples.append(fit(example, n_positions, history_start))
                cut += examples[-1] is not example
            persona = persona[-1:] + persona[:-1]
    tell_of_cut(cut, len(examples), n_positions)
    return examples


def window(history: list, max_history: int) -> list:
    """The last `2 * max_history + 1` turns of a history; -1 = all of them."""
    return history if max_history < 0 else history[-(2 * max_history + 1) :]


def make_trees(examples: Sequence[Example], longest: int = LONGEST_TREE) -> list[list[Example]]:
    """Examples that stand one after another, as those of a dialog do, together where they share words.

    A tree has at most `longest` tokens, but where one example has more.
    """
    lengths = [example.row_length for example in examples]
    sizes = tree_sizes(lengths, map(shared_length, examples, examples[1:]), longest)
    rest = iter(examples)
    return [list(islice(rest, size)) for size in sizes]


def tree_sizes(lengths: Sequence[int], shared: Iterable[int], longest: int = LONGEST_TREE) -> list[int]:
    """How many sequences, one after another, each tree holds: those that share words, of `longest` tokens together.

    Args:
        lengths: tokens of each sequence.
        shared: tokens that each but the first shares with the one before.
    """
    sizes: list[int] = []
    total = 0
    for alone, common in zip(lengths, chain([0], shared)):
        total += alone - common
        if common > 2 and total <= longest:  # more than <bos> and a speaker
            sizes[-1] += 1
        else:
            sizes.append(1)
            total = alone
    return sizes


def tree_length(tree: Sequence[Example]) -> int:
    """Tokens of a tree, candidates that begin alike counted apart."""
    return sum(example.row_length for example in tree) - sum(map(shared_length, tree, tree[1:]))


def shared_length(example: Example, later: Example) -> int:
    """Tokens that the context of a later turn shares with the sequence of this turn's gold reply.

    The whole of it but for `<eos>`, where the later history is this one, the reply and more; else the persona and a
    speaker. What happens to be equal beyond that is not counted.
    """
    if example.persona != later.persona:
        return 1
    turns = len(example.history)
    same_speakers = (len(later.history) - turns) % 2 == 0
    if same_speakers and later.history[: turns + 1] == [*example.history, example.candidates[-1]]:
        return context_length(example.persona, example.history) + len(example.candidates[-1])
    return 1 + sum(map(len, example.persona)) + same_speakers


def tell_of_cut(count: int, total: int, n_positions: int) -> None:
    """Say, once for a split, how many examples `fit` has shortened."""
    if count:
        logger.warning(
            "%d of %d examples are too long for the model's %d positions: their oldest turns are left out, then the"
            " persona from its end, or first of all where it reaches beyond the start of the history",
            count,
            total,
            n_positions,
        )


def context_length(persona: list[list[int]], history: list[list[int]]) -> int:
    """Tokens before the reply: `<bos>`, the persona, each turn with its speaker, the reply's speaker."""
    return 2 + sum(map(len, persona)) + sum(map(len, history)) + len(history)


def context_positions(persona: list[list[int]], history: list[list[int]], history_start: int = 0) -> list[int]:
    """Position ids of a context's tokens.

    With a `history_start` the history begins at that position whatever the persona's length, as in the system that
    took part in ConvAI2; 0 = right after the persona.
    """
    persona_length = 1 + sum(map(len, persona))
    start = history_start or persona_length
    return [*range(persona_length), *range(start, start + context_length(persona, history) - persona_length)]


def fit(example: Example, n_positions: int, history_start: int = 0) -> Example:
    """The example, shortened if its longest sequence reaches beyond `n_positions`.

    The oldest turns go first, then the persona from its end, then the beginning of the last turn. A reply is cut only
    where it alone is too long. A persona that reaches beyond `history_start` loses its end before all else. It is cut
    within a sentence: one long sentence is not lost as a whole.
    """
    persona, history, candidates, right = example
    if history_start:
        persona = _without_end(persona, 1 + sum(map(len, persona)) - history_start)  # 1 for <bos>

    def context_end() -> int:  # the position that a reply begins at
        gap = history_start - 1 - sum(map(len, persona)) if history_start else 0
        return context_length(persona, history) + gap

    room = n_positions - 1 - max(map(len, candidates), default=0)  # for the context; 1 for <eos>
    if context_end() <= room:
        return example if persona is example.persona else example._replace(persona=persona)
    while len(history) > 1 and context_end() > room:
        history = history[2:] or history[-1:]  # by twos: token types count from the persona, so an odd number stays odd
    if not history_start:
        persona = _without_end(persona, context_end() - room)
    if history and (excess := context_end() - room) > 0:
        history = [history[0][excess:]]
    longest = n_positions - 1 - context_end()
    return Example(persona, history, [reply[:longest] for reply in candidates], right)


def _without_end(sentences: list[list[int]], count: int) -> list[list[int]]:
    """Sentences without their last `count` tokens; without any to drop, the same list."""
    while count > 0 and sentences:
        *sentences, last = sentences
        if len(last) > count:
            return [*sentences, last[:-count]]
        count -= len(last)
    return sentences


def make_fork(
    example: Example, tokenizer: PreTrainedTokenizerBase, history_start: int = 0, with_eos: bool = True
) -> Fork:
    """A fork whose last candidate is to be predicted: the gold one in training."""
    persona, history, candidates, right = example
    context = build_input_from_segments(persona, history, [], tokenizer, with_eos=False)
    positions = context_positions(persona, history, history_start)
    eos = [tokenizer.eos_token_id] * with_eos
    replies = [reply + eos for reply in candidates]
    return Fork(context["input_ids"], context["token_type_ids"], positions, replies, len(replies) - 1, right)


class BucketSampler(Sampler[list[int]]):
    """Batches of trees of like length; over all ranks each tree occurs once an epoch.

    Batches of `batch_size * world_size` examples are made, of which each rank takes its share, so that the number of
    processes decides who computes what, not what is computed. Shuffled trees are sorted by length within windows of
    `WINDOW` batches, and the batches shuffled again: padding shrinks, and neighbours change from epoch to epoch.

    A tree of several examples is not divided: batches then hold about `batch_size` examples each, a tree at least, and
    there are as many in each epoch.

    Args:
        lengths: tokens of each tree.
        counts: examples of each tree; None = one.
        labels: tokens to be predicted of each tree; None = not known.
    """

    WINDOW = 32

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        counts: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
    ):
        self.lengths = np.asarray(lengths)
        self.counts = np.ones_like(self.lengths) if counts is None else np.asarray(counts)
        self.labels = np.zeros_like(self.lengths) if labels is None else np.asarray(labels)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self._made: tuple[int, list[np.ndarray]] = (-1, [])  # the newest epoch's batches: they are asked for again

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, which decides on the order, in every process the same; begin with batch `start` of it."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return min(len(self.lengths), -(-int(self.counts.sum()) // (self.batch_size * self.world_size)))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._global_batches(self.epoch)[self.start :]:
            yield batch[self.rank :: self.world_size].tolist()  # none of a batch with fewer trees than ranks

    def count_labels(self, iterations: Iterable[int]) -> list[int]:
        """The tokens to be predicted and the examples of iterations of a run, from 1 on, by all ranks."""
        places = [divmod(iteration - 1, len(self)) for iteration in iterations]
        trees = np.concatenate([self._global_batches(1 + epoch)[place] for epoch, place in places])
        return [int(self.labels[trees].sum()), int(self.counts[trees].sum())]

    def _global_batches(self, epoch: int) -> list[np.ndarray]:
        if self._made[0] != epoch:
            self._made = (epoch, self._make_batches(epoch))
        return self._made[1]

    def _make_batches(self, epoch: int) -> list[np.ndarray]:
        if not self.shuffle:
            return self._cut(np.argsort(self.lengths, kind="stable"))
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        window = np.cumsum(self.counts[order]) - self.counts[order]
        window //= self.batch_size * self.world_size * self.WINDOW
        batches = self._cut(order[np.lexsort((self.lengths[order], window))])  # a stable sort, as each of its keys' is
        return [batches[i] for i in generator.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Trees in this order as batches: a batch ends where the examples up to there fill so many batches."""
        n = len(self)
        filled = np.arange(1, n) * self.batch_size * self.world_size
        ends = np.searchsorted(np.cumsum(self.counts[order]), filled) + 1
        # no batch is empty: each ends after the one before, and leaves a tree for each to come
        ends = np.maximum.accumulate(ends - np.arange(n - 1)) + np.arange(n - 1)
        return np.split(order, np.minimum(ends, len(order) - np.arange(n - 1, 0, -1)))


def format_example(example: Example, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> str:
    """The sequence of an example's gold reply as a table: each token, its type, and the label to be predicted there.

    Args:
        rows: lines of the table at most (None = all): those around the beginning of the reply, and both ends.
    """
    instance = build_input_from_segments(
        example.persona, example.history, example.candidates[-1], tokenizer, lm_labels=True
    )
    columns = [tokenizer.convert_ids_to_tokens(instance[name]) for name in ("input_ids", "token_type_ids")]
    labels = ["" if label == IGNORED else tokenizer.convert_ids_to_tokens(label) for label in instance["lm_labels"]]
    lines = [*zip(map(str, range(len(labels))), *columns, labels)]
    if rows is not None and len(lines) >= rows:
        # the header and both ends with a gap beside them are five lines of it
        first = next(i for i, label in enumerate(labels) if label) - (rows - 5) // 2 - 1
        first = min(max(first, 1), len(lines) - 1 - (rows - 5))
        gap = ("...", "", "", "")
        lines = [lines[0], gap, *lines[first : first + rows - 5], gap, lines[-1]]
    table = [("position", "token", "type", "label"), *lines]
    return "\n".join(f"{place:>8}  {token:<16} {kind:<11} {label}".rstrip() for place, token, kind, label in table)
