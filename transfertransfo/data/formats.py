"""The format of a dataset file, and the unchecked dialogs in it.

A file is recognised by its content, plain or compressed (.gz, .xz), in UTF-8 or, with a byte-order mark, UTF-16:

* JSON: an object with "train" and/or "valid" (or another name of these), each a list of records, or one such list.
* JSON lines: a record a line.
* CSV and TSV: a header that names fields of a record, then a record a line. Lists are written as JSON.
* Parquet and Arrow, as `datasets` writes them.
* ParlAI's text (`parlai`).

`records` says what a record may be. Texts are taken as they stand; only unpaired surrogates, which UTF-8 cannot carry,
become U+FFFD.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from transfertransfo.data.fields import plain_name
from transfertransfo.data.parlai import parlai_dialogs, parlai_fields
from transfertransfo.data.reading import MAX_FAULTS, SPLIT_NAMES, Faults, Lines, Records, SharedTexts, kind
from transfertransfo.data.records import NONE_OF, is_record
from transfertransfo.errors import UserError, first_line, require

HEAD = 4096  # bytes by which a format is recognised
CHUNK = 1 << 18  # bytes
MAX_INFLATED = 2**24  # bytes out of a compressed file, and of more than these ...
MAX_RATIO = 100  # ... at most so many for each byte of it: PersonaChat's JSON has 4 with gzip, 14 with xz
MAX_FIELD = 2**24  # characters of a CSV field: Python's limit is 2**17

BOM = b"\xef\xbb\xbf"
JSON_LINES = object()
WHATSAPP = re.compile(rb"(?:\xe2\x80\x8e)?\[?[0-9]{1,4}[./-][0-9]{1,2}[./-][0-9]{1,4},? ")  # "[31.12.20, 21:15:00]"
FORMATS = "JSON, JSON lines, ParlAI text, CSV, TSV, Parquet or Arrow, plain, .gz or .xz; see docs/data.md"
REFUSED = (  # how files begin that are no datasets
    (b"<|im_start|>", "ChatML text: write its turns as messages with role and content"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file: git lfs pull fetches it"),
    (b"<", "a page of HTML or XML: a hub's address needs /resolve/ in place of /blob/"),
    (b"BZh", "compressed by bzip2: unpack it, or compress it by gzip or xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard: unpack it, or compress it by gzip or xz"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"PK\x03\x04", "a zip archive within another file: unpack it"),
    (b"SQLite format 3", "an SQLite database: write its dialogs as JSON lines"),
    (b"%PDF", "a PDF document: write its dialogs as JSON lines"),
    (b"\xd0\xcf\x11\xe0", "a file of an old office program: save it as CSV"),
    (b"\x80\x02", "a Python pickle, which is not loaded: write its dialogs as JSON lines"),
    (b"\x80\x03", "a Python pickle, which is not loaded: write its dialogs as JSON lines"),
    (b"\x80\x04", "a Python pickle, which is not loaded: write its dialogs as JSON lines"),
    (b"\x80\x05", "a Python pickle, which is not loaded: write its dialogs as JSON lines"),
    (b"\xff\xfe\0\0", "UTF-32: write it as UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32: write it as UTF-8"),
)


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn what the system and the decompressors raise into a UserError that names the path."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged compressed file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


# What it is


class Opened:
    """A file whose format is to be told: its beginning, and what its reader needs."""

    def __init__(self, path: Path, file: BinaryIO, texts: SharedTexts, faults: Faults):
        self.path, self.file, self.texts, self.faults = path, file, texts, faults
        raw = file.read(HEAD)
        file.seek(0)
        self.magic, self.start = raw, raw.removeprefix(BOM).lstrip()

    def lines(self) -> Lines:
        return _lines(self.file)


def read_records(path: Path, split: str, file: BinaryIO, texts: SharedTexts, faults: Faults) -> dict[str, Records]:
    """The records of each split in a file of any format, opened by `open_file`; `split` is that of one that has one.

    They are read as they are iterated over; what cannot be read goes to `faults`.

    Raises:
        UserError: the whole file is none of the formats.
    """
    opened = Opened(path, file, texts, faults)
    if not opened.start:
        raise UserError(f"{path}: the file is empty")
    if WHATSAPP.match(opened.start):
        raise UserError(f"{path}: an exported chat as WhatsApp's: write its turns as messages with role and content")
    if opened.start[:1] in b"{[":
        return _json(opened, split)
    for is_it, read in READERS:
        if is_it(opened):
            return {split: read(opened)}
    for magic, name in REFUSED:
        if opened.magic.startswith(magic):
            raise UserError(f"{path}: {name}")
    if columns := _columns(opened.start):
        raise UserError(f"{path}: no dialogs of a known layout: its columns are {columns[:100]}, {NONE_OF}")
    raise UserError(f"{path}: none of the formats that are read: {FORMATS}")


def _is_numbered(opened: Opened) -> bool:
    return re.match(rb"[0-9]{1,9} ", opened.start) is not None


def _has_fields(opened: Opened) -> bool:
    return re.match(rb"(?:[a-z_]+:[^\t\n]*\t)*(?:text|labels):", opened.start) is not None


def _is_parquet(opened: Opened) -> bool:
    return opened.magic.startswith(b"PAR1")


def _is_arrow(opened: Opened) -> bool:
    return opened.magic.startswith((b"ARROW1", b"\xff\xff\xff\xff"))


def _is_csv(opened: Opened) -> bool:
    return _delimiter(opened.start) is not None


READERS: tuple[tuple[Callable[[Opened], bool], Callable[[Opened], Records]], ...] = (
    (_is_numbered, lambda opened: parlai_dialogs(opened.lines(), opened.texts, opened.faults)),
    (_has_fields, lambda opened: parlai_fields(opened.lines(), opened.texts, opened.faults)),
    (_is_parquet, lambda opened: _table(opened, _parquet_batches)),
    (_is_arrow, lambda opened: _table(opened, _arrow_batches)),
    (_is_csv, lambda opened: _csv(opened)),
)


# Files


def open_file(path: Path) -> BinaryIO:
    """Open for reading bytes, decompressed; UTF-16 and line ends by CR alone are brought to UTF-8 and LF."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a file")
    file = _inflated(path)
    start = file.read(HEAD)
    file.seek(0)
    is_utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff")) and not start.startswith(b"\xff\xfe\0\0")
    if not is_utf16 and (b"\r" not in start[:-1] or b"\n" in start or b"\0" in start):
        return file
    with file:
        content = file.read()
    if is_utf16:
        try:
            content = content.decode("utf-16").encode(errors="surrogatepass")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start + 1}: invalid UTF-16") from None
    return io.BytesIO(content if b"\n" in content else content.replace(b"\r", b"\n"))


