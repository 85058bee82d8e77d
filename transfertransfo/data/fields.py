"""Fields of a record: their other names, lists in the cells of a table, and the sentences of a persona."""

import ast
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from transfertransfo.data.reading import Faults

LONGEST = 100  # characters of a field that may be known by another name
DIALOG_FIELDS, UTTERANCE_FIELDS = {"personality", "utterances"}, {"history", "candidates", "reply"}
PERSONA_NAMES = dict.fromkeys(
    ("persona", "personas", "personalities", "persona_sentences", "your_persona", "self_persona", "bot_persona"),
    "personality",
)
UTTERANCE_NAMES = {
    "context": "history", "contexts": "history", "dialog_history": "history", "dialogue_history": "history",
    "conversation_history": "history", "chat_history": "history",
    "label_candidates": "candidates", "options": "candidates", "choices": "candidates",
    "negatives": "distractors", "negative_candidates": "distractors",
}  # fmt: skip
GOLD = ("reply", "label", "labels", "eval_labels", "response", "correct_candidate", "answer", "answers", "target",
        "gold", "gold_reply", "gold_index", "label_index", "answer_index", "correct_index")  # fmt: skip
IDS = ("conv_id", "conversation_id", "dialog_id", "dialogue_id", "episode_id")
ORDER = ("utterance_idx", "utterance_id", "turn_idx", "turn_id", "turn")


def with_plain_names(record: dict) -> dict:
    """The record with its fields in lower case, `_` for spaces and dashes."""
    if record.keys() <= DIALOG_FIELDS:
        return record
    plain = {_plain(name) if len(name) <= LONGEST else name: value for name, value in record.items()}
    return record if plain.keys() == record.keys() else plain | {name: record[name] for name in record if name in plain}


@functools.lru_cache(1000)
def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def as_list(value: Any) -> Any:
    """The list that a cell of a table holds as JSON or in Python's writing, or else its text."""
    if type(value) is not str or value.lstrip()[:1] != "[":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if re.search(r"""['"]\s+['"]""", value):  # Python takes them for one text
        raise ValueError("a list without commas, as NumPy prints it: write lists as JSON")
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def sentences(value: Any) -> Any:
    """A persona's sentences: those of a list, the lines of a text, or the sentences of a line."""
    value = as_list(value)
    if type(value) is not str:
        return value
    lines = [line.strip() for line in value.splitlines() if line.strip()]
    return [part for line in lines for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", line) if part]


def renamed(record: dict, names: Mapping[str, str], faults: Faults) -> dict:
    """The record with fields of other names under those that are read; a field that is there already stays."""
    found = record
    for field, value in record.items():
        name = names.get(field)
        if name and value is not None and not found.get(name):
            found = {key: item for key, item in found.items() if key != field} | {name: value}
            faults.note(f"{field} is read as {name}")
    return found


def as_objects(value: Any) -> Any:
    """The list of objects of an object of lists, which `datasets` makes of it, or of a cell that holds one."""
    value = as_list(value)
    if type(value) is not dict or not all(type(column) is list for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, row)) for row in zip(*value.values())]
