"""Dataset files of texts -> checked dialogs, whatever their format (module `formats`).

A dialog is `{"personality": [text], "utterances": [{"candidates": [text], "history": [text]}]}`: the gold reply is the
last candidate, the distractors stand before it. `example_entry` shows one. Personality and history may be missing. An
utterance may give a `reply` instead of candidates; one that has no distractors gets some, drawn from the replies of
other dialogs.
"""

import contextlib
import itertools
import logging
import random
import re
from pathlib import Path

from transfertransfo.data.distractors import add_distractors_
from transfertransfo.data.formats import (
    MAX_FAULTS,
    SPLITS,
    Faults,
    SharedTexts,
    find_personas,
    kind,
    one_line_errors,
    open_file,
    persona_of,
    read_records,
)
from transfertransfo.errors import UserError

logger = logging.getLogger(__name__)

DATASET_NAME = re.compile(r"(train|valid)(?:ation)?(?![a-z]).*\.(?:txt|jsonl?)(?:\.gz|\.xz)?")
JSON_NAME = re.compile(r"[^.].*\.json(?:\.gz|\.xz)?")


def dataset_files(path: Path) -> list[Path]:
    """The files that a dataset path stands for, sorted: the file itself, or a folder's choice for each split.

    A folder, or its subfolder ConvAI2, holds `train*` and `valid*` files, or a single JSON file.

    Raises:
        UserError: nothing there, or nothing that could be a dataset.
    """
    path = Path(path)
    with one_line_errors(path):
        if path.is_file():
            return [path]
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder")
        folders = [
            [file for file in sorted(folder.iterdir()) if file.is_file()]
            for folder in (path, path / "ConvAI2")
            if folder.is_dir()
        ]
        for choose in (_split_files, _single_json):
            for files in folders:
                if chosen := choose(files):
                    return chosen
    raise UserError(
        f"{path}: no dataset in this folder: looked for train* and valid* files (.txt, .json or .jsonl,"
        " also with .gz or .xz), there and in ConvAI2, and for a single .json file"
    )


def read_dialogs(
    files: list[Path], skip_bad_dialogs: bool = False, with_distractors: bool = True
) -> dict[str, list[dict]]:
    """Read and check a dataset: {"train": [dialog], "valid": [dialog]}, only the splits that are there.

    Equal texts are one object, within and across dialogs.

    Args:
        skip_bad_dialogs: leave dialogs with a fault out, and say how many they are.
        with_distractors: give distractors to utterances with fewer than two candidates.

    Raises:
        UserError: a file that cannot be read, or its faults: a line each for the first ten, then their number.
    """
    splits: dict[str, list[dict]] = {}
    texts = SharedTexts()
    for path in files:
        with one_line_errors(path):
            found = _read_file(Path(path), texts, skip_bad_dialogs)
        for split in found:
            if split in splits:
                raise UserError(f"{path}: {split}: another file of this dataset gives this split already")
        splits.update(found)
    for dialogs in splits.values() if with_distractors else ():
        add_distractors_(dialogs)
    return {split: splits[split] for split in SPLITS if split in splits}


def draw_persona(files: list[Path], skip_bad_dialogs: bool = False) -> list[str]:
    """The persona of a dialog drawn by Python's `random`, out of those that have one.

    The files are searched for personas as they stand: 130,000 dialogs need not be parsed, nor fit into memory. They are
    read as `read_dialogs` does where that finds none, or none that is a text, and where bad dialogs are to be skipped.

    Raises:
        UserError: as `read_dialogs`, or no dialog with a persona.
    """
    found = [] if skip_bad_dialogs else [match for path in files for match in find_personas(path)]
    with contextlib.suppress(ValueError):
        if found:
            return persona_of(random.choice(found))
    dialogs = itertools.chain(*read_dialogs(files, skip_bad_dialogs).values())
    if personas := [dialog["personality"] for dialog in dialogs if dialog["personality"]]:
        return random.choice(personas)
    raise UserError(f"{', '.join(map(str, files))}: no dialog with a persona")


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


def _read_file(path: Path, texts: SharedTexts, skip_bad_dialogs: bool) -> dict[str, list[dict]]:
    """The checked dialogs of each split in a file."""
    faults, skipped, empty = Faults(), 0, []
    splits: dict[str, list[dict]] = {}
    with open_file(path) as file:
        for split, records in read_records(path, file, texts, faults).items():
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


# The check, one for every format


def _checked_dialog(record: object, place: str, faults: Faults) -> dict | None:
    """The dialog of a record without its unknown fields. What is wrong goes to `faults`."""
    if type(record) is not dict:
        faults.append(f"{place}: expected an object, got {kind(record)}")
        return None
    personality, utterances = _checked_texts(record, "personality", place, faults), record.get("utterances", [])
    if type(utterances) is not list:
        faults.append(f"{place}, utterances: expected a list of objects, got {kind(utterances)}")
        return None
    if not utterances:
        faults.append(f"{place}: no utterances")
    utterances = [
        _checked_utterance(utterance, f"{place}, utterance {number}", faults)
        for number, utterance in enumerate(utterances, 1)
    ]
    return {"personality": personality, "utterances": utterances}


def _checked_utterance(record: object, place: str, faults: Faults) -> dict | None:
    if type(record) is not dict:
        faults.append(f"{place}: expected an object, got {kind(record)}")
        return None
    history = _checked_texts(record, "history", place, faults)
    candidates = _checked_texts(record, "candidates", place, faults)
    reply = record.get("reply", "")
    if type(reply) is not str:
        faults.append(f"{place}, reply: expected a string, got {kind(reply)}")
    elif candidates is not None:
        if "reply" in record:
            candidates = _gold_last(candidates, reply)
        if not candidates:
            faults.append(f"{place}: no reply")
        elif not candidates[-1].strip():
            faults.append(f"{place}: empty reply")
    return {"candidates": candidates, "history": history}


def _checked_texts(record: dict, field: str, place: str, faults: Faults) -> list[str] | None:
    values = record.get(field, [])
    if type(values) is list and set(map(type, values)) <= {str}:
        return values
    got = kind(values)
    if type(values) is list:
        got = next(f"{kind(value)} in place {n}" for n, value in enumerate(values, 1) if type(value) is not str)
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
