"""Layouts that datasets come in, each from a small invented sample: what was once read wrong in silence."""

import json

import pytest
from helpers import lines, table, turns

TEA, ANN, BOB = ["i like tea ."], ["i am ann ."], ["i am bob ."]
USER, MODEL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def user(text, **more) -> dict:
    return {"role": "user", "content": text} | more


def model(text, **more) -> dict:
    return {"role": "assistant", "content": text} | more


def spoken(speakers, *texts, name="speaker") -> list:
    """Turns of speakers who take turns."""
    return [{name: speakers[number % len(speakers)], "text": text} for number, text in enumerate(texts)]


def content(dialogs) -> list:
    """Persona, histories and replies of each dialog."""
    return [(dialog["personality"], turns(dialog)) for dialog in dialogs]


BOTH = [(ANN, [([], "hi"), (["hi", "yo"], "so ?")]), (BOB, [(["hi"], "yo"), (["hi", "yo", "so ?"], "ok")])]


# Rows of a reply


@pytest.mark.parametrize("field", ["text", "utterance", "message", "content", "value", "Message"])
def test_the_partner_s_words_in_a_row_are_its_history(read, caplog, field):
    """They vanished, and each reply stood alone."""
    row = {"persona": "i like tea .", field: "hi\nyou", "response": "yo"}
    for text in (lines(row), table([row])):
        assert content(read(text)) == [(TEA, [(["hi\nyou"], "yo")])]
    assert f"{field.lower()} is read as history" in caplog.text


def test_words_beside_a_history_are_named(read, caplog):
    assert content(read(lines({"history": ["hi"], "text": "x", "reply": "yo"}))) == [([], [(["hi"], "yo")])]
    assert "text beside history is left out" in caplog.text


def test_a_later_record_of_another_format_is_a_fault(fault):
    """Only the first record was looked at."""
    row = {"history": ["hi"], "reply": "yo"}
    other = {"prompt": "a", "response": "b"}
    expected = "train dialog 2 (line 2), of another format: a prompt-response file (prompt, response), not dialogs"
    assert fault(lines(row, other)).startswith(expected)
    assert "a prompt-response file" in fault(lines({"conv_id": 1, **other}))


def test_turns_beside_a_reply_are_its_history(read, caplog):
    """The reply was dropped, and the turns read in its place."""
    said = ["hi", "hello", "what do you drink ?"]
    expected = [(TEA, [(said, "tea")])]
    assert content(read(lines({"persona": TEA, "dialogue": said, "response": "tea"}))) == expected
    assert (
        content(
            read(lines({"context": "x", "persona": TEA, "conversation": said, "candidates": ["x", "tea"], "label": 1}))
        )
        == expected
    )
    assert "conversation is read as history" in caplog.text
    assert len(read(lines({"dialog": said, "act": [1, 2, 1], "labels": [1, 2, 1]}))[0]["utterances"]) == 1  # as before


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"conversations": [USER], "chosen": MODEL, "rejected": MODEL}, "a preference file as LLaMA-Factory's"),
        ({"messages": [USER, MODEL], "label": False}, "a file of rated replies as KTO's"),
    ],
)
def test_lists_of_turns_with_ratings_are_refused_by_name(fault, record, expected):
    """The refused reply was learnt."""
    assert fault(lines(record)).startswith(expected)


def test_one_conversation_of_two_personas_in_rows_of_replies(read):
    """All replies had the first row's persona."""
    replies = [(BOB, ["a"], "b"), (ANN, ["a", "b"], "c"), (None, ["x"], "d"), (BOB, ["a", "b", "c"], "e")]
    rows = [{"conv_id": 1, "persona": who, "history": past, "reply": reply} for who, past, reply in replies]
    expected = [
        (BOB, [(["a"], "b"), (["a", "b", "c"], "e")]),
        (ANN, [(["a", "b"], "c"), (["x"], "d")]),
    ]
    assert content(read(lines(*rows))) == expected
    assert content(read(lines({**rows[0], "persona": None}, rows[3])))[0][0] == BOB


@pytest.mark.parametrize("gold", ["response", "target", "gold", "gold_reply"])
@pytest.mark.parametrize("text", ["2", "B"])
def test_a_text_is_no_index(read, gold, text):
    """The third candidate was learnt."""
    (dialog,) = read(lines({"history": ["how many ?"], gold: text, "candidates": ["a", "b", "c"]}))
    assert dialog["utterances"][0]["candidates"] == ["a", "b", "c", text]


