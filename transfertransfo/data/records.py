"""Records of JSON, CSV or a table -> dialogs in PersonaChat's layout, still unchecked (`dialogs` does that).

Recognised by the fields of a record:

* `utterances`: PersonaChat's own dialogs, with other names of the same fields.
* `messages`, `conversations` and other lists of turns: chat records with roles, or the turns of two speakers, of whom
  the second replies; both do where both have a persona, as in multi-session chat.
* `Best Generated Conversation`: Synthetic-Persona-Chat.
* rows of one reply (`history`, `candidates`, `reply`), or of one turn (`utterance`), put together by `conv_id`.
"""

import re
from collections.abc import Callable
from typing import Any

from transfertransfo.data.fields import (
    DIALOG_FIELDS,
    GOLD,
    IDS,
    ORDER,
    PERSONA_NAMES,
    UTTERANCE_FIELDS,
    UTTERANCE_NAMES,
    as_list,
    as_objects,
    renamed,
    sentences,
    with_plain_names,
)
from transfertransfo.data.reading import MAX_TURNS, Faults, Records, SharedTexts, kind
from transfertransfo.data.turns import SPEAKER, TEXT, TURN_LISTS, from_turns, merged, personas_of, sides, synthetic

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
KNOWN = "utterances, messages, conversations, or history and reply"


class AnotherFormat(Exception):
    """A file of records that are no dialogs; the message names what they are, and the way out."""


class Rows(list[dict]):
    """The rows of one conversation."""


# Rows


def grouped(records: Records, faults: Faults) -> Records:
    """The records, with successive rows of one `conv_id` put together."""
    rows, place, last, seen = Rows(), "", None, set()
    for row_place, record, is_whole in records:
        record = with_plain_names(record) if type(record) is dict else record
        number = _conversation(record) if is_whole and type(record) is dict else None
        if rows and (number is None or number != last):
            yield place, rows, True
            rows = Rows()
        if number is None:
            yield row_place, record, is_whole
        elif number != last and number in seen:
            begun = f"conversation {str(number)[:30]!r}{row_place}"
            faults.append(f"{begun}: has rows above already: all its rows must stand together")
            yield row_place, None, False
            number = None
        else:
            seen.add(number)
            place = place if rows else row_place
            rows.append(record)  # type: ignore[arg-type]  # a dict, as it has a number
        last = number
    if rows:
        yield place, rows, True


def _conversation(record: dict) -> str | int | None:
    """The number of the conversation that a row is part of."""
    if record.keys() & {"utterances", *TURN_LISTS}:
        return None
    return next((record[name] for name in IDS if type(record.get(name)) in (str, int)), None)


def _from_rows(rows: Rows, faults: Faults) -> list[dict]:
    if len(rows) > MAX_TURNS:
        raise ValueError(f"a conversation of more than {MAX_TURNS} rows")
    order = next((name for name in ORDER if name in rows[0]), None)
    if order and all(re.fullmatch(r"\d{1,9}", str(row.get(order))) for row in rows):
        rows = Rows(sorted(rows, key=lambda row: int(row[order])))
    if all(map(_is_row, rows)):
        dialogs = [_from_row(row, faults) for row in rows]
        utterances = [utterance for dialog in dialogs for utterance in dialog["utterances"]]
        return [{"personality": dialogs[0]["personality"], "utterances": utterances}]
    return sides(merged(rows, faults), personas_of(rows[0], faults))


def _from_row(row: dict, faults: Faults) -> dict:
    """A dialog of one utterance."""
    row = renamed(renamed(row, PERSONA_NAMES, faults), UTTERANCE_NAMES, faults)
    lists = {name: as_list(row[name]) for name in ("history", "candidates", "distractors") if row.get(name)}
    if type(lists.get("candidates")) is str:
        raise ValueError("candidates: expected a list, as JSON")
    utterance = {name: row[name] for name in GOLD if name in row} | lists
    faults.leave(row.keys() - UTTERANCE_FIELDS - DIALOG_FIELDS - {*GOLD, *IDS, *ORDER, *SPEAKER, *TEXT, "distractors"})
    history = utterance.get("history")
    if type(history) is str:
        utterance["history"] = [line for line in history.splitlines() if line.strip()]
    return {"personality": sentences(row.get("personality")), "utterances": [with_gold(utterance)]}


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


