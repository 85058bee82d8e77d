"""Texts and numbers that are not PersonaChat's: from a file through reader, tokenizer and packing to the model's heads.

What is refused, and how, stands in test_dialogs.py.
"""

import json
import string
from itertools import chain

import pytest
import torch
from helpers import load_own, slow_but

from transfertransfo.data.dataset import get_dataset
from transfertransfo.data.inputs import make_examples, make_fork
from transfertransfo.data.tokenization import SPECIAL_TOKENS, tokenize
from transfertransfo.data.trees import pack
from transfertransfo.model.sources import load_tokenizer

TEXTS = {
    "NUL": "a\0b",
    "only a NUL": "\0",
    "control characters": "\x01\x1b[2J\x7f",
    "BOM": "\ufeffhello",
    "CRLF": "hello\r\nthere",
    "line separators": "a\u2028b\x85c\x0cd",
    "unpaired surrogate": "hi \ud83d",
    "emoji": "🙂 👨‍👩‍👧‍👦 🇺🇳",
    "right to left": "\u202eאבג\u202c مرحبا",
    "combining": "e\u0301\u0301" * 50,
    "only punctuation": "?! ... ,,, “—”",
    "control tokens": "<bos> <eos> <speaker1> <pad> <|endoftext|> <unk>",
    "one megabyte": "hello there , " * 75_000,
}
EMPTY = {"nothing": "", "spaces": " \t  ", "no-break space": "\xa0"}  # these are refused as a reply


@pytest.fixture(params=["gpt", "gpt2"])
def through(request, checkpoints, tmp_path):
    """Takes dialogs to the heads of a tiny model; gives the tokenizer and the examples that it was shown."""

    def take(dialogs, as_lines=False, **options):
        path = tmp_path / "train.json"
        lines = "\n".join(map(json.dumps, dialogs)) if as_lines else json.dumps({"train": dialogs})
        path.write_text(lines)
        tokenizer, model = load_tokenizer(checkpoints[request.param]), load_own(checkpoints[request.param])
        first, again = (get_dataset(tokenizer, path, tmp_path / "cache.bin") for _ in range(2))
        assert first == again
        examples = make_examples(first["train"], 2, model.n_positions, **options)
        batch = pack([make_fork(example, tokenizer) for example in examples], tokenizer.pad_token_id)
        assert batch.position_ids.max() < model.n_positions
        replies = [[*example.candidates[-1], tokenizer.eos_token_id] for example in examples]
        assert batch.lm_labels.tolist() == [*chain(*replies)]
        with torch.inference_mode():
            logits, scores = model(batch)
        assert logits.isfinite().all() and scores[batch.last_positions >= 0].isfinite().all()
        assert batch.choice_labels.tolist() == [len(example.candidates) - 1 for example in examples]
        return tokenizer, examples

    return take


def is_no_dialog_token(tokenizer, ids) -> bool:
    return not {*ids} & {*tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)}


@pytest.mark.parametrize("text", (TEXTS | EMPTY).values(), ids=TEXTS | EMPTY)
@pytest.mark.parametrize("as_lines", slow_but([False], [False, True]), ids=["json", "lines"])
def test_a_text_anywhere(through, text, as_lines):
    reply = text if text.strip() else "yes ."
    utterance = {"history": [text, "why ?", text], "candidates": ["no .", text, reply]}
    tokenizer, (example,) = through([{"personality": [text, "i like tea ."], "utterances": [utterance]}], as_lines)
    for ids in (*example.persona, *example.history, *example.candidates):
        assert is_no_dialog_token(tokenizer, ids)


@pytest.mark.parametrize("text", ["a\0b", "\ufeffhello", "emoji 🙂 \u202eאבג", "?!...", "x\u2028y"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_in_parlai_lines(gpt2, tmp_path, text, end):
    lines = [f"1 your persona: {text}", f"2 {text}\t{text}\t\tno|{text}", ""]
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    (dialog,) = get_dataset(gpt2, tmp_path / "train.txt", "")["train"]
    ids = gpt2.encode(text, add_special_tokens=False)
    assert dialog["personality"] == [ids]
    assert dialog["utterances"] == [{"candidates": [gpt2.encode("no"), ids], "history": [ids]}]


@pytest.mark.parametrize("text", [text for name, text in (TEXTS | EMPTY).items() if name != "one megabyte"])
def test_a_text_tokenised_as_in_gpt_s_pre_training(spacy_gpt, tmp_path, text):
    utterance = {"reply": "a " * 500, "history": [text]}  # a text that is most of a dataset may be refused
    (tmp_path / "train.json").write_text(json.dumps({"train": [{"utterances": [utterance]}]}))
    (dialog,) = get_dataset(spacy_gpt, tmp_path / "train.json", "")["train"]
    assert all(0 <= token < len(spacy_gpt) for token in dialog["utterances"][0]["history"][0])


def test_numbers_of_candidates(through):
    """The original took the last ones of each list as if all were of one length."""
    counts = [0, 1, 2, 7, 40, 100]
    utterances = [{"candidates": [f"{n} no" for n in range(count)], "reply": f"yes {count}"} for count in counts]
    _, examples = through([{"utterances": utterances}, {"utterances": [{"reply": "maybe"}, {"reply": "never"}]}])
    # one without distractors gets those that other dialogs have: 2 or 7 here
    assert [len(example.candidates) for example in examples] == [3, 2, 3, 8, 41, 101, 7, 7]
    _, examples = through([{"utterances": utterances}], num_candidates=4)
    assert [len(example.candidates) for example in examples] == [1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("length", [0, 1, 2, 4, 5, 30])
def test_histories_of_any_length(through, length):
    history = [letter * 3 for letter in string.ascii_letters[:length]]
    tokenizer, (example,) = through([{"utterances": [{"candidates": ["no", "yes"], "history": history}]}])
    assert example.history == tokenize(tokenizer, history[-5:])


def test_contexts_far_beyond_the_model(through, tmp_path, caplog):
    """Oldest turns go first, then the persona from its end, never the reply; said once with a count."""
    persona = [f"{letter} have dogs ." for letter in string.ascii_letters[:50]]
    history = ["hi there ! " * 9, "how are you ? " * 30, "well . " * 60]
    long = {"candidates": ["no , never .", "yes , always ."], "history": history}
    short = {"candidates": ["no , never .", "yes , always ."], "history": ["hi !"]}
    dialogs = [{"personality": persona, "utterances": [long, short]}, {"utterances": [long]}, {"utterances": [short]}]
    tokenizer, examples = through(dialogs)
    whole = make_examples(get_dataset(tokenizer, tmp_path / "train.json", "")["train"], 2, 10**6)
    for example, all_of_it in zip(examples, whole):
        assert example.candidates == all_of_it.candidates
        kept = [*chain(*example.persona)]
        assert kept == [*chain(*all_of_it.persona)][: len(kept)]
    assert [len(example.persona) for example in examples][::2] == [0, 0] and 0 < len(examples[1].persona) < 50
    assert [len(example.history) for example in examples] == [1, 1, 1, 1]
    assert examples[0].history[0] == whole[0].history[-1][-len(examples[0].history[0]) :]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("3 of 4 examples are too long for the model's 128 positions: their oldest turns are left")