def test_wrong_answers_that_equal_the_right_one_are_left_out(read):
    for wrong in ({"distractors": ["a", "b ", "c"]}, {"candidates": ["b ", "a", "b", "c"]}):
        (dialog,) = read(lines({"history": ["x"], "label": "b"} | wrong))
        assert dialog["utterances"][0]["candidates"] == ["a", "c", "b"]
    native = {"candidates": ["b", "a", "b"], "history": ["x"]}
    assert read(lines({"utterances": [native]}))[0]["utterances"] == [native]


def test_persona_lines_in_a_row(read):
    """They were the first turns, or stood in each sentence."""
    expected = [(["i run .", "i sing ."], [(["hi"], "yo")])]
    said = "your persona: i run .\nyour persona: i sing .\npartner's persona: x\nhi"
    for history in (said, said.split("\n"), [said]):
        assert content(read(lines({"history": history, "reply": "yo"}))) == expected
    persona = ["your persona: i run .", "your persona: i sing ."]
    assert content(read(lines({"personality": persona, "history": ["hi"], "reply": "yo"}))) == expected


# Rows of a turn


@pytest.mark.parametrize("inside", [False, True])
def test_each_speaker_s_own_persona(read, inside):
    """The replies had the asker's."""

    def dialogs(speakers, first, second, name="speaker"):
        said = spoken(speakers, "hi", "yo", "so ?", "ok", name=name)
        said = [turn | {"persona": (first, second)[number % 2]} for number, turn in enumerate(said)]
        return content(read(lines({"dialog": said}) if inside else lines(*({"conv_id": 1} | turn for turn in said))))

    assert dialogs("ab", ANN, BOB) == BOTH
    assert dialogs(["user", "assistant"], ANN, BOB) == BOTH[1:]
    assert dialogs("ab", BOB, BOB) == dialogs("ab", None, BOB) == BOTH[1:]
    assert dialogs(["user", "assistant"], None, BOB, name="role") == BOTH[1:]


def test_a_speaker_of_two_personas_is_a_fault(fault):
    said = [turn | {"conv_id": 1, "persona": who} for turn, who in zip(spoken("aba", *"xyz"), (ANN, None, BOB))]
    assert fault(lines(*said)) == "train dialog 1 (line 1), speaker 'a': two different personas"


CHAIN = [
    {"id": "L3", "conversation_id": "L1", "speaker": "u1", "text": "so ?", "reply-to": "L2"},
    {"id": "L2", "conversation_id": "L1", "speaker": "u2", "text": "yo", "reply-to": "L1"},
    {"id": "L1", "conversation_id": "L1", "speaker": "u1", "text": "hi", "reply-to": None},
]


def test_rows_that_say_what_they_reply_to(read, fault):
    """ConvoKit's were read backwards."""
    assert content(read(lines(*CHAIN))) == [([], [(["hi"], "yo")])]
    assert "no chain of replies" in fault(lines(*CHAIN, {**CHAIN[0], "id": "L4", "text": "and ?"}))
    assert "no chain of replies" in fault(lines(*CHAIN[:2], {**CHAIN[2], "reply-to": "L3"}))


def test_numbers_of_turns(read, fault):
    rows = [
        {"conv_id": 1, "turn": 1.0, "speaker": "b", "text": "yo"},
        {"conv_id": 1, "turn": 0.0, "speaker": "a", "text": "hi"},
    ]
    for text in (table(rows), lines(*rows)):
        assert content(read(text)) == [([], [(["hi"], "yo")])]
    twice = [*rows, {**rows[0], "text": "again"}]
    assert fault(lines(*twice)) == "train dialog 1 (line 1), turn 1 occurs twice for speaker 'b'"
    shared = [{"conv_id": 1, "turn": 0, "role": turn["role"], "text": turn["content"]} for turn in (USER, MODEL)]
    assert content(read(lines(*shared))) == [([], [(["hi"], "yo")])]


def test_sessions_are_conversations_of_their_own(read):
    """Their turns were sorted into one another."""
    rows = [
        {
            "dialog_id": 7,
            "session_id": session,
            "turn_id": number,
            "speaker": "ab"[number],
            "text": f"{session}{number}",
        }
        for session in (1, 2)
        for number in (0, 1)
    ]
    assert content(read(table(rows))) == [([], [(["10"], "11")]), ([], [(["20"], "21")])]


# Lists of turns


