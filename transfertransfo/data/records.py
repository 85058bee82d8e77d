"""Records of JSON, CSV or a table -> dialogs in PersonaChat's layout, still unchecked (`dialogs` does that).

Recognised by the fields of a record:

* `utterances`: PersonaChat's own dialogs, with other names of the same fields.
* `messages`, `conversations` and other lists of turns: chat records with roles, or the turns of two speakers, of whom
  the second replies; both do where both have a persona, as in multi-session chat.
* `Best Generated Conversation`: Synthetic-Persona-Chat.
* rows of one reply (`history`, `candidates`, `reply`), or of one turn (`utterance`), put together by `conv_id`.
"""

from collections.abc import Callable
from typing import Any

from transfertransfo.data.fields import (
    DIALOG_FIELDS,
    GOLD,
    PERSONA_NAMES,
    UTTERANCE_FIELDS,
    UTTERANCE_NAMES,
    as_objects,
    renamed,
    sentences,
    with_gold,
    with_plain_names,
)
from transfertransfo.data.reading import Faults, SharedTexts
from transfertransfo.data.rows import Rows, conversation_of, from_row, from_rows, has_turns_beside_reply, is_row
from transfertransfo.data.turns import SPEAKER, from_prompt, from_turns, is_prompt, synthetic, turn_list

ANOTHER = (
    ({"instruction", "output"}, "an Alpaca file", "rename instruction to history and output to reply"),
    ({"instruction", "response"}, "an instruction file as Dolly", "rename instruction to history, response to reply"),
    ({"chosen", "rejected"}, "a preference file", "give history, chosen as reply and rejected as distractors"),
    ({"prompt", "completion"}, "a prompt-completion file", "rename prompt to history and completion to reply"),
    ({"prompt", "response"}, "a prompt-response file", "rename prompt to history and response to reply"),
    ({"question", "answer"}, "a question-answer file", "rename question to history and answer to reply"),
    ({"input", "output"}, "an input-output file", "rename input to history and output to reply"),
    ({"source", "target"}, "a source-target file", "rename source to history and target to reply"),
    ({"question", "answers"}, "a question-answer file", "rename question to history and give one reply"),
    ({"first_mes"}, "a character card", "give its description to interact.py as the personality"),
    ({"spec", "data"}, "a character card", "give its description to interact.py as the personality"),
    ({"title", "mapping"}, "ChatGPT's export", "write its turns as messages with role and content"),
    (
        {"text", "label"},
        "a file of labelled texts",
        "if the labels are replies, rename text to history, label to reply",
    ),
    (
        {"text", "labels"},
        "a file of labelled texts",
        "if the labels are replies, rename text to history, labels to reply",
    ),
    ({"text"}, "a file of plain texts", "write its turns as messages with role and content"),
)
NONE_OF = "none of utterances, messages, conversations, or history and reply"
SEE = ", and see docs/data.md"


class AnotherFormat(Exception):
    """A file of records that are no dialogs; the message names what they are, and the way out."""


# PersonaChat's own


def _native(record: dict, faults: Faults) -> list[dict]:
    if not record.keys() <= DIALOG_FIELDS:
        record = renamed(record, PERSONA_NAMES, faults)
        faults.leave(record.keys() - DIALOG_FIELDS)
    if type(record.get("personality")) is str:
        record = record | {"personality": sentences(record["personality"])}
    utterances = as_objects(record.get("utterances"))
    if type(utterances) is list:
        found = [_native_utterance(item, number, faults) for number, item in enumerate(utterances, 1)]
        if any(new is not old for new, old in zip(found, utterances)) or utterances is not record["utterances"]:
            record = record | {"utterances": found}
    return [record]


def _native_utterance(utterance: Any, number: int, faults: Faults) -> Any:
    if type(utterance) is not dict or utterance.keys() <= UTTERANCE_FIELDS:
        return utterance
    utterance = renamed(with_plain_names(utterance), UTTERANCE_NAMES, faults)
    faults.leave(utterance.keys() - UTTERANCE_FIELDS - {*GOLD, "distractors"})
    try:
        return with_gold(utterance)
    except ValueError as error:
        raise ValueError(f"utterance {number}, {error}") from None


