"""Rows of a table or of JSON lines -> dialogs: rows of a reply, or of a turn, put together by `conv_id`."""

import re
from typing import Any

from transfertransfo.data.fields import (
    DIALOG_FIELDS,
    GOLD,
    IDS,
    ORDER,
    PERSONA_NAMES,
    PLACE,
    TEXT_GOLD,
    UTTERANCE_FIELDS,
    UTTERANCE_NAMES,
    as_list,
    renamed,
    sentences,
    with_gold,
    with_plain_names,
)
from transfertransfo.data.parlai import PERSONA
from transfertransfo.data.reading import MAX_TURNS, Faults, Records
from transfertransfo.data.turns import (
    SPEAKER,
    TEXT,
    TURN_LISTS,
    is_texts,
    joined,
    merged,
    personas_of,
    sides,
    told_persona,
    turn_list,
    with_roles,
)

NUMBER = re.compile(r"\d{1,9}(?:\.0+)?")


class Rows(list[dict]):
    """The rows of one conversation."""


def grouped(records: Records, faults: Faults) -> Records:
    """The records, with successive rows of one `conv_id` put together."""
    rows, place, last, seen = Rows(), "", None, set()
    for row_place, record, is_whole in records:
        record = with_plain_names(record) if type(record) is dict else record
        number = conversation_of(record) if is_whole and type(record) is dict else None
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


def conversation_of(record: dict) -> str | int | tuple | None:
    """The number of the conversation that a row is part of, with that of its session."""
    if record.keys() & {"utterances", *TURN_LISTS}:
        return None
    number = next((record[name] for name in IDS if type(record.get(name)) in (str, int)), None)
    session = record.get("session_id")
    return number if number is None or type(session) not in (str, int) else (number, session)


def is_row(record: dict) -> bool:
    """Whether a record is a row of a reply."""
    names = record.keys() & {*UTTERANCE_FIELDS, "response", "label_candidates", "distractors", "options"}
    return bool(names or ("context" in record and record.keys() & {*GOLD}))


def has_turns_beside_reply(record: dict) -> bool:
    """Whether a record is a row of a reply whose history is a list of turns. Labels alone may be of these turns."""
    field = turn_list(record)
    if field is None or record.get("history") is not None or not is_texts(as_list(record[field])):
        return False
    return any(
        record.get(name) for name in (*TEXT_GOLD, "answer", "correct_candidate", "candidates", "label_candidates")
    )


# Conversations


def from_rows(rows: Rows, faults: Faults) -> list[dict]:
    """The dialogs of one conversation. ValueError where its rows make none."""
    if len(rows) > MAX_TURNS:
        raise ValueError(f"a conversation of more than {MAX_TURNS} rows")
    rows = _in_order(rows)
    if all(map(is_row, rows)):
        return _by_persona([from_row(row, faults) for row in rows])
    said = with_roles(merged([_with_commas(row, faults) for row in rows], faults))
    return sides(said, *personas_of(rows[0], said, faults))


def _in_order(rows: Rows) -> Rows:
    """The rows by the numbers of their turns, or by what they reply to; else as they stand."""
    order = next((name for name in ORDER if name in rows[0]), None)
    if order is None or not all(NUMBER.fullmatch(str(row.get(order))) for row in rows):
        return _chain(rows) if all({"id", "reply_to"} <= row.keys() for row in rows) else rows
    seen = set()
    for row in rows:
        number = int(float(row[order]))
        speaker = next((str(row[name]) for name in SPEAKER if row.get(name) is not None), None)
        if (number, speaker) in seen and not is_row(row):
            raise ValueError(f"{order} {number} occurs twice for speaker {str(speaker)[:30]!r}")
        seen.add((number, speaker))
    return Rows(sorted(rows, key=lambda row: int(float(row[order]))))


def _chain(rows: Rows) -> Rows:
    """ConvoKit's rows, each after the one that it replies to."""
    ids = {str(row["id"]) for row in rows}
    after = {parent if (parent := str(row["reply_to"])) in ids else None: row for row in rows}
    chain, row = Rows(), after.get(None)
    while row and len(ids) == len(after) == len(rows):
        chain.append(row)
        row = after.get(str(row["id"]))
    if len(chain) < len(rows):
        raise ValueError("reply_to: no chain of replies: leave such conversations out")
    return chain


def _by_persona(dialogs: list[dict]) -> list[dict]:
    """A dialog for each persona of a conversation. A row without one has that of the row before."""
    persona = next((dialog["personality"] for dialog in dialogs if dialog["personality"]), None)
    found: list[dict] = []
    for dialog in dialogs:
        persona = dialog["personality"] or persona
        same = [other for other in found if other["personality"] == persona]
        if not same:
            found += (same := [{"personality": persona, "utterances": []}])
        same[0]["utterances"] += dialog["utterances"]
    return found


def _with_commas(row: dict, faults: Faults) -> dict:
    """A row of EmpatheticDialogues, whose texts have `_comma_` for a comma."""
    text = row.get("utterance")
    if type(text) is not str or "_comma_" not in text:
        return row
    faults.note("_comma_ is read as a comma")
    return row | {"utterance": text.replace("_comma_", ",")}


# A reply


def from_row(row: dict, faults: Faults) -> dict:
    """A dialog of one utterance. ValueError where a field is not what it should be."""
    if turns := turn_list(row):
        row = renamed(row, {turns: "history"}, faults)
    row = renamed(renamed(row, PERSONA_NAMES, faults), UTTERANCE_NAMES, faults)
    lists = {name: as_list(row[name]) for name in ("history", "candidates", "distractors") if row.get(name)}
    if type(lists.get("candidates")) is str:
        raise ValueError("candidates: expected a list, as JSON")
    utterance = {name: row[name] for name in GOLD if name in row} | lists
    faults.leave(row.keys() - UTTERANCE_FIELDS - DIALOG_FIELDS - {*GOLD, *PLACE, *SPEAKER, *TEXT, "distractors"})
    history = utterance.get("history")
    if type(history) is str:
        utterance["history"] = [line for line in history.splitlines() if line.strip()]
    if said := next((name for name in TEXT if type(row.get(name)) is str), None):
        is_history = row.get("history") is None
        faults.note(f"{said} is read as history" if is_history else f"{said} beside history is left out")
        utterance |= {"history": [row[said]]} if is_history else {}
    persona, utterance["history"] = _without_persona(utterance.get("history"))
    own = _without_prefix(sentences(row.get("personality")))
    return {"personality": joined(own, persona) if persona else own, "utterances": [with_gold(utterance)]}


def _without_persona(history: Any) -> tuple[list[str], Any]:
    """The `your persona:` lines in front of a history, as ParlAI writes it, and the history without them."""
    persona: list[str] = []
    for number, text in enumerate(history if is_texts(history) else []):
        told, rest = told_persona(text)
        persona += told
        if not PERSONA.match(text) or rest.strip():
            return persona, [rest if PERSONA.match(text) else text, *history[number + 1 :]]
    return persona, [] if persona else history


def _without_prefix(persona: Any) -> Any:
    """The sentences of a persona without `your persona:`, and without those of the partner."""
    matches = [(PERSONA.fullmatch(text), text) for text in persona] if is_texts(persona) else []
    if not any(match for match, _ in matches):
        return persona
    return [match[2] if match else text for match, text in matches if not match or match[1].lower() == "your"]
