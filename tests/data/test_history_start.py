"""`--history_start`: the history begins at a fixed position, in training, evaluation and decoding alike."""

import pytest
import torch

from transfertransfo.data.inputs import Example, context_positions, fit, make_examples, make_fork
from transfertransfo.data.trees import pack
from transfertransfo.decoding import Decoding, generate
from transfertransfo.errors import UserError
from transfertransfo.evaluation.evaluator import Turn, rank_candidates
from transfertransfo.model.loading import load_model
from transfertransfo.model.saving import save_model

PERSONAS = [[], [[5, 6]], [[5, 6, 7], [8, 9]]]
HISTORY = [[10, 11], [12], [13, 14, 15]]
START = 20


def test_history_positions_do_not_depend_on_the_persona(tokenizer):
    rows = [make_fork(Example(persona, HISTORY, [[7, 7], [8]]), tokenizer, START) for persona in PERSONAS]
    batch = pack(rows, tokenizer.pad_token_id)
    for persona, row, positions in zip(PERSONAS, rows, batch.position_ids.tolist()):
        persona_length = 1 + sum(map(len, persona))
        assert row.positions[:persona_length] == list(range(persona_length))
        context = len(row.positions)
        assert positions[persona_length:context] == list(range(START, START + 10))  # 3 turns, 4 speakers
        assert positions[context : context + 5] == [30, 31, 32, 30, 31]  # both replies, with <eos>


def test_off_is_right_after_the_persona():
    for persona in PERSONAS:
        length = 1 + sum(map(len, persona)) + 10
        assert context_positions(persona, HISTORY) == list(range(length))


def test_a_start_that_is_the_personas_length_changes_nothing(model, tokenizer):
    """The model itself: hidden states with the history at its usual place are the usual ones."""
    example = Example(PERSONAS[2], HISTORY, [[7, 7], [8]])
    usual = model(pack([make_fork(example, tokenizer)], 0))
    same = model(pack([make_fork(example, tokenizer, 6)], 0))
    other = model(pack([make_fork(example, tokenizer, START)], 0))
    for want, got, changed in zip(usual, same, other):
        assert torch.equal(want, got)
        assert not torch.allclose(want, changed, atol=1e-4)


def test_a_persona_that_is_too_long_loses_its_end(model, tokenizer, caplog):
    """A chat ended in a traceback, or laid the persona over the history."""
    dialogs = [{"personality": persona, "utterances": [{"history": HISTORY, "candidates": [[7], [8]]}]}
               for persona in PERSONAS]  # fmt: skip
    kept = [example.persona for example in make_examples(dialogs, 2, 128, history_start=5)]
    assert kept == [PERSONAS[0], PERSONAS[1], [[5, 6, 7], [8]]]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "1 of 3 examples are too long for the model's 128 positions"
    ]
    assert [example.persona for example in make_examples(dialogs, 2, 128, history_start=6)] == PERSONAS

    model.history_start = START
    decoding = Decoding(max_length=5, no_sample=True)
    long, short = [[5] * 17, [6] * 500], [[5] * 17, [6] * 2]
    replies = [generate(model, [(persona, HISTORY)], tokenizer, decoding) for persona in (long, short)]
    assert replies[0] == replies[1]


def test_a_start_that_leaves_too_little_room(model):
    with pytest.raises(UserError, match=r"^history_start 65: leaves too few of the model's 128 positions"):
        model.history_start = 65
    model.history_start = 64


def test_what_does_not_fit_loses_its_oldest_turns_not_its_persona():
    example = Example(PERSONAS[2], [[i] * 9 for i in range(9)], [[7] * 5])
    short = fit(example, 64, START)
    assert short.persona == example.persona and short.history == example.history[-3:]
    assert context_positions(short.persona, short.history, START)[-1] + 1 + 5 + 1 <= 64


def test_saved_with_the_model_and_used_by_ranking_and_decoding(model, tokenizer, tmp_path):
    examples = [Example(persona, HISTORY, [[7, 7], [8], [9, 9, 9]]) for persona in PERSONAS]
    turns = [Turn(example, ["a", "b", "c"], "c", [9]) for example in examples]
    decoding = Decoding(max_length=8, no_sample=True)
    model.history_start = START
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.history_start == START

    rankings = rank_candidates(loaded, tokenizer, turns)
    replies = generate(loaded, [turn.example[:2] for turn in turns], tokenizer, decoding)
    for turn, ranking, reply in zip(turns, rankings, replies):
        row = make_fork(turn.example, tokenizer, START)
        scores = model(pack([row], 0))[1][0]
        assert ranking == scores.sort(descending=True).indices.tolist()
        # each greedy token is the likeliest after a plain forward over all before it
        for i, token in enumerate(reply):
            row = make_fork(turn.example._replace(candidates=[reply[:i]]), tokenizer, START, with_eos=False)
            hidden = model.packed_hidden_states(pack([row], 0))[-1]
            assert token == int(model.lm_logits(hidden).argmax()), (i, token)
