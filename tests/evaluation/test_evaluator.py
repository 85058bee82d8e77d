"""The evaluation in packed batches equals transformers' own classes on one plain sequence at a time."""

import json
import math
from itertools import pairwise

import pytest
import torch
import transformers
from helpers import FAMILIES, dialogs_of_text, slow_but
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import OpenAIGPTTokenizer

from transfertransfo.data.dataset import load_dataset
from transfertransfo.data.inputs import (
    Example,
    build_input_from_segments,
    make_trees,
    tree_length,
)
from transfertransfo.data.tokenization import SPECIAL_TOKENS, tokenize
from transfertransfo.decoding import Decoding
from transfertransfo.errors import UserError
from transfertransfo.evaluation.evaluator import Evaluator, LabelScorer, Turn, by_length, make_turns, rank_candidates
from transfertransfo.evaluation.metrics import SMOOTHING, count_words, split_words

GREEDY = Decoding(no_sample=True, max_length=8)
CLASSES = {"gpt": transformers.OpenAIGPTDoubleHeadsModel, "gpt2": transformers.GPT2DoubleHeadsModel}


@pytest.fixture(params=slow_but(["gpt2"], FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture
def dialogs(example_json) -> dict:
    """Short personas: the tiny model has 128 positions, and its tokenizer splits words to bits."""
    return {
        split: [dialog | {"personality": dialog["personality"][:1]} for dialog in example_json[split][:3]]
        for split in ("train", "valid")
    }


@pytest.fixture
def turns(model, tokenizer, dialogs, tmp_path) -> list[Turn]:
    """Seven turns that fit the model."""
    path = tmp_path / "dialogs.json"
    path.write_text(json.dumps(dialogs))
    dataset = load_dataset(tokenizer, path, "")
    tokens, texts = dataset.dialogs("valid", dataset.tokens), dataset.dialogs("valid", dataset.texts)
    turns = make_turns(tokens, texts, max_history=1)
    longest = [turn.example._replace(candidates=[max(turn.example.candidates, key=len)]) for turn in turns]
    lengths = [example.row_length for example in longest]
    fitting = [turn for turn, length in zip(turns, lengths) if length <= model.n_positions]
    assert len(fitting) >= 7
    return fitting[:7]


@pytest.fixture
def plain(family, checkpoint):
    """transformers' own model on one sequence, without a mask or a cache: choice score, next-token distributions."""
    reference = CLASSES[family].from_pretrained(checkpoint).eval()

    @torch.no_grad()
    def run(instance: dict) -> tuple[float, torch.Tensor]:
        ids, types = (torch.tensor([[instance[name]]]) for name in ("input_ids", "token_type_ids"))
        out = reference(input_ids=ids, token_type_ids=types, mc_token_ids=torch.tensor([[instance["mc_token_ids"]]]))
        return out.mc_logits.item(), out.logits[0, 0].softmax(-1)

    return run


def make_turn(tokenizer, label: str, candidates: tuple[str, ...] = (), history: tuple[str, ...] = ("hi !",)) -> Turn:
    encoded = [tokenize(tokenizer, list(texts)) for texts in (["i like tea ."], history, candidates, [label])]
    return Turn(Example(*encoded[:3]), list(candidates), label, encoded[3][0])


def plain_words(plain, tokenizer, turn: Turn, counts: dict, spaced: bool) -> list:
    """The definition of word perplexity, a forward and a loop over the dictionary for each word."""
    words, found = split_words(turn.label), []
    for i, word in enumerate(words):
        (before,) = tokenize(tokenizer, [" ".join(words[:i])])
        _, next_piece = plain(build_input_from_segments(*turn.example[:2], before, tokenizer, with_eos=False))
        pieces = {w: first_piece(tokenizer, w, spaced and i > 0) for w in counts}
        mass = sum(next_piece[-1, piece].item() for piece in set(pieces.values()))
        if word in counts:
            same = sum(counts[w] + SMOOTHING for w in counts if pieces[w] == pieces[word])
            found.append(next_piece[-1, pieces[word]].item() / mass * (counts[word] + SMOOTHING) / same)
        else:
            found.append(None)
    return found


def first_piece(tokenizer, word: str, space: bool) -> int:
    if isinstance(tokenizer, OpenAIGPTTokenizer):
        return tokenizer.backend_tokenizer.model.tokenize(word)[0].id
    return tokenizer.encode(" " + word if space else word)[0]


def assert_same_words(found: list, words: list[str], expected: list) -> None:
    assert [word for word, _ in found] == words
    assert [p for _, p in found] == [None if p is None else pytest.approx(p, rel=1e-4) for p in expected]


# Rankings


def test_rankings_are_those_of_one_candidate_at_a_time(model, tokenizer, turns, plain):
    for turn, ranking in zip(turns, rank_candidates(model, tokenizer, turns)):
        scores = [
            plain(build_input_from_segments(*turn.example[:2], candidate, tokenizer))[0]
            for candidate in turn.example.candidates
        ]
        assert ranking == sorted(range(len(scores)), key=lambda i: -scores[i])


def test_equal_candidates_keep_their_order_wherever_they_stand(model, tokenizer):
    """Scored apart, equal candidates differ by rounding, which put them in any order."""
    candidates = tuple(["no .", "yes , i do .", "no ."] * 33 + ["maybe ."])
    turns = [make_turn(tokenizer, "maybe .", candidates), make_turn(tokenizer, "no .", candidates[:7])]
    for turn, ranking in zip(turns, rank_candidates(model, tokenizer, turns)):
        assert sorted(ranking) == list(range(len(turn.example.candidates)))
        for text in set(turn.candidate_texts):
            places = [i for i in ranking if turn.candidate_texts[i] == text]
            assert places == sorted(places)
            assert ranking.index(places[-1]) - ranking.index(places[0]) == len(places) - 1


def test_a_model_without_an_opinion_ranks_in_the_order_given(model, tokenizer, turns):
    for parameter in model.pretrained.multiple_choice_head.parameters():
        torch.nn.init.zeros_(parameter)
    assert rank_candidates(model, tokenizer, turns[:2]) == [list(range(20))] * 2


def test_one_candidate_and_a_hundred(model, tokenizer, plain, example_json):
    replies = tuple(dict.fromkeys(dialogs_of_text({"valid": example_json["valid"]})))[:100]
    turns = [make_turn(tokenizer, replies[-1], replies), make_turn(tokenizer, "no .", ("no .",))]
    hundred, one = rank_candidates(model, tokenizer, turns)
    assert one == [0]
    scores = [
        plain(build_input_from_segments(*turns[0].example[:2], candidate, tokenizer))[0]
        for candidate in turns[0].example.candidates
    ]
    ordered = [scores[i] for i in hundred]
    assert sorted(hundred) == list(range(100))
    assert all(better > worse - 1e-5 for better, worse in pairwise(ordered))  # rounding may order near ties


# Probabilities


@pytest.mark.parametrize("gpt2_words", ["spaced", "original"])
def test_words_are_those_of_one_forward_a_word(model, tokenizer, turns, plain, dialogs, gpt2_words):
    counts = count_words({"train": dialogs["train"]})
    del counts["you"]  # stays in the context of the others, as any word outside the dictionary
    scorer = LabelScorer(tokenizer, counts, gpt2_words)
    expected = [plain_words(plain, tokenizer, turn, counts, gpt2_words == "spaced") for turn in turns[:3]]
    assert any(None in row for row in expected)
    for turn, found, p in zip(turns, scorer.score(model, turns[:3]), expected):
        assert_same_words(found["words"], split_words(turn.label), p)


@pytest.mark.parametrize("family", ["gpt2"])
def test_words_whose_context_is_no_beginning_of_the_reply_are_right_too(model, tokenizer, plain, example_json):
    """With pieces that cross words, the tokens of "i am" need not begin those of "i am here"."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(split_words(text)) for text in dialogs_of_text(example_json)],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.backend_tokenizer.model, tokenizer.backend_tokenizer.pre_tokenizer = bpe.model, bpe.pre_tokenizer
    texts = ("what do you do for a living ?", "i am a nurse . do you like it ?")
    turns = [make_turn(tokenizer, text) for text in texts]
    begins = []
    for turn in turns:
        *befores, whole = tokenize(tokenizer, [" ".join(split_words(turn.label)[:i]) for i in range(30)])
        begins += [whole[: len(before)] == before for before in befores]
    assert not all(begins) and any(begins)
    counts = count_words({"valid": example_json["valid"]})
    scorer = LabelScorer(tokenizer, counts)
    for turn, found in zip(turns, scorer.score(model, turns)):
        expected = plain_words(plain, tokenizer, turn, counts, spaced=True)
        assert_same_words(found["words"], split_words(turn.label), expected)


def test_the_distribution_after_each_word_is_the_same_computation(model, tokenizer, turns):
    """The archived scripts ask for one word at a time; a label too long for the model is cut the same way for them."""
    long = make_turn(tokenizer, "yes , i do . " * 40, history=("hello !", "hi .", "what do you do ?"))
    counts = {"i": 3, "do": 5, ",": 2, ".": 9, "yes": 1, "you": 1}
    scorer = LabelScorer(tokenizer, counts)
    for turn in (*turns[:2], long):
        found = scorer.score(model, [turn])[0]["words"]
        for i, (word, p) in list(enumerate(found))[:: 1 + len(found) // 20]:
            distribution = scorer.distribution(model, turn, split_words(turn.label)[:i])
            assert sum(distribution.values()) == pytest.approx(1)
            assert p == (pytest.approx(distribution[word], rel=1e-4) if word in counts else None)


def test_token_losses_are_those_of_one_reply_at_a_time(model, tokenizer, turns, plain):
    for turn, found in zip(turns, LabelScorer(tokenizer, {"no": 1}).score(model, turns)):
        loss, count = found["token_nll"]
        instance = build_input_from_segments(*turn.example[:2], turn.label_ids, tokenizer, lm_labels=True)
        _, next_piece = plain(instance)
        labels = instance["lm_labels"][1:]
        losses = [-math.log(next_piece[i, label].item()) for i, label in enumerate(labels) if label != -100]
        assert (loss, count) == (pytest.approx(math.fsum(losses), rel=1e-4), len(losses))
        assert count == len(turn.label_ids) + 1


# Replies


def test_greedy_replies_are_those_of_one_token_at_a_time(model, tokenizer, turns, plain):
    special = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    expected = []
    for turn in turns:
        ids = []
        while len(ids) < GREEDY.max_length:
            _, next_piece = plain(build_input_from_segments(*turn.example[:2], ids, tokenizer, with_eos=False))
            if not ids:
                next_piece[-1, special] = 0
            if (token := next_piece[-1].argmax().item()) in special:
                break
            ids.append(token)
        expected.append(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    evaluator = Evaluator(model, tokenizer, "f1", GREEDY, counts=dict)
    assert evaluator(turns) == [{"reply": text} for text in expected]


# What does not fit


def test_a_reply_longer_than_the_model(model, tokenizer):
    """It is ranked and scored as far as it goes; each of its words has a probability, after what the model can see."""
    long = "yes , i do . " * 100
    turns = [make_turn(tokenizer, long, ("no .", long)), make_turn(tokenizer, "no .", (long, "no ."))]
    results = Evaluator(model, tokenizer, "all", GREEDY, counts=lambda: {"yes": 1, "do": 2})(turns)
    assert [sorted(result["ranking"]) for result in results] == [[0, 1]] * 2
    assert len(results[0]["words"]) == 500
    assert all((p is None) == (word not in ("yes", "do")) for word, p in results[0]["words"])
    assert all(0 < p <= 1 for _, p in results[0]["words"] if p is not None)
    loss, count = results[0]["token_nll"]
    assert count < model.n_positions and math.isfinite(loss)


def test_a_reply_without_end(model, tokenizer):
    """A million words would be a million beginnings, each tokenised."""
    (found,) = LabelScorer(tokenizer, {"yes": 1}).score(model, [make_turn(tokenizer, "yes " * 10**5)])
    assert len(found["words"]) == 4 * model.n_positions


def test_no_word_in_the_dictionary_and_no_word_at_all(model, tokenizer):
    turns = [make_turn(tokenizer, "no ."), make_turn(tokenizer, " ")]
    found = LabelScorer(tokenizer, {"yes": 1}).score(model, turns)
    assert [row["words"] for row in found] == [[("no", None), (".", None)], []]


def test_words_that_the_tokenizer_cannot_spell(model, tokenizer):
    turn = make_turn(tokenizer, "\u200b \u0416 no")
    (found,) = LabelScorer(tokenizer, {"\u200b": 1, "\u0416": 2, "no": 3}).score(model, [turn])
    word, p = found["words"][-1]
    assert word == "no" and 0 < p < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_probabilities(model, tokenizer, monkeypatch, bad):
    lm_logits = type(model).lm_logits
    spoiled = lambda self, hidden: lm_logits(self, hidden).index_fill(-1, torch.tensor([7]), bad)  # noqa: E731
    monkeypatch.setattr(type(model), "lm_logits", spoiled)
    scorer, turn = LabelScorer(tokenizer, {"no": 1}), make_turn(tokenizer, "no .")
    for figures in (lambda: scorer.score(model, [turn]), lambda: scorer.distribution(model, turn, ["no"])):
        with pytest.raises(UserError, match=r"^the model gives scores that are not finite"):
            figures()


def test_nothing_to_measure_asks_for_a_reply(model, tokenizer):
    """As in a chat, where a message brings neither candidates nor a label."""
    chat = make_turn(tokenizer, "")._replace(label=None)
    measured = make_turn(tokenizer, "no .", ("yes .", "no ."))
    for eval_type, keys in (("hits@1", {"ranking"}), ("ppl", {"words", "token_nll"}), ("f1", {"reply"})):
        evaluator = Evaluator(model, tokenizer, eval_type, GREEDY, counts=lambda: {"no": 1})
        assert [set(result) for result in evaluator([chat, measured, chat])] == [{"reply"}, keys, {"reply"}]


@pytest.mark.parametrize("measured", ["all", "hits@1", "ppl", "f1"])
def test_batches_hold_every_turn_once_and_the_turns_of_a_dialog_together(turns, measured):
    batches = list(by_length(turns, 3, measured))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    examples = [turn.example for turn in turns]
    trees = [tree for batch in batches for tree in make_trees([examples[i] for i in batch])]
    assert sorted(map(len, trees)) == sorted(map(len, make_trees(examples)))
    if measured in ("all", "hits@1"):  # the others do not read the candidates
        lengths = [tree_length(tree) for tree in trees]
        assert lengths == sorted(lengths, reverse=True)


def test_figures_do_not_depend_on_what_shares_a_tree(model, tokenizer, turns):
    """Turns of one dialog in one tree, or each in a batch of its own."""
    evaluator = Evaluator(model, tokenizer, "all", GREEDY, counts=lambda: {"yes": 1, "do": 2, "i": 3})
    examples = [turn.example._replace(candidates=turn.example.candidates[-5:]) for turn in turns]
    turns = [turn._replace(example=example) for turn, example in zip(turns, examples)]
    assert len(make_trees([turn.example for turn in turns])) < len(turns)
    for together, turn in zip(evaluator(turns), turns, strict=True):
        (alone,) = evaluator([turn])
        assert together["ranking"] == alone["ranking"] and together["reply"] == alone["reply"]
        assert_same_words(together["words"], split_words(turn.label), [p for _, p in alone["words"]])
        assert together["token_nll"] == pytest.approx(alone["token_nll"], rel=1e-5)
