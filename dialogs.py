"""Dataset files of texts -> checked dialogs, whatever their format.

A dialog is `{"personality": [text], "utterances": [{"candidates": [text], "history": [text]}]}`: the gold reply is the
last candidate, the distractors stand before it. `example_entry` shows one. Formats are recognised by content, plain or
compressed (.gz, .xz):

* PersonaChat JSON: an object with "train" and/or "valid", each a list of dialogs.
* JSON lines: one dialog a line. The file is one split: valid if its name starts with "valid", else train.
* ParlAI text, one split likewise: `N your persona: text` and `N text<TAB>reply[<TAB>reward[<TAB>cand|cand]]` lines. A
  number N that does not grow starts a new dialog. The history is all that was said before; an empty text adds nothing
  to it, and ParlAI's `\\n` in a text separates turns. Of several replies `a|b` the first is the gold.
  `N partner's persona: text` lines are left out: the model conditions on its own persona only.

Personality and history may be missing. An utterance may give a `reply` instead of candidates; one that has no
distractors gets some, drawn from the replies of other dialogs. Texts are taken as they stand; only unpaired surrogates,
which UTF-8 cannot carry, become U+FFFD.
"""

import contextlib
import gzip
import io
import itertools
import json
import logging
import lzma
import mmap
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cli import UserError
from distractors import add_distractors_

logger = logging.getLogger(__name__)

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
DATASET_NAME = re.compile(r"(train|valid)(?:ation)?(?![a-z]).*\.(?:txt|jsonl?)(?:\.gz|\.xz)?")
JSON_NAME = re.compile(r"[^.].*\.json(?:\.gz|\.xz)?")
# Unchecked dialogs: the place, " (line 3)" or "" in PersonaChat JSON; the dialog; whether all of it could be read
Records = Iterable[tuple[str, object, bool]]
Lines = Iterable[tuple[int, str, str]]  # number, text, and the fault of one that is no text
KINDS = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}


def dataset_files(path: Path) -> list[Path]:
    """The files that a dataset path stands for, sorted: the file itself, or a folder's choice for each split.

    A folder, or its subfolder ConvAI2, holds `train*` and `valid*` files, or a single JSON file.

    Raises:
        UserError: nothing there, or nothing that could be a dataset.
    """
    path = Path(path)
    with _one_line_errors(path):
        if path.is_file():
            return [path]
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder")
        folders = [[file for file in sorted(folder.iterdir()) if file.is_file()]
                   for folder in (path, path / "ConvAI2") if folder.is_dir()]
        for choose in (_split_files, _single_json):
            for files in folders:
                if chosen := choose(files):
                    return chosen
    raise UserError(f"{path}: no dataset in this folder: looked for train* and valid* files (.txt, .json or .jsonl,"
                    " also with .gz or .xz), there and in ConvAI2, and for a single .json file")


def read_dialogs(files: list[Path], skip_bad_dialogs: bool = False) -> dict[str, list[dict]]:
    """Read and check a dataset: {"train": [dialog], "valid": [dialog]}, only the splits that are there.

    Equal texts are one object, within and across dialogs. Utterances with fewer than two candidates get
    distractors.

    Args:
        skip_bad_dialogs: leave dialogs with a fault out, and say how many they are.

    Raises:
        UserError: a file that cannot be read, or its faults: a line each for the first ten, then their number.
    """
    splits: dict[str, list[dict]] = {}
    texts = _SharedTexts()
    for path in files:
        with _one_line_errors(path):
            found = _read_file(Path(path), texts, skip_bad_dialogs)
        for split in found:
            if split in splits:
                raise UserError(f"{path}: {split}: another file of this dataset gives this split already")
        splits.update(found)
    for dialogs in splits.values():
        add_distractors_(dialogs)
    return {split: splits[split] for split in SPLITS if split in splits}


