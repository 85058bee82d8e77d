"""Datasets, tokenised once and cached by content."""

import contextlib
import copy
import gc
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as dump_arrays
from transformers import (
    PreTrainedTokenizerBase,
)

from transfertransfo.data.dialogs import read_dialogs, warn_of_overlap
from transfertransfo.data.distractors import draw_distractors
from transfertransfo.data.reading import SPLITS
from transfertransfo.data.sources import HUB, Files, dataset_files, hub_files, split_of_url
from transfertransfo.data.tokenization import WARNED_OF_UNKNOWN, check_unknown, fingerprint, tokenize, unknown_id
from transfertransfo.download import fetch, is_url
from transfertransfo.errors import SettingError, UserError
from transfertransfo.files import remove_abandoned, write_atomically

logger = logging.getLogger(__name__)

PERSONACHAT_URL = "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json"
CACHE_FORMAT = 3  # to be raised by whoever changes what a cache file holds


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Let Python's garbage collector rest while millions of lists are made: it looks at all of them over and over.

    None of them is part of a cycle, which is all that it looks for. Half of the time to read a dataset from the cache.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def get_dataset(
    tokenizer: PreTrainedTokenizerBase, dataset_path: str, dataset_cache: str, skip_bad_dialogs: bool = False
) -> dict[str, list[dict]]:
    """PersonaChat, or another dataset, as token ids.

    Args:
        tokenizer: from `load_tokenizer`, or any fast tokenizer of transformers.
        dataset_path: a file, a folder, a URL or hf:NAME; "" downloads PersonaChat. See `sources` and `formats`.
        dataset_cache: stem of the cache file; "" = no cache.
        skip_bad_dialogs: leave dialogs with a fault out.

    Returns:
        `{"train": [{"personality": [ids], "utterances": [{"candidates": [ids], "history": [ids]}]}], "valid": [...]}`,
        each split only if the dataset has it, the gold reply last among the candidates. Equal sentences share one list
        of ids: copy before changing one.

    Raises:
        UserError: the dataset cannot be had or read.
    """
    dataset = load_dataset(tokenizer, dataset_path, dataset_cache, skip_bad_dialogs)
    return dataset.all_dialogs(dataset.tokens)


