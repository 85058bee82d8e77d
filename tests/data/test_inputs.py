"""From dialogs to batches: the layout of a sequence, what is cut, which share a tree, which trees a batch."""

import random
from itertools import chain

import numpy as np
import pytest

from transfertransfo.data.inputs import (
    IGNORED,
    BucketSampler,
    Example,
    build_input_from_segments,
    context_length,
    fit,
    format_example,
    make_examples,
    make_fork,
    make_trees,
    pad_dataset,
    tree_length,
)
from transfertransfo.data.tokenization import SPECIAL_TOKENS
from transfertransfo.data.trees import pack
from transfertransfo.model.sources import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["gpt"])


def sentences(generator: random.Random, number: int, longest: int = 6, shortest: int = 1) -> list[list[int]]:
    return [[generator.randrange(5, 100) for _ in range(generator.randint(shortest, longest))] for _ in range(number)]


def random_example(generator: random.Random, shortest: int = 0) -> Example:
    return Example(*(sentences(generator, generator.randint(low, 7), shortest=shortest) for low in (0, 0, 1)))


# One sequence


@pytest.mark.parametrize(
    ("persona", "history", "reply", "with_eos", "expected"),
    [
        ([[5, 6], [7]], [[8], [9, 10], [11]], [12, 13], True, "<b 5 6 7> (2 8) <1 9 10> (2 11) <1 12! 13! e!>"),
        ([[5]], [[8]], [12], True, "<b 5> (2 8) <1 12! e!>"),
        ([], [[8]], [12], True, "<b> (2 8) <1 12! e!>"),
        ([[5]], [], [12], True, "<b 5> (1 12! e!)"),
        ([], [], [12], True, "<b> (1 12! e!)"),
        ([[5]], [[8], [9]], [12], True, "<b 5> (1 8) <2 9> (1 12! e!)"),
        ([[5]], [[8]], [12, 13], False, "<b 5> (2 8) <1 12! 13!>"),
        ([[5]], [[8]], [], False, "<b 5> (2 8) <1>"),
        ([[5]], [[]], [], True, "<b 5> (2) <1 e!>"),
    ],
)
@pytest.mark.parametrize("lm_labels", [True, False])
def test_layout_of_a_sequence(tokenizer, persona, history, reply, with_eos, expected, lm_labels):
    """`<...>` holds what has the type of speaker 1, `(...)` that of speaker 2; `!` marks a token to be predicted."""
    bos, eos, speaker1, speaker2 = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[:-1])
    names = {"b": bos, "e": eos, "1": speaker1, "2": speaker2}
    words = expected.split()
    ids, types, labels = [], [], []
    for word in words:
        if word[0] in "<(":
            kind = {"<": speaker1, "(": speaker2}[word[0]]
        word = word.strip("<>()")
        token = names.get(word.rstrip("!")) or int(word.rstrip("!"))
        ids.append(token)
        types.append(kind)
        labels.append(token if word.endswith("!") and lm_labels else IGNORED)

    got = build_input_from_segments(persona, history, reply, tokenizer, lm_labels, with_eos)
    assert got == {"input_ids": ids, "token_type_ids": types, "lm_labels": labels, "mc_token_ids": len(ids) - 1}


def test_arguments_of_a_sequence_are_not_changed(tokenizer):
    persona, history, reply = [[5]], [[6]], [7]
    build_input_from_segments(persona, history, reply, tokenizer)
    assert (persona, history, reply) == ([[5]], [[6]], [7])


def test_pad_dataset_pads_three_fields_to_the_longest():
    dataset = {
        "input_ids": [[1, 2, 3], [4]],
        "token_type_ids": [[5, 5, 5], [6]],
        "lm_labels": [[IGNORED, 2, 3], [4]],
        "mc_token_ids": [2, 0],
    }
    assert pad_dataset(dataset, padding=9) is dataset
    assert dataset == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "token_type_ids": [[5, 5, 5], [6, 9, 9]],
        "lm_labels": [[IGNORED, 2, 3], [4, IGNORED, IGNORED]],
        "mc_token_ids": [2, 0],
    }


