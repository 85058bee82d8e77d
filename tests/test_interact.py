"""The chat: its turns and commands as functions, through a pipe, and on a terminal."""

import contextlib
import gzip
import importlib
import io
import json
import logging
import os
import pty
import random
import re
import select
import signal
import termios
import threading
from argparse import Namespace
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, ROOT, slow_but, start_fork

import interact
from transfertransfo.chat import conversation, terminal
from transfertransfo.chat.commands import COMMANDS, answer
from transfertransfo.chat.conversation import Chat
from transfertransfo.data.dataset import get_dataset
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.inputs import Example
from transfertransfo.data.parlai import write_parlai
from transfertransfo.data.personas import draw_persona
from transfertransfo.data.sources import recorded_dataset
from transfertransfo.data.tokenization import SPECIAL_TOKENS, knows_dialog_tokens, tokenize
from transfertransfo.decoding import Decoding, sample_sequence
from transfertransfo.errors import UserError
from transfertransfo.model.loading import load_finetuned, load_model
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer
from transfertransfo.ranking import score_candidates

EXAMPLE = ROOT / "example" / "personachat.json"
PERSONA = ["i like dogs .", "i live in ohio ."]


@pytest.fixture(params=slow_but(["gpt"], FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture
def chat(model, tokenizer):
    told = []
    decoding = Decoding(max_length=6, min_length=6, no_sample=True)
    made = Chat(model, tokenizer, decoding, 2, PERSONA, lambda: ["i was drawn ."], told.append, io.StringIO())
    made.told = told
    return made


def say(chat: Chat, line: str) -> str:
    return "".join(answer(chat, line))


def transcript(chat: Chat) -> list[dict]:
    return [json.loads(line) for line in chat.transcript.getvalue().splitlines()]


# ---- turns ----


def test_replies_are_those_of_sample_sequence(chat, model, tokenizer):
    history = []
    for text in ("hello , how are you ?", "what do you do ?", "do you like dogs ?", "why ?"):
        history += tokenize(tokenizer, [text])
        reply = sample_sequence(tokenize(tokenizer, PERSONA), history[-5:], tokenizer, model, chat.decoding)
        history.append(reply)
        assert say(chat, text) == chat.text_of(reply)
    assert chat.context(chat.exchanges, [7]).earlier == history[1:4:2]


def test_a_reply_is_streamed_word_by_word(chat, tokenizer):
    sentences = [text for persona in json.loads(EXAMPLE.read_text())["valid"] for text in persona["personality"]]
    sentences += ["i do n't know , he 's here , i 'll go !", "' hi ' he said ' ok ' . . .", "it ' s", "don't you?", "a"]
    for text, ids in zip(sentences, tokenize(tokenizer, sentences)):
        reply = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conversation, "decode", lambda *args, ids=ids, **_: ([[token]] for token in ids))
            pieces = list(chat.stream(None, reply))
        assert reply == ids
        assert "".join(pieces) == chat.text_of(ids), text
        assert len([piece for piece in pieces if piece.strip()]) >= len(chat.text_of(ids).split()) / 2


def test_a_stopped_reply_counts_as_far_as_it_came(chat, model, monkeypatch):
    whole = say(chat, "hello")
    say(chat, "/undo")
    lm_logits, calls = model.lm_logits, iter(range(99))

    def stopped_at_the_third(hidden):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return lm_logits(hidden)

    monkeypatch.setattr(model, "lm_logits", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "hello")
    assert len(chat.exchanges[0].reply) == 3
    assert whole.startswith(chat.text_of(chat.exchanges[0].reply)[:4])
    assert transcript(chat)[-1]["stopped"]
    assert say(chat, "/history").endswith(" (stopped)")
    monkeypatch.undo()
    (words,) = tokenize(chat.tokenizer, ["i like dogs and cats"])
    monkeypatch.setattr(conversation, "decode", lambda *args, **_: ([[token]] for token in words))
    with closing(answer(chat, "go on")) as pieces:
        next(pieces)
    assert 0 < len(chat.exchanges[1].reply) < len(words)
    assert say(chat, "and on") == "i like dogs and cats"


def test_a_reply_stopped_before_its_first_token_leaves_nothing(chat, model, monkeypatch):
    monkeypatch.setattr(conversation, "candidate_replies", lambda *args, **_: (_ for _ in ()).throw(KeyboardInterrupt))
    chat.decoding = replace(chat.decoding, num_beams=2)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "hello")
    assert chat.exchanges == []


@pytest.mark.parametrize("text", ["<eos>", "<speaker1> hi <pad>", "hello<bos>", "</s> <speaker2>"])
def test_control_tokens_that_are_typed_stay_text(chat, tokenizer, text):
    say(chat, f'/persona "{text}"')
    say(chat, text)
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
    context = chat.context(chat.exchanges, [7])
    assert context.persona and context.history[0]
    assert not special & {token for row in [*context.persona, context.history[0]] for token in row}


