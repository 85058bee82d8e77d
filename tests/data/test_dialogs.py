import gzip
import json
import logging
import lzma
import os
from collections import Counter

import pytest

from example_entry import EXAMPLE_ENTRY
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.distractors import NUM_DISTRACTORS
from transfertransfo.data.formats import FORMATS
from transfertransfo.data.parlai import MAX_TURNS, write_parlai
from transfertransfo.data.personas import draw_persona
from transfertransfo.data.sources import dataset_files
from transfertransfo.errors import UserError


def dialog(*replies, personality=("i like tea .",), distractors=("no .", "why ?")):
    """A dialog with these replies, each to a question of its own, in PersonaChat's layout."""
    utterances, turns = [], []
    for number, reply in enumerate(replies):
        turns = [*turns, f"question {number} ?"]
        utterances.append({"candidates": [*distractors, reply], "history": turns})
        turns = [*turns, reply]
    return {"personality": list(personality), "utterances": utterances}


LATIN = "(perhaps Windows-1252 or Latin-1; write it as UTF-8)"
DATASET = {"train": [dialog("a", "b"), dialog("c", personality=[])], "valid": [dialog("d", "e", "f")]}
PARLAI = """\
1 your persona: i like tea .
2 partner's persona: i like coffee .
3 question 0 ?\ta\t\tno .|why ?|a
4 question 1 ?\tb\t\tno .|why ?|b
1 question 0 ?\tc\t\tno .|why ?|c
"""


@pytest.fixture
def read(tmp_path):
    """Write contents to a file and read it."""

    def write_and_read(content, name="train.json", **options):
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
        return read_dialogs([path], **options)

    return write_and_read


@pytest.fixture
def fault(read):
    """What the reader says of contents, without the file's name."""

    def read_fault(content, name="train.json", **options):
        with pytest.raises(UserError) as error:
            read(content, name, **options)
        lines = str(error.value).split("\n")
        assert all(line.partition(f"{name}: ")[1] for line in lines[:10])
        return "\n".join(line.partition(f"{name}: ")[2] or line for line in lines)

    return read_fault


def json_lines(dialogs):
    return "".join(json.dumps(dialog) + "\n" for dialog in dialogs)


# Formats


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("name", ["train.json", "train.txt", "data"])
def test_every_format_under_any_name_gives_the_same_dialogs(read, name, compress):
    expected = {"train": DATASET["train"]}
    for content in (json.dumps(expected), json.dumps(expected, indent=1), json_lines(DATASET["train"]), PARLAI):
        assert read(compress(content.encode()), name) == expected


def test_a_file_of_one_dialog_on_any_number_of_lines(read):
    (dialog, *_) = DATASET["train"]
    for content in (json.dumps(dialog), json.dumps(dialog) + "\n\n", json.dumps(dialog, indent=1)):
        assert read(content, "valid.json") == {"valid": [dialog]}


def test_both_splits_and_extra_fields(read):
    extended = json.loads(json.dumps(DATASET))
    extended["version"] = 2
    extended["train"][0]["id"] = None
    extended["valid"][0]["utterances"][1]["id"] = [1]
    assert read(extended) == DATASET
    assert list(read({"valid": DATASET["valid"], "train": DATASET["train"]})) == ["train", "valid"]


def test_the_name_gives_the_split_of_a_file_that_holds_one(read):
    assert list(read(PARLAI, "valid_self.txt")) == list(read(json_lines(DATASET["valid"]), "valid.jsonl")) == ["valid"]
    assert list(read(PARLAI, "chat.txt")) == ["train"]
    assert list(read({"valid": DATASET["valid"]}, "train.json")) == ["valid"]


def test_bom_and_crlf_are_accepted(read):
    for content in (json.dumps({"train": DATASET["train"]}, indent=1), json_lines(DATASET["train"]), PARLAI):
        windows = b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()
        assert read(windows) == {"train": DATASET["train"]}


