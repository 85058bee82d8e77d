"""Trees of tokens hold each sequence, each shared beginning once, and let a token see its ancestors alone."""

import random
from itertools import chain

import pytest
import torch

from transfertransfo.data.inputs import (
    IGNORED,
    Example,
    build_input_from_segments,
    context_positions,
    make_examples,
    make_fork,
    make_trees,
)
from transfertransfo.data.trees import Batch, Fork, pack
from transfertransfo.model.sources import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["gpt"])


def random_dialogs(generator: random.Random, vocabulary: int = 100) -> list[dict]:
    """A few words make candidates that are equal, that begin alike, and that begin one another."""

    def sentence() -> list[int]:
        return [generator.randrange(5, vocabulary) for _ in range(generator.randint(1, 5))]

    dialogs = []
    for _ in range(generator.randint(1, 3)):
        utterances, said = [], [sentence() for _ in range(generator.randint(0, 2))]
        for _ in range(generator.randint(1, 4)):
            candidates = [sentence() for _ in range(generator.randint(1, 5))]
            utterances.append({"history": said, "candidates": candidates})
            said = [*said, candidates[-1], sentence()]
        dialogs.append({"personality": [sentence() for _ in range(generator.randint(0, 3))], "utterances": utterances})
    return dialogs


def random_trees(seed: int, max_history: int, vocabulary: int, history_start: int = 0) -> list[list[Example]]:
    dialogs = random_dialogs(random.Random(seed), vocabulary)
    return make_trees(make_examples(dialogs, max_history, 512, history_start=history_start))


def pack_trees(trees: list[list[Example]], tokenizer, history_start: int = 0) -> Batch:
    forks = [make_fork(example, tokenizer, history_start) for example in chain.from_iterable(trees)]
    return pack(forks, tokenizer.pad_token_id, sizes=[len(tree) for tree in trees])


def sequences_of(example: Example, tokenizer, history_start: int) -> list[tuple]:
    """Each candidate's sequence by the definition of one: a (token, type, position) each, and its labels."""
    start = context_positions(example.persona, example.history, history_start)
    found = []
    for reply in example.candidates:
        one = build_input_from_segments(example.persona, example.history, reply, tokenizer, lm_labels=True)
        positions = start + [start[-1] + 1 + i for i in range(len(reply) + 1)]
        found.append((list(zip(one["input_ids"], one["token_type_ids"], positions, strict=True)), one["lm_labels"]))
    return found


@pytest.mark.parametrize("history_start", [0, 20])
@pytest.mark.parametrize("vocabulary", [7, 100])
@pytest.mark.parametrize("max_history", [0, 1, 2, -1])
def test_a_tree_holds_each_sequence_and_nothing_twice(tokenizer, max_history, vocabulary, history_start):
    for seed in range(15):
        trees = random_trees(seed, max_history, vocabulary, history_start)
        batch = pack_trees(trees, tokenizer, history_start)
        length = batch.input_ids.size(1)
        mask, labels = batch.attention_mask()[:, 0], batch.lm_labels.tolist()
        fields = torch.stack([batch.input_ids, batch.token_type_ids, batch.position_ids], -1)
        fork = 0
        at = iter(batch.lm_positions.tolist())
        for row, tree in enumerate(trees):
            beginnings = set()
            for example in tree:
                sequences = sequences_of(example, tokenizer, history_start)
                assert batch.choice_labels[fork] == len(sequences) - 1
                assert (batch.last_positions[fork] >= 0).tolist() == [k < len(sequences) for k in range(
                    batch.last_positions.size(1))]  # fmt: skip
                for k, (tokens, _) in enumerate(sequences):
                    beginnings |= {tuple(tokens[: i + 1]) for i in range(len(tokens))}
                    last = batch.last_positions[fork, k].item() - row * length
                    # what the last token sees is the sequence, in its order
                    columns = mask[row, last].nonzero().flatten()
                    assert list(map(tuple, fields[row, columns].tolist())) == tokens
                    for i, column in enumerate(columns.tolist()):
                        assert torch.equal(mask[row, column].nonzero().flatten(), columns[: i + 1])
                gold = [label for label in sequences[-1][1] if label != IGNORED]
                # what predicts a token is the one before it in its sequence
                first = len(columns) - 1 - len(gold)
                assert [next(at) - row * length for _ in gold] == columns[first:-1].tolist()
                assert labels[: len(gold)] == gold
                del labels[: len(gold)]
                fork += 1
            padding = torch.arange(length) >= len(beginnings)
            assert len(set(map(tuple, mask[row, ~padding].tolist()))) == len(beginnings)
            assert (fields[row, padding] == torch.tensor([tokenizer.pad_token_id, tokenizer.pad_token_id, 0])).all()
            assert torch.equal(mask[row, padding], torch.eye(length, dtype=torch.bool)[padding])
        assert not labels and fork == len(batch.last_positions)