def test_format_example_shows_each_token_its_type_and_its_label(tokenizer):
    example = Example([[5]], [[6, 7]], [[8], [9, 10]])
    header, *lines = format_example(example, tokenizer).splitlines()
    word = {i: tokenizer.convert_ids_to_tokens(i) for i in range(5, 11)}
    assert header.split() == ["position", "token", "type", "label"]
    assert [line.split() for line in lines] == [
        ["0", "<bos>", "<speaker1>"],
        ["1", word[5], "<speaker1>"],
        ["2", "<speaker2>", "<speaker2>"],
        ["3", word[6], "<speaker2>"],
        ["4", word[7], "<speaker2>"],
        ["5", "<speaker1>", "<speaker1>"],
        ["6", word[9], "<speaker1>", word[9]],
        ["7", word[10], "<speaker1>", word[10]],
        ["8", "<eos>", "<speaker1>", "<eos>"],
    ]


@pytest.mark.parametrize(("before", "reply"), [(40, 20), (40, 1), (1, 60), (3, 2)])
def test_format_example_shows_ten_lines_around_the_reply(tokenizer, before, reply):
    """It were 72 in the log of a run, of which most were the persona's."""
    example = Example([[5] * before], [[6]], [[7] * reply])
    whole, shown = (format_example(example, tokenizer, rows).splitlines() for rows in (None, 10))
    assert shown == whole if len(whole) <= 10 else len(shown) == 10
    assert shown[:2] == whole[:2] and shown[-1] == whole[-1]
    assert whole[before + 4] in shown and whole[before + 5] in shown  # the reply's speaker and its first word
    assert all(line in whole or line.strip() == "..." for line in shown)


# Examples


def numbered_dialog(turns: int = 9, num_candidates: int = 5, personality: int = 3) -> dict:
    """Every sentence is one token; turn i of the history is [100 + i]."""
    utterances = [
        {"candidates": [[10 * i + k] for k in range(num_candidates)], "history": [[100 + j] for j in range(i)]}
        for i in range(1, turns + 1)
    ]
    return {"personality": [[200 + i] for i in range(personality)], "utterances": utterances}


@pytest.mark.parametrize("max_history", [0, 1, 2, 9, -1])
def test_window_of_the_history(max_history):
    dialog = numbered_dialog()
    for example, utterance in zip(make_examples([dialog], max_history, 512), dialog["utterances"], strict=True):
        kept = len(utterance["history"]) if max_history < 0 else min(2 * max_history + 1, len(utterance["history"]))
        assert example.history == utterance["history"][len(utterance["history"]) - kept :]


@pytest.mark.parametrize(("num_candidates", "kept"), [(0, 5), (1, 1), (2, 2), (5, 5), (20, 5)])
def test_the_last_candidates_are_kept_the_gold_last(num_candidates, kept):
    dialog = numbered_dialog(num_candidates=5)
    for example, utterance in zip(make_examples([dialog], 2, 512, num_candidates), dialog["utterances"], strict=True):
        assert example.candidates == utterance["candidates"][5 - kept :]
        assert example.candidates[-1] == utterance["candidates"][-1]


def test_personas_rotate_by_one_sentence():
    dialogs = [numbered_dialog(turns=2), numbered_dialog(turns=1, personality=0)]
    examples = make_examples(dialogs, 2, 512, personality_permutations=4)
    assert [example.persona for example in examples] == [
        *([[[200], [201], [202]]] * 2),
        *([[[202], [200], [201]]] * 2),
        *([[[201], [202], [200]]] * 2),
        *([[[200], [201], [202]]] * 2),
        *([[]] * 4),
    ]


def test_making_examples_leaves_the_dataset_as_it_is():
    """The original rotated the dataset's own persona lists, so a second use of the dataset began elsewhere."""
    dialogs = [numbered_dialog(), numbered_dialog(turns=2)]
    make_examples(dialogs, 1, 12, num_candidates=2, personality_permutations=2)
    assert dialogs == [numbered_dialog(), numbered_dialog(turns=2)]