def test_texts_are_taken_as_they_stand(read):
    """str.splitlines, unlike a file's lines, ends a line at U+2028, U+0085 and more: texts with them fell apart."""
    texts = ["  two  spaces ", "a\u2028b", "c\x85d\x0ce", "🙂 \N{HEBREW LETTER ALEF}", "nul \0", "Don't."]
    dialogs = [dialog(*texts, personality=[*texts, ""], distractors=texts)]
    parlai = "".join(f"{n} your persona: {text}\n" for n, text in enumerate([*texts, ""], 1))
    parlai += "".join(
        f"{n} question {n - 8} ?\t{text}\t1.0\t{'|'.join([*texts, text])}\n" for n, text in enumerate(texts, 8)
    )
    assert read(parlai) == read({"train": dialogs}) == read(json_lines(dialogs)) == {"train": dialogs}


def test_unpaired_surrogates_are_replaced(read):
    content = r'{"train": [{"personality": ["\ud83d\ude42 \ud83d"], "utterances": [{"reply": "\udc00!"}]}]}'
    (read_dialog,) = read(content)["train"]
    assert read_dialog["personality"] == ["🙂 \ufffd"]
    assert read_dialog["utterances"][0]["candidates"] == ["\ufffd!"]


def test_equal_texts_are_one_object(read):
    for content in (json.dumps({"train": DATASET["train"]}), PARLAI):
        first, second = read(content)["train"][0]["utterances"]
        assert first["candidates"][0] is second["candidates"][0]
        assert first["candidates"][-1] is second["history"][1]


def test_parlai_dialogs_start_where_the_number_does_not_grow(read):
    lines = ["3 q\ta\t\tx|a", "5 r\tb\t\tx|b", "5 s\tc\t\tx|c", "2 t\td\t\tx|d", "3 u\te\t\tx|e"]
    histories = [[u["history"] for u in dialog["utterances"]] for dialog in read("\n".join(lines))["train"]]
    assert histories == [[["q"], ["q", "a", "r"]], [["s"]], [["t"], ["t", "d", "u"]]]


def test_parlai_lines_with_a_tab_are_said_by_someone_and_the_first_of_several_replies_is_the_gold(read):
    lines = ["1 your persona: x", "2 your persona: q\ta|b\t\tno|a", "3 partner's persona: r\tc\t\tno|c"]
    (read_dialog,) = read("\n".join(lines))["train"]
    assert read_dialog["personality"] == ["x"]
    assert read_dialog["utterances"] == [
        {"candidates": ["no", "a"], "history": ["your persona: q"]},
        {"candidates": ["no", "c"], "history": ["your persona: q", "a", "partner's persona: r"]},
    ]


@pytest.mark.parametrize(
    "candidates, expected",
    [
        ("x|a|y|b", ["x", "a", "y", "b"]),
        ("x|b|y|a", ["x", "y", "a", "b"]),
        ("b|y|b", ["b", "y", "b"]),
        ("x|y", ["x", "y", "b"]),
        ("x||b", ["x", "", "b"]),
    ],
)
def test_the_gold_is_the_last_candidate(read, candidates, expected):
    assert read(f"1 q\tb\t\t{candidates}")["train"][0]["utterances"][0]["candidates"] == expected
    record = {"utterances": [{"candidates": candidates.split("|"), "reply": "b"}]}
    assert read({"train": [record]})["train"][0]["utterances"][0]["candidates"] == expected


def test_a_reply_may_open_the_dialog(read):
    opened = [{"candidates": ["x", "hi"], "history": []}, {"candidates": ["y", "ok"], "history": ["hi", "1", "2"]}]
    assert read("1 \thi\t\tx|hi\n2 1\\n2\tok\t\ty|ok")["train"] == [{"personality": [], "utterances": opened}]
    assert read({"train": [{"utterances": [{"candidates": ["x", "hi"]}]}]})["train"][0]["utterances"] == opened[:1]


def test_the_example_entry_is_a_dialog(read):
    assert read({"train": [EXAMPLE_ENTRY]}) == {"train": [EXAMPLE_ENTRY]}


