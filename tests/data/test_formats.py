"""What people's files look like: each format from a small invented sample, and what was once read wrong in silence."""

import gzip
import io
import json
import logging
import random
import tarfile
import zipfile

import pytest
from helpers import lines, table, turns

from transfertransfo.data import dataset
from transfertransfo.data.dataset import locate_dataset
from transfertransfo.data.dialogs import read_dialogs, warn_of_overlap
from transfertransfo.data.personas import draw_persona
from transfertransfo.data.sources import dataset_files, split_of, split_of_url
from transfertransfo.errors import UserError

PERSONA = ["i like tea .", "i have two dogs ."]
HISTORIES = [["hi !"], ["hi !", "hello , tea ?", "yes please ."]]
REPLIES = ["hello , tea ?", "with milk ?"]
DIALOG = {
    "personality": PERSONA,
    "utterances": [{"candidates": [reply], "history": history} for reply, history in zip(REPLIES, HISTORIES)],
}
MESSAGES = [
    {"role": "system", "content": "i like tea . i have two dogs ."},
    {"role": "user", "content": "hi !"},
    {"role": "assistant", "content": "hello , tea ?"},
    {"role": "user", "content": "yes please ."},
    {"role": "assistant", "content": "with milk ?"},
]
SHAREGPT = [
    {"from": {"system": "system", "user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
    for turn in MESSAGES
]


TOOLS = "a turn of tools: leave such dialogs out"


def golds(splits) -> dict:
    """The dialogs without the distractors that were drawn."""
    return {
        split: [
            dialog | {"utterances": [{"candidates": [reply], "history": history} for history, reply in turns(dialog)]}
            for dialog in dialogs
        ]
        for split, dialogs in splits.items()
    }


# Misnamed fields


@pytest.mark.parametrize("persona", ["personality", "persona", "personas", "your_persona", "Persona"])
@pytest.mark.parametrize("history", ["history", "context", "dialogue_history"])
@pytest.mark.parametrize("distractors", ["distractors", "negatives"])
def test_other_names_of_fields(read, caplog, persona, history, distractors):
    """They vanished: no persona, no history, and distractors drawn in place of those given."""
    record = {persona: PERSONA, "utterances": [{history: ["hi !"], "reply": "yes", distractors: ["no", "why"]}]}
    expected = {"personality": PERSONA, "utterances": [{"history": ["hi !"], "candidates": ["no", "why", "yes"]}]}
    assert read(lines(record, record)) == [expected] * 2
    said = [f"{name} is read as" in caplog.text for name in (persona.lower(), history, distractors)]
    assert said == [name not in ("personality", "history") for name in (persona, history)] + [
        distractors != "distractors"
    ]


def test_fields_that_nothing_is_read_from_are_named_where_something_is_missing(read, caplog):
    record = {"my_persona": PERSONA, "utterances": [{"past": ["hi !"], "reply": "yes"}], "id": 3}
    read(lines(record))
    (line,) = caplog.messages
    assert "no dialog has a persona or a history; nothing is read from: " in line
    assert {"my_persona", "past", "id"} <= set(line.replace(",", "").split())
    caplog.clear()
    read(lines(DIALOG | {"id": 3, "source": "x"}))
    assert not caplog.messages


# The gold reply


@pytest.mark.parametrize(
    "gold",
    [
        {"reply": "b"}, {"label": "b"}, {"labels": ["b"]}, {"response": "b"}, {"correct_candidate": "b"},
        {"answer": "b"},
        {"label": 1}, {"answer": 1}, {"labels": [0, 1, 0]}, {"gold_index": 1}, {"answers": "B"}, {"labels": ["b", "c"]},
        {"label": 1.0}, {"answer": "1"}, {"label": 1, "answer": "b"}, {"reply": "b", "label": 0},
    ],
)  # fmt: skip
def test_the_field_that_names_the_gold_reply(read, gold):
    """The last candidate was taken for gold, whatever they say."""
    (dialog,) = read(lines({"personality": PERSONA, "utterances": [{"candidates": ["a", "b", "c"]} | gold]}))
    assert dialog["utterances"][0]["candidates"] == ["a", "c", "b"]


@pytest.mark.parametrize(
    "gold, expected",
    [
        ({"label": 3}, "label: 3 is no index of 3 candidates, from 0, nor one of them"),
        ({"label": -1}, "label: -1 is no index of 3 candidates, from 0, nor one of them"),
        ({"answer": "Z"}, "answer: Z is no index of 3 candidates, from 0, nor one of them"),
        ({"label": True}, "label: expected a reply, or its index among the candidates, got true or false"),
        ({"labels": [1, 1, 0]}, "labels: expected a reply, or its index among the candidates, got a list"),
        ({"label": 0, "answer": 1}, "label and answer: different replies"),
    ],
)
def test_a_gold_reply_that_is_none(fault, gold, expected):
    record = {"utterances": [{"candidates": ["a", "b", "c"]} | gold]}
    assert fault(lines(record)) == f"train dialog 1 (line 1), utterance 1, {expected}"


def test_an_index_without_candidates(fault):
    expected = "train dialog 1 (line 1), utterance 1, label: 0 is no index of 0 candidates, from 0, nor one of them"
    assert fault(lines({"utterances": [{"label": 0}]})) == expected


# Lists and null


def test_a_list_of_dialogs_and_null_for_what_is_missing(read):
    bare = {"personality": None, "utterances": [{"candidates": None, "history": None, "reply": "yes"}]}
    expected = {"personality": [], "utterances": [{"candidates": ["yes"], "history": []}]}
    for content in (json.dumps([bare]), json.dumps([bare], indent=1), lines(bare), json.dumps({"train": [bare]})):
        assert read(content) == [expected]


# Splits


def test_dialogs_of_valid_that_stand_in_train(caplog):
    other = DIALOG | {"personality": ["other"]}
    warn_of_overlap({"train": [DIALOG], "valid": [other]})
    warn_of_overlap({"valid": [DIALOG]})
    assert not caplog.messages
    warn_of_overlap({"train": [DIALOG, other], "valid": [other, DIALOG | {"personality": []}]})
    assert caplog.messages == ["1 of 2 valid dialogs stand in train too"]


@pytest.mark.parametrize(
    "name, split",
    [
        ("valid.jsonl", "valid"), ("validation-00000-of-00001.parquet", "valid"), ("val.csv", "valid"),
        ("dev.json", "valid"), ("Synthetic-Persona-Chat_valid.csv", "valid"), ("my_eval_data.jsonl", "valid"),
        ("train_valid_style.txt", "train"), ("user_name-test.arrow", "test"), ("v1.0-dev.json", "valid"),
        ("personachat.json", None), ("developer.json", None), ("trainer.json", None), ("evaluate.jsonl", None),
    ],
)  # fmt: skip
def test_the_split_that_a_name_says(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    "url, split",
    [
        ("https://host/a/valid.jsonl?download=true", "valid"),
        ("https://host/default/validation/0000.parquet", "valid"),
        ("https://host/valid/train.jsonl", "train"),
        ("https://host/chat.json", "train"),
    ],
)
def test_the_split_of_a_url_is_its_own(tmp_path, monkeypatch, url, split):
    """It was taken from the name in the cache, which begins with a hash."""
    path = tmp_path / "0123456789ab-file.jsonl"
    path.write_text(lines(DIALOG))
    monkeypatch.setattr(dataset, "fetch", lambda address: path)
    assert locate_dataset(url) == {path: split}
    assert (split_of_url(url) or "train") == split


@pytest.mark.parametrize("key", ["validation", "val", "dev", "eval"])
def test_other_names_of_splits_as_keys(tmp_path, caplog, key):
    (tmp_path / "chat.json").write_text(json.dumps({"train": [DIALOG], key: [DIALOG], "test": [DIALOG] * 2}))
    assert golds(read_dialogs([tmp_path / "chat.json"])) == {"train": [DIALOG], "valid": [DIALOG]}
    assert "test: a test split, left out" in caplog.text


def test_splits_that_are_no_two(fault):
    assert fault(json.dumps({"valid": [], "dev": []})) == "valid and dev: two lists of one split"
    assert fault(json.dumps({"test": [DIALOG]})).startswith('expected a list of dialogs, or an object with "train"')


def test_a_test_split_alone_is_refused(fault):
    assert fault(lines(DIALOG), "my_test.jsonl").startswith("a test split, by its name, which is left out: rename")


def test_splits_in_folders(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "chat.jsonl").write_text(lines(DIALOG))
    assert dataset_files(tmp_path) == {
        tmp_path / "train" / "chat.jsonl": "train",
        tmp_path / "dev" / "chat.jsonl": "valid",
    }


def test_the_split_of_a_numbered_part_is_its_folder_s(tmp_path):
    (tmp_path / "validation").mkdir()
    for name, split in (("0000.parquet", "valid"), ("data-00000-of-00002.arrow", "valid"), ("chat.jsonl", "train")):
        path = tmp_path / "validation" / name
        path.touch()
        assert dataset_files(path) == {path: split}


# Shards


@pytest.mark.parametrize(
    "names",
    [
        [f"train-{n:05}-of-00003.jsonl" for n in range(3)],
        ["train_part1.jsonl", "train_part2.jsonl", "train_part10.jsonl"],
        ["data/train-0.jsonl.gz", "data/train-1.jsonl.gz"],
        ["part-0.jsonl", "part-1.jsonl"],
        [f"data/train-{n:05}-of-00003-{hash}.jsonl" for n, hash in enumerate(("a17d5a115f8766d8", "7aa3a623015a4fef"))],
    ],
)
def test_all_shards_of_a_split_are_read(tmp_path, caplog, names):
    """Only the first was."""
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = lines({"utterances": [{"reply": str(number)}]}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with caplog.at_level(logging.INFO):
        found = read_dialogs(dataset_files(tmp_path))
    replies = sorted(dialog["utterances"][0]["candidates"][-1] for dialog in found["train"])
    assert replies == [str(number) for number in range(len(names))]
    assert f"{len(names)} files are read as parts of train" in caplog.text


def test_shards_that_are_not_all_there(tmp_path, caplog):
    for number in (0, 2):
        (tmp_path / f"train-{number:05}-of-00003.jsonl").touch()
    assert len(dataset_files(tmp_path)) == 2
    assert caplog.messages == [f"{tmp_path}: 2 of 3 parts of train are there"]


@pytest.mark.parametrize("kind", ["fold", "cv_", "split"])
def test_folds_are_no_parts(tmp_path, kind):
    """They were joined, and what is held out in one is learnt in another."""
    for number in (1, 2):
        (tmp_path / f"train_{kind}{number}.jsonl").touch()
    with pytest.raises(UserError, match="2 files for train, whose names do not say whether they are parts"):
        dataset_files(tmp_path)


def test_what_other_programs_leave_beside_a_dataset(tmp_path):
    """Its Mac's folder hid the dataset's, and a cache of `datasets` was one of its parts."""
    for name in ("__MACOSX/chat/._data-0.arrow", "chat/data-0.arrow", "chat/cache-3f2a.arrow", "chat/._data-0.arrow"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert dataset_files(tmp_path) == {tmp_path / "chat" / "data-0.arrow": "train"}


@pytest.mark.parametrize("other", ["train_small.jsonl", "train2.jsonl", "train_v2.jsonl", "train/chat.jsonl"])
def test_files_that_may_be_parts_or_variants_are_refused(tmp_path, other):
    (tmp_path / "train").mkdir()
    for name in ("train.jsonl", other):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="2 files for train, whose names do not say whether they are parts"):
        dataset_files(tmp_path)


def test_one_dataset_under_two_suffixes(tmp_path):
    for name in ("train.jsonl", "train.csv", "dataset_info.json", "state.json", "train_results.json"):
        (tmp_path / name).touch()
    assert [*dataset_files(tmp_path)] == [tmp_path / "train.csv"]


# ParlAI's text


def test_parlai_s_line_break_within_a_field(read):
    """It put the persona into the history, and stayed two characters in a reply."""
    (dialog,) = read("1 your persona: i like tea .\\nyour persona: i have two dogs .\\nhi !\\nyou ?\thello ,\\ntea ?\n")
    assert dialog["personality"] == PERSONA
    assert turns(dialog) == [(["hi !", "you ?"], "hello ,\ntea ?")]


def test_a_reply_with_a_bar_is_taken_whole(read, caplog):
    """It was cut at the bar."""
    (dialog,) = read("1 hi !\ti use a|b tests\n2 ok\tyes|no\t\tmaybe|yes|no\n3 q\tx|y\t\tno|z\n")
    assert [reply for _, reply in turns(dialog)] == ["i use a|b tests", "yes", "x|y"]
    assert "a reply with | in it" in caplog.text


@pytest.mark.parametrize("content", ["1 your persona: a\n2 hi !\thello\n1 q\tr\n", lines(DIALOG, DIALOG)])
def test_line_ends_by_cr_alone(read, content):
    """The whole file was one turn."""
    assert read(content.replace("\n", "\r")) == read(content)


def test_numbers_that_go_on_over_a_blank_line(read, fault):
    """Two dialogs became one."""
    first, second = read("1 your persona: a\n\n2 hi !\thello\n3 q\tr\n\n4 your persona: b\n5 s\tt\n")
    assert (first["personality"], turns(first)) == (["a"], [(["hi !"], "hello"), (["hi !", "hello", "q"], "r")])
    assert (second["personality"], turns(second)) == (["b"], [(["s"], "t")])
    first, second = read("1 a\tb\n2 c\td\n\n3 e\tf\n4 g\th\n")
    assert turns(second)[0] == (["e"], "f")
    for content in ("1 a\tb\n\n2 c\td\n", "1 your persona: a\n\n2 a\tb\n\n3 c\td\n"):  # or all lines stand apart
        assert "a blank line, and the number goes on" in fault(content)


def test_silence_is_nothing_said(read):
    assert turns(*read("1 __SILENCE__\thello\n2 hi !\ttea ?\n")) == [([], "hello"), (["hello", "hi !"], "tea ?")]


def test_a_line_without_a_reply(read):
    """The whole dialog was lost, or refused."""
    (dialog,) = read("1 hi !\thello\n2 well\n3 so ?\tyes\n4 bye\n")
    assert turns(dialog) == [(["hi !"], "hello"), (["hi !", "hello", "well", "so ?"], "yes")]


def test_other_spellings_of_a_persona_line_and_spaces_for_the_tab(read, caplog):
    (dialog,) = read(
        "1 Your persona: a\n2 your persona : b\n3 Partner’s persona : c\n4 hi !    hello\n5 q    r        x|r\n"
    )
    assert dialog["personality"] == ["a", "b"]
    assert turns(dialog) == [(["hi !"], "hello"), (["hi !", "hello", "q"], "r")]
    assert dialog["utterances"][1]["candidates"] == ["x", "r"]
    assert "four spaces are read as one" in caplog.text
    (dialog,) = read("1 hi !\thello    you\n")  # a file with tabs
    assert turns(dialog) == [(["hi !"], "hello    you")]


def test_parlai_s_lines_of_named_fields(read):
    content = (
        "text:your persona: i like tea .\\nyour persona: i have two dogs .\\nhi !\tlabels:hello , tea ?\n"
        "text:yes please .\tlabels:with milk ?\tlabel_candidates:no __PIPE__|with milk ?\tepisode_done:True\n"
        "text:a\tlabels:b\tepisode_done:True\n"
    )
    first, second = read(content)
    assert (first["personality"], turns(first)) == (PERSONA, turns(DIALOG))
    assert first["utterances"][1]["candidates"] == ["no |", "with milk ?"]
    assert turns(second) == [(["a"], "b")]


def test_parlai_s_conversations(read):
    acts = [{"id": "human", "text": "your persona: i like tea .\nyour persona: i have two dogs .\nhi !"}]
    acts += [{"id": name, "text": turn["content"]} for name, turn in zip(["bot", "human", "bot"], MESSAGES[2:])]
    record = {"dialog": [acts[:2], acts[2:]], "start_time": 1, "metadata_path": "x"}
    assert read(lines(record)) == [DIALOG]
    context = [{"id": "context", "text": "\n".join(f"your persona: {sentence}" for sentence in PERSONA)}]
    acts = [{"id": f"Speaker {2 - n % 2}", "text": turn["content"]} for n, turn in enumerate(MESSAGES[1:], 1)]
    assert read(lines({"dialog": [acts[:2], acts[2:]], "context": context})) == [DIALOG]


# Chat records


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation", "Messages"])
@pytest.mark.parametrize("turns", [MESSAGES, SHAREGPT])
def test_chat_records(read, field, turns):
    for content in (
        lines({field: turns}),
        json.dumps([{field: turns}], indent=1),
        json.dumps({"train": [{field: turns}]}),
    ):
        assert read(content) == [DIALOG]
    for first in ({"tools": None, field: turns}, {"id": "x", field: turns, "source": "y"}):
        assert read(lines(first)) == [DIALOG]


@pytest.mark.parametrize("user", ["user", "human", "User", "prompter"])
@pytest.mark.parametrize("model", ["assistant", "gpt", "bot", "model", "chatbot"])
def test_names_of_roles(read, user, model):
    names = {"system": "system", "user": user, "assistant": model}
    assert read(lines({"messages": [{**turn, "role": names[turn["role"]]} for turn in MESSAGES]})) == [DIALOG]


def test_parts_and_several_turns_of_one_side(read, caplog):
    parts = [{"type": "text", "text": "yes"}, {"type": "text", "text": "please ."}]
    messages = [*MESSAGES[:3], {"role": "user", "content": parts}, *(
        {"role": "assistant", "content": text} for text in ("with", "milk ?"))]  # fmt: skip
    assert read(lines({"messages": messages})) == [DIALOG]
    assert "several turns of one side in a row are read as one" in caplog.text


def test_a_persona_of_lines_beside_the_messages_or_none(read):
    own = {"persona": "i like tea\ni have two dogs", "messages": MESSAGES[1:]}
    assert read(lines(own))[0]["personality"] == ["i like tea", "i have two dogs"]
    assert read(lines({"system": " ".join(PERSONA), "conversations": SHAREGPT[1:]})) == [DIALOG]
    assert read(lines({"messages": MESSAGES[1:]}))[0]["personality"] == []


def test_an_assistant_that_begins_and_a_user_who_ends(read):
    said = [MESSAGES[2], MESSAGES[3], MESSAGES[4], MESSAGES[1]]
    assert turns(*read(lines({"messages": said}))) == [
        ([], "hello , tea ?"),
        (["hello , tea ?", "yes please ."], "with milk ?"),
    ]


def test_a_turn_that_is_not_to_be_learnt(read):
    said = [*MESSAGES[:2], {**MESSAGES[2], "weight": 0}, *MESSAGES[3:]]
    assert turns(*read(lines({"messages": said}))) == turns(DIALOG)[1:]


@pytest.mark.parametrize(
    "turn, expected",
    [
        ({"role": "tool", "content": "3"}, "turn 3, role 'tool': a turn of tools: leave such dialogs out"),
        (
            {"role": "assistant", "tool_calls": [{}]},
            "turn 3, role 'assistant': a turn of tools: leave such dialogs out",
        ),
        (
            {"from": "function_call", "value": "x"},
            "turn 3, from 'function_call': a turn of tools: leave such dialogs out",
        ),
        ({"role": "user", "content": None}, "turn 3, no content or value or text"),
        ({"role": "user", "content": 5}, "turn 3, content: expected a string, got a number"),
        ({"content": "x"}, "turn 3, no role or from or speaker"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "turn 3, a part that is no text: 'image_url'"),
        (None, "turn 3: expected an object, got null"),
    ],
)
def test_turns_that_are_refused(fault, turn, expected):
    messages = [*MESSAGES[1:3], turn]
    assert fault(lines({"messages": messages})) == f"train dialog 1 (line 1), messages, {expected}"


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([*MESSAGES[1:3], {"role": "narrator", "content": "x"}], "role 'narrator' is unknown: expected system, user"),
        ([*MESSAGES[1:3], MESSAGES[0], *MESSAGES[3:]], "a system message after the first turn"),
        ([], "expected two speakers, got 0"),
        ([{"speaker": name, "text": "x"} for name in ("ann", "bob", "cem")], "expected two speakers, got 3: ann, bob,"),
        (MESSAGES[1:3] * 501, "a dialog of more than 1000 turns"),
    ],
)  # fmt: skip
def test_dialogs_that_are_refused(fault, messages, expected):
    assert fault(lines({"messages": messages})).startswith(f"train dialog 1 (line 1), {expected}")


def test_chats_without_a_reply_or_with_an_empty_one(fault):
    assert fault(lines({"messages": MESSAGES[:2]})) == "train dialog 1 (line 1): no utterances"
    empty = [MESSAGES[1], {"role": "assistant", "content": " "}]
    assert fault(lines({"messages": empty})) == "train dialog 1 (line 1): no utterances"


# Rows


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_rows_of_replies_in_a_table(read, delimiter):
    rows = [
        {"persona": json.dumps(PERSONA), "history": json.dumps(history), "reply": reply, "conv_id": 7}
        for history, reply in zip(HISTORIES, REPLIES)
    ]
    assert read(table(rows, delimiter)) == [DIALOG]
    rows = [
        row | {"history": "\n".join(history), "persona": " ".join(PERSONA)} for row, history in zip(rows, HISTORIES)
    ]
    assert read(b"\xef\xbb\xbf" + table(rows, delimiter).encode()) == [DIALOG]
    assert read(table([row | {"persona": repr(PERSONA)} for row in rows], delimiter)) == [DIALOG]


def test_rows_in_json_lines_are_put_together(read, fault):
    rows = [
        {
            "conv_id": conv,
            "utterance_idx": n,
            "personality": PERSONA,
            "history": history,
            "candidates": ["x", reply],
        }
        for conv in (0, 1)
        for n, (history, reply) in enumerate(zip(HISTORIES, REPLIES))
    ]
    first, second = read(lines(*rows))
    assert first == second and turns(first) == turns(DIALOG) and first["personality"] == PERSONA
    assert read(lines(*rows[1::-1])) == [first]
    assert "has rows above already: all its rows must stand together" in fault(lines(rows[0], rows[2], rows[1]))


def test_rows_of_one_turn_are_put_together(read):
    rows = [
        {"conv_id": "hit:0", "utterance_idx": n, "context": "proud", "speaker_idx": n % 2, "utterance": turn["content"]}
        for n, turn in enumerate(MESSAGES[1:], 1)
    ]
    for content in (table(rows), lines(*rows)):
        (dialog,) = read(content)
        assert turns(dialog) == turns(DIALOG)


def test_chat_records_in_a_table(read):
    assert read(table([{"id": 1, "messages": json.dumps(MESSAGES)}])) == [DIALOG]


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            "history,reply\nhi !,hello , tea ?\n",
            "line 2: 3 fields under a header of 2: a text with the delimiter needs",
        ),
        ("history,reply\nhi !\n", "line 2: 1 fields under a header of 2"),
        ('history,reply\nhi !,"hello\n', "line 2: no CSV: unexpected end of data"),
        ("history,candidates\nhi !,a|b\n", "train dialog 1 (line 2), candidates: expected a list, as JSON"),
        ("persona,reply\n\"['a .' 'b .']\",x\n", "train dialog 1 (line 2), a list without commas, as NumPy prints it"),
        ("history,reply\nhi !,\n", "train dialog 1 (line 2), utterance 1: no reply"),
        ("history,reply\n", "train: no dialogs"),
        (b"history,reply\nhi !,caf\xe9\n", "line 2, byte 9: invalid UTF-8 (perhaps Windows-1252 or Latin-1"),
    ],
)
def test_tables_that_are_refused(fault, content, expected):
    assert fault(content).startswith(expected)


