"""A `dataset_path` -> the files of a dataset, each with its split.

The split of a file is said by its name (`valid.jsonl`, `my-data_dev.csv`), else by its folder's (`validation/`), else
it is train. Files of a folder are the parts of one split where their names differ in numbers alone; ConvAI2's variants
of a split are alternatives.
"""

import bz2
import json
import logging
import re
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from transfertransfo.data.formats import one_line_errors, open_file
from transfertransfo.data.reading import SPLIT_NAMES, SPLITS
from transfertransfo.download import cache_folder, extract, is_url
from transfertransfo.errors import UserError, first_line, require

logger = logging.getLogger(__name__)

HUB = "hf:"
TABLES = r"\.(?:jsonl?|ndjson|csv|tsv|parquet|arrow)(?:\.gz|\.xz)?"
DATASET_NAME = re.compile(rf"[^.].*(?:{TABLES}|\.txt(?:\.gz|\.xz)?)", re.IGNORECASE)
TABLE_NAME = re.compile(rf"[^.].*{TABLES}", re.IGNORECASE)
NO_DATASET = re.compile(
    r"(?:.*[-_.])?(?:args|config|state|infos?|dict|results|metrics|report|index|map)\.json|cache-.*\.arrow", re.I
)
SIDES = ("self", "both", "none", "other")  # ConvAI2's, of whose personas: the first is preferred
Files = dict[Path, str]  # each with its split, "test" included


def split_of(name: str) -> str | None:
    """The split that a file's name says: by its first word, else its last, else one between them."""
    words = re.findall("[a-z]+", name.lower())
    for word in [*words[:1], *reversed(words)]:
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def split_of_url(url: str) -> str | None:
    """The split that the last part of an address says, or the one before it."""
    parts = unquote(urlsplit(url).path).rstrip("/").split("/")
    return split_of(parts[-1]) or SPLIT_NAMES.get(parts[-2].lower() if len(parts) > 1 else "")


def dataset_files(path: Path) -> Files:
    """The files that a dataset path stands for: the file itself, or those of a folder or an archive.

    A folder, its subfolder ConvAI2 or data, or its only subfolder holds files whose names, or whose folders' names, say
    the split, or else one table.

    Raises:
        UserError: nothing there, or nothing that could be a dataset, or several that could.
    """
    path = Path(path)
    with one_line_errors(path):
        if path.is_file():
            return _archived(path) if is_archive(path) else {path: _split_of_file(path) or "train"}
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder")
        folders = [folder for folder in (path, path / "ConvAI2", path / "data") if folder.is_dir()]
        inner = [
            folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith((".", "__MACOSX"))
        ]
        folders += [folder for folder in inner if len(inner) == 1 and folder not in folders]
        for choose in (_split_files, _single_table):
            for folder in folders:
                if chosen := choose(folder):
                    return chosen
    raise UserError(
        f"{path}: no dataset in this folder: looked for train* and valid* files (.txt, .json, .jsonl, .csv, .tsv,"
        " .parquet or .arrow, also with .gz or .xz), there, in train and validation, in data and in ConvAI2, and for a"
        " single one of another name"
    )


def _split_of_file(path: Path) -> str | None:
    """The split of a file that is given alone: of a part that is but numbered, what its folder says."""
    is_part = re.fullmatch(r"(?:data-|part-)?\d+(?:-of-\d+)?", _stem(path))
    inside = (SPLIT_NAMES.get(path.absolute().parent.name.lower()) or _saved_split(path.parent)) if is_part else None
    return split_of(path.name) or inside


def _split_files(folder: Path) -> Files:
    """The files of each split; test's are left out."""
    found: dict[str, list[Path]] = {}
    inner = [(file, SPLIT_NAMES.get(file.parent.name.lower())) for file in sorted(folder.glob("*/*"))]
    for file, split in [*((file, split_of(file.name)) for file in sorted(folder.iterdir())), *inner]:
        if split and _may_be_data(file) and DATASET_NAME.fullmatch(file.name):
            found.setdefault(split, []).append(file)
    if left_out := found.pop("test", []):
        logger.info("%s: a test split, left out", ", ".join(file.name for file in left_out))
    return {file: split for split in SPLITS if split in found for file in _parts(split, found[split])}


def _may_be_data(file: Path) -> bool:
    return file.is_file() and not NO_DATASET.fullmatch(file.name)


def _single_table(folder: Path) -> Files:
    """The files of the only split of a folder where no name says one: the parts of one table."""
    tables = [file for file in sorted(folder.iterdir()) if _may_be_data(file) and TABLE_NAME.fullmatch(file.name)]
    if not tables or len({*map(_pattern, tables)}) > 1:
        return {}
    return dict.fromkeys(_parts("train", tables), _saved_split(folder) or "train")