class TokenizedDataset:
    """A dataset whose distinct sentences are held once, as text and as token ids, and numbered.

    Attributes:
        texts: the distinct sentences.
        tokens: their token ids, in the same order.
        splits: names of the splits, "train" before "valid".
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays
        self.splits = [split for split in SPLITS if f"{split}.history" in arrays]  # a cache file keeps no order
        self.tokens: list[list[int]] = list(self._lists("tokens"))

    @property
    def digest(self) -> str:
        """Fingerprint of this dataset, tokenised, wherever it was read from."""
        key = hashlib.blake2b(digest_size=16)
        for name in sorted(self._arrays):
            key.update(name.encode() + self._arrays[name].tobytes())
        return key.hexdigest()

    @property
    def texts(self) -> list[str]:
        text = self._arrays["texts"].tobytes()
        ends = self._arrays["texts.ends"].tolist()
        return [text[start:end].decode() for start, end in itertools.pairwise([0, *ends])]

    def count(self, split: str) -> int:
        """The number of a split's dialogs."""
        return len(self._arrays[f"{split}.turns"])

    def share_of(self, token: int) -> float:
        """The share of a token among those of all sentences. An empty sentence counts as one such token."""
        tokens, empty = self._arrays["tokens"], np.diff(self._arrays["tokens.ends"], prepend=0) == 0
        return (np.count_nonzero(tokens == token) + empty.sum()) / max(1, len(tokens) + empty.sum())

    @paused_collector()
    def dialogs(self, split: str, sentences: list, stop: int | None = None, num_candidates: int = 0) -> list[dict]:
        """Dialogs of a split, each sentence taken from `sentences`: `self.texts` or `self.tokens`.

        Args:
            stop: so many of the first dialogs; None = all. Distractors are drawn from these alone, where an utterance
                has none.
            num_candidates: the last candidates kept, gold included; 0 = all.
        """
        turns = self._arrays[f"{split}.turns"][:stop].tolist()
        candidates = self.candidates(split, stop, num_candidates)
        history = self._lists(f"{split}.history", len(candidates))
        utterances = (
            {
                "candidates": [sentences[i] for i in row],
                "history": [sentences[i] for i in next(history)],
            }
            for row in candidates
        )
        return [
            {
                "personality": [sentences[i] for i in personality],
                "utterances": list(itertools.islice(utterances, count)),
            }
            for personality, count in zip(self._lists(f"{split}.personality", stop), turns)
        ]

    def candidates(self, split: str, stop: int | None = None, num_candidates: int = 0) -> list[list[int]]:
        """The candidates of each utterance as numbers of sentences, the gold one last; arguments as of `dialogs`."""
        turns = self._arrays[f"{split}.turns"][:stop]
        # of two one shows that there are distractors
        rows = list(self._lists(f"{split}.candidates", int(turns.sum()), num_candidates and max(2, num_candidates)))
        golds = [row[-1] for row in rows]
        for place, drawn in draw_distractors(golds, list(map(len, rows)), turns.tolist()).items():
            rows[place] = drawn + rows[place]
        return [row[-num_candidates:] for row in rows] if num_candidates else rows

    def hold_out(self, share: float) -> "TokenizedDataset":
        """The dataset with the last training dialogs, this share of them and one at least, as its validation split.

        Raises:
            SettingError: no dialog would be left to train on.
        """
        count = max(1, round(self.count("train") * share))
        left = self.count("train") - count
        if left < 1:
            raise SettingError(f"valid_share {share}: too few dialogs to hold some out", "valid_share")
        logger.info("The last %d training dialogs are held out for validation", count)
        turns = self._arrays["train.turns"]
        parted = {"train.turns": turns[:left], "valid.turns": turns[left:]}
        utterances = int(turns[:left].sum())
        for name, rows in (("personality", left), ("candidates", utterances), ("history", utterances)):
            values, ends = self._arrays[f"train.{name}"], self._arrays[f"train.{name}.ends"]
            cut = int(ends[rows - 1])
            parted |= {f"train.{name}": values[:cut], f"train.{name}.ends": ends[:rows]}
            parted |= {f"valid.{name}": values[cut:], f"valid.{name}.ends": ends[rows:] - cut}
        dataset = copy.copy(self)
        dataset._arrays, dataset.splits = self._arrays | parted, ["train", "valid"]
        return dataset

    def all_dialogs(self, sentences: list) -> dict[str, list[dict]]:
        """The dialogs of each split, as `dialogs` gives them."""
        return {split: self.dialogs(split, sentences) for split in self.splits}

    def _lists(self, name: str, stop: int | None = None, last: int = 0) -> Iterator[list[int]]:
        """The first rows of a ragged array, None = all; of each the last elements, so many; 0 = all."""
        ends = self._arrays[f"{name}.ends"][:stop]
        counts = np.diff(ends, prepend=0)
        values = self._arrays[name][: counts.sum()]
        if last:
            after = np.repeat(ends, counts) - np.arange(len(values))  # 1 for a row's last element
            values, counts = values[after <= last], counts.clip(max=last)
        numbers = np.arange(values.max(initial=-1) + 1).astype(object)  # one int each, not one an occurrence
        kept = numbers[values].tolist()  # a slice of a list is made faster than a list of a slice
        return (kept[begin:end] for begin, end in itertools.pairwise([0, *counts.cumsum().tolist()]))


def locate_dataset(dataset_path: str) -> Files:
    """The files of a `dataset_path` with their splits, downloaded where it is a URL or "", PersonaChat's."""
    address = str(dataset_path) or PERSONACHAT_URL
    if address.startswith(HUB):
        return hub_files(address.removeprefix(HUB))
    if not is_url(address):
        return dataset_files(Path(address))
    path = fetch(address)
    files = dataset_files(path)
    return {path: split_of_url(address) or "train"} if path in files else files


def read_training_dialogs(dataset_path: str) -> list[dict]:
    """The training split of a dataset as texts, as `dialogs.read_dialogs` gives it without drawn distractors.

    Raises:
        UserError: no dataset, a faulty one, or none that has this split.
    """
    dialogs = read_dialogs(locate_dataset(dataset_path), with_distractors=False).get("train")
    if not dialogs:
        raise UserError(f"{dataset_path}: no train split")
    return dialogs


