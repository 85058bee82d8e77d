"""The ConvAI2 metrics: their definitions on cases small enough to count by hand."""

import math
import random

import numpy as np
import pytest

from transfertransfo.evaluation.metrics import (
    SPECIAL_WORDS,
    WordProbabilities,
    content_words,
    copies,
    count_words,
    distinct_n,
    f1,
    hit,
    normalize,
    perplexity,
    persona_overlap,
    rank,
    read_word_counts,
    right_places,
    split_words,
    write_word_counts,
)


def test_perplexity():
    assert perplexity(2 * math.log(3), 2) == pytest.approx(3)
    assert math.isnan(perplexity(0.0, 0)) and perplexity(1e4, 1) == perplexity(math.inf, 1) == math.inf


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat, an Ape & a dog!", ["cat", "ape", "dog"]),
        ("i don't", ["i", "don", "t"]),
        ("another than_the-rest a.b", ["another", "than", "rest", "b"]),  # articles go as whole words only
        ("a\u2026 caf\u00e9", ["\u2026", "caf\u00e9"]),  # a word boundary is enough around an article
        ("!\"#$%&()*+,-./:;<=>?@[]\\^`{|}~_'", []),
        ("", []),
    ],
)
def test_normalize(text, words):
    assert normalize(text) == words


def test_f1_is_the_overlap_of_bags():
    assert f1("i like dogs", ["Dogs, i like!"]) == 1.0
    assert f1("dogs dogs dogs", ["dogs dogs cats"]) == pytest.approx(2 / 3)  # a repeated word counts as often as shared
    assert f1("i like", ["i have the old cats"]) == pytest.approx(2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4))


def test_f1_is_zero_without_overlap_and_takes_the_best_label():
    for prediction, labels in (("", ["hello"]), ("hello", [""]), ("", [""]), ("the", ["the"]), ("cats", ["dogs"])):
        assert f1(prediction, labels) == 0.0
    assert f1("i like dogs", ["no", "i like cats", "nothing like it"]) == pytest.approx(2 / 3)


def test_rank_keeps_the_order_of_equal_scores():
    """The original sorted by an unstable sort, so that equal candidates came in any order."""
    assert rank([0.5, 2.0, 0.5, 2.0, -1.0]) == [1, 3, 0, 2, 4]
    assert rank(np.zeros(100, dtype=np.float32)) == list(range(100))
    assert rank([1.0]) == [0]
    scores = [random.Random(0).randint(0, 9) for _ in range(100)]
    assert rank(scores) == sorted(range(100), key=lambda i: (-scores[i], i))


def test_hit_compares_texts():
    candidates = ["Hello, you!", "bye", "hello you"]
    assert hit([0, 1, 2], candidates, "hello you")  # another index, but the same words
    assert hit([2, 1, 0], candidates, "hello the you.")
    assert not hit([1, 0, 2], candidates, "hello you")
    assert not hit([0, 1, 2], candidates, "not among them")
    assert hit([0], ["bye"], "bye")


def test_split_words():
    assert split_words("I'm 20.5; see:  What?!\nok (yes) it's-fine") == [
        "i'm", "20", ".", "5", ";", "see", ":", "what", "?", "!", "ok", "(yes)", "it's-fine"]  # fmt: skip
    assert split_words(" \n") == []


DIALOG = {
    "personality": ["i like tea.", "My tea is GREEN."],
    "utterances": [
        {"candidates": ["distractor", "fine, you?"], "history": ["hi there"]},
        {"candidates": ["distractor", "bye"], "history": ["hi there", "fine, you?", "good tea!"]},
    ],
}
PARTNER = {"your": 2, "persona": 2, ":": 2, "i": 1, "like": 1, "tea": 3, ".": 2, "my": 1, "is": 1, "green": 1,
           "hi": 1, "there": 1, "good": 1, "!": 1}  # fmt: skip
REPLIES = {"fine": 1, ",": 1, "you": 1, "?": 1, "bye": 1}


def test_count_words_counts_replies_of_train_only():
    assert count_words({"valid": [DIALOG]}) == SPECIAL_WORDS | PARTNER
    assert count_words({"train": [DIALOG]}) == SPECIAL_WORDS | PARTNER | REPLIES
    doubled = {word: 2 * count for word, count in PARTNER.items()}
    assert count_words({"train": [DIALOG], "valid": [DIALOG]}) == SPECIAL_WORDS | doubled | REPLIES
    assert count_words({}) == SPECIAL_WORDS


def test_count_words_counts_each_turn_once_whatever_the_history_holds():
    later = DIALOG["utterances"][1]
    windowed = {**DIALOG, "utterances": [DIALOG["utterances"][0], {**later, "history": later["history"][-1:]}]}
    assert count_words({"train": [windowed]}) == count_words({"train": [DIALOG]})
    opened = {"personality": [], "utterances": [{"candidates": ["c"], "history": ["x y", "z", "x"]}]}
    assert count_words({"valid": [opened]}) == SPECIAL_WORDS | {"x": 2, "y": 1, "z": 1}
    silent = {"personality": [], "utterances": [{"candidates": ["c"], "history": []}]}
    assert count_words({"train": [silent]}) == SPECIAL_WORDS | {"c": 1}