@pytest.mark.parametrize(
    "text", ["", "   ", "\t", "\x00\x01\x1b[31m\x07", "\ud800\udfff", "é 你好 😀 ﷽", "\u200b", "/", "/ /", "//\x00"]
)
def test_strange_lines(chat, text):
    """An empty line ended the original."""
    try:
        say(chat, text)
    except UserError as error:
        assert text.startswith("/") and "no such command" in str(error) and str(error).isprintable()
    for name in ("/history", "/candidates", "/undo"):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", say(chat, name))
    assert say(chat, "hello")


def test_a_long_line_and_a_long_persona_drop_the_oldest_and_say_so_once(chat):
    say(chat, "/persona " + "\n".join(["i like dogs and cats ."] * 200))
    for text in ("cats and dogs " * 8000, "x" * 100_000, "hello"):
        assert say(chat, text)
    assert [line for line in chat.told if "the oldest is left out" in line] == [
        "(more than the model's 128 positions: the oldest is left out now)"
    ]


def test_a_persona_that_does_not_fit_is_shown_as_the_model_sees_it(chat):
    """A persona of one long sentence was left out whole, and the chat went on showing it."""
    sentence = " ".join(f"i like {pet}s and dogs ." for pet in ("dog", "cat", "bird") * 30)
    shown = say(chat, f'/persona "{sentence}"')
    seen = re.fullmatch(r"Persona: (i like .*) \(the rest of it is more than the model can see\)", shown)[1]
    assert sentence.replace(" .", ".").startswith(seen) and len(seen) < len(sentence)
    say(chat, "hello")
    assert not any("persona" in line for line in chat.told), "it was shown as cut already"

    say(chat, "/persona " + "\n".join(PERSONA))
    assert say(chat, "/persona") == f"Persona: {' '.join(PERSONA)}"
    chat.told.clear()
    for _ in range(2):
        say(chat, "hello dogs " * 200)
    told = [line for line in chat.told if "persona" in line]
    assert told == ["(too long for the model: of its persona it sees: nothing)"]


def test_a_persona_s_line_end_is_for_the_model_what_it_is_in_training(chat, tokenizer):
    text = "i like tea .\ni like dogs ."
    shown = chat.begin([text])
    assert shown == "Persona: i like tea . i like dogs ."
    assert chat.persona_ids == tokenize(tokenizer, [text])


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_the_tokenizer_cannot_write_is_said(chat, family):
    for text in ("안녕하세요 hello", "만나서 반가워요"):
        say(chat, text)
    told = [line for line in chat.told if "cannot read" in line]
    note = r"\(of {} the model cannot read \d+ of \d+ tokens: its tokenizer cannot write them\)"
    persona = "저는 고양이를 좋아해요"
    shown = [say(chat, f'/persona "{persona}"'), say(chat, "/persona")]
    if family == "gpt":
        assert len(told) == 1 and re.fullmatch(note.format("this"), told[0]), "once"
        assert all(re.fullmatch(f"Persona: {persona} {note.format('it')}", line) for line in shown)
    else:
        assert (told, shown) == ([], [f"Persona: {persona}"] * 2)


@pytest.mark.parametrize("text", ["'" * 10_000, "(" * 10_000, f"a{' ' * 100_000}b", "é\n" * 10_000])
def test_long_lines_in_gpts_own_tokenization(base_checkpoints, text):
    """spaCy's time grows with the square of a word's length, a pattern's with that of white space: it took minutes."""
    tokenizer = load_tokenizer(base_checkpoints["gpt"], "spacy")
    assert tokenize(tokenizer, [text])[0]


def test_a_model_with_nothing_to_say(chat, model, tokenizer, monkeypatch):
    logits = torch.zeros(1, model.pretrained.config.vocab_size)
    logits[0, tokenizer.eos_token_id] = 100.0
    monkeypatch.setattr(model, "lm_logits", lambda hidden: logits)
    assert say(chat, "hello").strip() == "" and chat.told == ["(the model ends its reply at once)"]
    assert len(chat.exchanges) == 1


# ---- commands ----


def test_help_lists_every_command(chat):
    lines = say(chat, "/help").splitlines()
    assert [line.split()[0].rstrip(":") for line in lines] == list(COMMANDS)
    assert all(len(line) > 15 for line in lines)


@pytest.mark.parametrize(("typed", "near"), [
    ("/hlep", "/help"), ("/presona x", "/persona"), ("/Undo", "/undo"), ("/HELP", "/help"), ("/halp", "/help"),
    ("/exit", "/quit"),
])  # fmt: skip
def test_an_unknown_command_suggests_the_nearest(chat, typed, near):
    with pytest.raises(UserError, match=rf"^{typed.split()[0]}: no such command \(nearest: {near}\); "):
        say(chat, typed)


