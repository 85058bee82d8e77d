"""Loaders of batches of trees, each process's share of the examples."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import ignite.distributed as idist
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.inputs import (
    BucketSampler,
    Example,
    format_example,
    make_examples,
    make_fork,
    make_trees,
    tree_length,
)
from transfertransfo.data.trees import IGNORED, Batch, pack

logger = logging.getLogger(__name__)


Loaders = tuple[DataLoader, DataLoader | None, BucketSampler, BucketSampler | None]  # train, valid, their samplers


def first_share(count: int, share: float) -> int:
    """How many of so many dialogs their first share is, one at least."""
    return max(1, round(count * share))


def make_loaders(
    train_dialogs: list[dict],
    valid_dialogs: list[dict] | None,
    right_places: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_positions: int,
    history_start: int,
    max_history: int,
    personality_permutations: int,
    by_dialog: bool,
    train_batch_size: int,
    valid_batch_size: int,
    seed: int,
    multiple: int,
) -> Loaders:
    """Loaders of batches of trees, and their samplers: train, valid, train, valid; without valid dialogs None.

    Args:
        right_places: of each valid example the candidates that read like the gold one; any of them is a hit.
        by_dialog: whether a training batch holds whole dialogs; one of the valid split always does.
        seed: decides the order of the training examples.
        multiple: of which the length of a tree is one, in tokens.
    """
    train = make_examples(
        train_dialogs,
        max_history,
        n_positions,
        personality_permutations=personality_permutations,
        history_start=history_start,
    )
    # every process takes part in each forward, so where a share is empty one works on what does not count
    collate = partial(
        pack_examples, tokenizer=tokenizer, history_start=history_start, multiple=multiple, filler=train[0]
    )
    trees = make_trees(train) if by_dialog else [[example] for example in train]
    train_loader, train_sampler = make_loader(trees, collate, batch_size=train_batch_size, shuffle=True, seed=seed)
    log_examples("train", trees, train_sampler)
    logger.info("One example as the model sees it:\n%s", format_example(train[0], tokenizer, rows=10))
    if valid_dialogs is None:
        return train_loader, None, train_sampler, None
    # original: the persona rotates in validation too; here each validation example counts once
    valid = make_examples(valid_dialogs, max_history, n_positions, history_start=history_start)
    valid = [example._replace(right=places) for example, places in zip(valid, right_places, strict=True)]
    if sole := sum(len(example.candidates) == 1 for example in valid):
        logger.warning("accuracy: %d of %d valid replies are the only candidate, always a hit", sole, len(valid))
    trees = make_trees(valid)
    valid_loader, valid_sampler = make_loader(trees, collate, batch_size=valid_batch_size, shuffle=False)
    log_examples("valid", trees, valid_sampler)
    return train_loader, valid_loader, train_sampler, valid_sampler


def make_loader(
    trees: list[list[Example]],
    collate: Callable[[list[list[Example]]], Batch],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
) -> tuple[DataLoader, BucketSampler]:
    """A loader of batches of about `batch_size` examples, of this process's share of the trees, and its sampler."""
    sampler = BucketSampler(
        list(map(tree_length, trees)),
        batch_size,
        shuffle=shuffle,
        seed=seed,
        rank=idist.get_rank(),
        world_size=idist.get_world_size(),
        counts=list(map(len, trees)),
        labels=[sum(len(example.candidates[-1]) + 1 for example in tree) for tree in trees],  # 1 for <eos>
    )
    loader: DataLoader = DataLoader(
        trees,  # type: ignore[arg-type]  # torch takes any sequence
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each epoch would draw from torch's own, a resumed one too
    )
    return loader, sampler


def pack_examples(
    trees: Sequence[Sequence[Example]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    history_start: int,
    multiple: int,
    filler: Example,
) -> Batch:
    """A batch of trees; of none, as a process's share of a batch may be, `filler` without labels."""
    forks = [make_fork(example, tokenizer, history_start) for example in chain.from_iterable(trees)]
    sizes = list(map(len, trees))
    if not forks:
        forks, sizes = [make_fork(filler, tokenizer, history_start)._replace(lm_reply=IGNORED)], [1]
    return pack(forks, tokenizer.pad_token_id, multiple, sizes)


def log_examples(split: str, trees: list[list[Example]], sampler: BucketSampler) -> None:
    candidates = max(len(example.candidates) for example in chain.from_iterable(trees))
    logger.info(
        "%s: %d examples of up to %d candidates, %d tokens in %d trees, the longest %d",
        split,
        sampler.counts.sum(),
        candidates,
        sampler.lengths.sum(),
        len(trees),
        sampler.lengths.max(),
    )