def test_word_counts_survive_the_file(tmp_path):
    counts = SPECIAL_WORDS | {"tea": 2, "caf\u00e9": 3, "b": 1, "a": 1, "'\\": 1}
    path = tmp_path / "dict_self"
    write_word_counts(path, counts)
    assert read_word_counts(path) == counts
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "__null__\t1000000003"
    assert lines[4:] == ["caf\u00e9\t3", "tea\t2", "'\\\t1", "a\t1", "b\t1"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", [b"tea", b"tea\tmany", b"tea\t-1", b"tea\t1\t2", b"\t3", b"", b"\xff\t1"])
def test_read_word_counts_names_the_line(tmp_path, line):
    path = tmp_path / "dict_self"
    path.write_bytes(b"a\t1\n" + line + b"\nb\t2\n")
    with pytest.raises(ValueError, match=r"dict_self: line 2 is not"):
        read_word_counts(path)


def test_read_word_counts_of_an_empty_file(tmp_path):
    path = tmp_path / "dict_self"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="dict_self: the dictionary is empty"):
        read_word_counts(path)


COUNTS = {"tea": 5, "ten": 15, "a": 0, "xyz": 40}
PIECES = {"t": 4, "a": 1, "x": 6}


@pytest.fixture
def words():
    return WordProbabilities(COUNTS, lambda word: PIECES[word[0]])


def random_distributions(rows: int) -> np.ndarray:
    p = np.random.default_rng(0).random((rows, 8), dtype=np.float32)
    return p / p.sum(1, keepdims=True)


def test_word_probabilities_follow_the_definition(words):
    p = random_distributions(4)
    mass = p[:, [1, 4, 6]].astype(np.float64).sum(1)
    expected = [p[0, 4] * (10 / 30) / mass[0], p[1, 4] * (20 / 30) / mass[1], None, p[3, 1] / mass[3]]
    assert words.probabilities(["tea", "ten", "tee", "a"], p) == [x and pytest.approx(float(x)) for x in expected]
    assert words.pieces.tolist() == [1, 4, 6]
    assert words.probabilities([], p[:0]) == []


def test_word_probabilities_are_double_beyond_the_softmax(words):
    """A float32 sum over the pieces differs between batch sizes; ConvAI2's figures come from a double one."""
    p = np.array([[0, 2**-30, 0, 0, 0.5, 0, 0.25, 0]], dtype=np.float32)
    assert words.probabilities(["xyz"], p) == [0.25 / (0.75 + 2**-30)]
    assert words.probabilities(["xyz"], p) != [0.25 / 0.75]


def test_a_batch_gives_what_its_rows_give(words):
    import torch

    p, asked = random_distributions(50), random.Random(0).choices([*COUNTS, "unknown"], k=50)
    batched = words.probabilities(asked, torch.from_numpy(p))
    assert batched == [words.probabilities([word], p[i : i + 1])[0] for i, word in enumerate(asked)]
    assert batched == [words.distribution(p[i]).get(word) for i, word in enumerate(asked)]


def test_the_words_of_the_dictionary_have_probability_one_together(words):
    for row in random_distributions(5):
        p = words.distribution(row)
        assert list(p) == list(COUNTS)
        assert math.fsum(p.values()) == pytest.approx(1, abs=1e-12)


def test_distinct_n():
    replies = [["i", "like", "i", "like"], ["i", "like"], []]
    assert distinct_n(replies, 1) == 2 / 6
    assert distinct_n(replies, 2) == 2 / 4  # "like i" within the first reply, none across two
    assert distinct_n(iter(replies), 4) == 1.0
    assert distinct_n(replies, 5) == 0.0
    assert distinct_n([["a"], ["b"]], 2) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_right_places_are_those_whose_choice_is_a_hit(seed):
    """Texts of few pieces, so that many read alike: articles, case, punctuation, white space, and other letters."""
    draw = random.Random(seed)
    pieces = ["a", "The", "dog", "Dog", "!", "é", "É", "the’", "한국", "anthem", "k", "7"]
    pieces += ["\u212a", "\u3000", "\x1c", "\n"]  # the sign for Kelvin, which is k in lower case; white space
    texts = ["".join(draw.choice(pieces) + draw.choice([" ", ""]) for _ in range(draw.randrange(4))) for _ in range(60)]
    texts += ["No!", "the cat", "Cat.", "cat", ""]
    rows = [[draw.randrange(len(texts)) for _ in range(draw.randint(1, 20))] for _ in range(200)]
    want = []
    for row in rows:
        candidates = [texts[i] for i in row]
        want.append([place for place in range(len(row)) if hit([place], candidates, candidates[-1])])
    assert right_places(rows, texts) == want
    assert sum(map(len, want)) > len(rows)  # not the gold ones alone


def test_content_words_are_those_without_grammar():
    assert content_words("I don't like the green teas, and we've had them!") == ["like", "green", "teas"]
    assert content_words("it isn't about you .") == []


def test_persona_overlap():
    persona = ["i like green tea .", "i have two dogs , old dogs ."]  # like green tea two dogs old dogs
    assert persona_overlap("my dogs and dogs like big dogs", persona) == pytest.approx((3 / 5, 3 / 7, 2 * 3 / (5 + 7)))
    assert persona_overlap("what do you do ?", persona) == persona_overlap("tea", []) == (0.0, 0.0, 0.0)


def test_copies_takes_four_words_in_a_row_of_one_text():
    assert copies("Oh, I have two old dogs!", ["i like tea .", "i have two old cats ."])
    assert not copies("i have two", ["i have two"]) and not copies("", ["", "a b c d"])
    assert not copies("i like tea i have", ["i like tea .", "i have two old cats ."])
