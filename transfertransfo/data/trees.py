"""Sequences that begin alike as trees of tokens: a token that several of them share is in a batch, and computed, once.

Two sequences share a token as long as all tokens, types and positions up to it agree. Hidden states depend on what
stands before a token alone, so those of a shared one are the same in each of its sequences. The turns of a dialog with
their candidate replies:

    <bos> persona <speaker2> turn 1 <speaker1> +- reply A <eos>
                                               +- reply B +- <eos>
                                                          +- <speaker2> turn 2 <speaker1> +- reply C <eos>
                                                                                          +- reply D <eos>

A row of a batch is such a tree in depth-first order: a token, then all that goes on from it. So the tokens that go on
from the one in column c, however far, stand in the columns from c up to an end, and a token attends to its ancestors
and itself where `key's column <= query's column < key's end`. Positions are depths, but where a gap was left.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a label that no loss counts

# a token, its type and its position as one number, from the highest bits on
TOKEN, TYPE = 44, 24
FIELD = (1 << 20) - 1
POSITION = (1 << TYPE) - 1
BYTES = 8

BLOCK = 64  # queries whose keys are gathered together


class Fork(NamedTuple):
    """A context, and the replies that may follow it."""

    context: list[int]  # token ids up to and with the reply's speaker token
    token_types: list[int]  # of the context; the replies continue its last one
    positions: list[int]  # likewise
    replies: list[list[int]]  # token ids, with <eos> where the reply is complete; at least one
    lm_reply: int  # index of the reply whose tokens are to be predicted; IGNORED = the fork has no labels
    right: Sequence[int] = ()  # indices of all replies that are right to choose; () = that one alone


class Blocks(NamedTuple):
    """An attention mask of trees by blocks of Q queries, n of them a row, each with the keys that it needs, M at most.

    Most tokens of a large tree are no ancestors of most others: of a dialog in a window of five turns, with 577 tokens,
    a block of 64 needs 192 at most. Attention then costs n * Q * M in place of T * T.
    """

    keys: Tensor  # (B, n, M), flat positions
    mask: Tensor  # (B * n, 1, Q, M), True where a query attends to a key


class Batch(NamedTuple):
    """Trees: B of them, T tokens in the largest; of E forks with at most K replies, N tokens are to be predicted.

    Positions are flat: they index the batch's hidden states as (B * T, C).
    """

    input_ids: Tensor  # (B, T)
    token_type_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    ends: Tensor  # (B, T), the column after the last token that goes on from this one; padding ends after itself
    last_positions: Tensor  # (E, K), the last token of each reply; -1 where a fork has fewer than K
    lm_positions: Tensor  # (N,), the tokens that predict
    lm_labels: Tensor  # (N,), the tokens to be predicted there
    choice_labels: Tensor  # (E,), the reply that has the labels
    right: Tensor  # (E, K), True for the replies that are right to choose: that one, and those that read alike

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "Batch":
        return Batch(*(tensor.pin_memory() for tensor in self))

    def attention_mask(self) -> Tensor:
        """(B, 1, T, T), True where a query (row) attends to a key (column).

        Never None, not even where it is causal: transformers then takes a gap in the positions, as `history_start`
        leaves one, for the beginning of another sequence.
        """
        column = torch.arange(self.ends.size(1), device=self.ends.device)
        # padding attends to itself, so that no softmax is empty
        return ((column <= column[:, None]) & (column[:, None] < self.ends[:, None, :]))[:, None]

    def blocks(self) -> Blocks | None:
        """The same mask by blocks; None where they would need most of the keys."""
        rows, length = self.ends.shape
        n = -(-length // BLOCK)
        column = torch.arange(length, device=self.ends.device)
        starts = torch.arange(0, length, BLOCK, device=self.ends.device)[:, None]  # (n, 1)
        needed = (column < starts + BLOCK) & (self.ends[:, None] > starts)  # (B, n, T): what ends before is no ancestor
        most = int(needed.sum(-1).max())
        if 2 * most > length:
            return None
        keys = (~needed).byte().argsort(dim=-1, stable=True)[..., :most]  # (B, n, M), the needed ones in their order
        ends = self.ends.gather(1, keys.flatten(1)).view_as(keys).masked_fill(~needed.gather(-1, keys), 0)
        query = (starts + torch.arange(BLOCK, device=starts.device))[..., None]  # (n, Q, 1)
        # a query beyond the row attends to what the row's last one does
        mask = (keys[:, :, None] <= query) & (query.clamp(max=length - 1) < ends[:, :, None])
        flat = keys + length * torch.arange(rows, device=keys.device)[:, None, None]
        return Blocks(flat, mask.view(rows * n, 1, BLOCK, most))


def pack(forks: Sequence[Fork], pad: int, multiple: int = 1, sizes: Sequence[int] | None = None) -> Batch:
    """Lay forks out as trees, padded on the right with the token id `pad` to a multiple of so many tokens.

    Args:
        sizes: how many of the forks, one after another, each tree holds; None = each fork is a tree of its own.
    """
    sizes = [1] * len(forks) if sizes is None else sizes
    sequences = _sequences(forks)
    n_replies = np.array([len(fork.replies) for fork in forks])
    fork_of = np.repeat(np.arange(len(forks)), n_replies)  # (S,), of each sequence
    tree_of = np.repeat(np.arange(len(sizes)), sizes)[fork_of].tolist()
    # 1) in lexicographic order each sequence begins with what it shares with the one before, and new tokens follow
    order = sorted(range(len(sequences)), key=lambda s: (tree_of[s], sequences[s]))
    keys, paths, ends, tree_starts = _grow([sequences[s] for s in order], [tree_of[s] for s in order])
    # 2) tokens in columns
    tree = np.repeat(np.arange(len(sizes)), np.diff(tree_starts))  # (nodes,)
    longest = int(np.diff(tree_starts).max())
    size = (len(sizes), -(-longest // multiple) * multiple)
    place = np.arange(len(keys)) + (tree * size[1] - tree_starts[tree])  # flat position of each node

    def spread(values: np.ndarray, padding: np.ndarray | int) -> np.ndarray:
        row = np.empty(size, dtype=np.int64)
        row[:] = padding
        row.ravel()[place] = values
        return row

    # 3) what is read off, each sequence by its path through the tree
    row_of = np.empty(len(order), dtype=np.int64)
    row_of[order] = np.arange(len(order))
    lengths = np.array([len(sequence) // BYTES for sequence in sequences])
    last = np.full((len(forks), int(n_replies.max())), -1)
    first_sequence = np.cumsum(n_replies) - n_replies
    last[fork_of, np.arange(len(fork_of)) - first_sequence[fork_of]] = place[paths[row_of, lengths - 1]]
    right = np.zeros(last.shape, dtype=bool)
    lm_positions, lm_labels = [], []
    for i, (fork, start) in enumerate(zip(forks, first_sequence)):
        right[i, list(fork.right)] = True
        if fork.lm_reply >= 0:
            right[i, fork.lm_reply] = True
            reply, end = fork.replies[fork.lm_reply], len(fork.context) - 1
            lm_positions.append(paths[row_of[start + fork.lm_reply], end : end + len(reply)])
            lm_labels.append(reply)
    arrays = (
        spread(keys >> TOKEN, pad),
        spread(keys >> TYPE & FIELD, pad),
        spread(keys & POSITION, 0),
        spread(ends - tree_starts[tree], np.arange(1, size[1] + 1)),
        last,
        place[np.concatenate([np.empty(0, dtype=np.int64), *lm_positions])],
        np.fromiter(chain.from_iterable(lm_labels), dtype=np.int64),
        np.array([fork.lm_reply for fork in forks]),
        right,
    )
    return Batch(*map(torch.from_numpy, arrays))


def _sequences(forks: Sequence[Fork]) -> list[bytes]:
    """Each reply after its context, a token as 8 bytes: bytes compare as fast as memory is read."""
    contexts = [
        np.fromiter(chain.from_iterable(parts), dtype=np.int64)
        for parts in zip(*((fork.context, fork.token_types, fork.positions) for fork in forks))
    ]
    replies = [reply for fork in forks for reply in fork.replies]
    lengths = np.fromiter(map(len, replies), dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.fromiter(chain.from_iterable(replies), dtype=np.int64)
    fork_of = np.repeat(np.repeat(np.arange(len(forks)), [len(fork.replies) for fork in forks]), lengths)
    types = np.array([fork.token_types[-1] for fork in forks])[fork_of]
    begin = np.array([fork.positions[-1] + 1 for fork in forks])
    positions = begin[fork_of] + np.arange(len(tokens)) - np.repeat(starts, lengths)
    before, after = _keys(*contexts), _keys(tokens, types, positions)
    sequences, end, start = [], 0, 0
    for fork in forks:
        context = before[BYTES * end : BYTES * (end + len(fork.context))]
        end += len(fork.context)
        for reply in fork.replies:
            sequences.append(context + after[BYTES * start : BYTES * (start + len(reply))])
            start += len(reply)
    return sequences


def _keys(tokens: np.ndarray, types: np.ndarray, positions: np.ndarray) -> bytes:
    return (tokens << TOKEN | types << TYPE | positions).astype(">i8").tobytes()


def _grow(sequences: list[bytes], tree_of: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The trees of sequences in lexicographic order within each tree; nodes are numbered through, depth first.

    Returns:
        keys: (nodes,), token, type and position.
        paths: (S, longest), the nodes of each sequence; beyond its end without a meaning.
        ends: (nodes,), the node after the last one that goes on from this one.
        tree_starts: (trees + 1,), the first node of each tree, and their number.
    """
    lengths = np.array([len(sequence) // BYTES for sequence in sequences])
    column = np.arange(lengths.max() + 1)  # one more, where no two sequences agree
    filled = column < lengths[:, None]
    table = np.full(filled.shape, -1)
    table[filled] = np.frombuffer(b"".join(sequences), dtype=">i8")
    same = np.zeros_like(filled)
    same[1:] = (table[1:] == table[:-1]) & filled[1:]
    new_tree = np.diff(tree_of, prepend=-1) != 0
    same[new_tree] = False
    shared = same.argmin(1)  # tokens that a sequence shares with the one before
    new = filled & (column >= shared[:, None])
    counts = lengths - shared
    first = np.cumsum(counts) - counts
    paths = np.where(new, (first - shared)[:, None] + column, 0)
    np.maximum.accumulate(paths, axis=0, out=paths)  # a shared token is the last one made at its depth
    n_nodes = int(counts.sum())
    # the sequences through a node follow one another: it ends where the first one begins that is none of them
    through = np.bincount(paths[filled], minlength=n_nodes)
    ends = np.append(first, n_nodes)[np.repeat(np.arange(len(sequences)), counts) + through]
    return table[new], paths, ends, np.append(first[new_tree], n_nodes)
