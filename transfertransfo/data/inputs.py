"""How a dialog becomes what the model sees: segments, one sequence, packed rows, batches of rows of like length.

One sequence is `<bos> persona | <speaker2> turn | <speaker1> turn | ... | <speaker1> reply <eos>`: the speakers
alternate back from the reply, token types alternate by segment, labels are on the reply only (Wolf et al. 2019,
section 3).

A packed row holds the context of a dialog turn once, and all its candidate replies after it:

    positions    0 1 2 ... c-1 | c c+1 c+2 | c c+1 | c c+1 c+2 c+3
    segments     0 0 0 ...  0  | 1  1   1  | 2  2  | 3  3   3   3
                 context         reply 1     reply 2  reply 3 (gold)

A reply attends to the context and to itself, so its hidden states are those that it has in a sequence of its own.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.dataset import paused_collector
from transfertransfo.data.tokenization import special_ids

logger = logging.getLogger(__name__)

MODEL_INPUTS = ["input_ids", "mc_token_ids", "lm_labels", "mc_labels", "token_type_ids"]
PADDED_INPUTS = ["input_ids", "lm_labels", "token_type_ids"]
IGNORED = -100  # a label that no loss counts


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

    The original's way to batch, kept for scripts that import it; training here packs rows instead.
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
        """Tokens of the packed row."""
        return context_length(self.persona, self.history) + sum(len(reply) + 1 for reply in self.candidates)


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
        max_history: exchanges kept; the window is `2 * max_history + 1` turns.
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
                history = utterance["history"][-(2 * max_history + 1) :]
                example = Example(persona, history, utterance["candidates"][-num_candidates:])
                examples.append(fit(example, n_positions, history_start))
                cut += examples[-1] is not example
            persona = persona[-1:] + persona[:-1]
    tell_of_cut(cut, len(examples), n_positions)
    return examples


def tell_of_cut(count: int, total: int, n_positions: int) -> None:
    """Say, once for a split, how many examples `fit` has shortened."""
    if count:
        logger.warning(
            "%d of %d examples are too long for the model's %d positions: their oldest turns are left out, then the"
            " persona from its end, or first of all where it reaches beyond --history_start", count, total, n_positions,
        )  # fmt: skip


def context_length(persona: list[list[int]], history: list[list[int]]) -> int:
    """Tokens before the reply: `<bos>`, the persona, each turn with its speaker, the reply's speaker."""
    return 2 + sum(map(len, persona)) + sum(len(turn) + 1 for turn in history)


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


class Row(NamedTuple):
    """What `pack` lays out: a context, then replies that do not see one another."""

    context: list[int]  # token ids up to and with the reply's speaker token
    token_types: list[int]  # of the context; the replies continue its last one
    positions: list[int]  # likewise
    replies: list[list[int]]  # token ids, with <eos> where the reply is complete
    lm_reply: int  # index of the reply whose tokens are to be predicted; IGNORED = the row has no labels
    right: Sequence[int] = ()  # indices of all replies that are right to choose; () = that one alone


def make_row(
    example: Example, tokenizer: PreTrainedTokenizerBase, history_start: int = 0, with_eos: bool = True
) -> Row:
    """A row whose last candidate is to be predicted: the gold one in training."""
    persona, history, candidates, right = example
    context = build_input_from_segments(persona, history, [], tokenizer, with_eos=False)
    positions = context_positions(persona, history, history_start)
    replies = [reply + [tokenizer.eos_token_id] * with_eos for reply in candidates]
    return Row(context["input_ids"], context["token_type_ids"], positions, replies, len(replies) - 1, right)


class Batch(NamedTuple):
    """Packed rows. B rows, T tokens in the longest, at most K replies a row, N tokens to be predicted.

    Positions are flat: they index the batch's hidden states as (B * T, C).
    """

    input_ids: Tensor  # (B, T)
    token_type_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T), beginning again with each reply where the context ends
    segment_ids: Tensor  # (B, T), 0 in the context, k in the k-th reply, -1 in the padding
    last_positions: Tensor  # (B, K), the last token of each reply; -1 where a row has fewer than K
    lm_positions: Tensor  # (N,), the tokens that predict
    lm_labels: Tensor  # (N,), the tokens to be predicted there
    choice_labels: Tensor  # (B,), the reply that has the labels
    right: Tensor  # (B, K), True for the replies that are right to choose: that one, and those that read alike

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "Batch":
        return Batch(*(tensor.pin_memory() for tensor in self))

    def attention_mask(self) -> Tensor:
        """(B, 1, T, T), True where a query (row) attends to a key (column).

        Never None, not even where it is causal: transformers then takes a gap in the positions, as `history_start`
        leaves one, for the beginning of another sequence.
        """
        query, key = self.segment_ids[:, None, :, None], self.segment_ids[:, None, None, :]
        causal = torch.ones(key.size(-1), key.size(-1), dtype=torch.bool, device=key.device).tril()
        return causal & ((key == 0) | (key == query))  # padding attends to padding, so that no softmax is empty


