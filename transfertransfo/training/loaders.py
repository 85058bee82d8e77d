"""Loaders of packed batches, each process's share of the examples."""

import logging
from collections.abc import Callable

import ignite.distributed as idist
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.inputs import (
    IGNORED,
    Batch,
    BucketSampler,
    Example,
    make_row,
    pack,
)

logger = logging.getLogger(__name__)


def make_loader(
    examples: list[Example],
    collate: Callable[[list[Example]], Batch | None],
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
) -> tuple[DataLoader, BucketSampler]:
    """A loader of packed batches, of this process's share of the examples, and its sampler."""
    sampler = BucketSampler(
        [example.row_length for example in examples],
        batch_size, shuffle, seed, idist.get_rank(), idist.get_world_size(),
    )  # fmt: skip
    loader: DataLoader = DataLoader(
        examples,  # type: ignore[arg-type]  # torch takes any sequence
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each epoch would draw from torch's own, a resumed one too
    )
    return loader, sampler


def pack_examples(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    history_start: int,
    multiple: int,
    filler: Example | None = None,
) -> Batch | None:
    """A batch of examples; of none, as a process's share of a last batch may be, `filler` without labels, or None."""
    rows = [make_row(example, tokenizer, history_start) for example in examples]
    if not rows and filler:
        rows = [make_row(filler, tokenizer, history_start)._replace(lm_reply=IGNORED)]
    return pack(rows, tokenizer.pad_token_id, multiple) if rows else None


def log_examples(split: str, examples: list[Example], sampler: BucketSampler) -> None:
    candidates = max(len(example.candidates) for example in examples)
    logger.info(
        "%s: %d examples of up to %d candidates, %d tokens in packed rows, the longest %d",
        split,
        len(examples),
        candidates,
        sampler.lengths.sum(),
        sampler.lengths.max(),
    )