def test_forks_of_other_trees_are_not_shared(tokenizer):
    """Two rows may hold the same dialog, as two copies of one do."""
    example = Example([[5]], [[6]], [[7, 8], [9]])
    alone, twice = pack_trees([[example]], tokenizer), pack_trees([[example], [example]], tokenizer)
    assert torch.equal(twice.input_ids, alone.input_ids.repeat(2, 1))
    assert torch.equal(twice.ends, alone.ends.repeat(2, 1))
    together = pack_trees([[example, example]], tokenizer)
    assert torch.equal(together.input_ids, alone.input_ids)
    assert torch.equal(together.last_positions, alone.last_positions.repeat(2, 1))
    assert together.lm_labels.tolist() == alone.lm_labels.tolist() * 2


def test_replies_that_are_empty():
    """Right after the speaker's token nothing is predicted yet, and what the choice head reads is that token."""
    forks = [Fork([1, 2, 3], [4, 4, 5], [0, 1, 2], [[]], 0), Fork([1, 2], [4, 5], [0, 1], [[7, 8], []], 0)]
    batch = pack(forks, pad=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 9], [1, 2, 7, 8]]
    assert batch.last_positions.tolist() == [[2, -1], [7, 5]]
    assert batch.lm_positions.tolist() == [5, 6]
    assert batch.lm_labels.tolist() == [7, 8]
    assert pack(forks[:1], pad=9).lm_labels.dtype == torch.int64


def test_tokens_types_and_positions_of_any_size_come_back():
    fork = Fork([400_000, 1], [400_001, 0], [0, 9_000_000], [[399_999, 0]], IGNORED)
    batch = pack([fork], pad=3)
    assert batch.input_ids.tolist() == [[400_000, 1, 399_999, 0]]
    assert batch.token_type_ids.tolist() == [[400_001, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 9_000_000, 9_000_001, 9_000_002]]
    assert batch.choice_labels.tolist() == [IGNORED] and len(batch.lm_labels) == 0


def test_batches_move_as_one(tokenizer):
    batch = pack([make_fork(Example([], [[5]], [[6]]), tokenizer)], 0)
    assert all(tensor.device.type == "meta" for tensor in batch.to("meta"))


def test_a_row_length_rounded_up_changes_the_padding_alone(tokenizer):
    forks = [make_fork(Example([[5, 6]], [[7]], [[8, 9], [10]]), tokenizer)]
    plain, rounded = pack(forks, tokenizer.pad_token_id), pack(forks, tokenizer.pad_token_id, multiple=64)
    length = plain.input_ids.size(1)
    assert length < 64 and rounded.input_ids.size(1) == 64
    assert pack(forks, tokenizer.pad_token_id, multiple=length).input_ids.size(1) == length
    assert torch.equal(rounded.input_ids[:, :length], plain.input_ids)
    assert (rounded.input_ids[:, length:] == tokenizer.pad_token_id).all()
    assert torch.equal(rounded.lm_positions, plain.lm_positions)