def test_two_personas_beside_user_and_assistant(read):
    """The assistant had the user's."""
    said = {"messages": [user("hi"), model("yo"), user("so ?"), model("ok")]}
    assert content(read(lines({"personas": [ANN, BOB], **said}))) == BOTH[1:]
    assert content(read(lines({"persona1": ANN, "persona2": BOB, **said}))) == BOTH[1:]
    said = {"dialog": spoken(["Speaker 1", "Speaker 2"], "hi", "yo", "so ?", "ok")}
    assert content(read(lines({"persona1": ANN, "persona2": None, **said})))[0] == BOTH[0]


def test_parlai_s_self_chats_have_a_context_for_each_side(read, caplog):
    """Both personas were one. Since pull request 2583 of 2020 the first context is who begins'."""
    said = spoken(["m_2", "m_1"], "hi", "yo", "so ?", "ok", name="id")
    context = [{"id": "context", "text": f"your persona: {persona[0]}\nsome topic"} for persona in (ANN, BOB)]
    assert content(read(lines({"dialog": [said[:2], said[2:]], "context": context}))) == BOTH
    assert "of two contexts the first is read as that of who begins" in caplog.text


def test_a_blank_turn_keeps_its_place(read, fault):
    """All sides before it were changed."""
    said = [user(" "), model("yo"), user([{"type": "text", "text": " "}]), model(""), user("so ?"), model("ok")]
    assert content(read(lines({"messages": said}))) == [([], [([], "yo"), (["yo", "", "", "so ?"], "ok")])]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
@pytest.mark.parametrize("persona", ["i run . i sing .", ["i run .", "i sing ."], [{"text": "i run . i sing ."}]])
def test_a_system_message_beside_the_turns(read, field, persona):
    assert read(lines({field: persona, "messages": [USER, MODEL]}))[0]["personality"] == ["i run .", "i sing ."]


def test_a_system_message_that_is_none(fault):
    expected = "train dialog 1 (line 1), system: expected a string, got an object"
    assert fault(lines({"system": {"a": 1}, "messages": [USER, MODEL]})) == expected


@pytest.mark.parametrize("names", [("Usr", "Bot"), ("Persona A", "Persona B"), ("user", "assistant")])
def test_speakers_in_front_of_the_turns(read, caplog, names):
    """They stood in the texts."""
    said = [f"{names[0]}: hi", f"{names[0]}: there", f"{names[1]}: yo : x"]
    assert content(read(lines({"dialogue": said}))) == [([], [(["hi there"], "yo : x")])]
    assert "a name and a colon in front of each turn are read as its speaker" in caplog.text
    assert content(read(lines({"dialogue": ["a: b", "hi"]}))) == [([], [(["a: b"], "hi")])]


def test_a_list_of_speakers(read, fault):
    record = {"dialogue": ["hi", "you", "yo"], "speakers": ["Ann", "Ann", "Bob"]}
    assert content(read(lines(record))) == [([], [(["hi you"], "yo")])]
    assert fault(lines(record | {"speakers": ["Ann", "Bob"]})).endswith("dialogue: 2 speakers of 3 turns")


def test_lists_of_lists(read):
    """Conversations were joined to one, and a number was a turn."""
    talks = [["hi", "yo"], ["how are you ?", "fine", "good"]]
    expected = [([], [(["hi"], "yo")]), ([], [(["how are you ?"], "fine")])]
    assert content(read(json.dumps({"conversations": talks}))) == expected
    pairs = [[0, "hi"], [1, "yo"], [0, "so ?"], [1, "ok"]]
    assert content(read(lines({"personas": [ANN, BOB], "dialog": pairs}))) == BOTH


@pytest.mark.parametrize("mask", [{"loss": False}, {"weight": "0"}, {"weight": 0.0}, {"train": False}])
def test_turns_that_are_not_learnt(read, mask):
    said = [user("hi"), model("bad", **mask), user("so ?"), model("ok")]
    assert content(read(lines({"messages": said}))) == [([], [(["hi", "bad", "so ?"], "ok")])]


@pytest.mark.parametrize(
    "speakers, expected",
    [
        (["USER", "SYSTEM"], [(["a"], "b"), (["a", "b", "c"], "d")]),
        (["SYSTEM", "USER"], [([], "a"), (["a", "b"], "c")]),
        (["user", "agent"], [(["a"], "b"), (["a", "b", "c"], "d")]),
        (["Assistant", "Customer"], [([], "a"), (["a", "b"], "c")]),
    ],
)
def test_who_replies(read, speakers, expected):
    """SYSTEM's first turn was the persona."""
    assert content(read(lines({"turns": spoken(speakers, *"abcd")}))) == [([], expected)]


