"""Distractors for datasets that have none: replies drawn from other dialogs, always the same ones."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

Reply = TypeVar("Reply", bound=Hashable)
NUM_DISTRACTORS = 19  # as PersonaChat: 19 and the gold
DISTRACTOR_SEED = 42


def add_distractors_(dialogs: list[dict]) -> None:
    """Give distractors to the utterances of a split that have none, as `draw_distractors` does."""
    utterances = [utterance for dialog in dialogs for utterance in dialog["utterances"]]
    golds = [utterance["candidates"][-1] for utterance in utterances]
    counts = [len(utterance["candidates"]) for utterance in utterances]
    for place, drawn in draw_distractors(golds, counts, [len(dialog["utterances"]) for dialog in dialogs]).items():
        utterances[place]["candidates"][:0] = drawn


def draw_distractors(golds: Sequence[Reply], counts: Sequence[int], turns: Sequence[int]) -> dict[int, list[Reply]]:
    """`NUM_DISTRACTORS` distractors for each utterance of a split that has none, by the utterance's place in the split.

    They are drawn from the distinct replies of other dialogs, without repeats and without the gold, all equally
    likely; fewer where there are not as many. The draw depends on the split's dialogs alone: who holds some of them out
    draws for each side by itself.

    Args:
        golds: the reply of each utterance, as a text or any sign for one.
        counts: the candidates of each utterance, the gold one included.
        turns: the utterances of each dialog.
    """
    wanting = np.flatnonzero(np.asarray(counts) < 2)
    if not wanting.size:
        return {}
    numbers: dict[Reply, int] = {}  # distinct reply -> its number, by first appearance
    reply = np.array([numbers.setdefault(gold, len(numbers)) for gold in golds])
    dialog = np.repeat(np.arange(len(turns)), turns)

    # 1) order the replies: those that several dialogs give, then a block for each dialog's own, so that what may
    #    be drawn in a dialog is all but one block
    first, last = np.empty(len(numbers), dtype=np.int64), np.empty(len(numbers), dtype=np.int64)
    first[reply[::-1]], last[reply] = dialog[::-1], dialog  # of repeated indices the last assignment holds
    owner = np.where(first == last, first, -1)
    order = owner.argsort(kind="stable")
    place = order.argsort()
    start = np.searchsorted(owner[order], np.arange(len(turns)))
    size = np.searchsorted(owner[order], np.arange(len(turns)), side="right") - start

    # 2) draw among what is left without the block and the gold; 3) step over the gold and over the block
    own, gold = dialog[wanting], reply[wanting]
    shared = (owner[gold] < 0).astype(np.int64)  # else the gold is in its dialog's block
    drawn = _sample_rows(len(numbers) - size[own] - shared, NUM_DISTRACTORS)
    drawn += (drawn >= place[gold][:, None]) * shared[:, None]
    drawn += (drawn >= start[own][:, None]) * size[own][:, None]

    distinct = [*numbers]
    replies = [distinct[n] for n in order.tolist()]
    return {place: [replies[n] for n in row if n >= 0] for place, row in zip(wanting.tolist(), drawn.tolist())}


def _sample_rows(sizes: np.ndarray, count: int) -> np.ndarray:
    """(R,) -> (R, count): distinct numbers below each size, in random order; -1 for those that it lacks.

    Floyd's algorithm, on all rows at once (Bentley and Floyd, "A sample of brilliance", CACM 30(9), 1987).
    """
    random = np.random.RandomState(DISTRACTOR_SEED)  # NumPy keeps its stream the same in all releases
    drawn = np.full((count, len(sizes)), -1)  # turned, so that a step compares whole rows
    for step in range(count):
        top = sizes - count + step
        draw = (random.random_sample(len(sizes)) * (top + 1)).astype(np.int64)
        taken = (drawn[:step] == draw).any(axis=0)
        drawn[step] = np.where(top < 0, -1, np.where(taken, top, draw))
    shuffle = random.random_sample((len(sizes), count)).argsort(axis=1)
    return np.take_along_axis(drawn.T, shuffle, axis=1)