# Synthetic-Persona-Chat and multi-session chat


def test_synthetic_persona_chat_s_both_sides(read):
    talk = "User 1: hi !\nUser 2: hello , tea ?\nUser 1: yes\nplease .\nUser 2: with milk ?"
    row = {
        "user 1 personas": "I run.\nI sing.",
        "user 2 personas": "\n".join(PERSONA),
        "Best Generated Conversation": talk,
    }
    for content in (table([row]), lines(row)):
        first, second = read(content, "Synthetic-Persona-Chat_train.csv")
        assert second["personality"] == PERSONA and turns(second) == turns(DIALOG)
        assert first["personality"] == ["I run.", "I sing."]
        assert turns(first) == [([], "hi !"), (["hi !", "hello , tea ?"], "yes please .")]


def test_multi_session_chat_s_both_sides(read):
    said = [{"id": f"Speaker {1 + n % 2}", "text": turn["content"]} for n, turn in enumerate(MESSAGES[1:])]
    session = {"personas": [["i run ."], PERSONA], "dialog": said, "previous_dialogs": []}
    flat = {"persona1": ["i run ."], "persona2": PERSONA, "dialogue": [turn["text"] for turn in said],
            "speaker": [turn["id"] for turn in said], "dialoug_id": 3, "session_id": 0}  # fmt: skip
    for record in (session, flat):
        first, second = read(lines(record))
        assert second["personality"] == PERSONA and turns(second) == turns(DIALOG)
        assert first["personality"] == ["i run ."] and turns(first)[0] == ([], "hi !")