def _saved_split(folder: Path) -> str | None:
    """The split that `datasets` notes in a folder of its `save_to_disk`."""
    try:
        return SPLIT_NAMES.get(str(json.loads((folder / "state.json").read_bytes())["_split"]).lower())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parts(split: str, files: list[Path]) -> list[Path]:
    """The preferred file of a split with all its parts: with candidates, the own persona, the original one."""
    best = min(map(_preference, files))
    chosen = [file for file in files if _preference(file) == best]
    same_data: dict[tuple, Path] = {}
    for file in chosen:  # under several suffixes: the first by name
        same_data.setdefault((file.parent, _stem(file)), file)
    chosen = [*same_data.values()]
    if len({(file.parent, _pattern(file)) for file in chosen}) > 1:
        names = ", ".join(f"{file.parent.name}/{file.name}" for file in chosen[:4])
        raise UserError(
            f"{chosen[0].parent}: {len(chosen)} files for {split}, whose names do not say whether they are parts of one"
            f" dataset ({names}): give one of them, or number the parts ({split}_1, {split}_2)"
        )
    if len(chosen) > 1:
        logger.info("%s to %s: %d files are read as parts of %s", chosen[0], chosen[-1].name, len(chosen), split)
        whole = re.search(r"-of-0*(\d{1,9})\b", chosen[0].name)
        if whole and int(whole[1]) != len(chosen):
            logger.warning("%s: %d of %s parts of %s are there", chosen[0].parent, len(chosen), whole[1], split)
    elif len(files) > 1:
        logger.info("%s: taken for %s, out of %d files", chosen[0], split, len(files))
    return chosen


def _preference(file: Path) -> tuple:
    words = re.split("[._]", file.name)
    side = next((place for place, name in enumerate(SIDES) if name in words), 0)
    return "no_cands" in file.name, side > 0, "revised" in words, side


def _stem(file: Path) -> str:
    return re.sub(rf"(?:{TABLES}|\.txt(?:\.gz|\.xz)?)$", "", file.name, flags=re.IGNORECASE)


def _pattern(file: Path) -> str:
    """A name without its numbers and without the hash behind those of the hub's shards.

    Some numbers tell variants apart, and stay: of versions, as train_v1 and train_v2, and of folds, which overlap.
    """
    name = re.sub(r"(-of-\d+)-[0-9a-f]{16}$", r"\1", _stem(file))
    numbers = re.compile(r"((?:fold|cv|split)[-_ ]?|v)?\d+", re.IGNORECASE)
    return numbers.sub(lambda match: match[0] if match[1] else "#", name)


# Archives


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or tar archive, the latter maybe compressed."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"PK\x03\x04":
        return True
    if magic.startswith(b"BZh"):
        try:
            with bz2.open(path) as file:
                return file.read(512)[257:262] == b"ustar"
        except (OSError, EOFError, ValueError):
            return False
    with one_line_errors(path), open_file(path) as opened:
        return opened.read(512)[257:262] == b"ustar"


def _archived(archive: Path) -> Files:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
        if "[Content_Types].xml" in names:
            raise UserError(f"{archive}: a spreadsheet or document of an office program: save it as CSV")
        if any(name.endswith((".pkl", ".npy")) for name in names):
            raise UserError(f"{archive}: a file of PyTorch or NumPy: write its dialogs as JSON lines")
    folder = extract(archive, cache_folder())
    try:
        return dataset_files(folder)
    except UserError as error:
        raise UserError(f"{archive}: an archive of no single dataset: {error}") from None


# The hub


def hub_files(name: str) -> Files:
    """The Arrow files of a dataset on the hub, `user/name` or `user/name:configuration`, downloaded by `datasets`.

    Raises:
        UserError: `datasets` is not there, or does not get it.
    """
    require(f"dataset_path {HUB}{name}", "datasets", requirements="data", setting="dataset_path")
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        parts = {
            name: rows.cache_files for name, rows in datasets.load_dataset(repository, configuration or None).items()
        }
    except Exception as error:  # of its own, of huggingface_hub, of what it reads with
        logger.debug("datasets.load_dataset", exc_info=True)
        raise UserError(f"{HUB}{name}: datasets does not load it ({first_line(error)}); give a local copy") from error
    splits = {name: split_of(name) or ("train" if len(parts) == 1 else "") for name in parts}
    for split in SPLITS:
        names = [name for name in splits if splits[name] in (split, "")]
        if len(names) > 1:
            raise UserError(
                f"{HUB}{repository}: {len(names)} splits that may be {split} ({', '.join(names)[:200]}):"
                " write the one you mean to a file, by its to_json, and give that"
            )
    logger.info("%s%s: %s", HUB, repository, ", ".join(f"{name} is {split}" for name, split in splits.items()))
    files = {Path(file["filename"]): splits[name] for name, rows in parts.items() for file in rows}
    return {path: split for path, split in files.items() if split != "test"}


def recorded(checkpoint: str) -> dict:
    """The arguments of the run that a checkpoint is of, as `training_args.json` has them; {} where it is of none."""
    try:
        arguments = json.loads(Path(checkpoint, "training_args.json").read_text())
    except (OSError, ValueError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def recorded_dataset(checkpoint: str) -> str:
    """The dataset that a run folder was trained on, a URL, hf:NAME or a path that is still there; "" = PersonaChat."""
    path = recorded(checkpoint).get("dataset_path")
    if not isinstance(path, str):
        return ""
    return path if is_url(path) or path.startswith(HUB) or Path(path).exists() else ""