def pack(rows: Sequence[Row], pad: int, multiple: int = 1) -> Batch:
    """Lay rows out as a batch, padded on the right with the token id `pad` to a multiple of so many tokens.

    On a GPU a compiled model is compiled for each row length, so a large multiple makes few of them.
    """
    longest = max(len(row.context) + sum(map(len, row.replies)) for row in rows)
    size = (len(rows), -(-longest // multiple) * multiple)
    input_ids, segments = np.full(size, pad), np.full(size, -1)
    token_types, positions = np.full(size, pad), np.zeros(size, dtype=np.int64)
    last = np.full((len(rows), max(len(row.replies) for row in rows)), -1)
    right = np.zeros(last.shape, dtype=bool)
    lm_positions, lm_labels = [], []
    for i, row in enumerate(rows):
        begin, end = i * size[1], len(row.context)
        input_ids[i, :end], token_types[i, :end] = row.context, row.token_types
        positions[i, :end], segments[i, :end] = row.positions, 0
        for k, reply in enumerate(row.replies):
            start, end = end, end + len(reply)
            input_ids[i, start:end], token_types[i, start:end] = reply, row.token_types[-1]
            positions[i, start:end] = np.arange(len(reply)) + row.positions[-1] + 1
            segments[i, start:end] = k + 1
            # an empty reply's last token is the context's
            last[i, k] = begin + (end if reply else len(row.context)) - 1
            right[i, k] = k in row.right or k == row.lm_reply
            if k == row.lm_reply:
                lm_positions += [begin + len(row.context) - 1, *range(begin + start, begin + end - 1)][: len(reply)]
                lm_labels += reply
    arrays = (
        input_ids,
        token_types,
        positions,
        segments,
        last,
        np.array(lm_positions, dtype=np.int64),
        np.array(lm_labels, dtype=np.int64),
        np.array([row.lm_reply for row in rows]),
        right,
    )
    return Batch(*map(torch.from_numpy, arrays))


class BucketSampler(Sampler[list[int]]):
    """Batches of examples of like length; over all ranks each example occurs once an epoch.

    Batches of `batch_size * world_size` examples are made, of which each rank takes its share, so that the number of
    processes decides who computes what, not what is computed. Shuffled examples are sorted by length within windows of
    `WINDOW` batches, and the batches shuffled again: padding shrinks, and neighbours change from epoch to epoch.
    """

    WINDOW = 32

    def __init__(
        self, lengths: Sequence[int], batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, which decides on the order, in every process the same; begin with batch `start` of it."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._global_batches()[self.start :]:
            yield batch[self.rank :: self.world_size].tolist()  # none of a last batch with fewer examples than ranks

    def _global_batches(self) -> list[np.ndarray]:
        size = self.batch_size * self.world_size
        if not self.shuffle:
            return list(_split(np.argsort(self.lengths, kind="stable"), size))
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        batches: list[np.ndarray] = []
        for window in _split(order, size * self.WINDOW):
            batches += _split(window[np.argsort(self.lengths[window], kind="stable")], size)
        return [batches[i] for i in generator.permutation(len(batches))]


def _split(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))


def format_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The sequence of an example's gold reply as a table: each token, its type, and the label to be predicted there."""
    instance = build_input_from_segments(
        example.persona, example.history, example.candidates[-1], tokenizer, lm_labels=True
    )
    columns = [tokenizer.convert_ids_to_tokens(instance[name]) for name in ("input_ids", "token_type_ids")]
    labels = ["" if label == IGNORED else tokenizer.convert_ids_to_tokens(label) for label in instance["lm_labels"]]
    lines = [("position", "token", "type", "label"), *zip(map(str, range(len(labels))), *columns, labels)]
    return "\n".join(f"{place:>8}  {token:<16} {kind:<11} {label}".rstrip() for place, token, kind, label in lines)