def test_cut_examples_are_counted_once(caplog):
    make_examples([numbered_dialog(turns=3)], 2, 512)
    assert not caplog.records
    make_examples([numbered_dialog(turns=3)], 2, n_positions=10, personality_permutations=2)  # 7 + 2 * turns
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "4 of 6 examples are too long for the model's 10 positions"
    ]


# What does not fit


def longest_sequence(example: Example, tokenizer) -> int:
    return max(
        len(build_input_from_segments(*example[:2], reply, tokenizer)["input_ids"]) for reply in example.candidates
    )


@pytest.mark.parametrize(
    ("room", "persona", "history", "reply"),
    [
        (24, [[1, 1], [2, 2]], [[3, 3], [4, 4], [5, 5], [6, 6], [7, 7]], [8, 8]),  # all: 2 + 4 + 15 + 2 + 1
        (23, [[1, 1], [2, 2]], [[5, 5], [6, 6], [7, 7]], [8, 8]),  # the oldest turns go by twos
        (18, [[1, 1], [2, 2]], [[5, 5], [6, 6], [7, 7]], [8, 8]),
        (17, [[1, 1], [2, 2]], [[7, 7]], [8, 8]),
        (12, [[1, 1], [2, 2]], [[7, 7]], [8, 8]),
        (11, [[1, 1], [2]], [[7, 7]], [8, 8]),  # then the persona from its end
        (10, [[1, 1]], [[7, 7]], [8, 8]),
        (9, [[1]], [[7, 7]], [8, 8]),
        (8, [], [[7, 7]], [8, 8]),
        (7, [], [[7]], [8, 8]),  # then the last turn from its beginning
        (6, [], [[]], [8, 8]),
        (5, [], [[]], [8]),  # and a reply only where it alone is too long
    ],
)
def test_what_is_cut_in_which_order(tokenizer, room, persona, history, reply):
    full = Example([[1, 1], [2, 2]], [[3, 3], [4, 4], [5, 5], [6, 6], [7, 7]], [[9], [8, 8]])
    full.history[-1][0] = 70  # so that the cut turn shows its end
    history = [[70, 7] if turn == [7, 7] else turn for turn in history]
    assert fit(full, room) == Example(persona, history, [[9], reply])


def test_a_persona_of_one_long_sentence_is_cut_within_it():
    """It vanished whole, as from a system's prompt, and the chat went on showing it."""
    persona = [[*range(100)]]
    assert fit(Example(persona, [[7, 7]], [[8]]), 50).persona == [[*range(50 - 7)]]
    assert fit(Example(persona, [[7, 7]], [[8]]), 200, history_start=30).persona == [[*range(29)]]
    assert fit(Example([[5], *persona], [[7, 7]], [[8]]), 50).persona == [[5], [*range(50 - 8)]]


def test_random_examples_fit_and_lose_no_more_than_they_must(tokenizer):
    generator = random.Random(0)
    cut = 0
    for _ in range(500):
        example, n_positions = random_example(generator), generator.randint(8, 60)
        fitted = fit(example, n_positions)
        if longest_sequence(example, tokenizer) <= n_positions:
            assert fitted is example
            continue
        cut += 1
        assert longest_sequence(fitted, tokenizer) <= n_positions
        persona, whole = list(chain(*fitted.persona)), list(chain(*example.persona))
        assert persona == whole[: len(persona)]
        kept = len(fitted.history)
        assert len(fitted.candidates) == len(example.candidates)
        assert bool(kept) == bool(example.history)
        if kept > 1:  # turns were cut only
            assert (len(example.history) - kept) % 2 == 0
            assert fitted == example._replace(history=example.history[-kept:])
        if len(example.history) % 2:
            assert kept % 2
        if kept < len(example.history):  # one step back would have been too long
            before = example.history[-kept - 2 :]
            assert longest_sequence(example._replace(history=before), tokenizer) > n_positions
        if 0 < len(persona) < len(whole):  # cut within a sentence, so nothing is left free
            assert longest_sequence(fitted, tokenizer) == n_positions
        if kept and fitted.history[-1] != example.history[-1]:
            assert not fitted.persona and kept == 1
            assert fitted.history[0] == example.history[-1][len(example.history[-1]) - len(fitted.history[0]) :]
            assert longest_sequence(fitted, tokenizer) == n_positions
        if fitted.candidates != example.candidates:
            assert not fitted.persona and not any(fitted.history)
            limit = n_positions - 3 - kept  # <bos>, two speakers or one, <eos>
            assert fitted.candidates == [reply[:limit] for reply in example.candidates]
    assert cut > 100