# Folders


@pytest.mark.parametrize(
    "worse",
    [
        "train_self_original_no_cands.txt",
        "train_both_original.txt",
        "train_none_original.txt",
        "train_self_revised.txt",
        "train_self_original.txt.gz",
    ],
)
def test_a_folder_s_best_variant_is_taken_and_said(tmp_path, caplog, worse):
    for name in (
        worse,
        "train_self_original.txt",
        "valid.jsonl",
        "test_self_original.txt",
        "training_args.json",
        "train.py",
        "trainer.json",
    ):
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO):
        assert list(dataset_files(tmp_path)) == [tmp_path / "train_self_original.txt", tmp_path / "valid.jsonl"]
    left_out, taken = caplog.messages
    assert left_out == "test_self_original.txt: a test split, left out"
    assert "train_self_original.txt: taken for train" in taken


@pytest.mark.parametrize(
    "better, worse",
    [
        ("train_both_revised.txt", "train_self_original_no_cands.txt"),
        ("train_self_revised.txt", "train_both_original.txt"),
        ("train_none_original.txt", "train_both_revised.txt"),
    ],
)
def test_candidates_count_more_than_the_persona_s_side_and_wording(tmp_path, better, worse):
    for name in (better, worse):
        (tmp_path / name).touch()
    assert list(dataset_files(tmp_path)) == [tmp_path / better]


def test_a_folder_s_subfolder_and_its_single_json(tmp_path):
    (tmp_path / "personachat.json.xz").touch()
    assert list(dataset_files(tmp_path)) == [tmp_path / "personachat.json.xz"]
    (tmp_path / "ConvAI2").mkdir()
    (tmp_path / "ConvAI2" / "valid_self_original.txt").touch()
    assert list(dataset_files(tmp_path)) == [tmp_path / "ConvAI2" / "valid_self_original.txt"]


def test_a_folder_is_read_whole(tmp_path):
    (tmp_path / "train.txt").write_text(PARLAI)
    (tmp_path / "valid.jsonl.gz").write_bytes(gzip.compress(json_lines(DATASET["valid"]).encode()))
    assert read_dialogs(dataset_files(tmp_path)) == DATASET