@paused_collector()
def load_dataset(
    tokenizer: PreTrainedTokenizerBase, dataset_path: str, dataset_cache: str, skip_bad_dialogs: bool = False
) -> TokenizedDataset:
    """As `get_dataset`, in the form that gives texts too."""
    files = locate_dataset(dataset_path)
    if not dataset_cache:
        dataset = TokenizedDataset(_tokenized_arrays(tokenizer, files, skip_bad_dialogs))
    else:
        cache = _cache_file(dataset_cache, tokenizer, files, skip_bad_dialogs)
        remove_abandoned(cache.parent, f"{Path(dataset_cache).stem}_")
        arrays = _read_cache(cache, ", which bad dialogs are left out of" if skip_bad_dialogs else "")
        if arrays is None:
            arrays = _tokenized_arrays(tokenizer, files, skip_bad_dialogs)
            _write_cache(cache, arrays)
        dataset = TokenizedDataset(arrays)
    if dataset.share_of(unknown_id(tokenizer)) > WARNED_OF_UNKNOWN:  # at most so many: only then texts are looked at
        check_unknown(tokenizer, dataset.texts, dataset.tokens, str(dataset_path) or "PersonaChat")
    return dataset


def _tokenized_arrays(
    tokenizer: PreTrainedTokenizerBase, files: Files, skip_bad_dialogs: bool
) -> dict[str, np.ndarray]:
    """The content of a cache file: ragged arrays `name` with `name.ends`, all of small integers."""
    logger.info("Reading and tokenising %s", ", ".join(map(str, files)))
    number: dict[str, int] = {}  # text -> its place among the distinct ones
    arrays = {}

    def add(name: str, rows: Iterable[list[int]]) -> None:
        rows = list(rows)
        arrays[f"{name}.ends"] = np.cumsum([len(row) for row in rows], dtype=np.int64)
        arrays[name] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32)

    def add_split(split: str, dialogs: list[dict]) -> None:
        utterances = [utterance for dialog in dialogs for utterance in dialog["utterances"]]
        arrays[f"{split}.turns"] = np.array([len(dialog["utterances"]) for dialog in dialogs], dtype=np.int32)
        for name, holders in (("personality", dialogs), ("candidates", utterances), ("history", utterances)):
            rows = ([number.setdefault(text, len(number)) for text in holder[name]] for holder in holders)
            add(f"{split}.{name}", rows)

    splits = read_dialogs(files, skip_bad_dialogs, with_distractors=False)
    warn_of_overlap(splits)
    for split in [*splits]:
        add_split(split, splits.pop(split))  # given back at once: tokenising takes memory too
    texts = [text.encode() for text in number]
    arrays["texts"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    arrays["texts.ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    add("tokens", tokenize(tokenizer, list(number)))
    return arrays


def _cache_file(stem: str, tokenizer: PreTrainedTokenizerBase, files: Files, skip_bad_dialogs: bool) -> Path:
    """The cache's own file: one per dataset content, tokenizer content and format, and of what is left without faults.

    A dataset with faults must not be taken from the cache of a start that was told to leave them out.
    """
    key = hashlib.blake2b(f"{CACHE_FORMAT} {fingerprint(tokenizer)}".encode(), digest_size=8)
    key.update(b"without bad dialogs" * skip_bad_dialogs)
    for file, split in files.items():
        key.update(f"{split} {file.name}\0".encode())
        try:
            with open(file, "rb") as content:
                key.update(hashlib.file_digest(content, "blake2b").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    path = Path(stem)
    if not path.name:
        raise SettingError(f"dataset_cache {stem}: not the name of a file", "dataset_cache")
    return path.with_name(f"{path.stem}_{key.hexdigest()}{path.suffix}")


def _read_cache(path: Path, note: str = "") -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None, with one line said, if it is not as it was written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingError(f"dataset_cache {path}: {error.strerror}", "dataset_cache") from error
    digest, payload = content[:64], memoryview(content)[64:]
    try:
        if hashlib.blake2b(payload).digest() != digest:
            raise SafetensorError("checksum differs")
        arrays = load_arrays(payload.tobytes())
    except SafetensorError as error:
        logger.warning("%s is damaged (%s): built anew", path, error)
        return None
    logger.info("Using the tokenised dataset in %s%s", path, note)
    return arrays


def _write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the cache whole or not at all: a checksum of 64 bytes, then safetensors."""
    payload = dump_arrays(arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.blake2b(payload).digest() + payload)
    except OSError as error:
        logger.warning("The cache %s cannot be written (%s): the next start tokenises again", path, error.strerror)