# Trees of examples


def test_a_tree_is_no_longer_than_its_examples_say(tokenizer):
    """Candidates that begin alike make it shorter; the order of the batches does not depend on it."""
    generator = random.Random(1)
    for _ in range(50):
        example = random_example(generator)
        assert (
            pack([make_fork(example, tokenizer)], 0).input_ids.size(1) <= example.row_length == tree_length([example])
        )
        context = build_input_from_segments(*example[:2], [], tokenizer, with_eos=False)["input_ids"]
        assert context_length(*example[:2]) == len(context)


def length_packed(tree: list[Example], tokenizer) -> int:
    return pack([make_fork(example, tokenizer) for example in tree], 0, sizes=[len(tree)]).input_ids.size(1)


@pytest.mark.parametrize("max_history", [0, 1, 2, -1])
@pytest.mark.parametrize("num_candidates", [1, 5])
def test_dialogs_make_trees_and_long_ones_several(tokenizer, max_history, num_candidates):
    """Sentences of one token that differ share nothing by chance, so that a tree's length is known exactly."""
    dialogs = [spoken_dialog(turns=9, number=0), spoken_dialog(turns=1, number=1), spoken_dialog(turns=4, number=2)]
    examples = make_examples(dialogs, max_history, 512, num_candidates)
    trees = make_trees(examples)
    assert [len(tree) for tree in trees] == [9, 1, 4]
    assert list(chain.from_iterable(trees)) == examples
    for tree in trees:
        assert tree_length(tree) == length_packed(tree, tokenizer)
    longest = tree_length(trees[0])
    assert make_trees(examples, longest)[0] == trees[0]
    parts = make_trees(examples, longest - 1)
    assert len(parts) == len(trees) + 1 and len(parts[0]) == 8
    assert all(len(tree) == 1 for tree in make_trees(examples, 1))


def test_turns_that_share_no_more_than_bos_are_no_tree(tokenizer):
    dialogs = [spoken_dialog(3, number) | {"personality": []} for number in (0, 1)]
    for max_history, sizes in ((-1, [3, 3]), (1, [2, 1, 2, 1]), (0, [1] * 6)):
        trees = make_trees(make_examples(dialogs, max_history, 512))
        assert [len(tree) for tree in trees] == sizes
        assert [tree_length(tree) for tree in trees] == [length_packed(tree, tokenizer) for tree in trees]


def spoken_dialog(turns: int, number: int) -> dict:
    """As `numbered_dialog`, the gold replies in the histories that follow."""
    dialog, base = numbered_dialog(turns, personality=3), 1000 * number
    said: list[list[int]] = []
    for i, utterance in enumerate(dialog["utterances"]):
        utterance["candidates"] = [[base + token for token in reply] for reply in utterance["candidates"]]
        utterance["history"] = [*said, [base + 300 + i]]
        said = [*utterance["history"], utterance["candidates"][-1]]
    return dialog | {"personality": [[base + token for token in sentence] for sentence in dialog["personality"]]}


# Batches of like length


def lengths(number: int, seed: int = 0) -> list[int]:
    return np.random.RandomState(seed).randint(5, 300, number).tolist()