def test_paths_without_a_dataset(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        dataset_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no dataset in this folder: looked for train\* and valid\* files"):
        dataset_files(tmp_path)
    for name in ("config.json", "training_args.json", "train.py"):  # neither a split nor a single JSON file
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no dataset in this folder"):
        dataset_files(tmp_path)
    with pytest.raises(UserError, match="a folder, expected a file"):
        read_dialogs([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: neither a file nor a folder"):
        dataset_files(tmp_path / "pipe")


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read: No such file"):
        read_dialogs([tmp_path / "gone.txt"])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop: cannot be read: Too many levels of symbolic links"):
        read_dialogs([tmp_path / "loop"])


def test_two_files_of_one_split(tmp_path):
    for name in ("train.txt", "train2.txt"):
        (tmp_path / name).write_text(PARLAI)
    (tmp_path / "data.json").write_text(json.dumps(DATASET))
    assert read_dialogs([tmp_path / "train.txt", tmp_path / "train2.txt"]) == {"train": DATASET["train"] * 2}
    with pytest.raises(UserError, match=r"data\.json: train: another file of this dataset gives this split"):
        read_dialogs([tmp_path / "train.txt", tmp_path / "data.json"])


# Faults


def change(value, *keys):
    """The dataset with the value at these keys replaced, or removed if it is `...`."""
    dataset = json.loads(json.dumps(DATASET))
    place = dataset
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return dataset


TRAIN_2, VALID_3 = ("train", 1), ("valid", 0, "utterances", 2)


@pytest.mark.parametrize(
    "keys, value, expected",
    [
        (
            (*VALID_3, "candidates"),
            None,
            "valid dialog 1, utterance 3: no reply",
        ),
        (
            (*VALID_3, "candidates"),
            "",
            "valid dialog 1, utterance 3, candidates: expected a list of strings, got a string",
        ),
        (
            (*VALID_3, "candidates", 1),
            5,
            "valid dialog 1, utterance 3, candidates: expected a list of strings, got a number in place 2",
        ),
        ((*VALID_3, "history"), {}, "valid dialog 1, utterance 3, history: expected a list of strings, got an object"),
        ((*VALID_3, "reply"), True, "valid dialog 1, utterance 3, reply: expected a string, got true or false"),
        ((*VALID_3, "candidates"), ..., "valid dialog 1, utterance 3: no reply"),
        ((*VALID_3, "candidates"), [], "valid dialog 1, utterance 3: no reply"),
        ((*VALID_3, "candidates", 2), "", "valid dialog 1, utterance 3: empty reply"),
        (VALID_3, [], "valid dialog 1, utterance 3: expected an object, got a list"),
        (
            (*TRAIN_2, "personality"),
            [[]],
            "train dialog 2, personality: expected a list of strings, got a list in place 1",
        ),
        ((*TRAIN_2, "utterances"), 1.5, "train dialog 2, utterances: expected a list of objects, got a number"),
        ((*TRAIN_2, "utterances"), [], "train dialog 2: no utterances"),
        ((*TRAIN_2, "utterances"), ..., "train dialog 2: no utterances"),
        (TRAIN_2, None, "train dialog 2: expected an object, got null"),
        (("train",), [], "train: no dialogs"),
    ],
)
def test_a_fault_is_one_line_with_its_place(fault, keys, value, expected):
    assert fault(change(value, *keys)) == expected


def test_a_split_that_is_no_list(fault):
    assert fault({"train": {}}) == "train: expected a list of dialogs, got an object"
    assert fault({"train": [None], "valid": 1}) == "valid: expected a list of dialogs, got a number"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("hello there", f"none of the formats that are read: {FORMATS}"),
        ("null", f"none of the formats that are read: {FORMATS}"),
        (b"\x89PNG\r\n\x1a\n", f"none of the formats that are read: {FORMATS}"),
        ("[]", "train: no dialogs"),
        ('{"data": []}', 'expected a list of dialogs, or an object with "train" or "valid", got an object with data'),
        ('{\n"train": [,]}', "line 2, column 11: not JSON: Expecting value"),
        ('{"train": []}\n{"valid": []}', "line 2: more text after the end of the JSON"),
        ('{"train": ' + "[" * 100_000, "line 1: not a dataset: JSON nested too deeply"),
        (b'{"train":\n ["\xff"]}', f"line 2, byte 4: invalid UTF-8 {LATIN}"),
        (b'{"train": \xed\xa0\x80', f"line 1, byte 11: invalid UTF-8 {LATIN}"),
        (gzip.compress(b"", mtime=0), "the file is empty"),
    ],
)
def test_a_file_that_is_no_dataset(fault, content, expected):
    assert fault(content) == expected


def test_numbers_too_long_for_python(fault):
    """Python refuses to convert digits by the thousand, with an error that is not JSON's own."""
    assert fault('{"train": ' + "9" * 5000 + "}").startswith("line 1: not a dataset: Exceeds the limit")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
@pytest.mark.parametrize("content", [json.dumps(DATASET), PARLAI, json_lines(DATASET["train"])])
def test_truncated_and_altered_compressed_files(fault, compress, content):
    data = compress(content.encode())
    for cut in (7, len(data) // 2, len(data) - 1):
        assert fault(data[:cut]).startswith("damaged compressed file: ")
    for place in (12, len(data) // 2, -6):  # the last is a checksum in both
        altered = bytearray(data)
        altered[place] ^= 0xFF
        assert fault(bytes(altered)).startswith("damaged compressed file: ")


def test_faults_of_lines_name_the_line(fault):
    good = json.dumps(dialog("a"))
    assert fault(f'{good}\n\n{{"personality": null}}\n') == ("train dialog 2 (line 3): no utterances")
    assert fault(f"{good}\n{good[:-1]}\n[]\n") == (
        f"line 2, column {len(good)}: not JSON: Expecting ',' delimiter\n"
        "train dialog 3 (line 3): expected an object, got a list"
    )
    assert fault(f"{good}\n".encode() + b'{"\xff"}') == f"line 2, byte 3: invalid UTF-8 {LATIN}"
    assert fault("1 your persona: a\n1 q\ta\n2 r\t\n1 q\t\nx\n") == (
        "train dialog 1 (line 1): no utterances\n"
        "train dialog 2 (line 2), utterance 2: empty reply\n"
        "line 5: expected a number, a space and a text"
    )
    assert fault("1 q\ta\n1 q\t\n") == "train dialog 2 (line 2), utterance 1: empty reply"


def test_ten_faults_are_listed_and_the_rest_counted(fault):
    lines = fault({"train": [None] * 12}).split("\n")
    assert lines[9:] == ["train dialog 10: expected an object, got null", "and 2 more"]
    assert len(fault({"train": [None] * 10}).split("\n")) == 10


def test_a_parlai_file_numbered_throughout(fault):
    """Each history holds all turns before it, so one endless dialog would take memory with the square of its length."""
    lines = [f"{n} q\ta" for n in range(1, MAX_TURNS)]
    assert fault("\n".join(lines)).startswith(f"line {MAX_TURNS // 2 + 1}: a dialog of more than {MAX_TURNS} turns")


# Faulty dialogs left out

LINES = [json.dumps(dialog).encode() for dialog in DATASET["train"]]


@pytest.mark.parametrize("content, count, first", [
    (json.dumps({"train": [None, *DATASET["train"], {"utterances": 3}]}), 2, "train dialog 1: expected an object, got"),
    (b"\n".join([LINES[0], b'{"history": "\xff"}', LINES[1], LINES[0][:-9], b"[]"]), 3, "line 2, byte 14: invalid UTF"),
    (b"\n".join([LINES[0][:-1], *LINES]), 1, f"line 1, column {len(LINES[0])}: not JSON: Expecting ',' delimiter"),
    (f"1 q\ta\nand\n2 q\tb\n{PARLAI}1 q\t\n", 2, "line 2: expected a number, a space and a text"),
    (PARLAI.encode() + b"1 q\ta\n2 \xff\tb\n3 q\tc", 1, "line 7, byte 3: invalid UTF-8"),
    (PARLAI + "".join(f"{n} q\ta\n" for n in range(1, MAX_TURNS)), 1,
     f"line {6 + MAX_TURNS // 2}: a dialog of more than {MAX_TURNS} turns"),
])  # fmt: skip
def test_bad_dialogs_are_left_out_and_counted(read, fault, caplog, content, count, first):
    assert first in fault(content)
    assert read(content, skip_bad_dialogs=True) == {"train": DATASET["train"]}
    (line,) = caplog.messages
    assert f"train.json: {count} bad dialogs are left out; the first fault: {first}" in line and "\n" not in line


def test_nothing_is_said_where_no_dialog_is_bad(read, caplog):
    assert read(DATASET, skip_bad_dialogs=True) == DATASET
    assert not caplog.messages


@pytest.mark.parametrize(
    "content, expected",
    [
        ("hello there", "none of the formats"),
        ('{"train": [}', "line 1, column 12: not JSON"),
        ({"train": DATASET["train"], "valid": 1}, "valid: expected a list of dialogs, got a number"),
        ({"train": [None, *DATASET["train"]], "valid": []}, "valid: no dialogs"),
        ({"train": [None, 1]}, "train: no dialogs left; the first fault: train dialog 1: expected an object, got null"),
        (b"1 \xff", "train: no dialogs left; the first fault: line 1, byte 3: invalid UTF-8"),
    ],
)
def test_faults_outside_of_dialogs_remain_faults(fault, content, expected):
    assert fault(content, skip_bad_dialogs=True).startswith(expected)
    assert "\n" not in fault(content, skip_bad_dialogs=True)


# Personas


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("content", [json.dumps(DATASET), json_lines(DATASET["train"]), PARLAI])
def test_a_persona_is_drawn_without_reading_the_dialogs(tmp_path, monkeypatch, content, compress):
    path = tmp_path / "data"
    path.write_bytes(compress(content.encode()))
    monkeypatch.setattr("transfertransfo.data.personas.read_dialogs", None)
    assert draw_persona([path]) == ["i like tea ."]


@pytest.mark.parametrize("persona", [b'["\xff"]', b'["\\x"]', b'["a\nb"]', b"[3]", b"5"])
def test_a_persona_that_is_none_is_the_reader_s_fault(tmp_path, fault, persona):
    content = b'{"train": [{"personality": ' + persona + b', "utterances": [{"reply": "a"}]}]}'
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        draw_persona([tmp_path / "train.json"])
    assert str(error.value) == f"{tmp_path / 'train.json'}: {fault(content)}"


def test_a_drawn_persona_is_text(tmp_path):
    """An unpaired surrogate ended the chat in the tokenizer."""
    record = r'{"personality": ["\ud83d", "\ud83d\ude42"], "utterances": [{"reply": "a"}]}'
    (tmp_path / "train.json").write_text(f'{{"train": [{record}]}}')
    assert draw_persona([tmp_path / "train.json"]) == ["\ufffd", "🙂"]
    (tmp_path / "valid.txt").write_bytes(b"1 your persona: \xff\n2 q\ta")
    with pytest.raises(UserError, match=r"valid\.txt: line 1, byte 17: invalid UTF-8 "):
        draw_persona([tmp_path / "valid.txt"])


def test_a_persona_is_drawn_from_the_good_dialogs(tmp_path, caplog):
    bad = {"personality": ["not me"], "utterances": []}
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"train": [bad, dialog("a"), dialog("b", personality=[])]}))
    assert {tuple(draw_persona([path], skip_bad_dialogs=True)) for _ in range(20)} == {("i like tea .",)}
    assert not caplog.messages  # a chat's persona is a good one: that others are not, training says
    path.write_text(json.dumps({"train": [bad, dialog("b", personality=[])]}))
    with pytest.raises(UserError, match=r"data\.json: no dialog with a persona"):
        draw_persona([path], skip_bad_dialogs=True)


