"""The chat template of a run folder: token for token what this project makes of the same dialog."""

import json

import pytest
from helpers import DATASET, EVERY_FAMILY, ROOT, run_training
from transformers import AutoTokenizer

from transfertransfo.data.inputs import build_input_from_segments
from transfertransfo.data.tokenization import make_chat_template, tokenize
from transfertransfo.model.sources import load_tokenizer

ROLES = ("user", "assistant")


def with_template(folder, max_history=2):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = make_chat_template(tokenizer, max_history)
    return tokenizer


def messages_of(persona: list[str], turns: list[str], last: str) -> list[dict]:
    """A dialog as other programs hold it, whose last turn is by the role `last`."""
    system = [{"role": "system", "content": "\n".join(persona)}] if persona else []
    first = (ROLES.index(last) + len(turns) - 1) % 2
    return system + [{"role": ROLES[(first + i) % 2], "content": text} for i, text in enumerate(turns)]


def templated(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def inputs(tokenizer, persona, history, reply=None) -> list[int]:
    persona, history = tokenize(tokenizer, persona), tokenize(tokenizer, history)
    (words,) = tokenize(tokenizer, [reply]) if reply is not None else ([],)
    return build_input_from_segments(persona, history, words, tokenizer, with_eos=reply is not None)["input_ids"]


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("max_history", [-1, 0, 2])
def test_a_dialog_is_what_it_is_here(checkpoints, example_json, family, max_history):
    """Every turn of the example: the context with the reply's speaker, and the whole with the reply and its end."""
    tokenizer = with_template(checkpoints[family], max_history)
    window = 2 * max_history + 1 if max_history >= 0 else 100
    turns = [(dialog["personality"], turn) for dialog in example_json["train"][:8] for turn in dialog["utterances"]]
    assert max(len(turn["history"]) for _, turn in turns) > 5
    for persona, turn in turns:
        history, reply = turn["history"], turn["candidates"][-1]
        asked = messages_of(persona, history, "user")
        want = inputs(tokenizer, persona, history[-window:])
        assert templated(tokenizer, asked, add_generation_prompt=True) == want
        told = messages_of(persona, [*history, reply], "assistant")
        assert templated(tokenizer, told) == inputs(tokenizer, persona, history[-window:], reply)


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama"])
def test_dialogs_at_the_edge(checkpoints, family):
    tokenizer = with_template(checkpoints[family])
    for persona, history in ([], ["hi !"]), (["i like tea ."], []), (["Tea."], ["  two  blanks ", "İ 😀"]):
        got = templated(tokenizer, messages_of(persona, history, "user"), add_generation_prompt=True)
        assert got == inputs(tokenizer, persona, history)


@pytest.mark.parametrize("family", ["gpt", "gpt2"])
def test_a_message_may_be_a_list_of_parts(checkpoints, family):
    """As in OpenAI's API: of the persona each part is a sentence."""
    tokenizer, persona = with_template(checkpoints[family]), ["i like tea .", "i have two dogs ."]
    texts = [[{"type": "text", "text": text} for text in part] for part in (persona, ["hi !"])]
    messages = [{"role": "system", "content": texts[0]}, {"role": "user", "content": texts[1]}]
    assert templated(tokenizer, messages, add_generation_prompt=True) == inputs(tokenizer, persona, ["hi !"])


def test_sentences_of_gpts_persona_need_no_stop(checkpoints):
    """Its words end with a blank in any case; those of GPT-2's kind run together without one."""
    persona = ["i like tea", "children are loud"]
    for checkpoint, same in ((checkpoints["gpt"], True), (ROOT / "example" / "smollm2", False)):
        tokenizer = with_template(checkpoint)
        got = templated(tokenizer, messages_of(persona, ["hi !"], "user"), add_generation_prompt=True)
        assert (got == inputs(tokenizer, persona, ["hi !"])) == same


def test_a_run_folder_has_it(base_checkpoints, tmp_path):
    """Loaded by transformers alone, which generates up to the `<eos>` that the configuration names."""
    run = run_training(tmp_path, base_checkpoints["llama"], "--n_epochs", 1, "--max_history", 1)
    theirs, ours = AutoTokenizer.from_pretrained(run.folder), load_tokenizer(run.folder)
    assert theirs.chat_template == ours.chat_template == make_chat_template(ours, 1)
    dialog = DATASET["valid"][0]
    history = dialog["utterances"][-1]["history"]
    got = templated(theirs, messages_of(dialog["personality"], history, "user"), add_generation_prompt=True)
    assert got == inputs(ours, dialog["personality"], history[-3:])
    assert json.loads((run.folder / "generation_config.json").read_text())["eos_token_id"] == ours.eos_token_id