def batches(sampler: BucketSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    result = list(sampler)
    assert len(sampler) == len(result)
    return result


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("number", [1, 7, 8, 500])
def test_each_example_once_an_epoch(number, shuffle):
    sampler = BucketSampler(lengths(number), 4, shuffle, seed=1)
    for epoch in range(3):
        found = batches(sampler, epoch)
        assert sorted(chain(*found)) == list(range(number))
        assert sorted(map(len, found)) == sorted([4] * (number // 4) + [number % 4] * (number % 4 > 0))


def test_order_changes_with_the_epoch_and_the_seed_only():
    def order(seed, epoch):
        return batches(BucketSampler(lengths(100), 4, True, seed=seed), epoch)

    assert order(1, 2) == order(1, 2)
    distinct = [order(seed, epoch) for seed in (0, 1) for epoch in (1, 2, 3)]
    assert all(one != other for i, one in enumerate(distinct) for other in distinct[:i])
    assert order(1, 1)[0] != order(1, 2)[0]


def test_order_without_shuffling_is_by_length_in_every_epoch():
    sampler = BucketSampler([3, 1, 2, 1, 5], 2, shuffle=False)
    assert batches(sampler, 0) == batches(sampler, 7) == [[1, 3], [2, 0], [4]]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("number", [48, 49, 50, 2])
def test_ranks_share_the_batches_of_one_process(number, world_size, shuffle):
    """k processes with batches of n compute what one process with batches of k * n does."""
    size = lengths(number)
    single = batches(BucketSampler(size, 4 * world_size, shuffle, 5), 1)
    shares = [batches(BucketSampler(size, 4, shuffle, 5, rank, world_size), 1) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(single)}
    for whole, *parts in zip(single, *shares):
        assert sorted(chain(*parts)) == sorted(whole)
        assert max(map(len, parts)) <= 4
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_of_like_length_hold_little_padding(shuffle):
    size = np.array(lengths(1000))

    def padding(groups):
        return sum(size[group].max() * len(group) - size[group].sum() for group in map(np.array, groups))

    unsorted = [list(range(start, start + 4)) for start in range(0, 1000, 4)]
    assert padding(batches(BucketSampler(size, 4, shuffle))) < 0.1 * padding(unsorted)


def test_shuffled_batches_do_not_come_by_length():
    """Sorted windows must not train on the short examples first."""
    size = np.array(lengths(256))
    longest = [size[batch].max() for batch in batches(BucketSampler(size, 4, True))]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4


# Batches of trees


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 4, 16, 10**6])
@pytest.mark.parametrize("number", [1, 2, 7, 300])
def test_trees_are_not_divided_and_fill_batches(number, size, shuffle):
    counts = np.random.RandomState(1).randint(1, 14, number)
    sampler = BucketSampler(lengths(number), size, shuffle, seed=1, counts=counts)
    for epoch in range(3):
        found = batches(sampler, epoch)
        assert sorted(chain(*found)) == list(range(number)) and all(found)
        if size == 16 and number == 300:
            examples = [counts[batch].sum() for batch in found]
            assert abs(np.mean(examples) - size) < 0.5 and max(examples) < size + 13


def test_one_example_a_tree_gives_the_batches_of_examples():
    size = lengths(300)
    for shuffle in (True, False):
        trees = BucketSampler(size, 4, shuffle, 1, 1, 2, counts=[1] * 300)
        assert batches(trees) == batches(BucketSampler(size, 4, shuffle, 1, 1, 2))


def test_the_order_of_examples_is_the_one_there_has_always_been():
    """A run that was begun before there were trees goes on with the batches that are due."""
    found = batches(BucketSampler(lengths(9), 2, True, seed=3), 1)
    assert found == [[6, 1], [8], [7, 4], [2, 0], [3, 5]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_trees_of_one_process(world_size):
    size, counts = lengths(50), np.random.RandomState(1).randint(1, 14, 50)
    single = batches(BucketSampler(size, 4 * world_size, True, 5, counts=counts), 1)
    shares = [batches(BucketSampler(size, 4, True, 5, rank, world_size, counts), 1) for rank in range(world_size)]
    for whole, *parts in zip(single, *shares, strict=True):
        assert sorted(chain(*parts)) == sorted(whole)