# Bombs


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
@pytest.mark.parametrize("content", [b'{"train": [' + b" " * 10**5, b"1 " + b"0" * 10**5, b"1 0\n" * 25_000])
def test_a_file_out_of_proportion_is_refused(fault, read, monkeypatch, compress, content):
    monkeypatch.setattr("transfertransfo.data.formats.CHUNK", 2**12)
    monkeypatch.setattr("transfertransfo.data.formats.MAX_INFLATED", 10**4)
    message = "more than 100 times larger than the compressed file: refused"
    assert fault(compress(content)).startswith(message)
    assert fault(compress(content), skip_bad_dialogs=True).startswith(message)
    monkeypatch.setattr("transfertransfo.data.formats.MAX_INFLATED", 2 * 10**5)
    assert not fault(compress(content)).startswith(message)
    monkeypatch.setattr("transfertransfo.data.formats.MAX_INFLATED", 0)
    assert read(compress(PARLAI.encode() * 9)) == {"train": DATASET["train"] * 9}


# Distractors


def without_candidates(replies):
    """Dialogs with these replies, a list a dialog, and no distractors."""
    return [{"utterances": [{"reply": reply} for reply in dialog]} for dialog in replies]


def test_distractors_are_other_dialogs_replies_without_gold_or_repeats(read):
    replies = [[f"reply {n % 70}" for n in range(start, start + 9)] for start in range(0, 200, 5)] + [["reply 0"]]
    dialogs = read({"train": without_candidates(replies)})["train"]
    for index, dialog in enumerate(dialogs):
        others = {reply for other, list_ in enumerate(replies) if other != index for reply in list_}
        for utterance, reply in zip(dialog["utterances"], replies[index], strict=True):
            *distractors, gold = utterance["candidates"]
            assert gold == reply and gold not in distractors
            assert len(set(distractors)) == len(distractors) == NUM_DISTRACTORS
            assert set(distractors) <= others