@pytest.mark.parametrize(
    ("rest", "persona"),
    [
        ('"i like cats ." "i \'m old ."', ["i like cats .", "i 'm old ."]),
        ("i like cats .\n\n i am old . \n", ["i like cats .", "i am old ."]),
        ("i don't like cats .", ["i don't like cats ."]),
        ('""', []),
    ],
)
def test_another_persona_begins_again(chat, rest, persona):
    say(chat, "hello")
    shown = say(chat, f"/persona {rest}")
    assert [text.strip() for text in chat.persona] == persona and chat.exchanges == []
    assert shown == say(chat, "/persona") == f"Persona: {' '.join(chat.persona) or '(none)'}"
    assert say(chat, "hello")


def test_a_persona_with_an_open_quote(chat):
    with pytest.raises(UserError, match=r"^/persona: no closing quotation$"):
        say(chat, '/persona "i like')
    assert chat.persona == PERSONA


def test_random_reset_undo_retry_history(chat):
    first = say(chat, "hello")
    second = say(chat, "do you like dogs ?")
    assert say(chat, "/history") == f"you:   hello\nmodel: {first}\nyou:   do you like dogs ?\nmodel: {second}"
    assert say(chat, "/retry") == second and len(chat.exchanges) == 2
    assert say(chat, "/undo") == "(taken back: do you like dogs ?)"
    assert say(chat, "/history") == f"you:   hello\nmodel: {first}"
    assert say(chat, "do you like dogs ?") == second
    say(chat, "/reset")
    assert chat.exchanges == [] and chat.persona == PERSONA and say(chat, "hello") == first
    assert say(chat, "/random") == "Persona: i was drawn ." and chat.exchanges == []
    for name in ("/undo", "/retry", "/history", "/candidates"):
        assert say(chat, name) == "(nothing was said yet)"


def test_a_reply_stays_where_no_other_comes(chat):
    say(chat, "hello")
    exchanges = chat.exchanges.copy()
    for length in (600, 10**12):
        chat.decoding = replace(chat.decoding, max_length=length)
        with pytest.raises(UserError, match=f"^max_length {length}: more than the model's 128 positions hold"):
            say(chat, "/retry")
        assert chat.exchanges == exchanges


def test_settings(chat):
    assert say(chat, "/set temperature 0.9") == "temperature = 0.9" and chat.decoding.temperature == 0.9
    assert say(chat, "/set temperature") == "temperature = 0.9"
    assert say(chat, "/set no_sample off") == "no_sample = False" and chat.decoding.no_sample is False
    say(chat, "/set max_history 0")
    say(chat, "hello")
    assert len(chat.context(chat.exchanges, [7]).history) == 1
    assert "max_history = 0" in say(chat, "/set").splitlines()


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("temprature 1", r"^/set temprature: no such setting \(nearest: temperature\)"),
        ("temperature 0", "^/set temperature: expected .* got '0'; /set num_samples 1 and /set no_sample on take"),
        ("temperature -h", "^/set temperature: expected a number"),
        ("rank yes", "^/set rank: expected on or off, got 'yes'$"),
        ("num_samples 3", "^/set num_samples 3: with no_sample they would"),
        ("rank on", "^/set rank: this takes several replies; give num_samples or num_beams of at least 2 too$"),
        ("help 1", "^/set help: no such setting"),
        ("device cuda", "^/set device: no such setting"),
    ],
)
def test_wrong_settings_change_nothing(chat, rest, message):
    before = chat.decoding, chat.max_history
    with pytest.raises(UserError, match=message):
        say(chat, f"/set {rest}")
    assert (chat.decoding, chat.max_history) == before


