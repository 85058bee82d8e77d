"""A run folder: its arguments and figures, finding it, opening it."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

from transfertransfo.errors import SettingError, UserError, first_line
from transfertransfo.files import remove_leftovers, write_atomically
from transfertransfo.training.checkpoints import UNFINISHED, list_checkpoints

if TYPE_CHECKING:
    from ignite.engine import State
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ARGUMENTS = "training_args.json"
METRICS = "metrics.jsonl"
# What may differ between a run and its resumption; all else decides what is computed.
CHANGEABLE = {
    "resume", "n_epochs", "valid_batch_size", "eval_before_start", "log_every", "save_every", "n_saved", "patience",
    "device", "local_rank", "dataset_cache", "export", "compile", "unset",
}  # fmt: skip
# Paths that may differ in a run that is given, since what they lead to is compared itself.
MOVABLE = {"dataset_path", "model_checkpoint"}
NOT_RESUMED = {"resume", "local_rank", "device", "world_size"}  # of them a resumption takes its own


@dataclass(frozen=True, kw_only=True)
class Found:
    """Facts that a run finds out: those that its flags leave open, and its dataset's digest.

    Attributes:
        gpt_tokenization: how GPT's text is split into words (None = another kind of tokenizer).
        token_types: "on" or "off".
        dataset_digest: tells the dataset, tokenised, from any other.
        base_digest: tells the model that it began with from any other ("" = one on the hub, without an adapter).
    """

    gpt_tokenization: str | None
    history_start: int
    token_types: str
    lora_rank: int
    log_every: int
    dataset_digest: str
    base_digest: str


def make_record(flags: Mapping, found: Found, saved: Mapping) -> dict:
    """The content of `training_args.json`: the flags, with what the run found in the place of those left open.

    Args:
        saved: the record of the run that is resumed, {} for a new one. It names in `unset` the flags left open then.
    """
    left_open = [name for name, value in flags.items() if value is None]
    return {**saved, **flags, "unset": saved.get("unset", []) if saved else left_open, **asdict(found)}


def find_run(resume: str, flags: Mapping, defaults: Mapping) -> Path | None:
    """The run folder to resume: the one given, or for "auto" the newest of the same flags, if there is one.

    Args:
        defaults: what a run has of flags that are newer than it.

    Raises:
        SettingError: the folder given is no run folder, or has no checkpoint yet.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / ARGUMENTS).is_file():
            raise SettingError(f"resume {resume}: no run folder (it has no {ARGUMENTS})", "resume")
        if not list_checkpoints(folder):
            raise SettingError(f"resume {resume}: the run has no checkpoint yet; start it anew", "resume")
        return folder
    runs = sorted(Path("runs").glob(f"*/{ARGUMENTS}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for file in runs:
        try:
            saved = {**defaults, **read_arguments(file.parent)}
        except UserError as error:  # another program's, or a damaged one
            logger.warning("%s", error)
            continue
        given = saved | dict.fromkeys(saved.get("unset", ()))  # before what was found took the place of unset ones
        compared = saved.keys() & flags.keys() - CHANGEABLE
        same = all(flags[name] in (given[name], saved[name]) for name in compared)
        if same and list_checkpoints(file.parent):
            return file.parent
    return None


def read_arguments(folder: Path) -> dict:
    """The record that `make_record` made of a run.

    Raises:
        UserError: it is damaged or not there.
    """
    try:
        arguments = json.loads((folder / ARGUMENTS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ARGUMENTS}: {error}") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{folder / ARGUMENTS}: expected an object")
    return arguments


def check_kinds(folder: Path, saved: Mapping, defaults: Mapping) -> None:
    """Check that a run's arguments are of the kinds that their defaults are.

    Raises:
        UserError: one is not.
    """
    kinds = {float: (float, int), type(None): (type(None), str, int, float)}
    for name, default in defaults.items():
        if type(saved[name]) not in kinds.get(type(default), (type(default),)):
            raise UserError(f"{folder / ARGUMENTS}: {name}: {saved[name]!r} cannot be its value")


def changed_arguments(saved: Mapping, flags: Mapping) -> dict[str, tuple]:
    """The arguments of a run that may not change and differ from the flags given, each as there and here.

    Of a base model on the hub, as of one in a run of an early version, the path is all that is known.
    """
    movable = MOVABLE if saved.get("base_digest") else MOVABLE - {"model_checkpoint"}
    return {
        name: (saved[name], flags[name])
        for name in sorted(saved.keys() & flags.keys() - CHANGEABLE - movable)
        if flags[name] not in (None, saved[name])  # None = not given
    }


def divide_batch(saved: Mapping, world_size: int) -> dict[str, int]:
    """The arguments by which another number of processes goes on with a run's own batches.

    Raises:
        UserError: they cannot be divided by it.
    """
    examples = saved["train_batch_size"] * saved["world_size"]
    if examples % world_size:
        here, there = (f"{n} process" + "es" * (n > 1) for n in (world_size, saved["world_size"]))
        raise UserError(f"{there} took {examples} examples at a time, which {here} cannot share equally")
    return {"world_size": world_size, "train_batch_size": examples // world_size}


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keep other processes from training in a run folder (None = do not) until the block, or this process, ends.

    The lock is on the folder itself, so that nothing is left in it. Where a disk has no such locks none is held.

    Raises:
        SettingError: another process trains in it.
    """
    if folder is None or fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SettingError(f"resume {folder}: another process trains in it", "resume") from error
        yield
    finally:
        os.close(descriptor)


def open_run_folder(
    folder: Path | None,
    record: Mapping,
    state: "State",
    config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
) -> Path:
    """Make the run folder, or go back in it to where the run resumes; write what is known before the first step.

    Args:
        folder: of the run to resume (None = a new run).
        state: the trainer's, as the checkpoint has it.

    Raises:
        UserError: it cannot be written to, or its figures cannot be read. Of a new run nothing is left then.
    """
    resumed = folder is not None
    folder = folder or Path(make_logdir(record["model_checkpoint"]))
    logger.info("Run folder: %s, with the arguments in %s", folder, ARGUMENTS)
    try:
        remove_leftovers(folder, UNFINISHED)
        cut_metrics(folder, state)
        write_atomically(folder / ARGUMENTS, json.dumps(record, indent=2) + "\n")
        if not resumed:  # not written again: a run that is killed meanwhile would have none
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no OSError, but Exception itself
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)  # nothing has been trained
        raise UserError(f"{folder}: cannot be written to ({first_line(error)})") from error
    return folder


def cut_metrics(folder: Path, state: "State") -> None:
    """Drop the lines of `metrics.jsonl` that a killed run wrote after the checkpoint which it resumes from.

    Args:
        state: the trainer's, as the checkpoint has it.

    Raises:
        UserError: a line before the last one cannot be read. The last one need not have been written whole.
    """
    path = folder / METRICS
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if not _is_before(line, state):
                break
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number}: no figures of a step or a validation; remove it") from error
        kept.append(line + b"\n")
    write_atomically(path, b"".join(kept))


def _is_before(line: bytes, state: "State") -> bool:
    figures = json.loads(line)
    float(figures["nll" if "split" in figures else "loss"])  # as the outcome reads it
    # an epoch's validation may follow its last step after forwards that await the next one
    return figures["step"] <= state.optimizer_step and ("split" not in figures or figures["epoch"] <= state.epoch)


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