@pytest.mark.parametrize(
    "replies, expected",
    [
        ([["a", "b"]], [["", ""]]),
        ([["a", "b"], ["c"]], [["c", "c"], ["ab"]]),
        ([["a"], ["a"]], [[""], [""]]),
        ([["a", "b"], ["b", "c"], ["d", "d"]], [["bcd", "cd"], ["ad", "abd"], ["abc", "abc"]]),
    ],
)
def test_few_replies_give_few_distractors(read, replies, expected):
    dialogs = read({"train": without_candidates(replies)})["train"]
    found = [["".join(sorted(u["candidates"][:-1])) for u in dialog["utterances"]] for dialog in dialogs]
    assert found == expected


def test_distractors_are_equally_likely_in_every_place(read):
    dialogs = read({"train": without_candidates([[f"own {n}"] for n in range(41)] + [["gold"] * 4000])})["train"]
    rows = [utterance["candidates"] for utterance in dialogs[-1]["utterances"]]
    for place in range(NUM_DISTRACTORS):
        counts = Counter(row[place] for row in rows)  # binomial: 4000/41 = 97.6 expected, standard deviation 9.8
        assert len(counts) == 41 and min(counts.values()) > 97 - 5 * 9.8 and max(counts.values()) < 98 + 5 * 9.8