def draw_persona(files: list[Path], skip_bad_dialogs: bool = False) -> list[str]:
    """The persona of a dialog drawn by Python's `random`, out of those that have one.

    The files are searched for personas as they stand: 130,000 dialogs need not be parsed, nor fit into memory. They are
    read as `read_dialogs` does where that finds none, or none that is a text, and where bad dialogs are to be skipped.

    Raises:
        UserError: as `read_dialogs`, or no dialog with a persona.
    """
    found = [] if skip_bad_dialogs else [match for path in files for match in _find_personas(path)]
    with contextlib.suppress(ValueError):
        if found:
            return _persona(random.choice(found))
    dialogs = itertools.chain(*read_dialogs(files, skip_bad_dialogs).values())
    if personas := [dialog["personality"] for dialog in dialogs if dialog["personality"]]:
        return random.choice(personas)
    raise UserError(f"{', '.join(map(str, files))}: no dialog with a persona")


def _find_personas(path: Path) -> list[re.Match]:
    with _one_line_errors(path), _open(path) as file:
        text = file.read() if isinstance(file.raw, _Inflated) else _map(file)
        return [match for kind in (JSON_PERSONA, PARLAI_PERSONA) for match in kind.finditer(text)]


def _persona(match: re.Match) -> list[str]:
    """The sentences of a persona that was found; ValueError where they are none."""
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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for dialog in dialogs:
                for episode in _parlai_episodes(dialog):
                    file.writelines(f"{number} {line}\n" for number, line in enumerate(episode, 1))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


# Files


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged compressed file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _split_files(files: list[Path]) -> list[Path]:
    """The preferred file of each split: with candidates, then the own persona, then the original one, then by name."""
    chosen = []
    for split in SPLITS:
        variants = [file for file in files if (match := DATASET_NAME.fullmatch(file.name)) and match[1] == split]
        if variants:
            chosen.append(min(variants, key=_preference))
        if len(variants) > 1:
            logger.info("%s: taken for %s, out of %d files", chosen[-1], split, len(variants))
    return chosen


def _preference(file: Path) -> tuple:
    parts = set(re.split("[._]", file.name))
    return "no_cands" in file.name, bool(parts & {"both", "other", "none"}), "revised" in parts, file.name


def _single_json(files: list[Path]) -> list[Path]:
    matching = [file for file in files if JSON_NAME.fullmatch(file.name)]
    return matching if len(matching) == 1 else []


class _Inflated(io.RawIOBase):
    """The content of a .gz or .xz file, up to where it is out of all proportion: a bomb of zeros would fill memory."""

    def __init__(self, path: Path, inflate: Callable[[io.FileIO], io.BufferedIOBase]):
        self._path = path
        self._packed = io.FileIO(path)
        self._file = inflate(self._packed)

    def readinto(self, buffer: Any) -> int:
        if self._file.tell() > max(MAX_INFLATED, MAX_RATIO * self._packed.tell()):
            raise UserError(f"{self._path}: more than {MAX_RATIO} times larger than the compressed file: refused;"
                            " if it is a dataset all the same, give it uncompressed")
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


def _open(path: Path) -> io.BufferedReader:
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


class _Faults(list[str]):
    """The first faults of a file, and the number of all: a file of nothing else would fill memory with them."""

    total = 0

    def append(self, fault: str) -> None:
        self.total += 1
        if self.total <= MAX_FAULTS:
            super().append(fault)


def _read_file(path: Path, texts: "_SharedTexts", skip_bad_dialogs: bool) -> dict[str, list[dict]]:
    """The checked dialogs of each split in a file."""
    faults, skipped, empty = _Faults(), 0, []
    splits: dict[str, list[dict]] = {}
    with _open(path) as file:
        for split, records in _records(path, file, texts, faults).items():
            splits[split] = []
            for number, (place, record, is_whole) in enumerate(records, 1):
                before = faults.total
                dialog = _checked_dialog(record, f"{split} dialog {number}{place}", faults) if is_whole else None
                if dialog and faults.total == before:
                    splits[split].append(dialog)
                else:
                    skipped += 1
            if not splits[split]:
                empty.append(f"{split}: no dialogs")
    if skip_bad_dialogs and empty and faults:
        empty = [f"{empty[0]} left; the first fault: {faults[0]}"]
    elif skip_bad_dialogs and faults:
        logger.warning("%s: %d bad dialogs are left out; the first fault: %s", path, skipped, faults[0])
    if lines := empty if skip_bad_dialogs else faults or empty:
        more = [f"and {faults.total - MAX_FAULTS} more"] if lines is faults and faults.total > MAX_FAULTS else []
        raise UserError("\n".join([f"{path}: {line}" for line in lines] + more))
    return splits