# Files of datasets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Datasets of `datasets` in a cache of the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


ROWS = [{"personality": PERSONA, "utterances": DIALOG["utterances"]}] * 2


def test_parquet(tmp_path, hub):
    for split in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        hub.Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").touch()
    assert golds(read_dialogs(dataset_files(tmp_path))) == {"train": [DIALOG] * 2, "valid": [DIALOG] * 2}
    hub.Dataset.from_list([{"messages": MESSAGES, "id": None}]).to_parquet(tmp_path / "chat.parquet")
    assert golds(read_dialogs(dataset_files(tmp_path / "chat.parquet"))) == {"train": [DIALOG]}
    assert draw_persona([tmp_path / "chat.parquet"]) == PERSONA


def test_save_to_disk(tmp_path, hub):
    rows = hub.Dataset.from_list(ROWS)
    hub.DatasetDict({"train": rows, "validation": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    assert golds(read_dialogs(dataset_files(tmp_path / "saved"))) == {"train": [DIALOG] * 2, "valid": [DIALOG] * 2}
    hub.Dataset.from_list(ROWS, split="validation").save_to_disk(tmp_path / "one", num_shards=2)
    assert golds(read_dialogs(dataset_files(tmp_path / "one"))) == {"valid": [DIALOG] * 2}


def test_an_object_of_lists(tmp_path, hub):
    """A list of objects, as `datasets` keeps the feature Sequence."""
    columns = {name: [turn[name] for turn in MESSAGES] for name in ("role", "content")}
    hub.Dataset.from_list([{"messages": columns}]).to_parquet(tmp_path / "chat.parquet")
    assert golds(read_dialogs([tmp_path / "chat.parquet"])) == {"train": [DIALOG]}


def test_a_name_on_the_hub(tmp_path, hub, monkeypatch):
    folder = tmp_path / "local"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(lines(*ROWS))
    load = hub.load_dataset
    asked = []

    def load_local(name, configuration):
        asked.append((name, configuration))
        return load(str(folder), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(hub, "load_dataset", load_local)
    files = locate_dataset("hf:user/name:small")
    assert sorted(files.values()) == ["train", "valid"] and asked == [("user/name", "small")]
    assert golds(read_dialogs(files)) == {"train": [DIALOG] * 2, "valid": [DIALOG] * 2}
    rows = hub.Dataset.from_list(ROWS)
    monkeypatch.setattr(hub, "load_dataset", lambda *_: {"train_sft": rows, "train_gen": rows})
    with pytest.raises(UserError, match=r"hf:user/name: 2 splits that may be train \(train_sft, train_gen\)"):
        locate_dataset("hf:user/name")


def test_a_name_on_the_hub_that_is_not_loaded(hub, monkeypatch):
    def fail(*_):
        raise ConnectionError("Couldn't reach 'user/name' on the Hub\nmore")

    monkeypatch.setattr(hub, "load_dataset", fail)
    expected = r"^hf:user/name: datasets does not load it \(Couldn't reach 'user/name' on the Hub\); give a local copy$"
    with pytest.raises(UserError, match=expected):
        locate_dataset("hf:user/name")


@pytest.mark.parametrize("what", ["hf:user/name", "table"])
def test_what_needs_a_package_says_so(tmp_path, monkeypatch, what):
    monkeypatch.setattr("transfertransfo.errors.importlib.util.find_spec", lambda name: None)
    (tmp_path / "table").write_bytes(b"PAR1 and more")
    with pytest.raises(UserError, match=r"needs (datasets|pyarrow); pip install -r requirements/data\.txt"):
        read_dialogs(locate_dataset(what if what.startswith("hf:") else tmp_path / what))


@pytest.mark.parametrize("content", [b"PAR1 and more", b"ARROW1\0\0 and more", b"\xff\xff\xff\xff\x10\0\0\0 and more"])
def test_damaged_tables(fault, content):
    pytest.importorskip("pyarrow")
    message = fault(content)
    assert message.startswith("pyarrow does not read it: ") and "\n" not in message


# Archives and encodings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path / "downloads"))


def archive(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, content in files.items():
                opened.writestr(name, content)
    else:
        with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as opened:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives(tmp_path, suffix):
    path = tmp_path / f"chat.{suffix}"
    archive(path, {"chat/train.jsonl": lines(DIALOG).encode(), "chat/valid.jsonl": lines(DIALOG, DIALOG).encode()})
    assert golds(read_dialogs(dataset_files(path))) == {"train": [DIALOG], "valid": [DIALOG] * 2}
    archive(path, {"a.jsonl": b"", "b.jsonl": b""})
    with pytest.raises(
        UserError, match=rf"chat\.{suffix}: an archive of no single dataset: .*no dataset in this folder"
    ):
        dataset_files(path)


@pytest.mark.parametrize(
    "name, expected", [("[Content_Types].xml", "spreadsheet or document"), ("x/data.pkl", "PyTorch or NumPy")]
)
def test_archives_that_are_something_else(tmp_path, name, expected):
    archive(tmp_path / "chat.zip", {name: b"x"})
    with pytest.raises(UserError, match=expected):
        dataset_files(tmp_path / "chat.zip")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("content", [lines(DIALOG), table([{"persona": "ä", "reply": "b"}]), "1 hi !\thello — you\n"])
def test_encodings_with_a_byte_order_mark(read, encoding, content):
    assert read(content.encode(encoding)) == read(content)
    assert read(gzip.compress(content.replace("\n", "\r\n").encode(encoding))) == read(content)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("1 hi !\tcafé\n".encode("latin-1"), "invalid UTF-8 (perhaps Windows-1252 or Latin-1"),
        ("1 你好，你叫什么名字\t我叫小明\n".encode("gb18030"), "invalid UTF-8 (perhaps an encoding of Chinese"),
        (lines(DIALOG).encode("utf-32"), "UTF-32: write it as UTF-8"),
        (b"\xff\xfeh", "byte 3: invalid UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS in place of the file"),
        ("<!DOCTYPE html><html>", "a page of HTML or XML"),
        (b"\x80\x04\x95", "a Python pickle, which is not loaded"),
        (b"BZh91AY", "compressed by bzip2"),
        (
            lines({"instruction": "a", "input": "", "output": "b"}),
            "an Alpaca file (instruction, output), not dialogs: rename",
        ),
        (json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "a preference file (chosen, rejected)"),
        (lines({"prompt": "a", "completion": "b"}), "a prompt-completion file"),
        (lines({"text": "a"}), "a file of plain texts"),
        (lines({"text": "a", "label": 1}), "a file of labelled texts"),
        (lines({"text": "a", "label": "joy"}), "a file of labelled texts"),
        (table([{"question": "a", "answer": "b"}]), "a question-answer file"),
        (lines({"instruction": "a", "context": "", "response": "b"}), "an instruction file as Dolly"),
        (lines({"a": 1, "b": 2}, {"a": 1}), "no dialogs of a known layout: its records have a, b, none of utterances"),
    ],
)
def test_what_is_not_read_is_named(fault, content, expected):
    message = fault(content)
    assert expected in message and "\n" not in message


# One reader for the chat and for training


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf1 your persona: a\n2 your persona: b\n3 q\tr\n",
        "1 your persona: a\n2 partner's persona: x\n3 your persona: b\n4 q\tr\n",
        json.dumps([{"meta": {"personality": ["x"]}, "personality": ["a", "b"], "utterances": [{"reply": "r"}]}]),
        '{"train": [{"personality": ["x"], "personality": ["a", "b"], "utterances": [{"reply": "r"}]}]}',
        '{"train": [{"personality": ["x"], "utterances": [{"reply": "r"}]}],\n'
        ' "train": [{"personality": ["a", "b"], "utterances": [{"reply": "r"}]}]}',
        json.dumps({"test": [{"personality": ["x"], "utterances": [{"reply": "r"}]}],
                    "train": [{"personality": ["a", "b"], "utterances": [{"reply": "r"}]}]}),
        json.dumps({"version": 12, "train": [{"personality": ["a", "b"], "utterances": [{"reply": "r"}]}]}),
        json.dumps([{"messages": [{"role": "system", "content": "a\nb"}, {"role": "assistant", "content": "r"}]}]),
    ],
)  # fmt: skip
def test_the_chat_draws_the_persona_that_training_reads(tmp_path, read, content):
    """It searched the text: a mark, a line between, a key given twice or a nested persona misled it."""
    assert [dialog["personality"] for dialog in read(content)] == [["a", "b"]]
    assert draw_persona([tmp_path / "chat"]) == ["a", "b"]


def test_a_large_list_is_drawn_from_dialog_by_dialog(tmp_path, monkeypatch):
    """Whatever the boundaries of the pieces that are read."""
    dialogs = [
        {"personality": [f"é {n}"], "utterances": [{"reply": "🙂 x", "history": ["q"] * (n % 7)}]} for n in range(90)
    ]
    for chunk in (1, 7, 100, 4096):
        monkeypatch.setattr("transfertransfo.data.personas.CHUNK", chunk)
        monkeypatch.setattr("transfertransfo.data.personas.read_dialogs", None)
        for value in ({"train": dialogs[:60], "valid": dialogs[60:]}, dialogs):
            (tmp_path / "chat").write_text(json.dumps(value, ensure_ascii=False, indent=chunk % 2 or None))
            random.seed(1)
            drawn = {tuple(draw_persona([tmp_path / "chat"])) for _ in range(30)}
            assert len(drawn) > 15 and drawn <= {(f"é {n}",) for n in range(90)}
