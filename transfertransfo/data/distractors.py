"""Distractors for datasets that have none: replies drawn from other dialogs, always the same ones."""

import numpy as np

NUM_DISTRACTORS = 19  # as PersonaChat: 19 and the gold
DISTRACTOR_SEED = 42


def add_distractors_(dialogs: list[dict]) -> None:
    """Give `NUM_DISTRACTORS` distractors to the utterances of a split that have none.

    They are drawn from the distinct replies of other dialogs, without repeats and without the gold, all equally
    likely; fewer where there are not as many. The draw depends on the split's dialogs alone.
    """
    utterances = [utterance for dialog in dialogs for utterance in dialog["utterances"]]
    wanting = np.flatnonzero([len(utterance["candidates"]) < 2 for utterance in utterances])
    if not wanting.size:
        return
    numbers: dict[str, int] = {}  # distinct reply -> its number, by first appearance
    reply = np.array([numbers.setdefault(utterance["candidates"][-1], len(numbers)) for utterance in utterances])
    dialog = np.repeat(np.arange(len(dialogs)), [len(dialog["utterances"]) for dialog in dialogs])

    # 1) order the replies: those that several dialogs give, then a block for each dialog's own, so that what may
    #    be drawn in a dialog is all but one block
    first, last = np.empty(len(numbers), dtype=np.int64), np.empty(len(numbers), dtype=np.int64)
    first[reply[::-1]], last[reply] = dialog[::-1], dialog  # of repeated indices the last assignment holds
    owner = np.where(first == last, first, -1)
    order = owner.argsort(kind="stable")
    place = order.argsort()
    start = np.searchsorted(owner[order], np.arange(len(dialogs)))
    size = np.searchsorted(owner[order], np.arange(len(dialogs)), side="right") - start

    # 2) draw among what is left without the block and the gold; 3) step over the gold and over the block
    own, gold = dialog[wanting], reply[wanting]
    shared = (owner[gold] < 0).astype(np.int64)  # else the gold is in its dialog's block
    drawn = _sample_rows(len(numbers) - size[own] - shared, NUM_DISTRACTORS)
    drawn += (drawn >= place[gold][:, None]) * shared[:, None]
    drawn += (drawn >= start[own][:, None]) * size[own][:, None]

    distinct = [*numbers]
    replies = [distinct[n] for n in order.tolist()]
    for utterance, row in zip((utterances[n] for n in wanting), drawn.tolist(), strict=True):
        utterance["candidates"][:0] = [replies[n] for n in row if n >= 0]


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
