"""Rows of a table or of JSON lines -> dialogs: rows of a reply, or of a turn, put together by `conv_id`."""

import re

from transfertransfo.data.fields import (
    DIALOG_FIELDS,
    GOLD,
    IDS,
    ORDER,
    PERSONA_NAMES,
    UTTERANCE_FIELDS,
    UTTERANCE_NAMES,
    as_list,
    renamed,
    sentences,
    with_gold,
    with_plain_names,
)
from transfertransfo.data.reading import MAX_TURNS, Faults, Records
from transfertransfo.data.turns import SPEAKER, TEXT, TURN_LISTS, merged, personas_of, sides


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


def conversation_of(record: dict) -> str | int | None:
    """The number of the conversation that a row is part of."""
    if record.keys() & {"utterances", *TURN_LISTS}:
        return None
    return next((record[name] for name in IDS if type(record.get(name)) in (str, int)), None)


def is_row(record: dict) -> bool:
    names = record.keys() & {*UTTERANCE_FIELDS, "response", "label_candidates", "distractors", "options"}
    return bool(names or ("context" in record and record.keys() & {*GOLD}))


def from_rows(rows: Rows, faults: Faults) -> list[dict]:
    if len(rows) > MAX_TURNS:
        raise ValueError(f"a conversation of more than {MAX_TURNS} rows")
    order = next((name for name in ORDER if name in rows[0]), None)
    if order and all(re.fullmatch(r"\d{1,9}", str(row.get(order))) for row in rows):
        rows = Rows(sorted(rows, key=lambda row: int(row[order])))
    if all(map(is_row, rows)):
        dialogs = [from_row(row, faults) for row in rows]
        utterances = [utterance for dialog in dialogs for utterance in dialog["utterances"]]
        return [{"personality": dialogs[0]["personality"], "utterances": utterances}]
    return sides(merged(rows, faults), personas_of(rows[0], faults))


def from_row(row: dict, faults: Faults) -> dict:
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
