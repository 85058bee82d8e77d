"""Where models come from: names, folders, archives and GGUF files; their configurations and tokenizers."""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, knows_dialog_tokens
from transfertransfo.download import extract, fetch, is_url
from transfertransfo.errors import SettingError, first_line, require
from transfertransfo.model.gguf import read_gguf_config

HF_FINETUNED_MODEL = (
    "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
)
MAX_CONFIG = 1 << 20  # bytes of a configuration
MAX_LIST = 10_000
PART = 4096  # bytes of a file that are looked at together
COUNTED, MAX_COUNT = re.compile(r"(^|_)(n|num)_.*(layers?|labels|experts|heads?)$"), 1024
POSITIONS, MAX_POSITIONS = re.compile(r"positions?(_embeddings)?$|^n_ctx$|max_seq_len$"), 1 << 24
HUB_NAMES = {"openai-gpt": "openai-community/openai-gpt"} | {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
VOCABULARY = re.compile(r"^tokenizer\.json$|^vocab|^merges|\.(model|tiktoken)$|^tekken")
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
)


def download_pretrained_model() -> str:
    """The folder of the fine-tuned GPT of 2019, downloaded on first use."""
    return str(extract(fetch(HF_FINETUNED_MODEL)))


def resolve_checkpoint(checkpoint: str | Path) -> str:
    """The folder or the hub's full name that a `model_checkpoint` stands for; an archive's URL is downloaded."""
    text = str(checkpoint)
    if is_url(text):
        return str(extract(fetch(text)))
    if os.path.isdir(text):
        if not os.path.isfile(os.path.join(text, "config.json")):
            raise unusable(text, "the folder has no config.json, so it is not a checkpoint")
        return text
    if is_gguf(text):
        return locate_gguf(text)
    if os.path.exists(text):
        raise unusable(text, "expected a folder, a GGUF file, a hub name or a URL, got a file")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text):  # what a model's name on the hub looks like
        raise unusable(text, "no such folder")
    return HUB_NAMES.get(text, text)


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file; a run folder's name may end as its model's."""
    return path.endswith(".gguf") and not os.path.isdir(path)


def locate_gguf(path: str) -> str:
    """The file of a path, which may begin with the name of an installed Python package that carries it.

    Raises:
        UserError: no such file, or what reads it is not installed.
    """
    require(f"model_checkpoint {path}", "gguf", "accelerate", setting="model_checkpoint")
    if os.path.isfile(path):
        return path
    package, _, rest = path.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in (found and found.submodule_search_locations) or ():
        if os.path.isfile(os.path.join(folder, rest)):
            return os.path.join(folder, rest)
    raise unusable(path, "no such file, neither here nor in an installed Python package")


def pretrained_arguments(checkpoint: str) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` methods for a resolved checkpoint."""
    if not is_gguf(checkpoint):
        return {"pretrained_model_name_or_path": checkpoint}
    folder, name = os.path.split(os.path.abspath(checkpoint))
    return {"pretrained_model_name_or_path": folder, "gguf_file": name}


def has_weights(checkpoint: str) -> bool:
    """Whether a resolved checkpoint holds weights; the hub's models all do."""
    return not os.path.isdir(checkpoint) or any(os.path.isfile(os.path.join(checkpoint, name)) for name in WEIGHTS)


