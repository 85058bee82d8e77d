"""The formats of dataset files: a file -> the unchecked dialogs of each split, dialogs -> ParlAI text.

Formats are recognised by content, plain or compressed (.gz, .xz):

* PersonaChat JSON: an object with "train" and/or "valid", each a list of dialogs.
* JSON lines: one dialog a line. The file is one split: valid if its name starts with "valid", else train.
* ParlAI text, one split likewise: `N your persona: text` and `N text<TAB>reply[<TAB>reward[<TAB>cand|cand]]` lines. A
  number N that does not grow starts a new dialog. The history is all that was said before; an empty text adds nothing
  to it, and ParlAI's `\\n` in a text separates turns. Of several replies `a|b` the first is the gold.
  `N partner's persona: text` lines are left out: the model conditions on its own persona only.

Texts are taken as they stand; only unpaired surrogates, which UTF-8 cannot carry, become U+FFFD.
"""

import contextlib
import gzip
import io
import itertools
import json
import lzma
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from transfertransfo.errors import UserError
from transfertransfo.files import open_atomically

SPLITS = ("train", "valid")
MAX_FAULTS = 10  # listed in one message
CHUNK = 1 << 18  # bytes
MAX_INFLATED = 2**24  # bytes out of a compressed file, and of more than these ...
MAX_RATIO = 100  # ... at most so many for each byte of it: PersonaChat's JSON has 4 with gzip, 14 with xz
MAX_TURNS = 1000  # of a ParlAI dialog. Its histories grow with the square: a file numbered throughout would fill memory
TOO_LONG = f"a dialog of more than {MAX_TURNS} turns: each dialog must number its lines from 1"

BOM = b"\xef\xbb\xbf"
SURROGATE = re.compile("[\ud800-\udfff]")
PARLAI_LINE = re.compile(r"([0-9]{1,9}) (.*)", re.DOTALL)
OWN_PERSONA, PARTNER_PERSONA = "your persona:", "partner's persona:"
PARLAI_PERSONA = re.compile(rb"^[0-9]{1,9} your persona:.*(?:\n[0-9]{1,9} your persona:.*)*", re.MULTILINE)
JSON_LINES = object()
JSON_TEXT = rb'"(?:[^"\\]|\\.)*"'
JSON_PERSONA = re.compile(rb'"personality"\s*:\s*(\[\s*' + JSON_TEXT + rb"(?:\s*,\s*" + JSON_TEXT + rb")*\s*\])")
# Unchecked dialogs: the place, " (line 3)" or "" in PersonaChat JSON; the dialog; whether all of it could be read
Records = Iterable[tuple[str, object, bool]]
Lines = Iterable[tuple[int, str, str]]  # number, text, and the fault of one that is no text
KINDS = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn what the system and the decompressors raise into a UserError that names the path."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged compressed file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


class Faults(list[str]):
    """The first faults of a file, and the number of all: a file of nothing else would fill memory with them."""

    total = 0

    def append(self, fault: str) -> None:
        self.total += 1
        if self.total <= MAX_FAULTS:
            super().append(fault)


def read_records(path: Path, file: BinaryIO, texts: "SharedTexts", faults: Faults) -> dict[str, Records]:
    """The unchecked dialogs of each split in a file of any format, opened by `open_file`.

    They are read as they are iterated over; what is no JSON and no ParlAI text goes to `faults`.

    Raises:
        UserError: the whole file is none of the formats.
    """
    split = "valid" if path.name.startswith("valid") else "train"
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    if not start:
        raise UserError(f"{path}: the file is empty")
    if re.match(rb"[0-9]{1,9} ", start):
        return {split: _parlai_dialogs(_lines(file), texts, faults)}
    if start[:1] not in b"{[":
        raise UserError(f"{path}: neither JSON nor JSON lines nor ParlAI text (plain, .gz or .xz)")
    value = _first_json(path, file, texts)
    if value is JSON_LINES:
        file.seek(0)
        return {split: _json_lines(_lines(file), texts, faults)}
    if _is_dialog(value):
        return {split: iter([("", value, True)])}
    if not (type(value) is dict and value.keys() & set(SPLITS)):
        without = " without them" if type(value) is dict else ""
        raise UserError(f'{path}: expected an object with "train" or "valid", got {kind(value)}{without}')
    if file.read().strip():
        raise UserError(f"{path}: line 2: more text after the end of the JSON")
    for split in SPLITS:
        if type(value.get(split, [])) is not list:
            raise UserError(f"{path}: {split}: expected a list of dialogs, got {kind(value[split])}")
    return {split: (("", record, True) for record in value[split]) for split in SPLITS if split in value}