@pytest.mark.parametrize("said", [["hi", "yo"], spoken(["USER", "ASSISTANT"], "hi", "yo")])
def test_utterances_that_are_turns(read, said):
    assert content(read(lines({"utterances": said, "acts": [1, 2]}))) == [([], [(["hi"], "yo")])]


def test_a_list_of_turns_beside_a_name(read):
    assert content(read(lines({"conversation": "c1", "turns": spoken("ab", "hi", "yo")}))) == [([], [(["hi"], "yo")])]


def test_a_conversational_prompt_and_completion(read, fault):
    record = {"prompt": [user("a"), model("b"), user("hi")], "completion": [MODEL]}
    assert content(read(lines(record))) == [([], [(["a", "b", "hi"], "yo")])]
    assert fault(lines(record | {"label": False})).startswith("a file of rated replies as KTO's")


def test_parts_with_a_text(read, fault):
    """Telegram's."""
    said = [{"from": "Ann", "text": "hi"}, {"from": "Bob", "text": ["see", {"type": "link", "text": "http://x"}]}]
    assert content(read(lines({"messages": said}))) == [([], [(["hi"], "see http://x")])]
    said[1]["text"] = [{"type": "image_url", "text": "x"}]
    assert "a part that is no text: 'image_url'" in fault(lines({"messages": said}))


@pytest.mark.parametrize("field", ["utterances", "dialog", "prompt"])
def test_a_list_that_cannot_be_read(fault, field):
    record = {field: "['a' 'b']", "response": "yo", "completion": "x"}
    for text in (json.dumps([record]), json.dumps(record), json.dumps(record, indent=1)):
        assert ", a list without commas, as NumPy prints it: write lists as JSON" in fault(text)


def test_nan_is_missing(read, fault):
    assert fault('{"history": ["hi"], "reply": NaN}\n').endswith("utterance 1: no reply")
    assert content(read('{"persona": NaN, "history": ["hi"], "reply": "yo"}\n')) == [([], [(["hi"], "yo")])]


# Tables


def test_spaces_behind_a_comma(read):
    assert content(read('history, reply\n"hi", "yo, you"\n')) == [([], [(["hi"], "yo, you")])]


def test_surplus_fields_without_a_name(read, caplog):
    """EmpatheticDialogues has them, and writes a comma as _comma_."""
    text = "conv_id,utterance_idx,speaker_idx,utterance\n1,1,1,hi_comma_ you,\n1,2,0,yo,c1|c2\n"
    assert content(read(text)) == [([], [(["hi, you"], "yo")])]
    assert "fields without a name at the end of rows are left out" in caplog.text
    assert "_comma_ is read as a comma" in caplog.text


@pytest.mark.parametrize(
    "text, expected",
    [
        ('history\treply\na\t"quoted\nb\tc"\nd\te\n', "line 3: a quote that swallows a tab and a line's end"),
        ("history,reply,Reply\nhi,yo,x\n", "the column reply occurs twice"),
        ("name,words\na,b\n", "no dialogs of a known layout: its columns are name, words, none of utterances"),
        ("history,reply\nhi,yo,\nhi,yo,x,y\n", "line 3: 4 fields under a header of 2"),
    ],
)
def test_tables_that_are_named(fault, text, expected):
    assert fault(text).startswith(expected)


# What is named


@pytest.mark.parametrize(
    "text, expected",
    [
        (json.dumps({"name": "x", "personality": "loud", "first_mes": "hi"}), "a character card (first_mes)"),
        (json.dumps({"spec": "chara_card_v2", "data": {"name": "x"}}), "a character card (data, spec)"),
        (json.dumps({"data": [{"history": ["hi"], "reply": "yo"}]}), "got an object with data: rename data to train"),
        ("<|im_start|>user\nhi<|im_end|>\n", "ChatML text: write its turns as messages"),
        ("[31.12.20, 21:15:00] Ann: hi\n", "an exported chat as WhatsApp's: write its turns as messages"),
        ("12/31/20, 9:15 PM - Ann: hi\n", "an exported chat as WhatsApp's: write its turns as messages"),
    ],
)
def test_what_else_is_named(fault, text, expected):
    assert expected in fault(text)