def test_candidates_are_scored_by_the_choice_head(chat, model, tokenizer):
    for line in ("/set no_sample off", "/set temperature 2", "/set num_samples 4", "/set rank on"):
        say(chat, line)
    reply = say(chat, "hello")
    *before, last = chat.exchanges
    context = chat.context(before, last.heard)
    (scores,) = score_candidates(model, tokenizer, [Example(context.persona, context.history, last.candidates)])
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    lines = say(chat, "/candidates").splitlines()
    assert lines == [f"{' ' if i else '*'} {score:8.3f}  {chat.text_of(ids)}"
                     for i, (score, ids) in enumerate(zip(scores, last.candidates))]  # fmt: skip
    assert lines[0].endswith(reply)
    say(chat, "/set rank off")
    say(chat, "/retry")
    lines = say(chat, "/candidates").splitlines()
    scores = [float(line[1:].split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    stars = [line for line in lines if line.startswith("*")]
    assert len(stars) == 1 and stars[0].endswith(chat.text_of(chat.exchanges[-1].candidates[0]))


def test_a_saved_dialog_is_a_dataset(chat, tokenizer, tmp_path):
    replies = [say(chat, text) for text in ("hello there !", "and you ?")]
    path = tmp_path / "talk.jsonl"
    say(chat, f"/save {path}")
    (dialog,) = read_dialogs([path])["train"]
    assert dialog["personality"] == PERSONA
    assert [turn["history"] for turn in dialog["utterances"]] == [
        ["hello there !"], ["hello there !", replies[0], "and you ?"]
    ]  # fmt: skip
    assert [turn["candidates"][-1] for turn in dialog["utterances"]] == replies
    assert get_dataset(tokenizer, str(path), "")["train"][0]["personality"] == tokenize(tokenizer, PERSONA)
    with pytest.raises(UserError, match=f"^/save {path}: is there already; /save >> {path} adds the dialog to it$"):
        say(chat, f"/save {path}")
    for odd in ("~nosuchuser/x", "x" * 300, "x\0y", '"x'):
        with pytest.raises(UserError, match=r"^/save "):
            say(chat, f"/save {odd}")


def test_dialogs_are_added_to_a_file_and_ratings_go_with_them(chat, tmp_path):
    """A session makes a dataset: /save took a new file each time."""
    path = tmp_path / "talks.jsonl"
    assert say(chat, "/rate 3") == "(nothing was said yet)"
    reply = say(chat, "hello")
    assert say(chat, "/rate 4") == f"(rated 4: {reply})"
    assert say(chat, f"/save >> {path}") == f"(written to {path})"
    say(chat, "/reset")
    say(chat, "how are you ?")
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
    assert say(chat, f"/save >>{path}") == f"(added to {path})"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["utterances"][0].get("rating") for line in lines] == [4, None]
    assert [dialog["utterances"][0]["history"] for dialog in read_dialogs([path])["train"]] == [
        ["hello"], ["how are you ?"]
    ]  # fmt: skip
    assert {"rating": 4, "text": reply}.items() <= transcript(chat)[5].items()
    for content in ('{"train": [\n]}\n', "hello\n", "3\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=f"^/save {path}: not a file of JSON lines"):
            say(chat, f"/save >> {path}")
        assert path.read_text() == content
    for rest in ("", "0", "6", "4.5", "good"):
        with pytest.raises(UserError, match=rf"^/rate: expected a number from 1 to 5, got '{rest}'$"):
            say(chat, f"/rate {rest}")


@pytest.mark.parametrize(("typed", "command"), [("quit", "/quit"), ("Exit ", "/quit"), ("help", "/help")])
def test_a_command_without_its_slash(chat, typed, command):
    with pytest.raises(UserError, match=rf"^{typed.strip()}: did you mean {command}\? To say it, put a blank before"):
        say(chat, typed)
    assert chat.exchanges == []
    assert say(chat, f" {typed}") and say(chat, f"{typed} me") and len(chat.exchanges) == 2


@pytest.mark.parametrize("order", ["rank", "consensus"])
@pytest.mark.parametrize(("ways", "name"), [(["num_samples 4"], "num_samples"), (["num_beams 4"], "num_beams")])
def test_one_reply_is_not_ranked(chat, ways, name, order):
    """`/set num_samples 1` was refused for the sake of `--rank`, which nobody had typed."""
    for rest in ("no_sample off", *ways, f"{order} on"):
        say(chat, f"/set {rest}")
    assert say(chat, f"/set {name} 1").splitlines() == [
        f"{name} = 1", f"{order} = False (there are too few replies now)"
    ]  # fmt: skip
    assert not chat.decoding.chooses and say(chat, "hello") and len(chat.exchanges[0].candidates) == 1


def test_the_name_of_a_saved_file_is_read_as_in_a_shell(chat, tmp_path):
    say(chat, "hello")
    for typed, name in (('"a b"', "a b"), ("c d", "c d"), ("'> e'", "> e")):
        path = tmp_path / name
        assert say(chat, f"/save {typed.replace(name, str(path))}") == f"(written to {path})" and path.exists()
    assert say(chat, f"/save > {tmp_path / 'f'}") == f"(written to {tmp_path / 'f'})"
    for typed in ("", ">> "):
        with pytest.raises(UserError, match=f"^/save {tmp_path}: Is a directory$"):
            say(chat, f"/save {typed}{tmp_path}")


def test_the_advice_for_a_temperature_of_nought_can_be_followed(chat):
    chat.decoding = Decoding(num_samples=4, rank=True)
    with pytest.raises(UserError, match="; /set num_samples 1 and /set no_sample on take") as error:
        say(chat, "/set temperature 0")
    for command in re.findall(r"/set \w+ \w+(?= and| take)", str(error.value)):
        say(chat, command)
    assert chat.decoding == Decoding(no_sample=True)


def test_what_cannot_be_saved(chat, tmp_path):
    for line, message in (
        ("/save", "one file's name"), ("/save >>", "one file's name"), ('/save "a" "b"', "one file's name"),
        (f"/save {tmp_path / 'x'}", "nothing was said"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^/save: .*{message}"):
            say(chat, line)
    say(chat, "hello")
    with pytest.raises(UserError, match=r"No such file or directory$"):
        say(chat, f"/save {tmp_path / 'no' / 'x'}")


def test_the_transcript_has_each_turn(chat):
    reply = say(chat, "hello\x1b")
    say(chat, "/undo")
    lines = transcript(chat)
    assert all(line.pop("time") for line in lines)
    assert lines == [
        {"persona": PERSONA},
        {"speaker": "user", "text": "hello\x1b"},
        {"speaker": "model", "text": reply},
        {"command": "/undo"},
    ]


def test_nothing_that_is_shown_reaches_the_terminal_raw(chat, tokenizer, monkeypatch, capsys, checkpoint):
    """Escape sequences of a persona or a reply could clear the screen, or type into it."""
    hostile = "a \x1b[2J \x07 \r \x9b1m \x00 tea"
    (ids,) = tokenize(tokenizer, [hostile])
    flags = ["--model", checkpoint, "--personality", hostile, "--no_sample"]
    lines = [f"hi{hostile}", "/history", f"/{hostile}", f"/set {hostile}", f"/save {hostile}/x", "/undo"]
    shown = [chat.text_of(ids), chat.begin([hostile]), chat_through_a_pipe(monkeypatch, capsys, lines, *flags)]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "".join(shown))
    assert "\\x1b[2J" in shown[1] and "Persona: a \\x1b[2J \\x07" in shown[2] and ">>> hia \\x1b[2J" in shown[2]


def test_quit(chat):
    with pytest.raises(EOFError):
        say(chat, "/quit")


# ---- personas ----


@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt", "json.gz"])
def test_a_persona_is_drawn_from_any_format(tmp_path, suffix):
    personas = [["i like [brackets] .", 'i say "hi" .'], [], ["i am é ."], ["x ."]]
    dialogs = [{"personality": persona, "utterances": [{"history": ['the "personality": ["no"]'], "reply": "hi"}]}
               for persona in personas]  # fmt: skip
    path = tmp_path / f"train.{suffix}"
    if suffix == "txt":
        utterances = [{"history": ["a"], "candidates": ["b"]}] * 2
        write_parlai([{**dialog, "utterances": utterances} for dialog in dialogs], path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(dialog) + "\n" for dialog in dialogs))
    else:
        with (gzip.open if suffix.endswith("gz") else open)(path, "wt") as file:
            json.dump({"train": dialogs[:2], "valid": dialogs[2:]}, file)
    drawn = {tuple(draw_persona([path])) for _ in range(60)}
    assert drawn == {tuple(persona) for persona in personas if persona}


def test_drawing_reads_nothing_else(monkeypatch):
    """The original tokenised the whole dataset to draw one persona."""
    for name in ("data.personas.read_dialogs", "data.dataset.tokenize", "chat.conversation.tokenize"):
        monkeypatch.setattr(f"transfertransfo.{name}", None)
    monkeypatch.setattr("json.load", None)
    personas = [dialog["personality"] for split in json.loads(EXAMPLE.read_text()).values() for dialog in split]
    assert draw_persona([EXAMPLE]) in personas


def arguments(dataset_path, model_checkpoint="") -> Namespace:
    return Namespace(dataset_path=str(dataset_path), model_checkpoint=model_checkpoint, skip_bad_dialogs=False)


def test_no_persona_to_draw(tmp_path):
    (tmp_path / "train.txt").write_text("1 hello\thi\n")
    (tmp_path / "empty.json").touch()
    for name, fault in (("train.txt", "no dialog with a persona"), ("empty.json", "the file is empty")):
        with pytest.raises(UserError, match=f"{name}: {fault}; or give a persona .*--personality"):
            interact.draw_from_dataset(arguments(tmp_path / name), print)


def test_a_run_folder_tells_its_dataset(tmp_path):
    told = []
    args = arguments("", model_checkpoint=str(tmp_path))
    (tmp_path / "training_args.json").write_text(json.dumps({"dataset_path": str(EXAMPLE)}))
    assert interact.draw_from_dataset(args, told.append)
    assert told == [f"(a persona from {EXAMPLE})"]
    for content in ('{"dataset_path": "/no/such"}', "[]", "{", '{"dataset_path": null}', "{}"):
        (tmp_path / "training_args.json").write_text(content)
        assert recorded_dataset(str(tmp_path)) == ""


def test_no_download_names_the_way_out(monkeypatch):
    def fail(url):
        raise UserError(f"cannot download {url}")

    monkeypatch.setattr("transfertransfo.data.dataset.fetch", fail)
    with pytest.raises(UserError, match=r"^cannot download https.*; or give a persona instead: --personality "):
        interact.draw_from_dataset(arguments(""), print)


def test_persona_flags(tmp_path):
    file = tmp_path / "persona.txt"
    file.write_bytes("\ufeffi like dogs .\n\ni am é .\n".encode())
    given = lambda *flags: interact.given_persona(interact.parse_args(flags))  # noqa: E731
    assert given() is None
    assert given("--personality", "a", "b c") == ["a", "b c"]
    assert given("--personality_file", str(file)) == ["i like dogs .", "", "i am é ."]
    file.write_bytes(b"\xff\xfe")
    for flags, message in (
        (["--personality_file", str(file)], "no UTF-8 text$"),
        (["--personality_file", str(tmp_path)], "Is a directory$"),
        (["--personality", "a", "--personality_file", str(file)], "give one of the two$"),
    ):
        with pytest.raises(UserError, match=message):
            given(*flags)


# ---- the script ----


def chat_through_a_pipe(monkeypatch, capsys, lines: list[str], *flags: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    interact.run(["--device", "cpu", "--max_length", "4", "--no_sample", *map(str, flags)])
    return capsys.readouterr().out


def test_run_through_a_pipe(monkeypatch, capsys, checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--transcript", tmp_path / "t.jsonl", "--personality", "i like <eos> dogs .", " "]
    out = chat_through_a_pipe(monkeypatch, capsys, ["hello", "", "/xyzzy", "/undo", "/set max_length 200"], *flags)
    lines = out.splitlines()
    assert lines[0].startswith("Persona: i like <eos> dogs .") and lines[1] == ">>> hello"
    assert lines[3:] == [
        ">>> ", "(say something, or leave with Ctrl-D)", "",
        ">>> /xyzzy", "/xyzzy: no such command; /help lists them",
        ">>> /undo", "(taken back: hello)",
        ">>> /set max_length 200", "/set max_length 200: more than the model's 128 positions hold",
        ">>> ",
    ]  # fmt: skip
    assert "\x1b" not in out
    recorded = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line.get("speaker") or line.get("command") for line in recorded] == [
        None, "user", "model", "/undo", "/set max_length 200"
    ]  # fmt: skip


@pytest.mark.parametrize("length", [126, 600, 100_000])
def test_a_reply_longer_than_the_model_is_refused_at_the_start(monkeypatch, capsys, checkpoint, length):
    flags = ["--model", checkpoint, "--personality", "x", "--max_length", length]
    with pytest.raises(UserError, match=f"^--max_length {length}: more than the model's 128 positions hold$"):
        chat_through_a_pipe(monkeypatch, capsys, ["hello"], *flags)
    assert ">>> hello" in chat_through_a_pipe(monkeypatch, capsys, ["hello"], *flags[:-1], 125)


def test_seeds(monkeypatch, capsys, checkpoint):
    """The original's chat had the same persona each time."""
    chosen = {}
    for seed in (0, 5):
        random.seed(1)
        flags = ["--model", checkpoint, "--dataset_path", EXAMPLE, "--seed", seed]
        chosen[seed] = [chat_through_a_pipe(monkeypatch, capsys, [], *flags) for _ in range(4)]
    assert len(set(chosen[0])) > 1 and len(set(chosen[5])) == 1


def test_a_model_that_knows_no_dialogs(monkeypatch, capsys, base_checkpoints, checkpoints, family, tmp_path):
    tokenizer = load_tokenizer(base_checkpoints[family], "basic" if family == "gpt" else None)
    tokenizer.save_pretrained(tmp_path)
    save_model(load_model(base_checkpoints[family], from_scratch=True), tmp_path)
    flags = ["--model", tmp_path, "--personality", "x"]
    with pytest.raises(UserError, match="not fine-tuned on dialogs"):
        chat_through_a_pipe(monkeypatch, capsys, ["hello"], *flags)
    assert ">>> hello\n" in chat_through_a_pipe(monkeypatch, capsys, ["hello"], *flags, "--force")
    model, tokenizer = load_finetuned(tmp_path, device="cpu", force=True)
    assert knows_dialog_tokens(tokenizer) and model.pretrained.config.vocab_size == len(tokenizer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_transcript_on_a_full_disk(checkpoint):
    """What the disk did not take was written once more at the end, with a traceback."""
    flags = ["--model", str(checkpoint), "--personality", "x", "--transcript", "/dev/full", "--device", "cpu"]
    with pytest.raises(UserError, match=r"^--transcript /dev/full: No space left on device$"):
        interact.run(flags)


def test_a_transcript_that_cannot_be_written(monkeypatch, capsys, checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--personality", "x", "--transcript", tmp_path]
    with pytest.raises(UserError, match=f"^--transcript {tmp_path}: Is a directory$"):
        chat_through_a_pipe(monkeypatch, capsys, [], *flags)


def test_public_names():
    module = importlib.import_module("interact")
    assert module.sample_sequence is sample_sequence and module.top_filtering and module.run
    with pytest.raises(AttributeError):
        module.nothing  # noqa: B018


@pytest.mark.slow
def test_bytes_that_are_no_text_through_a_real_pipe(checkpoints, tmp_path):
    reader, writer = os.pipe()
    os.write(writer, "hé\n".encode() + b"\xff\n")
    os.close(writer)
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        fds = reader, out.fileno(), err.fileno()
        process = start_fork(interact.run, ["--model", checkpoints["gpt2"], "--personality", "x"], fds, "ascii")
        process.join(PATIENCE)
    os.close(reader)
    shown = (tmp_path / "out").read_bytes()
    assert process.exitcode == 0 and b"Traceback" not in (tmp_path / "err").read_bytes()
    assert shown.count(b">>> ") == 3 and shown.isascii()


def test_the_model_is_looked_at_before_a_persona(monkeypatch, capsys):
    """`--model gpt2` without a network failed over a dataset."""
    monkeypatch.setattr(interact, "draw_from_dataset", lambda *_: pytest.fail("a persona was drawn"))
    with pytest.raises(UserError, match=r"^--model_checkpoint nothing/there/x: no such folder$"):
        interact.run(["--model", "nothing/there/x"])


@pytest.mark.parametrize(("argv", "expected"), [
    ([], {"num_samples": 1, "rank": False, "num_beams": 0, "preset": "original"}),
    ([], {"max_history": 2}),
    (["--model", str(ROOT / "example/smollm2")], {"num_samples": 1, "block_history_ngram": 3, "max_history": -1}),
    (["--model", str(ROOT / "example/smollm2"), "--max_history", "3"], {"block_history_ngram": 3, "max_history": 3}),
    (["--model", str(ROOT / "example/smollm2"), "--num_samples", "4", "--rank"], {"num_samples": 4, "rank": True}),
    (["--model", str(ROOT / "example/model")], {"num_samples": 4, "rank": True, "preset": "ranked", "max_history": 2}),
    (["--model", str(ROOT / "example/smollm2"), "--preset", "original"], {"num_samples": 1, "rank": False}),
    (["--model", str(ROOT / "example/model"), "--no_sample"], {"num_samples": 1, "rank": False, "no_sample": True}),
    (["--preset", "ranked", "--num_samples", "8"], {"num_samples": 8, "rank": True}),
    (["--preset", "ranked", "--temperature", "0.5"], {"num_samples": 4, "rank": True, "temperature": 0.5}),
    (["--preset", "ranked", "--num_samples", "1"], {"num_samples": 1, "rank": False}),
    (["--preset", "ranked", "--num_beams", "2"], {"num_samples": 1, "num_beams": 2, "rank": False}),
    (["--preset", "ranked", "--consensus"], {"num_samples": 4, "rank": False, "consensus": True}),
    (["--preset", "beams"], {"num_beams": 4, "no_repeat_ngram_size": 3, "num_samples": 1}),
    (["--preset", "beams", "--no_repeat_ngram_size", "0"], {"num_beams": 4, "no_repeat_ngram_size": 0}),
    (["--preset", "beams", "--num_samples", "3", "--rank"], {"num_beams": 0, "num_samples": 3, "rank": True}),
])  # fmt: skip
def test_presets_and_the_flags_that_override_them(argv, expected):
    args = interact.parse_args(argv)
    assert expected.items() <= vars(args).items()
    assert Decoding.of(args)  # fit together


# ---- the terminal ----


def test_words_wrap_at_the_terminals_width():
    wrap = terminal.Wrapper(lambda: 12)
    text = "i like dogs and cats and supercalifragilistic 你好你好 你好你好 x\n  indented as it was\n"
    whole, pieces = wrap(text), "".join(map(terminal.Wrapper(lambda: 12), re.findall(r"\s*\S+|\s+", text)))
    assert whole == pieces == (
        "i like dogs\nand cats\nand\nsupercalifragilistic\n你好你好\n你好你好 x\n  indented\nas it was\n"
    )  # fmt: skip


@pytest.fixture
def editor(monkeypatch, tmp_path):
    """Types keys at the prompt and returns what the chat reads; a function that begins another session makes one."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path / "cache"))

    def type_into_new_session(*keys: str) -> list[str]:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            read = terminal.make_editor()
            lines = []
            for typed in keys:
                pipe.send_text(typed)
                lines.append(read())
            return lines

    return type_into_new_session


def test_editing_and_a_history_kept_between_runs(editor, tmp_path):
    left, backspace, up = "\x1b[D", "\x7f", "\x1b[A"
    assert editor(f"hellx{backspace}o 你{left}!\r", f"{up}?\r") == ["hello !你", "hello !你?"]
    assert editor(f"{up}\r", f"{up}{up}{up}!\r") == ["hello !你?", "hello !你!"]
    assert (tmp_path / "cache" / "chat_history").stat().st_mode & 0o777 == 0o600


def test_a_paste_of_several_lines_is_one_text(editor):
    assert editor("\x1b[200~i like dogs .\ni am old .\n\x1b[201~\r") == ["i like dogs .\ni am old .\n"]


@pytest.mark.parametrize(("key", "error"), [("abc\x03", KeyboardInterrupt), ("\x04", EOFError)])
def test_control_keys(editor, key, error):
    with pytest.raises(error):
        editor(key)


def test_no_place_for_the_history(editor, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path / "file"))
    assert editor("hello\r") == ["hello"]


def test_ctrl_c_stops_a_reply_and_a_second_one_leaves(monkeypatch):
    shown, events = [], iter(["hi", "again", KeyboardInterrupt, "never read"])

    def read():
        event = next(events)
        if event is KeyboardInterrupt:
            raise event
        return event

    def stopped_after_a_word(chat, line):
        yield line
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "answer", stopped_after_a_word)
    terminal.talk(None, read, lambda text, kind="": shown.append(text))
    hint = "\n(Ctrl-C once more, Ctrl-D or /quit leaves)\n"
    assert shown == ["hi", hint, "again", hint, "\n"]
    assert next(events) == "never read"


def test_the_exception_behind_a_note_is_logged(chat, caplog):
    """A bug of our own must not hide in the one line that a command fails with."""
    lines, shown = iter(["hello", "/save /nowhere/at/all", "/quit"]), []
    caplog.set_level(logging.DEBUG, logger="transfertransfo")
    terminal.talk(chat, lambda: next(lines), lambda text, kind="": shown.append(text))
    assert "/save /nowhere/at/all: No such file or directory\n" in shown
    assert "FileNotFoundError" in caplog.text and "Traceback" not in "".join(shown)


PATIENCE = 300  # seconds without a sign of life after which a test fails; a busy machine takes long


def read_until(terminal: int, pattern: str) -> str:
    shown = ""
    while not re.search(pattern, shown, re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], PATIENCE)
        assert ready, f"no {pattern!r} in {shown!r}"
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def test_keys_typed_during_a_reply_are_not_seen(monkeypatch):
    ours, theirs = pty.openpty()
    with open(theirs, closefd=False) as tty:
        monkeypatch.setattr("sys.stdin", tty)
        with terminal.unseen_keys():
            os.write(ours, b"unseen\n")
            assert select.select([tty], [], [], PATIENCE)[0]  # the terminal has taken it
        os.write(ours, b"seen\n")
        assert read_until(ours, "\n") == "seen\r\n"
        assert [tty.readline(), tty.readline()] == ["unseen\n", "seen\n"]
    os.close(ours)
    os.close(theirs)


def test_sigterm_leaves_the_terminal_as_it_was(monkeypatch):
    ours, theirs = pty.openpty()
    handler, settings = signal.getsignal(signal.SIGTERM), termios.tcgetattr(theirs)
    with open(theirs, closefd=False) as tty:
        monkeypatch.setattr("sys.stdin", tty)
        with pytest.raises(SystemExit) as error, terminal.orderly_sigterm(), terminal.unseen_keys():
            os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.code == 143 and signal.getsignal(signal.SIGTERM) == handler
    assert termios.tcgetattr(theirs) == settings
    os.close(ours)
    os.close(theirs)


@contextlib.contextmanager
def killed_in_the_end(process):
    """A process that does not do what is waited for is killed, so that the wait ends."""
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_session_on_a_terminal(checkpoints, tmp_path, term):
    ours, theirs = pty.openpty()
    environment = {
        "TERM": term, "TRANSFERTRANSFO_CACHE": str(tmp_path), "NO_COLOR": "", "PROMPT_TOOLKIT_NO_CPR": "1"
    }  # fmt: skip
    argv = ["--model", checkpoints["gpt"], "--personality", "i like dogs ."]
    process = start_fork(interact.run, argv, [theirs] * 3, **environment)  # its group is what Ctrl-Z stops
    os.close(theirs)
    begun = read_until(ours, ">>>")
    assert begun.startswith(f"Loading {checkpoints['gpt']} ...")
    banner = f"Model: {checkpoints['gpt']}; /help lists commands, Ctrl-D leaves Persona: i like dogs ."
    assert banner in " ".join(re.sub("\x1b\\[[0-9;]*m", "", begun).split())
    assert ("\x1b[33m" in begun) == (term == "xterm")
    os.write(ours, b"/set no_sample on\r")
    read_until(ours, "no_sample = True.*>>>")
    if term == "xterm":
        os.write(ours, b"\x1a")
        with killed_in_the_end(process):
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]), "Ctrl-Z does not suspend"
        os.kill(process.pid, signal.SIGCONT)
        read_until(ours, ">>>")  # only then does it read keys again: Ctrl-D is the terminal's own before
    os.write(ours, b"\x04")
    process.join(PATIENCE)
    assert process.exitcode == 0
    os.close(ours)
