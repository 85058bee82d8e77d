"""Dataset files of texts -> checked dialogs, whatever their format (modules `formats` and `records`).

A dialog is `{"personality": [text], "utterances": [{"candidates": [text], "history": [text]}]}`: the gold reply is the
last candidate, the distractors stand before it. `example_entry` shows one. Personality and history may be missing. An
utterance may give a `reply` instead of candidates; one that has no distractors gets some, drawn from the replies of
other dialogs.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from transfertransfo.data.distractors import add_distractors_
from transfertransfo.data.formats import one_line_errors, open_file, read_records
from transfertransfo.data.reading import MAX_FAULTS, SPLITS, Faults, Records, SharedTexts, kind
from transfertransfo.data.records import AnotherFormat, dialogs_of, shared
from transfertransfo.data.rows import grouped
from transfertransfo.data.sources import Files, split_of
from transfertransfo.errors import UserError

logger = logging.getLogger(__name__)


def read_dialogs(
    files: Files | Iterable[Path], skip_bad_dialogs: bool = False, with_distractors: bool = True
) -> dict[str, list[dict]]:
    """Read and check a dataset: {"train": [dialog], "valid": [dialog]}, only the splits that are there.

    Equal texts are one object, within and across dialogs.

    Args:
        files: as `sources.dataset_files` gives them, or files whose names say their splits.
        skip_bad_dialogs: leave dialogs with a fault out, and say how many they are.
        with_distractors: give distractors to utterances with fewer than two candidates.

    Raises:
        UserError: a file that cannot be read, or its faults: a line each for the first ten, then their number.
    """
    splits: dict[str, list[dict]] = {}
    texts = SharedTexts()
    for path, split in with_splits(files).items():
        with one_line_errors(path):
            found = _read_file(path, split, texts, skip_bad_dialogs)
        for name, dialogs in found.items():
            if name in splits and (len(found) > 1 or name != split):
                raise UserError(f"{path}: {name}: another file of this dataset gives this split already")
            splits.setdefault(name, []).extend(dialogs)
    for dialogs in splits.values() if with_distractors else ():
        add_distractors_(dialogs)
    return {split: splits[split] for split in SPLITS if split in splits}


def with_splits(files: Files | Iterable[Path]) -> Files:
    """The files with their splits, which their names say where nothing else has."""
    return files if isinstance(files, dict) else {Path(path): split_of(Path(path).name) or "train" for path in files}


def warn_of_overlap(splits: dict[str, list[dict]]) -> None:
    """Say how many dialogs of valid stand in train too: the validation then measures what was learnt by heart."""
    valid = [_key(dialog) for dialog in splits.get("valid", ())]
    train = {_key(dialog) for dialog in splits.get("train", ()) if valid}
    if both := sum(key in train for key in valid):
        logger.warning("%d of %d valid dialogs stand in train too", both, len(valid))


def _key(dialog: dict) -> int:
    """A hash of a dialog's persona, histories and right replies. Its texts have theirs already."""
    utterances = [(*utterance["history"], utterance["candidates"][-1]) for utterance in dialog["utterances"]]
    return hash((*dialog["personality"], *utterances))


def _read_file(path: Path, split: str, texts: SharedTexts, skip_bad_dialogs: bool) -> dict[str, list[dict]]:
    """The checked dialogs of each split in a file."""
    faults, skipped, empty = Faults(), 0, []
    splits: dict[str, list[dict]] = {}
    with open_file(path) as file:
        for name, records in read_records(path, split, file, texts, faults).items():
            if name == "test":
                raise UserError(
                    f"{path}: a test split, by its name, which is left out: rename the file to train or valid"
                )
            splits[name] = []
            for dialogs in checked_dialogs(path, name, records, texts, faults):
                splits[name] += dialogs
                skipped += not dialogs
            if not splits[name]:
                empty.append(f"{name}: no dialogs")
    if skip_bad_dialogs and empty and faults:
        empty = [f"{empty[0]} left; the first fault: {faults[0]}"]
    elif skip_bad_dialogs and faults:
        logger.warning("%s: %d bad dialogs are left out; the first fault: %s", path, skipped, faults[0])
    if lines := empty if skip_bad_dialogs else faults or empty:
        more = [f"and {faults.total - MAX_FAULTS} more"] if lines is faults and faults.total > MAX_FAULTS else []
        raise UserError("\n".join([f"{path}: {line}" for line in lines] + more))
    _tell(path, splits, faults)
    return splits


def _tell(path: Path, splits: dict[str, list[dict]], faults: Faults) -> None:
    """Say what a reader must know of how a file was understood."""
    for note in faults.notes:
        logger.warning("%s: %s", path, note)
    dialogs = [dialog for split in splits.values() for dialog in split]
    missing = ["persona"] if not any(dialog["personality"] for dialog in dialogs) else []
    if not any(utterance["history"] for dialog in dialogs for utterance in dialog["utterances"]):
        missing.append("history")
    if missing and faults.unread:
        fields = ", ".join(faults.unread)[:200]
        logger.warning("%s: no dialog has a %s; nothing is read from: %s", path, " or a ".join(missing), fields)
    if len(splits) == 1 and "valid" in splits:
        logger.info("%s: read as valid", path)


def checked_dialogs(
    path: Path, split: str, records: Records, texts: SharedTexts, faults: Faults
) -> Iterator[list[dict]]:
    """The checked dialogs of each record; none of a record that has a fault, which goes to `faults`.

    Raises:
        UserError: the records are none of dialogs.
    """
    for number, (record_place, record, is_whole) in enumerate(grouped(records, faults), 1):
        before, place = faults.total, f"{split} dialog {number}{record_place}"
        try:
            found = dialogs_of(record, place, faults, number == 1) if is_whole else []
        except AnotherFormat as error:
            raise UserError(f"{path}: {error}") from None
        dialogs = [_checked_dialog(dialog, place, faults) for dialog in found]
        if faults.total > before:
            yield []
        else:  # JSON's texts are shared while it is parsed
            yield [dialog if raw is record else shared(dialog, texts) for dialog, raw in zip(dialogs, found) if dialog]


# The check, one for every format


def _checked_dialog(record: object, place: str, faults: Faults) -> dict | None:
    """The dialog of a record without its unknown fields. What is wrong goes to `faults`."""
    if type(record) is not dict:
        faults.append(f"{place}: expected an object, got {kind(record)}")
        return None
    personality, utterances = _checked_texts(record, "personality", place, faults), record.get("utterances")
    utterances = [] if utterances is None else utterances
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
    reply = record.get("reply")
    if reply is not None and type(reply) is not str:
        faults.append(f"{place}, reply: expected a string, got {kind(reply)}")
    elif candidates is not None:
        if reply is not None:
            candidates = _gold_last(candidates, reply)
        if not candidates:
            faults.append(f"{place}: no reply")
        elif not candidates[-1].strip():
            faults.append(f"{place}: empty reply")
    return {"candidates": candidates, "history": history}


def _checked_texts(record: dict, field: str, place: str, faults: Faults) -> list[str] | None:
    values = record.get(field)
    if values is None:  # as `datasets` writes a missing field
        return []
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
