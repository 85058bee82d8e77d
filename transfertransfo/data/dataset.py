"""Where data and checkpoints come from: datasets tokenised once and cached, tokenizers, checkpoints, run folders."""

import contextlib
import gc
import hashlib
import importlib.util
import itertools
import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as dump_arrays
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    OpenAIGPTConfig,
    OpenAIGPTTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import has_file

from transfertransfo.cli import UserError, first_line, require
from transfertransfo.data.dialogs import dataset_files, read_dialogs
from transfertransfo.data.formats import SPLITS
from transfertransfo.data.tokenization import fingerprint, tokenize
from transfertransfo.download import extract, fetch, is_url
from transfertransfo.files import write_atomically

logger = logging.getLogger(__name__)

PERSONACHAT_URL = "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json"
HF_FINETUNED_MODEL = (
    "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
)
HUB_NAMES = {"openai-gpt": "openai-community/openai-gpt"} | {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
SPECIAL_TOKENS = ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]
ATTR_TO_SPECIAL_TOKEN: dict[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<speaker1>", "<speaker2>"],
}
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
           "adapter_model.safetensors")
CACHE_FORMAT = 1  # to be raised by whoever changes what a cache file holds


class AttrDict(dict):
    """A dict whose keys are attributes too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


# ---------------------------------------------------------------------------------------------------------- checkpoints


def download_pretrained_model() -> str:
    """The folder of the fine-tuned GPT of 2019, downloaded on first use."""
    return str(extract(fetch(HF_FINETUNED_MODEL)))


def resolve_checkpoint(checkpoint: str | Path) -> str:
    """The folder or the hub's full name that a `--model_checkpoint` stands for; an archive's URL is downloaded."""
    text = str(checkpoint)
    if is_url(text):
        return str(extract(fetch(text)))
    if os.path.isdir(text):
        if not os.path.isfile(os.path.join(text, "config.json")):
            raise UserError(f"--model_checkpoint {text}: the folder has no config.json, so it is not a checkpoint")
        return text
    if is_gguf(text):
        return locate_gguf(text)
    if os.path.exists(text):
        raise UserError(f"--model_checkpoint {text}: expected a folder, a GGUF file, a hub name or a URL, got a file")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text):  # what a model's name on the hub looks like
        raise UserError(f"--model_checkpoint {text}: no such folder")
    return HUB_NAMES.get(text, text)


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file; a run folder's name may end as its model's."""
    return path.endswith(".gguf") and not os.path.isdir(path)


def locate_gguf(path: str) -> str:
    """The file of a path, which may begin with the name of an installed Python package that carries it.

    Raises:
        UserError: no such file, or what reads it is not installed.
    """
    require(f"--model_checkpoint {path}", "gguf", "accelerate")
    if os.path.isfile(path):
        return path
    package, _, rest = path.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in (found and found.submodule_search_locations) or ():
        if os.path.isfile(os.path.join(folder, rest)):
            return os.path.join(folder, rest)
    raise UserError(f"--model_checkpoint {path}: no such file, neither here nor in an installed Python package")


def pretrained_arguments(checkpoint: str) -> dict[str, Any]:
    """What transformers' `from_pretrained` methods are to be called with for a resolved checkpoint."""
    if not is_gguf(checkpoint):
        return {"pretrained_model_name_or_path": checkpoint}
    folder, name = os.path.split(os.path.abspath(checkpoint))
    return {"pretrained_model_name_or_path": folder, "gguf_file": name}


def has_weights(checkpoint: str) -> bool:
    """Whether a resolved checkpoint holds weights; the hub's models all do."""
    return not os.path.isdir(checkpoint) or any(os.path.isfile(os.path.join(checkpoint, name)) for name in WEIGHTS)


def load_config(checkpoint: str | Path) -> PretrainedConfig:
    """A checkpoint's configuration. Those of 2019 do not name their family; GPT's alone has `afn`.

    Raises:
        UserError: no configuration there that transformers knows.
    """
    folder = resolve_checkpoint(checkpoint)
    try:
        arguments = pretrained_arguments(folder)
        values, _ = PretrainedConfig.get_config_dict(**arguments)
        if "model_type" not in values and "n_embd" in values:
            return (OpenAIGPTConfig if "afn" in values else GPT2Config).from_dict(values)
        if "gguf_file" in arguments:
            return AutoConfig.for_model(**values)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it asks whether to, on a terminal
    except Exception as error:  # of a damaged file: OSError, ValueError, TypeError, KeyError, ...
        raise UserError(cannot_load(checkpoint, "GGUF header" if is_gguf(folder) else "config.json", error)) from error