def test_the_draw_depends_on_the_split_alone(read):
    train = without_candidates([["a", "b"], ["c"], ["d", "e", "f"]] * 10 + [[f"{n}" for n in range(30)]])
    alone = read({"train": train})["train"]
    assert read({"train": train, "valid": DATASET["valid"]})["train"] == alone
    assert read(json_lines(train), "other.jsonl")["train"] == alone


def test_one_candidate_is_a_reply_without_distractors(read):
    dialogs = [dialog("a", distractors=()), dialog("b", distractors=["x"])]
    first, second = read({"train": dialogs})["train"]
    assert first["utterances"][0]["candidates"] == ["b", "a"]
    assert second["utterances"][0]["candidates"] == ["x", "b"]


# Writing


def test_written_parlai_text_reads_back(tmp_path):
    opened = {"candidates": ["x", "hi"], "history": []}
    two_at_once = {"candidates": ["y", "ok"], "history": ["hi", "1", "2"]}
    ragged = {"personality": [" a", ""], "utterances": [opened, two_at_once]}
    dialogs = [*DATASET["train"], ragged, dialog("same", personality=[]), dialog("your persona: me", "z")]
    write_parlai(dialogs, tmp_path / "valid.txt")
    assert read_dialogs([tmp_path / "valid.txt"]) == {"valid": dialogs}
    assert os.listdir(tmp_path) == ["valid.txt"]


def test_an_utterance_that_does_not_go_on_starts_a_dialog(tmp_path):
    first, second = ({"candidates": ["x", reply], "history": ["q", "r", "s"]} for reply in "ab")
    write_parlai([{"personality": ["p"], "utterances": [first, second]}], tmp_path / "train.txt")
    expected = [{"personality": ["p"], "utterances": [utterance]} for utterance in (first, second)]
    assert read_dialogs([tmp_path / "train.txt"])["train"] == expected


def test_what_parlai_text_cannot_carry_becomes_a_space(tmp_path):
    write_parlai([dialog("a|b\tc", personality=["p|\nq"], distractors=["d\\ne"])], tmp_path / "train.txt")
    (written,) = read_dialogs([tmp_path / "train.txt"])["train"]
    assert written == dialog("a b c", personality=["p| q"], distractors=["d e"])


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"train\.txt: cannot be written: No such file or directory"):
        write_parlai(DATASET["train"], tmp_path / "nowhere" / "train.txt")
