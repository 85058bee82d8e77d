"""GGUF files unpacked once: transformers takes half a minute for one of 93 MB, a kept copy of its weights a second."""

import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

from transfertransfo.download import cache_folder
from transfertransfo.errors import UserError, first_line
from transfertransfo.files import TEMPORARY, move_into_place, own_prefix, remove_abandoned

Check = Callable[[PreTrainedModel, Mapping[str, Any]], bool]

logger = logging.getLogger(__name__)

VERSION = "1"  # of the kept copies; another one has them made anew


def read_gguf_config(file: str) -> dict[str, Any]:
    """The values of a GGUF file's configuration: those beside the kept weights, or from its header in 9 seconds."""
    if kept := kept_copy(file):
        return json.loads(record_in(kept)["config"])
    return dict(config_in_header(file, *state_of(file)))


@functools.lru_cache(maxsize=1)
def config_in_header(file: str, *_: object) -> dict[str, Any]:
    """The configuration in the header. The further arguments are the file's state: the result is kept for that one."""
    folder, name = os.path.split(os.path.abspath(file))
    with name_map_made_once():
        found: Any = PretrainedConfig.get_config_dict(folder, gguf_file=name)
    return found[0]


def load_gguf(
    family: type[PreTrainedModel], file: str, config: PretrainedConfig, check: Check
) -> tuple[PreTrainedModel, bool]:
    """The model of a GGUF file in float32, and what `check` says of it. What the file lacks is random.

    Args:
        check: is given a model and what transformers found amiss in the file (`checks.check_fit`). It raises an error
            where the weights are not to be used.
    """
    kept = kept_copy(file)
    tensors = load_file(kept) if kept else unpack(family, file, config, check)
    if not kept:
        keep(file, tensors)
    # The same way whether a copy was there or not: a random head then is the same too
    loaded: Any = family.from_pretrained(
        None, config=copy.deepcopy(config), state_dict=tensors, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    pretrained, found = loaded
    return pretrained, check(pretrained, found)


def unpack(family: type[PreTrainedModel], file: str, config: PretrainedConfig, check: Check) -> dict[str, torch.Tensor]:
    """The tensors that the file holds, under transformers' names. The random generator stays as it was."""
    folder, name = os.path.split(os.path.abspath(file))
    logger.info("Unpacking %s, once", name)
    quiet = contextlib.redirect_stderr(io.StringIO())  # transformers shows a bar here that it has no switch for
    with quiet, torch.random.fork_rng(), name_map_made_once():
        loaded: Any = family.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            config=copy.deepcopy(config),
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    quantized, found = loaded
    check(quantized, found)
    tensors, places = {}, set()
    for key, tensor in quantized.state_dict().items():
        if key not in found["missing_keys"] and tensor.data_ptr() not in places:  # a tied layer stands there once
            tensors[key] = tensor.detach()
        places.add(tensor.data_ptr())
    return tensors


@contextlib.contextmanager
def name_map_made_once() -> Iterator[None]:
    """Spare transformers a third of its time: it has gguf make one and the same map of names for each module."""
    import gguf

    original = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(original)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = original


def kept_copy(file: str) -> Path | None:
    """The kept weights of a file of this content, if they are there and whole."""
    try:
        path = place_of(file)
        record = record_in(path)
    except (OSError, SafetensorError, UserError):  # none, a damaged one, no folder for it
        return None
    return path if record.items() >= expected_record(file).items() and "config" in record else None


def keep(file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Keep a file's weights in the cache folder, each in the smallest type that holds it exactly.

    Where that cannot be it is logged: the file is then unpacked each time.
    """
    try:
        path = place_of(file)
        record = expected_record(file) | {"config": json.dumps(read_gguf_config(file))}
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_abandoned(path.parent, "gguf-")
        prefix = own_prefix(path.name)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix, suffix=TEMPORARY) as temporary:
            save_file({key: smallest(tensor) for key, tensor in tensors.items()}, f"{temporary}/weights", record)
            move_into_place(f"{temporary}/weights", path)
    except (OSError, SafetensorError, UserError, TypeError) as error:
        logger.warning("%s is unpacked each time: its weights could not be kept (%s)", file, first_line(error))


def smallest(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as half as many bytes, where that changes none of its values."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(half := tensor.to(dtype), tensor):
            return half.contiguous()
    return tensor.contiguous()


def place_of(file: str) -> Path:
    return cache_folder() / f"gguf-{sha256_of(file)[:16]}.safetensors"


def expected_record(file: str) -> dict[str, str]:
    """The record that the header of a kept copy must have. Another transformers may unpack otherwise."""
    return {"version": VERSION, "transformers": transformers.__version__, "sha256": sha256_of(file)}


def record_in(path: Path) -> dict[str, str]:
    """The record in a kept copy's header. safetensors refuses a file that is shorter or longer than its header says."""
    with safe_open(path, "pt") as kept:
        return kept.metadata() or {}


def sha256_of(file: str) -> str:
    return _sha256(os.path.abspath(file), *state_of(file))


def state_of(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _sha256(file: str, *_: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