def load_tokenizer(checkpoint: str | Path, gpt_tokenization: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; its `init_kwargs["gpt_tokenization"]` says how GPT's text is split into words.

    Saved with the tokenizer, that entry is a run's record of it. Where there is none: "basic" for a checkpoint that
    knows the dialog tokens already, since the original tokenised so in effect; "spacy", as in GPT's own pre-training
    (Radford et al. 2018, section 4.1), for a new run.

    Raises:
        UserError: no tokenizer there, or `gpt_tokenization` given for another family than GPT.
    """
    folder = resolve_checkpoint(checkpoint)
    if not os.path.exists(folder) and not _can_be_had(folder):
        raise UserError(cannot_load(checkpoint, "tokenizer", OSError()))
    config = load_config(checkpoint)
    try:
        arguments = pretrained_arguments(folder)
        tokenizer = AutoTokenizer.from_pretrained(**arguments, config=config, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its readers met: OSError, ValueError, TypeError, KeyError
        raise UserError(cannot_load(checkpoint, "tokenizer", error)) from error
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) <= 1:
        files = "tokenizer.json, or vocab.json and merges.txt"
        raise UserError(f"--model_checkpoint {checkpoint}: no tokenizer there ({files})")
    fine_tuned = knows_dialog_tokens(tokenizer)
    if fine_tuned:  # from files of 2019 the speakers come as words, which a text could contain
        tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    if isinstance(tokenizer, OpenAIGPTTokenizer):
        recorded = tokenizer.init_kwargs.get("gpt_tokenization") or ("basic" if fine_tuned else "spacy")
        tokenizer.init_kwargs["gpt_tokenization"] = gpt_tokenization or recorded
    elif gpt_tokenization:
        raise UserError(f"--gpt_tokenization {gpt_tokenization}: this is for GPT's text, and {checkpoint} is no GPT")
    return tokenizer


def _can_be_had(name: str) -> bool:
    """Whether a hub model is in transformers' cache or on the hub. Asked once: loading retries for a minute."""
    for in_cache in (True, False):
        with contextlib.suppress(Exception):  # whatever a network does
            if has_file(name, "config.json", local_files_only=in_cache):
                return True
    return False


def knows_dialog_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer belongs to a model that was made for dialogs."""
    return set(SPECIAL_TOKENS) <= tokenizer.get_added_vocab().keys()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of `SPECIAL_TOKENS`."""
    return tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)  # type: ignore[return-value]  # of a list it is a list


def cannot_load(checkpoint: str | Path, what: str, error: Exception) -> str:
    """One line for what transformers could not load."""
    if os.path.exists(checkpoint) or is_gguf(str(checkpoint)):
        return f"--model_checkpoint {checkpoint}: no usable {what} there ({first_line(error)})"
    return (
        f"--model_checkpoint {checkpoint}: neither a folder nor a model that can be had from the hub here;"
        " give a local folder, or the embedded example: --model_checkpoint example/model"
    )


# ------------------------------------------------------------------------------------------------------------- datasets


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
        dataset_path: a file, a folder or a URL; "" downloads PersonaChat. See `formats`.
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
        """What tells this dataset, tokenised, from any other, wherever it was read from."""
        key = hashlib.blake2b(digest_size=16)
        for name in sorted(self._arrays):
            key.update(name.encode() + self._arrays[name].tobytes())
        return key.hexdigest()

    @property
    def texts(self) -> list[str]:
        text = self._arrays["texts"].tobytes()
        ends = self._arrays["texts.ends"].tolist()
        return [text[start:end].decode() for start, end in itertools.pairwise([0, *ends])]

    @paused_collector()
    def dialogs(self, split: str, sentences: list) -> list[dict]:
        """The dialogs of a split, each sentence taken from `sentences`: `self.texts` or `self.tokens`."""
        candidates, history = self._lists(f"{split}.candidates"), self._lists(f"{split}.history")
        dialogs = []
        utterances = (
            {"candidates": [sentences[i] for i in next(candidates)], "history": [sentences[i] for i in next(history)]}
            for _ in itertools.count()
        )
        for personality, turns in zip(self._lists(f"{split}.personality"), self._arrays[f"{split}.turns"].tolist()):
            dialogs.append({
                "personality": [sentences[i] for i in personality],
                "utterances": list(itertools.islice(utterances, turns)),
            })  # fmt: skip
        return dialogs

    def all_dialogs(self, sentences: list) -> dict[str, list[dict]]:
        """The dialogs of each split, as `dialogs` gives them."""
        return {split: self.dialogs(split, sentences) for split in self.splits}

    def _lists(self, name: str) -> Iterator[list[int]]:
        values, ends = self._arrays[name].tolist(), self._arrays[f"{name}.ends"].tolist()
        return (values[start:end] for start, end in itertools.pairwise([0, *ends]))