# The table


def _is_native(record: dict) -> bool:
    """Whether a record has utterances that are no turns, as DailyDialog's texts and Taskmaster's speakers' are."""
    if "utterances" not in record:
        return False
    utterances = as_objects(record["utterances"])
    first = utterances[0] if type(utterances) is list and utterances else None
    if type(first) is not dict:
        return type(first) is not str
    return "candidates" in first or not first.keys() & {*SPEAKER[:3]} or bool(first.keys() & UTTERANCE_FIELDS)


def _is_synthetic(record: dict) -> bool:
    return "best_generated_conversation" in record


Reader = Callable[[dict, Faults], list[dict]]
READERS: tuple[tuple[Callable[[dict], bool], Reader], ...] = (
    (_is_native, _native),
    (_is_synthetic, synthetic),
    (has_turns_beside_reply, lambda record, faults: [from_row(record, faults)]),
    (lambda record: turn_list(record) is not None, from_turns),
    (is_prompt, from_prompt),
    (is_row, lambda record, faults: [from_row(record, faults)]),
)


def is_record(value: object) -> bool:
    """Whether a JSON value is one record of a dataset, of a layout that is read or refused by name."""
    if type(value) is not dict:
        return False
    record = with_plain_names(value)
    if "personality" in record or conversation_of(record) is not None:
        return True
    try:
        return any(is_it(record) for is_it, _ in READERS) or bool(another_format(record))
    except ValueError:  # a list that cannot be read, as `dialogs_of` will say
        return True


def another_format(record: dict) -> str | None:
    """The layout of a record that is no dialog, with the way out; None of others."""
    if "utterances" in record:
        return None
    names = record.keys()
    if names & {"messages", "conversations", "completion"} and type(record.get("label")) is bool:
        return f"a file of rated replies as KTO's (label): keep those whose label is true, without it{SEE}"
    if {"conversations", "chosen", "rejected"} <= names:
        return f"a preference file as LLaMA-Factory's: append chosen to conversations, and leave rejected out{SEE}"
    if names & {"messages", "conversations"} or is_prompt(record):
        return None
    for fields, name, way_out in ANOTHER:
        if fields <= names and not ("text" in fields and (is_row(record) or conversation_of(record) is not None)):
            return f"{name} ({', '.join(sorted(fields))}), not dialogs: {way_out}{SEE}"
    return None


def _another_in(record: object) -> str | None:
    """The same of a record, or of a conversation's rows of replies."""
    if type(record) is dict:
        return another_format(record)
    rows = filter(is_row, record) if type(record) is Rows else ()
    return next(filter(None, map(another_format, rows)), None)


def dialogs_of(record: object, place: str, faults: Faults, is_first: bool = False) -> list[Any]:
    """The unchecked dialogs of a record, in PersonaChat's layout. What is wrong goes to `faults`.

    Raises:
        AnotherFormat: the file's first record is none of a dialog.
    """
    try:
        if another := _another_in(record):
            if is_first:
                raise AnotherFormat(another)
            raise ValueError(f"of another format: {another}")
        if type(record) is Rows:
            return from_rows(record, faults)
        if type(record) is not dict:
            return [record]
        for is_it, read in READERS:
            if is_it(record):
                return read(record, faults)
        if is_first and record and "personality" not in record:
            raise AnotherFormat(
                f"no dialogs of a known layout: its records have {', '.join(map(str, record))[:100]}, {NONE_OF}"
            )
        return [record]
    except ValueError as error:
        faults.append(f"{place}, {error}")
        return []


def shared(record: dict, texts: SharedTexts) -> dict:
    """A checked dialog, its texts shared as those of JSON are."""
    personality = [texts[text] for text in record["personality"]]
    utterances = [
        {name: [texts[text] for text in utterance[name]] for name in ("candidates", "history")}
        for utterance in record["utterances"]
    ]
    return {"personality": personality, "utterances": utterances}
