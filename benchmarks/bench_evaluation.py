"""hits@1, word perplexity and F1: batches of turns over packed rows and a cache, and one sequence after another."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks import reference
from benchmarks.measure import check_close, check_equal, in_turn, ratio
from benchmarks.setting import DECODING, Setting, Shape, spread
from transfertransfo.decoding import Context, generate
from transfertransfo.evaluation.evaluator import Evaluator, Turn, by_length
from transfertransfo.evaluation.metrics import count_words, split_words


def time_turns(
    benchmark: str,
    setting: Setting,
    measured: str,
    size: int,
    ours: Callable,
    theirs: Callable,
    same: Callable,
    goal: str,
) -> dict:
    """Time `ours(turns)` and `theirs(turn)` for about `size` turns, in batches as the evaluation makes them.

    `same` compares the answers of both for a turn.
    """
    full = [batch for batch in by_length(setting.turns, size, measured) if 2 * len(batch) > size]
    batches = [[setting.turns[i] for i in batch] for batch in spread(full, setting.sizes.repetitions)]

    def check(answers: list, expected: list) -> None:
        for answer, other in zip(answers, expected, strict=True):
            same(answer, other)

    one_by_one = lambda turns: [theirs(turn) for turn in turns]  # noqa: E731
    warm_up = batches[0][:2]
    own, other = in_turn([ours, one_by_one], [warm_up, *batches], check)
    return ratio(benchmark, own, other, goal, turns=size)


def hits(setting: Setting) -> Iterator[dict]:
    model, tokenizer = setting.model, setting.tokenizer
    evaluator = Evaluator(model, tokenizer, "hits@1", DECODING, counts=dict)
    plain = reference.double_heads(model)
    yield time_turns(
        "hits@1, 20 candidates", setting, "hits@1", setting.sizes.turns // 2, evaluator,
        lambda turn: reference.rank_candidates(plain, tokenizer, turn.example),
        lambda ours, theirs: check_equal("hits@1, ranking", ours["ranking"], theirs),
        ">= 6",
    )  # fmt: skip


def word_ppl(
    setting: Setting, shape: Shape | None = None, name: str = "GPT's size", goal: str = ">= 20"
) -> Iterator[dict]:
    tokenizer = setting.tokenizer
    model = setting.make_model(shape) if shape else setting.model
    dataset = setting.dataset
    counts = count_words(dataset.all_dialogs(dataset.texts))
    evaluator = Evaluator(model, tokenizer, "ppl", DECODING, counts=lambda: counts)
    lm = reference.lm_head(reference.double_heads(model))
    scorer = reference.WordScorer(counts, lambda word: tokenizer.backend_tokenizer.model.tokenize(word)[0].id)

    def same(ours: dict, theirs: list) -> None:
        check_equal("word ppl, words", [word for word, _ in ours["words"]], [word for word, _ in theirs])
        for (word, p), (_, other) in zip(ours["words"], theirs):
            check_equal(f"word ppl, {word} known", p is None, other is None)
            if p is not None:
                check_close(f"word ppl, {word}", p / other, 1.0, 1e-4)

    yield time_turns(
        f"word ppl, {name}", setting, "ppl", setting.sizes.turns, evaluator,
        lambda turn: scorer.probabilities(lm, tokenizer, turn.example, split_words(turn.label)),
        same, goal,
    )  # fmt: skip


def small_word_ppl(setting: Setting) -> Iterator[dict]:
    yield from word_ppl(setting, setting.sizes.small, "small model", ">= 50")


def f1(setting: Setting, gold_lengths: bool = False) -> Iterator[dict]:
    """Replies of `max_length` tokens, since a random model's own have no end; or as long as the gold ones."""
    model, tokenizer = setting.model, setting.tokenizer
    lm = reference.lm_head(reference.double_heads(model))
    longest = DECODING.max_length
    length_of = lambda turn: min(len(turn.label_ids) + 1, longest) if gold_lengths else longest  # noqa: E731
    up_to = lambda length: replace(DECODING, max_length=length)  # noqa: E731

    def ours(turns: list[Turn]) -> list[list[int]]:
        contexts = [Context(turn.example.persona, turn.example.history) for turn in turns]
        replies = generate(model, contexts, tokenizer, up_to(max(map(length_of, turns))))
        return [reply[: length_of(turn)] for reply, turn in zip(replies, turns)]

    yield time_turns(
        "F1, greedy, " + ("as long as the gold replies" if gold_lengths else f"{longest} tokens a reply"),
        setting, "f1", setting.sizes.turns, ours,
        lambda turn: reference.greedy_reply(lm, tokenizer, turn.example, up_to(length_of(turn))),
        lambda ours, theirs: check_equal("F1, reply", ours, theirs),
        ">= 15",
    )  # fmt: skip


def f1_gold_lengths(setting: Setting) -> Iterator[dict]:
    yield from f1(setting, gold_lengths=True)
