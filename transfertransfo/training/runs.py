"""A run folder: its arguments and figures, finding it, opening it."""

import itertools
import json
import logging
import os
import socket
from argparse import Namespace
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from transfertransfo.errors import UserError
from transfertransfo.files import write_atomically
from transfertransfo.training.checkpoints import list_checkpoints

if TYPE_CHECKING:
    from ignite.engine import State

logger = logging.getLogger(__name__)

ARGUMENTS = "training_args.json"
METRICS = "metrics.jsonl"
# What may differ between a run and its resumption; all else decides what is computed.
CHANGEABLE = {
    "resume", "n_epochs", "valid_batch_size", "eval_before_start", "log_every", "save_every", "n_saved", "patience",
    "device", "local_rank", "dataset_cache", "export", "compile", "unset",
}  # fmt: skip
NOT_RESUMED = {"resume", "local_rank", "device", "world_size"}  # of them a resumption takes its own


def find_run(resume: str, args: Namespace) -> Path | None:
    """The run folder to resume: the one given, or for "auto" the newest of the same arguments, if there is one.

    Raises:
        UserError: the folder given is no run folder, or has no checkpoint yet.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / ARGUMENTS).is_file():
            raise UserError(f"--resume {resume}: no run folder (it has no {ARGUMENTS})")
        if not list_checkpoints(folder):
            raise UserError(f"--resume {resume}: the run has no checkpoint yet; start it anew")
        return folder
    here = vars(args)
    runs = sorted(Path("runs").glob(f"*/{ARGUMENTS}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for file in runs:
        try:
            saved = read_arguments(file.parent)
        except UserError as error:  # another program's, or a damaged one
            logger.warning("%s", error)
            continue
        given = saved | dict.fromkeys(saved.get("unset", ()))  # before the model's own took the place of unset ones
        same = all(here[name] in (given[name], saved[name]) for name in saved.keys() & here.keys() - CHANGEABLE)
        if same and list_checkpoints(file.parent):
            return file.parent
    return None


def read_arguments(folder: Path) -> dict:
    """The arguments of a run."""
    try:
        arguments = json.loads((folder / ARGUMENTS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {folder / ARGUMENTS}: {error}") from error
    if not isinstance(arguments, dict):
        raise UserError(f"--resume {folder / ARGUMENTS}: expected an object")
    return arguments


def changed_arguments(saved: Mapping, args: Namespace) -> list[str]:
    """The arguments that differ from those of a run and may not, each as `--flag is X there, Y here`; None is unset."""
    here = vars(args)
    return [
        f"{'the number of processes' if name == 'world_size' else f'--{name}'} is {saved[name]!r} there,"
        f" {here[name]!r} here"
        for name in sorted(saved.keys() & here.keys() - CHANGEABLE)
        if saved[name] != here[name] and here[name] is not None
    ]


def cut_metrics(folder: Path, state: "State") -> None:
    """Drop the lines of `metrics.jsonl` that a killed run wrote after the checkpoint which it resumes from.

    Args:
        state: the trainer's, as the checkpoint has it.
    """
    path = folder / METRICS
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    write_atomically(path, "".join(itertools.takewhile(lambda line: _is_before(line, state), lines)))


def _is_before(line: str, state: "State") -> bool:
    try:
        figures = json.loads(line)
    except ValueError:  # the last line, if it was not written whole
        return False
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