def with_gold(utterance: dict) -> dict:
    """The utterance with the gold reply as its `reply`, whichever field names it, and distractors as candidates.

    Raises:
        ValueError: two fields name different replies, or one an index that is none.
    """
    candidates = utterance.get("candidates")
    given = {name: utterance[name] for name in GOLD if utterance.get(name) not in (None, [])}
    if "reply" in given:  # what stands beside it is something else
        given = {"reply": given["reply"]}
    golds = {name: _gold(name, value, candidates) for name, value in given.items()}
    if any(gold != next(iter(golds.values())) for gold in golds.values()):
        raise ValueError(f"{' and '.join(golds)}: different replies")
    found = {name: utterance[name] for name in ("history", "candidates") if name in utterance}
    distractors = utterance.get("distractors")
    if golds:
        found["reply"] = next(iter(golds.values()))
    elif distractors and type(candidates) is list and candidates:
        found["reply"] = candidates[-1]
    if distractors and type(distractors) is list and type(candidates) in (list, type(None)):
        found["candidates"] = [*distractors, *(candidates or [])]
    elif distractors:
        raise ValueError(f"distractors: expected a list of strings, got {kind(distractors)}")
    return found


def _gold(name: str, value: Any, candidates: Any) -> Any:
    """The reply that a field names, by its text, its index among the candidates, or a 1 in its place."""
    choices = candidates if type(candidates) is list else []
    if name == "reply" or (type(value) is str and not choices):
        return value
    if type(value) is list:
        if type(value[0]) is str or (len(value) == 1 and type(value[0]) is int):  # of several labels the first
            return _gold(name, value[0], candidates)
        if sorted(map(str, value)) == ["0"] * (len(choices) - 1) + ["1"]:
            return choices[[*map(str, value)].index("1")]
        raise ValueError(f"{name}: expected a reply, or its index among the candidates, got a list")
    if type(value) is str and value in choices:
        return value
    if type(value) is str and re.fullmatch("[A-Z]", value):
        index = ord(value) - ord("A")
    elif type(value) is str and not re.fullmatch(r"-?\d{1,9}", value):
        return value
    elif type(value) in (int, str) or (type(value) is float and value.is_integer()):
        index = int(value)
    else:
        raise ValueError(f"{name}: expected a reply, or its index among the candidates, got {kind(value)}")
    if not 0 <= index < len(choices):
        raise ValueError(f"{name}: {str(value)[:30]} is no index of {len(choices)} candidates, from 0, nor one of them")
    return choices[index]


# The table


def _is_native(record: dict) -> bool:
    return "utterances" in record


def _is_synthetic(record: dict) -> bool:
    return "best_generated_conversation" in record


def _has_turns(record: dict) -> bool:
    return any(type(record.get(name)) in (list, dict) or _begins_a_list(record.get(name)) for name in TURN_LISTS)


def _begins_a_list(value: object) -> bool:
    return type(value) is str and value.lstrip().startswith("[")


def _is_row(record: dict) -> bool:
    names = record.keys() & {*UTTERANCE_FIELDS, "response", "label_candidates", "distractors", "options"}
    return bool(names or ("context" in record and record.keys() & {*GOLD}))


Reader = Callable[[dict, Faults], list[dict]]
READERS: tuple[tuple[Callable[[dict], bool], Reader], ...] = (
    (_is_native, _native),
    (_is_synthetic, synthetic),
    (_has_turns, from_turns),
    (_is_row, lambda record, faults: [_from_row(record, faults)]),
)


def is_record(value: object) -> bool:
    """Whether a JSON value is one record of a dataset, of a layout that is read or refused by name."""
    if type(value) is not dict:
        return False
    record = with_plain_names(value)
    is_read = any(is_it(record) for is_it, _ in READERS)
    return is_read or "personality" in record or bool(another_format(record)) or _conversation(record) is not None


def another_format(record: dict) -> str | None:
    """What a record is that is none of a dialog, with the way out."""
    if record.keys() & {"utterances", "messages", "conversations"}:
        return None
    for fields, name, way_out in ANOTHER:
        if fields <= record.keys() and not (
            "text" in fields and (_is_row(record) or _conversation(record) is not None)
        ):
            return f"{name} ({', '.join(sorted(fields))}), not dialogs: {way_out}, and see docs/data.md"
    return None


def dialogs_of(record: object, place: str, faults: Faults, is_first: bool = False) -> list[Any]:
    """The unchecked dialogs of a record, in PersonaChat's layout. What is wrong goes to `faults`.

    Raises:
        AnotherFormat: the file's first record is none of a dialog.
    """
    try:
        if type(record) is Rows:
            return _from_rows(record, faults)
        if type(record) is not dict:
            return [record]
        if is_first and (another := another_format(record)):
            raise AnotherFormat(another)
        for is_it, read in READERS:
            if is_it(record):
                return read(record, faults)
        if is_first and record and "personality" not in record:
            fields = ", ".join(map(str, record))[:100]
            raise AnotherFormat(f"no dialogs of a known layout: its records have {fields}, none of {KNOWN}")
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
