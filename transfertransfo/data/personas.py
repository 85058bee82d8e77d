"""A persona out of a dataset, read as in training but never whole: 130,000 dialogs need not fit into memory."""

import codecs
import contextlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from transfertransfo.data.dialogs import checked_dialogs, read_dialogs, with_splits
from transfertransfo.data.formats import BOM, missing, one_line_errors, open_file, read_records
from transfertransfo.data.reading import SPLIT_NAMES, Faults, FreedTexts, Records, SharedTexts
from transfertransfo.data.sources import Files
from transfertransfo.errors import UserError

CHUNK = 1 << 20  # bytes
SPACE = re.compile(r"[ \t\r\n]*")
SPLITS_OR_LIST = re.compile(rb"\s*(?:\{\s*\"([a-z]+)\"\s*:\s*)?\[\s*\{")  # how JSON begins that is worth streaming


def draw_persona(files: Files | Iterable[Path], skip_bad_dialogs: bool = False) -> list[str]:
    """A persona drawn by Python's `random`, out of the dialogs that have one and no fault.

    Raises:
        UserError: as `read_dialogs`, where that leaves no dialog with a persona.
    """
    files = with_splits(files)
    drawn: list[str] = []
    with contextlib.suppress(ValueError, RecursionError):  # of JSON that the whole reader knows better
        for number, persona in enumerate(_personas(files), 1):
            if random.random() * number < 1:  # the n-th replaces the drawn one with probability 1/n
                drawn = persona
        if drawn:
            return drawn
    splits = read_dialogs(files, skip_bad_dialogs, with_distractors=False)
    dialogs = [dialog for split in splits.values() for dialog in split]
    if personas := [dialog["personality"] for dialog in dialogs if dialog["personality"]]:
        return random.choice(personas)
    raise UserError(f"{', '.join(map(str, files))}: no dialog with a persona")


def _personas(files: Files) -> Iterator[list[str]]:
    """The personas of the dialogs without a fault."""
    for path, split in files.items():
        texts, faults = FreedTexts(), Faults()
        with one_line_errors(path), open_file(path) as file:
            for name, records in _streamed(path, split, file, texts, faults):
                if name == "test":
                    raise ValueError("no split to draw from")
                for dialogs in checked_dialogs(path, name, records, texts, faults):
                    yield from (dialog["personality"] for dialog in dialogs if dialog["personality"])


def _streamed(
    path: Path, split: str, file: BinaryIO, texts: SharedTexts, faults: Faults
) -> Iterable[tuple[str, Records]]:
    """As `formats.read_records`, but a large list of JSON dialog by dialog."""
    start = SPLITS_OR_LIST.match(file.read(256).removeprefix(BOM))
    file.seek(0)
    if not start or (start[1] and SPLIT_NAMES.get(start[1].decode()) is None):
        return read_records(path, split, file, texts, faults).items()
    return _json_lists(_JsonText(file), split, texts)


def _json_lists(text: "_JsonText", split: str, texts: SharedTexts) -> Iterator[tuple[str, Records]]:
    """The lists of an object of splits, or the one list that is all. ValueError where it is anything else."""
    if text.peek() == "[":
        yield split, text.items(texts)
        return text.end()
    text.take("{")
    seen: set[str] = set()
    while not seen or text.peek() == ",":
        if seen:
            text.take(",")
        key = text.value(texts)
        text.take(":")
        name = SPLIT_NAMES.get(key) if type(key) is str else None
        if not isinstance(key, str) or key in seen or (name and (name in seen or text.peek() != "[")):
            raise ValueError("not the layout of PersonaChat")
        seen |= {key, name or key}
        if name and name != "test":
            yield name, text.items(texts)
        else:
            text.value(texts)
    text.take("}")
    text.end()


class _JsonText:
    """JSON of which as much is held as the value that is being read."""

    def __init__(self, file: BinaryIO):
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._is_whole = "", 0, False

    def _read_on(self) -> None:
        self._text, self._at = self._text[self._at :], 0
        data = self._file.read(max(CHUNK, len(self._text)))
        self._is_whole = not data
        self._text += self._decoder.decode(data, final=not data)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing too
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"expected {character}")
        self._at += 1

    def value(self, texts: SharedTexts) -> object:
        """The next value."""
        self.peek()
        decoder = json.JSONDecoder(object_hook=texts.share_, parse_constant=missing)
        while True:
            with contextlib.suppress(json.JSONDecodeError):
                value, end = decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_whole:  # else it may be the beginning of a number
                    self._at = end
                    return value
            if self._is_whole:
                raise ValueError("no JSON")
            self._read_on()

    def items(self, texts: SharedTexts) -> Records:
        """The items of a list, one by one."""
        self.take("[")
        more = self.peek() != "]"
        while more:
            yield "", self.value(texts), True
            more = self.peek() == ","
            if more:
                self.take(",")
        self.take("]")

    def end(self) -> None:
        if self.peek():
            raise ValueError("more text after the end")