def _records(path: Path, file: BinaryIO, texts: "_SharedTexts", faults: _Faults) -> dict[str, Records]:
    """The unchecked dialogs of each split in a file of any format."""
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
    if value is JSON_LINES or _is_dialog(value):
        file.seek(0)
        return {split: _json_lines(_lines(file), texts, faults)}
    if not (type(value) is dict and value.keys() & set(SPLITS)):
        without = " without them" if type(value) is dict else ""
        raise UserError(f'{path}: expected an object with "train" or "valid", got {_kind(value)}{without}')
    if file.read().strip():
        raise UserError(f"{path}: line 2: more text after the end of the JSON")
    for split in SPLITS:
        if type(value.get(split, [])) is not list:
            raise UserError(f"{path}: {split}: expected a list of dialogs, got {_kind(value[split])}")
    return {split: (("", record, True) for record in value[split]) for split in SPLITS if split in value}


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


class _SharedTexts(dict[str, str]):
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


def _load_json(text: str, texts: _SharedTexts, line: int = 1) -> object:
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


def _is_dialog(value: object) -> bool:
    return type(value) is dict and not value.keys() & set(SPLITS) and bool(value.keys() & {"personality", "utterances"})


def _first_json(path: Path, file: BinaryIO, texts: _SharedTexts) -> object:
    """The value of the first line, or else of the whole file; JSON_LINES where it is neither, but of lines."""
    with contextlib.suppress(ValueError):
        return _load_json(_decode(file.readline()), texts)
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


def _json_lines(lines: Lines, texts: _SharedTexts, faults: _Faults) -> Records:
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


def _parlai_dialogs(lines: Lines, texts: _SharedTexts, faults: _Faults) -> Records:
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


def _read_parlai_line_(line: str, dialog: dict, turns: list[str], texts: _SharedTexts) -> None:
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


# The check, one for every format


def _kind(value: object) -> str:
    return KINDS.get(type(value), "a number")


def _checked_dialog(record: object, place: str, faults: _Faults) -> dict | None:
    """The dialog of a record without its unknown fields. What is wrong goes to `faults`."""
    if type(record) is not dict:
        faults.append(f"{place}: expected an object, got {_kind(record)}")
        return None
    personality, utterances = _checked_texts(record, "personality", place, faults), record.get("utterances", [])
    if type(utterances) is not list:
        faults.append(f"{place}, utterances: expected a list of objects, got {_kind(utterances)}")
        return None
    if not utterances:
        faults.append(f"{place}: no utterances")
    utterances = [
        _checked_utterance(utterance, f"{place}, utterance {number}", faults)
        for number, utterance in enumerate(utterances, 1)
    ]
    return {"personality": personality, "utterances": utterances}


def _checked_utterance(record: object, place: str, faults: _Faults) -> dict | None:
    if type(record) is not dict:
        faults.append(f"{place}: expected an object, got {_kind(record)}")
        return None
    history = _checked_texts(record, "history", place, faults)
    candidates = _checked_texts(record, "candidates", place, faults)
    reply = record.get("reply", "")
    if type(reply) is not str:
        faults.append(f"{place}, reply: expected a string, got {_kind(reply)}")
    elif candidates is not None:
        if "reply" in record:
            candidates = _gold_last(candidates, reply)
        if not candidates:
            faults.append(f"{place}: no reply")
        elif not candidates[-1].strip():
            faults.append(f"{place}: empty reply")
    return {"candidates": candidates, "history": history}


def _checked_texts(record: dict, field: str, place: str, faults: _Faults) -> list[str] | None:
    values = record.get(field, [])
    if type(values) is list and set(map(type, values)) <= {str}:
        return values
    got = _kind(values)
    if type(values) is list:
        got = next(f"{_kind(value)} in place {n}" for n, value in enumerate(values, 1) if type(value) is not str)
    faults.append(f"{place}, {field}: expected a list of strings, got {got}")
    return None


def _gold_last(candidates: list[str], reply: str) -> list[str]:
    """The reply moved, or added, to the end of the candidates."""
    if reply in candidates[-1:]:
        return candidates
    rest = candidates.copy()
    if reply in rest:
        rest.remove(reply)
    return [*rest, reply]