def locate_dataset(dataset_path: str) -> list[Path]:
    """The files of a `--dataset_path`, downloaded where it is a URL or "", PersonaChat's."""
    url = str(dataset_path) or PERSONACHAT_URL
    return dataset_files(fetch(url) if is_url(url) else Path(url))


def read_training_dialogs(dataset_path: str) -> list[dict]:
    """The training split of a dataset as texts (`dialogs.read_dialogs`).

    Raises:
        UserError: no dataset, a faulty one, or none that has this split.
    """
    dialogs = read_dialogs(locate_dataset(dataset_path)).get("train")
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
        return TokenizedDataset(_tokenized_arrays(tokenizer, files, skip_bad_dialogs))
    cache = _cache_file(dataset_cache, tokenizer, files, skip_bad_dialogs)
    arrays = _read_cache(cache, ", which bad dialogs are left out of" if skip_bad_dialogs else "")
    if arrays is None:
        arrays = _tokenized_arrays(tokenizer, files, skip_bad_dialogs)
        _write_cache(cache, arrays)
    return TokenizedDataset(arrays)


def _tokenized_arrays(
    tokenizer: PreTrainedTokenizerBase, files: list[Path], skip_bad_dialogs: bool
) -> dict[str, np.ndarray]:
    """What a cache file holds: ragged arrays `name` with `name.ends`, all of small integers."""
    logger.info("Reading and tokenising %s", ", ".join(map(str, files)))
    number: dict[str, int] = {}  # text -> its place among the distinct ones
    arrays = {}

    def add(name: str, rows: Iterable[list[int]]) -> None:
        rows = list(rows)
        arrays[f"{name}.ends"] = np.cumsum([len(row) for row in rows], dtype=np.int64)
        arrays[name] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32)

    for split, dialogs in read_dialogs(files, skip_bad_dialogs).items():
        utterances = [utterance for dialog in dialogs for utterance in dialog["utterances"]]
        arrays[f"{split}.turns"] = np.array([len(dialog["utterances"]) for dialog in dialogs], dtype=np.int32)
        for name, holders in (("personality", dialogs), ("candidates", utterances), ("history", utterances)):
            rows = ([number.setdefault(text, len(number)) for text in holder[name]] for holder in holders)
            add(f"{split}.{name}", rows)
    texts = [text.encode() for text in number]
    arrays["texts"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    arrays["texts.ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    add("tokens", tokenize(tokenizer, list(number)))
    return arrays


def _cache_file(stem: str, tokenizer: PreTrainedTokenizerBase, files: list[Path], skip_bad_dialogs: bool) -> Path:
    """The cache's own file: one per dataset content, tokenizer content and format, and of what is left without faults.

    A dataset with faults must not be taken from the cache of a start that was told to leave them out.
    """
    key = hashlib.blake2b(f"{CACHE_FORMAT} {fingerprint(tokenizer)}".encode(), digest_size=8)
    key.update(b"without bad dialogs" * skip_bad_dialogs)
    for file in files:
        key.update(file.name.encode() + b"\0")  # a file's name says which split it is
        try:
            with open(file, "rb") as content:
                key.update(hashlib.file_digest(content, "blake2b").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    path = Path(stem)
    if not path.name:
        raise UserError(f"--dataset_cache {stem}: not the name of a file")
    return path.with_name(f"{path.stem}_{key.hexdigest()}{path.suffix}")


def _read_cache(path: Path, note: str = "") -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None, with one line said, if it is not as it was written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"--dataset_cache {path}: {error.strerror}") from error
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
        logger.warning("--dataset_cache %s: not written (%s): the next start tokenises again", path, error.strerror)


# ---------------------------------------------------------------------------------------------------------- run folders


def make_logdir(model_name: str) -> str:
    """Make a new run folder, as `runs/Nov21_20-57-01_host_model`; a start in the same second gets another one."""
    started = datetime.now().strftime("%b%d_%H-%M-%S")
    name = f"{started}_{socket.gethostname()}_{os.path.basename(os.path.abspath(model_name))}"
    suffixes = itertools.chain([""], (f"_{i}" for i in itertools.count(2)))
    while True:
        folder = Path("runs", name + next(suffixes))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot make the run folder ({error.strerror})") from error
        return str(folder)