def files_digest(checkpoint: str | Path) -> str:
    """Text that tells a local checkpoint's weights from others, by up to 256 parts of each file; "" = not a local one.

    Where they are and what they are called does not count.
    """
    place = Path(resolve_checkpoint(checkpoint))
    if not place.exists():
        return ""
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin")
    files = [file for pattern in patterns for file in sorted(place.glob(pattern))] if place.is_dir() else [place]
    key = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            key.update(str(size).encode())
            for start in range(0, size, max(PART, size // 256)):
                file.seek(start)
                key.update(file.read(PART))
    return key.hexdigest()


def load_config(checkpoint: str | Path) -> PretrainedConfig:
    """A checkpoint's configuration. Those of 2019 do not name their family; GPT's alone has `afn`.

    Raises:
        UserError: no configuration there that transformers knows.
    """
    folder = resolve_checkpoint(checkpoint)
    try:
        if is_gguf(folder):
            return AutoConfig.for_model(**read_gguf_config(folder))
        check_file_sizes(folder)
        values, _ = PretrainedConfig.get_config_dict(folder)
        check_sizes(values)
        if "model_type" not in values and "n_embd" in values:
            return (OpenAIGPTConfig if "afn" in values else GPT2Config).from_dict(values)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it asks whether to, on a terminal
    except Exception as error:  # of a damaged file: OSError, ValueError, TypeError, KeyError, ...
        raise cannot_load(checkpoint, "GGUF header" if is_gguf(folder) else "config.json", error) from error


def check_file_sizes(folder: str) -> None:
    """Check that a folder's configurations are as small as such are; transformers takes half a minute for large ones.

    Raises:
        ValueError: one is not.
    """
    for name in ("config.json", "generation_config.json"):
        if os.path.isfile(file := os.path.join(folder, name)) and os.path.getsize(file) > MAX_CONFIG:
            raise ValueError(f"{name} is {os.path.getsize(file)} bytes, more than {MAX_CONFIG}")


def check_sizes(values: Mapping) -> None:
    """Check the sizes of a configuration that transformers would make a list or a layer of each.

    Raises:
        ValueError: one is less than 0, or more than any model has.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_sizes(value)
        elif isinstance(value, list) and len(value) > MAX_LIST:
            raise ValueError(f"{name}: a list of {len(value)}, more than {MAX_LIST}")
        elif isinstance(value, int | float):
            most = MAX_COUNT if COUNTED.search(name) else MAX_POSITIONS if POSITIONS.search(name) else None
            if most and not 0 <= value <= most:
                raise ValueError(f"{name}: expected a number from 0 to {most}, got {value}")


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
        raise cannot_load(checkpoint, "tokenizer", OSError())
    config = load_config(checkpoint)
    none_there = unusable(checkpoint, "no tokenizer there (tokenizer.json, or vocab.json and merges.txt)")
    try:
        arguments = pretrained_arguments(folder)
        tokenizer = AutoTokenizer.from_pretrained(**arguments, config=config, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its readers met: OSError, ValueError, TypeError, KeyError
        raise (cannot_load(checkpoint, "tokenizer", error) if has_vocabulary(folder) else none_there) from error
    if not tokenizer.is_fast or vocabulary_size(tokenizer) <= size_without_files(type(tokenizer)):
        raise none_there
    fine_tuned = knows_dialog_tokens(tokenizer)
    if fine_tuned:  # from files of 2019 the speakers come as words, which a text could contain
        tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    if isinstance(tokenizer, OpenAIGPTTokenizer):
        recorded = tokenizer.init_kwargs.get("gpt_tokenization") or ("basic" if fine_tuned else "spacy")
        tokenizer.init_kwargs["gpt_tokenization"] = gpt_tokenization or recorded
    elif gpt_tokenization:
        message = f"gpt_tokenization {gpt_tokenization}: this is for GPT's text, and {checkpoint} is no GPT"
        raise SettingError(message, "gpt_tokenization")
    return tokenizer


def has_vocabulary(checkpoint: str) -> bool:
    """Whether a resolved checkpoint has a file that tokenizers are read from; those of the hub all have."""
    return not os.path.isdir(checkpoint) or any(map(VOCABULARY.search, os.listdir(checkpoint)))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a fast tokenizer's model has; added ones do not count."""
    return tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)


def size_without_files(kind: type[PreTrainedTokenizerBase]) -> int:
    """The size of the vocabulary that a class of tokenizers has by itself, which transformers takes where no file is.

    It is 2 for GPT-NeoX and 5 for Gemma.
    """
    try:
        return max(1, vocabulary_size(kind()))
    except Exception:  # a class that needs files says so in many ways: TypeError, ValueError, ImportError, ...
        return 1


def _can_be_had(name: str) -> bool:
    """Whether a hub model is in transformers' cache or on the hub. Asked once: loading retries for a minute."""
    for in_cache in (True, False):
        with contextlib.suppress(Exception):  # whatever a network does
            if has_file(name, "config.json", local_files_only=in_cache):
                return True
    return False


def cannot_load(checkpoint: str | Path, what: str, error: Exception) -> SettingError:
    """The error of what transformers could not load, in one line."""
    if os.path.exists(checkpoint) or is_gguf(str(checkpoint)):
        return unusable(checkpoint, f"no usable {what} there ({first_line(error)})")
    return unusable(
        checkpoint,
        "neither a folder nor a model that can be had from the hub here;"
        " give a local folder, or example/model, the embedded example",
    )


def unusable(checkpoint: str | Path, fault: str) -> SettingError:
    """The error of a checkpoint that cannot be used, whoever gave it: a script calls it by its flag."""
    return SettingError(f"model_checkpoint {checkpoint}: {fault}", "model_checkpoint")
