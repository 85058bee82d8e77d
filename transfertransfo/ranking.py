"""Which of several replies comes first: by the choice head, or by what they have in common."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.inputs import Example, fit, make_fork, make_trees
from transfertransfo.data.trees import pack
from transfertransfo.model.double_heads import DoubleHeads


def agreement(replies: list[list[int]]) -> list[float]:
    """Each reply's mean F1 with the other replies. F1 is that of `metrics.f1`, of bags of tokens.

    The reply with the greatest has the minimum Bayes risk, estimated from the samples (Kumar and Byrne 2004, "Minimum
    Bayes-Risk Decoding for Statistical Machine Translation"; Eikema and Aziz 2020, "Is MAP Decoding All You Need?").
    """
    bags = list(map(Counter, replies))
    counts = torch.tensor([[bag[token] for token in set().union(*bags)] for bag in bags])  # (replies, tokens)
    shared, lengths = torch.minimum(counts[:, None], counts).sum(-1), counts.sum(-1)
    f1 = 2 * shared / (lengths[:, None] + lengths).clamp(min=1)
    return ((f1.sum(-1) - f1.diagonal()) / (len(replies) - 1)).tolist()


def best_first(replies: list[list[int]], scores: list[float]) -> list[list[int]]:
    """The replies by score, the greatest first. Replies of equal score keep their order."""
    return [replies[i] for i in descending(scores)]


def descending(scores: Sequence[float]) -> list[int]:
    """Indices of scores, the greatest first. Equal ones keep their order."""
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


@torch.inference_mode()
def score_candidates(
    model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[list[float]]:
    """The choice head's score of each candidate of each example, complete with `<eos>`, all in one batch.

    Neighbours that begin alike, as turns of a dialog do, share a tree.
    """
    seen, history_start = _fit(model, examples), model.history_start
    forks = [make_fork(example, tokenizer, history_start) for example in seen]
    batch = pack(forks, tokenizer.pad_token_id, sizes=list(map(len, make_trees(seen))))
    scores = model.score_candidates(batch).tolist()
    return [row[: len(example.candidates)] for row, example in zip(scores, examples)]


class Weighed(NamedTuple):
    """A candidate's score and log-probability."""

    score: float  # by the choice head
    log_p: float  # by the language-model head, of the candidate's tokens and `<eos>`


@torch.inference_mode()
def weigh_candidates(
    model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[list[Weighed]]:
    """Score and log-probability of each candidate of each example, complete with `<eos>`.

    Each candidate has a fork of its own, so that all are predicted. An example's forks share its context in a tree.
    """
    seen, history_start = _fit(model, examples), model.history_start
    together = [make_fork(example, tokenizer, history_start) for example in seen]
    forks = [fork._replace(replies=[reply], lm_reply=0) for fork in together for reply in fork.replies]
    sizes = [len(fork.replies) for fork in together]
    batch = pack(forks, tokenizer.pad_token_id, sizes=sizes).to(model.device)
    hidden = model.packed_hidden_states(batch)
    scores = model.choice_scores(hidden[batch.last_positions]).flatten().tolist()
    lengths = [len(fork.replies[0]) for fork in forks]
    weighed = []
    # one reply after another: all at once would take logits of (tokens of all replies, vocabulary)
    for score, positions, labels in zip(scores, batch.lm_positions.split(lengths), batch.lm_labels.split(lengths)):
        log_p = model.lm_logits(hidden[positions]).float().log_softmax(-1)  # (tokens of the reply, vocabulary)
        weighed.append(Weighed(score, float(log_p.gather(-1, labels[:, None]).sum())))
    rest = iter(weighed)
    return [list(islice(rest, size)) for size in sizes]


def _fit(model: DoubleHeads, examples: Sequence[Example]) -> list[Example]:
    """The examples as the model sees them."""
    n_positions, history_start = model.n_positions, model.history_start  # each searches the configuration
    return [fit(example, n_positions, history_start) for example in examples]
