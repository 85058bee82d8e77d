"""The model's talks with itself: who says what to whom, and the figures of talks small enough to count by hand."""

import json

import pytest
from helpers import DATASET, dialog, slow_but

from transfertransfo.data.dataset import load_dataset
from transfertransfo.data.tokenization import tokenize
from transfertransfo.decoding import Context, Decoding, generate
from transfertransfo.errors import SettingError
from transfertransfo.evaluation.selfchat import EXCHANGES, Talk, draw_dialogs, measure, selfchat

GREEDY = Decoding(no_sample=True, max_length=3, block_history_ngram=1)


@pytest.fixture
def dataset(tokenizer, tmp_path):
    path = tmp_path / "dialogs.json"
    path.write_text(json.dumps(DATASET | {"valid": [dialog(i, turns=3) for i in (0, 2, 3)]}))
    return load_dataset(tokenizer, path, "")


@pytest.mark.parametrize("max_history", [1, -1])
@pytest.mark.parametrize("family", slow_but(["gpt2"], ["gpt", "gpt2"]))
def test_each_reply_is_to_what_was_said_under_the_speakers_persona(model, tokenizer, dataset, max_history):
    talks, of_people = selfchat(
        model, tokenizer, dataset, GREEDY, count=9, max_history=max_history, batchsize=2, seed=1
    )
    assert len(talks) == 3
    for talk, theirs in zip(talks, of_people):
        assert theirs.turns[0] == talk.turns[0] and theirs.personas[1] == talk.personas[1] != talk.personas[0]
        assert len(theirs.turns) == 6  # as many as the dialog has
        turns = [tokenize(tokenizer, talk.turns[:1])[0]]
        for place in range(1, 2 * EXCHANGES + 1):
            history = turns if max_history < 0 else turns[-3:]
            earlier = turns[: len(turns) - len(history)][(place % 2) :: 2]
            persona = tokenize(tokenizer, talk.personas[place % 2])
            turns += generate(model, [Context(persona, history, earlier)], tokenizer, GREEDY)
        replies = tokenizer.batch_decode(turns[1:], skip_special_tokens=True)
        assert talk.turns[1:] == list(map(tokenizer.clean_up_tokenization, replies))


def test_figures_counted_by_hand():
    talk = Talk(
        (["i like green tea ."], ["i have two old dogs .", "i sing ."]),
        ["do you like green tea too ?", "i have two dogs .", "do you like green tea too ?", "I have two dogs !",
         "you have two dogs there ?", "", "tea ."],
    )  # fmt: skip
    found = measure([talk])
    assert found.pop("distinct-2") == 15 / 20
    assert found == {
        "replies": 6,
        "repeated": 2 / 6,  # the second question, and the second answer
        "repeats": 2 / 6,
        "echoes": 0.0,
        "persona_used": (3 / 3 + 2 / 4) / 2,  # like, green, tea; two, dogs of two, old, dogs, sing
        "words": (4 + 6 + 4 + 5 + 0 + 1) / 6,
        "empty": 1 / 6,
    }
    assert measure([Talk(([], []), ["we live in town", "so you live in town", "we live in town"])])["echoes"] == 0
    assert measure([Talk(([], []), ["we all live in town", "so all live in town here"])])["echoes"] == 1


def test_two_personas_are_needed():
    opened = {"utterances": [{"history": ["hi"], "candidates": ["hello"]}]}
    begun_by_the_model = {"utterances": [{"history": [], "candidates": ["hello"]}]}
    assert sorted(draw_dialogs([opened, begun_by_the_model, opened], 5, 0)) == [0, 2]
    with pytest.raises(SettingError, match="two validation dialogs"):
        draw_dialogs([opened, begun_by_the_model], 5, 0)


def test_without_a_seed_each_draw_is_another():
    """`--seed 0` drew the same dialogs each time."""
    dialogs = [{"utterances": [{"history": ["hi !"]}]}] * 100
    draws = [draw_dialogs(dialogs, 100, seed) for seed in (0, 0, 1, 1)]
    assert draws[0] != draws[1] and draws[2] == draws[3]