def _is_dialog(value: object) -> bool:
    return type(value) is dict and not value.keys() & set(SPLITS) and bool(value.keys() & {"personality", "utterances"})


def kind(value: object) -> str:
    """What a JSON value is, as messages call it."""
    return KINDS.get(type(value), "a number")


def find_personas(path: Path) -> list[re.Match]:
    """What looks like a persona in a file of any format, searched as it stands."""
    with one_line_errors(path), open_file(path) as file:
        text = file.read() if isinstance(file.raw, _Inflated) else _map(file)
        return [match for kind in (JSON_PERSONA, PARLAI_PERSONA) for match in kind.finditer(text)]


def persona_of(match: re.Match) -> list[str]:
    """The sentences of what `find_personas` has found; ValueError where they are none."""
    if match.re is JSON_PERSONA:
        sentences = json.loads(match[1])
    else:
        sentences = [line.partition(b":")[2].decode().strip() for line in match[0].split(b"\n")]
    return [SURROGATE.sub("\ufffd", sentence) for sentence in sentences]


def _map(file: BinaryIO) -> mmap.mmap | bytes:
    """A file's content, brought into memory as it is looked at; an empty file has no such map."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def write_parlai(dialogs: list[dict], path: Path) -> None:
    """Write one split as ParlAI text with candidates, a line an utterance; `read_dialogs` gives the same dialogs back.

    An utterance whose history does not go on from the one before starts a new dialog there. What the format cannot
    carry (a tab, a line's end, `\\n`, and `|` in a reply) becomes a space.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with open_atomically(Path(path)) as file:
            for dialog in dialogs:
                for episode in _parlai_episodes(dialog):
                    file.writelines(f"{number} {line}\n".encode() for number, line in enumerate(episode, 1))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


# Files


def open_file(path: Path) -> io.BufferedReader:
    """Open for reading bytes, decompressed."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a file")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return io.BufferedReader(_Inflated(path, lambda packed: gzip.GzipFile(fileobj=packed)), CHUNK)
    if magic == b"\xfd7zXZ\0":
        return io.BufferedReader(_Inflated(path, lzma.LZMAFile), CHUNK)
    return open(path, "rb")


class _Inflated(io.RawIOBase):
    """The content of a .gz or .xz file, up to where it is out of all proportion: a bomb of zeros would fill memory."""

    def __init__(self, path: Path, inflate: Callable[[io.FileIO], io.BufferedIOBase]):
        self._path = path
        self._packed = io.FileIO(path)
        self._file = inflate(self._packed)

    def readinto(self, buffer: Any) -> int:
        if self._file.tell() > max(MAX_INFLATED, MAX_RATIO * self._packed.tell()):
            raise UserError(
                f"{self._path}: more than {MAX_RATIO} times larger than the compressed file: refused;"
                " if it is a dataset all the same, give it uncompressed"
            )
        return self._file.readinto(buffer)

    def seek(self, *place: int) -> int:
        return self._file.seek(*place)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()


def _lines(file: BinaryIO) -> Lines:
    """The lines that are not blank. "\\n" alone ends a line; str.splitlines knows other ends."""
    for number, data in enumerate(file, 1):
        fault = ""
        try:
            line = _decode(data, number)
        except ValueError as error:
            line, fault = data.decode(errors="replace"), str(error)
        line = line.removesuffix("\n").removesuffix("\r")
        if line.strip():
            yield number, line, fault


def _decode(data: bytes, line: int = 1) -> str:
    """UTF-8 to text; ValueError names the place, counted from `line`."""
    if line == 1:
        data = data.removeprefix(BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(f"line {line}, byte {column}: invalid UTF-8") from None


# JSON


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


def _load_json(text: str, texts: SharedTexts, line: int = 1) -> object:
    """Parse; ValueError names the place, counted from `line`."""
    try:
        return json.loads(text, object_hook=texts.share_)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"line {line}: not a dataset: JSON nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"line {line}: not a dataset: {error}") from None


def _first_json(path: Path, file: BinaryIO, texts: SharedTexts) -> object:
    """The value of the first line, or else of the whole file; JSON_LINES where each line is a dialog of its own."""
    with contextlib.suppress(ValueError):
        value = _load_json(_decode(file.readline()), texts)
        return JSON_LINES if _is_dialog(value) else value
    file.seek(0)
    try:
        return _load_json(_decode(file.read()), texts)
    except ValueError as error:
        fault = UserError(f"{path}: {error}")
    file.seek(0)
    for line in itertools.islice(file, MAX_FAULTS):  # the first may be damaged
        with contextlib.suppress(ValueError):
            if _is_dialog(_load_json(_decode(line), texts)):
                return JSON_LINES
    raise fault


def _json_lines(lines: Lines, texts: SharedTexts, faults: Faults) -> Records:
    for number, line, fault in lines:
        record = None
        try:
            record = None if fault else _load_json(line, texts, number)
        except ValueError as error:
            fault = str(error)
        if fault:
            faults.append(fault)
        yield f" (line {number})", record, not fault


# ParlAI text


def _parlai_dialogs(lines: Lines, texts: SharedTexts, faults: Faults) -> Records:
    place, is_whole, previous = "", True, float("inf")
    dialog: dict = {}
    turns: list[str] = []
    for line_number, line, fault in lines:
        match = PARLAI_LINE.fullmatch(line)
        if match and int(match[1]) <= previous:
            if dialog:
                yield place, dialog, is_whole
            place, dialog, turns = f" (line {line_number})", {"personality": [], "utterances": []}, []
            is_whole = True
        if not match:
            fault = fault or f"line {line_number}: expected a number, a space and a text"
        elif len(turns) <= MAX_TURNS:  # else that has been said already
            _read_parlai_line_(match[2], dialog, turns, texts)
            if len(turns) > MAX_TURNS:
                fault = f"line {line_number}: {TOO_LONG}"
        previous = int(match[1]) if match else previous
        if fault:
            faults.append(fault)
            is_whole = False
    if dialog:
        yield place, dialog, is_whole


def _read_parlai_line_(line: str, dialog: dict, turns: list[str], texts: SharedTexts) -> None:
    """Add a line, its number cut off, to the dialog; `turns` is all that was said in it so far."""
    text, *fields = line.split("\t")
    if not fields and text.startswith(OWN_PERSONA):
        dialog["personality"].append(texts[text.removeprefix(OWN_PERSONA).removeprefix(" ")])
    elif fields or not text.startswith(PARTNER_PERSONA):
        if text:
            turns.extend(texts[turn] for turn in text.split("\\n"))
        utterance: dict = {"history": turns.copy()}
        if fields:
            utterance["reply"] = texts[fields[0].split("|")[0]]
            turns.append(utterance["reply"])
        if len(fields) > 2 and fields[2]:
            utterance["candidates"] = [texts[candidate] for candidate in fields[2].split("|")]
        dialog["utterances"].append(utterance)


def _parlai_episodes(dialog: dict) -> Iterator[list[str]]:
    """The lines, not yet numbered, of a dialog: one list where each history goes on from the one before."""
    persona = [f"{OWN_PERSONA} {_parlai_text(text)}" for text in dialog["personality"]]
    episode: list[str] = []
    turns: list[str] = []
    for utterance in dialog["utterances"]:
        history, candidates = utterance["history"], [_parlai_text(text, "|") for text in utterance["candidates"]]
        if episode and history[: len(turns)] != turns:
            yield episode
            episode, turns = [], []
        text = "\\n".join(_parlai_text(turn) for turn in history[len(turns) :])
        episode = (episode or persona) + [f"{text}\t{candidates[-1]}\t\t{'|'.join(candidates)}"]
        turns = [*history, utterance["candidates"][-1]]
    yield episode


def _parlai_text(text: str, separators: str = "") -> str:
    return re.sub(rf"\\n|[\t\r\n{separators}]", " ", text)
