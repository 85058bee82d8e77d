"""Common to the readers of all dataset formats: texts held once, faults and notes, and how a value is called."""

import re
from collections.abc import Iterable

SPLITS = ("train", "valid")
SPLIT_NAMES = {  # as keys of a JSON object, in the names of files and folders
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "devel", "development", "eval", "evaluation"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
MAX_FAULTS = 10  # listed in one message
MAX_TURNS = 1000  # of a dialog. Its histories grow with the square: a file that is one dialog would fill memory
SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
# Unchecked dialogs: the place, " (line 3)" or "" in PersonaChat JSON; the dialog; whether all of it could be read
Records = Iterable[tuple[str, object, bool]]
Lines = Iterable[tuple[int, str, str]]  # number, text, and the fault of one that is no text


def kind(value: object) -> str:
    """The kind of a JSON value, as messages call it."""
    return KINDS.get(type(value), "a number")


class Faults(list[str]):
    """The first faults of a file, and the number of all: a file of nothing else would fill memory with them.

    Attributes:
        total: the number of all faults.
        notes: what is to be said once of the file, however often it occurs.
        unread: fields that nothing is read from, in the order in which they are met.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.notes: dict[str, None] = {}
        self.unread: dict[str, None] = {}

    def append(self, fault: str) -> None:
        self.total += 1
        if self.total <= MAX_FAULTS:
            super().append(fault)

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_FAULTS:
            self.notes[text] = None

    def leave(self, fields: Iterable[object]) -> None:
        """Remember fields that nothing is read from."""
        if len(self.unread) < MAX_FAULTS:
            self.unread.update(dict.fromkeys(map(str, fields)))


class SharedTexts(dict[str, str]):
    """Text -> the one object that stands for all its equals: of PersonaChat's texts one in twelve is distinct."""

    def __missing__(self, text: str) -> str:
        clean = text if text.isascii() else SURROGATE.sub("\ufffd", text)
        self[text] = clean
        return clean

    def share_(self, record: dict) -> dict:
        """Share the texts of a JSON object while it is parsed, so that the repeated ones are freed at once."""
        for field in ("personality", "candidates", "history"):
            values = record.get(field)
            if type(values) is list:
                record[field] = [self[value] if type(value) is str else value for value in values]
        if type(record.get("reply")) is str:
            record["reply"] = self[record["reply"]]
        return record


class FreedTexts(SharedTexts):
    """The same without holding them: for who looks at one dialog after the other and keeps none."""

    def __missing__(self, text: str) -> str:
        return text if text.isascii() else SURROGATE.sub("\ufffd", text)
