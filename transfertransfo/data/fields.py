"""Fields of a record: their other names, lists in the cells of a table, a persona's sentences, the gold reply."""

import ast
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from transfertransfo.data.reading import Faults, kind

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
TEXT_GOLD = ("reply", "response", "target", "gold", "gold_reply")  # a string there is the reply, never an index
IDS = ("conv_id", "conversation_id", "dialog_id", "dialogue_id", "episode_id")
ORDER = ("utterance_idx", "utterance_id", "turn_idx", "turn_id", "turn")
PLACE = {*IDS, *ORDER, "session_id", "reply_to"}  # of a row in its conversation


def with_plain_names(record: dict) -> dict:
    """The record with its fields in lower case, `_` for spaces and dashes."""
    if record.keys() <= DIALOG_FIELDS:
        return record
    plain = {plain_name(name) if len(name) <= LONGEST else name: value for name, value in record.items()}
    return record if plain.keys() == record.keys() else plain | {name: record[name] for name in record if name in plain}


@functools.lru_cache(1000)
def plain_name(name: str) -> str:
    """A field's name in lower case, `_` for spaces and dashes."""
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


# The gold reply


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
        found["candidates"] = [*_wrong(distractors, found.get("reply")), *(candidates or [])]
    elif distractors:
        raise ValueError(f"distractors: expected a list of strings, got {kind(distractors)}")
    elif golds and "reply" not in golds and type(candidates) is list:
        found["candidates"] = _wrong(candidates, found["reply"])
    return found


def _wrong(answers: list, reply: Any) -> list:
    """The answers without those that read like the reply."""
    return [answer for answer in answers if not type(answer) is type(reply) is str or answer.strip() != reply.strip()]


def _gold(name: str, value: Any, candidates: Any) -> Any:
    """The reply that a field names, by its text, its index among the candidates, or a 1 in its place."""
    choices = candidates if type(candidates) is list else []
    if name == "reply" or (type(value) is str and (name in TEXT_GOLD or not choices)):
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