def _inflated(path: Path) -> io.BufferedReader:
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
            line = decode(data, number)
        except ValueError as error:
            line, fault = data.decode(errors="replace"), str(error)
        line = line.removesuffix("\n").removesuffix("\r")
        if line.strip():
            yield number, line, fault


def decode(data: bytes, line: int = 1) -> str:
    """UTF-8 to text; ValueError names the place, counted from `line`."""
    if line == 1:
        data = data.removeprefix(BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        guess = _encoding(data[: error.start + 200])
        raise ValueError(f"line {line}, byte {column}: invalid UTF-8 (perhaps {guess}; write it as UTF-8)") from None


def _encoding(data: bytes) -> str:
    """The encodings that text which is no UTF-8 may have."""
    if data.count(0) > len(data) // 4:
        return "UTF-16 without its byte-order mark"
    runs = re.findall(rb"[\x80-\xff][\x40-\xff]*", data)
    is_wide = max(map(len, runs), default=0) > 3 and sum(map(len, runs)) > len(data) // 2
    return "an encoding of Chinese, Japanese or Korean, or Cyrillic's" if is_wide else "Windows-1252 or Latin-1"


# JSON


def _json(opened: Opened, split: str) -> dict[str, Records]:
    """The records of an object of splits, of a list, of lines, or of one record."""
    path, file = opened.path, opened.file
    value = _first_json(path, file, opened.texts)
    if value is JSON_LINES:
        file.seek(0)
        return {split: _json_lines(opened.lines(), opened.texts, opened.faults)}
    if is_record(value) and not splits_in(value):
        return {split: iter([("", value, True)])}
    if file.read().strip():
        raise UserError(f"{path}: line 2: more text after the end of the JSON")
    if type(value) is list:
        return {split: _in_list(value)}
    assert isinstance(value, dict)  # JSON that begins with { or [
    found = splits_in(value)
    if len({*found.values()}) < len(found):
        raise UserError(f"{path}: {' and '.join(found)}: two lists of one split")
    if left_out := [key for key in found if found[key] == "test"]:
        opened.faults.note(f"{left_out[0]}: a test split, left out")
    if not {*found.values()} - {"test"}:
        got = f"an object with {', '.join(value)[:100]}" if value else "an empty object"
        lists = [key for key, items in value.items() if type(items) is list and items and is_record(items[0])]
        got += f": rename {lists[0][:100]} to train" if len(lists) == 1 else ""
        raise UserError(f'{path}: expected a list of dialogs, or an object with "train" or "valid", got {got}')
    for key in found:
        if type(value[key]) is not list:
            raise UserError(f"{path}: {key}: expected a list of dialogs, got {kind(value[key])}")
    return {found[key]: _in_list(value[key]) for key in found if found[key] != "test"}


def _in_list(values: list) -> Records:
    return (("", record, True) for record in values)


def splits_in(value: Any) -> dict[str, str]:
    """The keys of a JSON object that name splits, and what they mean; none of an object that is a record."""
    if type(value) is not dict or value.keys() & {"utterances", "messages", "conversations"}:
        return {}
    return {key: SPLIT_NAMES[key] for key in value
            if key in ("train", "valid") or (key in SPLIT_NAMES and type(value[key]) is list)}  # fmt: skip


def load_json(text: str, texts: SharedTexts, line: int = 1) -> object:
    """Parse; ValueError names the place, counted from `line`."""
    try:
        return json.loads(text, object_hook=texts.share_, parse_constant=missing)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"line {line}: not a dataset: JSON nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"line {line}: not a dataset: {error}") from None


def missing(constant: str) -> None:
    """NaN and Infinity, which are no JSON: what Python writes for a number that is missing."""


def _first_json(path: Path, file: BinaryIO, texts: SharedTexts) -> object:
    """The value of the first line, or else of the whole file; JSON_LINES where each line is a record of its own."""
    with contextlib.suppress(ValueError):
        value = load_json(decode(file.readline()), texts)
        if type(value) is not dict or splits_in(value):
            return value
        return JSON_LINES if is_record(value) or file.readline().strip() else value
    file.seek(0)
    try:
        return load_json(decode(file.read()), texts)
    except ValueError as error:
        fault = UserError(f"{path}: {error}")
    file.seek(0)
    for line in itertools.islice(file, MAX_FAULTS):  # the first may be damaged
        with contextlib.suppress(ValueError):
            value = load_json(decode(line), texts)
            if is_record(value) and not splits_in(value):
                return JSON_LINES
    raise fault


def _json_lines(lines: Lines, texts: SharedTexts, faults: Faults) -> Records:
    for number, line, fault in lines:
        record = None
        try:
            record = None if fault else load_json(line, texts, number)
        except ValueError as error:
            fault = str(error)
        if fault:
            faults.append(fault)
        yield f" (line {number})", record, not fault


# Tables


def _header(line: str, delimiter: str) -> list[str]:
    with contextlib.suppress(csv.Error):
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return []


def _delimiter(start: bytes) -> str | None:
    """The delimiter of a CSV file's first line; None where its fields are none of a record's."""
    line = start.partition(b"\n")[0].decode(errors="replace")
    return next((mark for mark in "\t,;" if is_record(dict.fromkeys(_header(line, mark), "["))), None)


def _columns(start: bytes) -> str:
    """The columns of what looks like a table of another layout: short names, and as many fields below them."""
    first, second, *_ = [*start.decode(errors="replace").splitlines(), "", ""]
    for mark in "\t,;":
        header = _header(first, mark)
        are_names = all(re.fullmatch(r"[\w .#-]{0,40}", name) for name in header)
        if are_names and len(header) == len(_header(second, mark)) > 1:
            return ", ".join(filter(None, header))
    return ""


def _csv(opened: Opened) -> Records:
    """The rows under a header; an empty field is one that is missing, a damaged line ends the file."""
    csv.field_size_limit(MAX_FIELD)
    lines = (decode(data, number) for number, data in enumerate(opened.file, 1))
    delimiter = _delimiter(opened.start) or ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")
    line, header, longest = 1, [], 0
    try:
        header = next(reader)
        names = [plain_name(name) for name in header if name]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{opened.path}: the column {twice[0][:100]} occurs twice: rename one")
        for row in reader:
            line, place = reader.line_num, f" (line {line + 1})"
            if row:
                longest = longest or _length(row, header, opened.faults)
                fault = _fault_of_row(row, len(header), longest, delimiter)
                if fault:
                    opened.faults.append(f"line {line}: {fault}")
                yield place, {name: field or None for name, field in zip(header, row)}, not fault
    except (csv.Error, ValueError) as error:
        opened.faults.append(str(error) if type(error) is ValueError else f"line {line + 1}: no CSV: {error}")
        yield f" (line {line + 1})", None, False


def _length(first: list[str], header: list[str], faults: Faults) -> int:
    """How long rows may be: as the header, or as a first row that has more fields, empty ones without a name."""
    surplus = first[len(header) :]
    if not surplus or any(field.strip() for field in surplus):
        return len(header)
    faults.note("fields without a name at the end of rows are left out")
    return len(first)


def _fault_of_row(row: list[str], length: int, longest: int, delimiter: str) -> str:
    if not length <= len(row) <= longest:
        return f"{len(row)} fields under a header of {length}: a text with the delimiter needs quotes"
    if delimiter == "\t" and any("\t" in field and "\n" in field for field in row):
        return "a quote that swallows a tab and a line's end: double the quotes in texts, or leave them out"
    return ""


def _table(opened: Opened, batches: Callable[[Path], Iterator[Any]]) -> Records:
    """The rows of a file that pyarrow reads."""
    require(f"{opened.path}: a table of datasets", "pyarrow", requirements="data")
    if not isinstance(getattr(opened.file, "raw", None), io.FileIO):
        raise UserError(f"{opened.path}: a compressed table: unpack it, Parquet and Arrow are compressed within")
    try:
        for batch in batches(opened.path):
            for row in batch.to_pylist():
                for utterance in row["utterances"] if type(row.get("utterances")) is list else []:
                    if type(utterance) is dict:
                        opened.texts.share_(utterance)
                yield "", opened.texts.share_(row), True
    except (ValueError, OSError, KeyError, NotImplementedError) as error:  # pyarrow's own are of these kinds
        raise UserError(f"{opened.path}: pyarrow does not read it: {first_line(error)}") from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    return parquet.ParquetFile(path).iter_batches(batch_size=1000)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """The batches of a stream, as `datasets` writes them, or of a file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)
