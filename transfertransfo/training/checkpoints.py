"""The training state in a run folder: saved so that a run which is killed goes on as if it had not been."""

import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from transfertransfo.errors import UserError, first_line
from transfertransfo.files import TEMPORARY, open_atomically
from transfertransfo.processes import cpu_group, gather, n_processes, rank

if TYPE_CHECKING:
    from ignite.engine import Engine

logger = logging.getLogger(__name__)

UNFINISHED = r"checkpoint_\d+(\.old)?"  # names, before `TEMPORARY`, of folders that are written or removed
STATE = "state.pt"  # in the folder of a checkpoint in shards: all that is no shard
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


class RandomState:
    """The random generators of every process, as one object that is saved and loaded."""

    def state_dict(self) -> dict:
        generator = np.random.get_state(legacy=False)
        state = {
            "python": random.getstate(),
            "numpy": (
                generator["state"]["key"].tolist(),
                generator["state"]["pos"],
                generator["has_gauss"],
                generator["gauss"],
            ),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        return {"ranks": gather(state)}

    def load_state_dict(self, states: dict) -> None:
        if len(states["ranks"]) != n_processes():
            told = "going on with %d processes in place of %d: equal to about 1e-5, not to the bit; dropout is another"
            logger.info(told, n_processes(), len(states["ranks"]))
            return
        state = states["ranks"][rank()]
        random.setstate(state["python"])
        keys, *rest = state["numpy"]
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


class TrainedParameters:
    """The tensors of a model that a run folder needs, as one object that is saved and loaded.

    They are the trained parameters and the buffers that a model is saved with, as the biases by which DeepSeek-V3
    chooses experts; a run folder may hold a checkpoint before it holds weights.

    A checkpoint of an early version lacks all but the trained ones; the others then stay as they are, and a line says
    so.

    Args:
        frozen: whether the other parameters too, where no other checkpoint has them.
    """

    def __init__(self, model: nn.Module, frozen: bool = False):
        saved = model.state_dict()
        self.trained = {name for name, value in model.named_parameters() if value.requires_grad}
        self.tensors: dict[str, torch.Tensor] = {name: value for name, value in model.named_buffers() if name in saved}
        self.tensors |= {name: value for name, value in model.named_parameters() if frozen or value.requires_grad}

    def state_dict(self) -> dict:
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        missing = self.tensors.keys() - state.keys()
        if lost := missing & self.trained:
            raise ValueError(f"it lacks {min(lost)}")
        if missing:
            logger.warning("an early version's checkpoint, without %s: that stays as the run began", min(missing))
        for name in self.tensors.keys() & state.keys():
            self.tensors[name].copy_(state[name])


class Shards:
    """The tensors of a model in shards and of its AdamW, of each of which every process holds some rows.

    Args:
        model: a `DoubleHeads`, of which `TrainedParameters` are held.
        optimizer: of the parameters that are trained.
        frozen: as of `TrainedParameters`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, frozen: bool = False):
        self.model, self.optimizer, self.frozen = model, optimizer, frozen

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, by their names; what the optimizer has none of yet is 0."""
        self.model.reshard()  # type: ignore[operator]  # what the last forward has gathered
        pretrained: Any = self.model.pretrained
        found = {f"model.{name}": tensor for name, tensor in TrainedParameters(pretrained, self.frozen).tensors.items()}
        names = {parameter: name for name, parameter in pretrained.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
                found |= {f"optimizer.{names[parameter]}.{name}": state[name] for name in MOMENTS}
        return {name: tensor.detach() for name, tensor in found.items()}

    def state_dict(self) -> dict:
        """The rest of the optimizer's state: its steps, as many for each parameter."""
        return {"steps": [float(state["step"]) for state in self.optimizer.state.values()][:1]}

    def load_state_dict(self, state: dict) -> None:
        for own in self.optimizer.state.values():
            own["step"].fill_(*state["steps"])


class Best:
    """The best validation so far, and the epoch that was exported.

    Attributes:
        metric: decides which validation is better: `hits@1` or `nll`.
        value: of the best validation, the greater the better (None = there was none).
        validations_since: number of validations since the best one.
        exported: the epoch whose weights the run folder has (0 = none, or not known: of an early version).
    """

    def __init__(self, metric: str):
        self.metric = metric
        self.value: float | None = None
        self.validations_since = 0
        self.exported = 0

    def update(self, metrics: Mapping[str, float]) -> bool:
        """Count a validation; returns whether it is the best yet. `nll` is better the lower, `hits@1` the higher."""
        value = -metrics["nll"] if self.metric == "nll" else metrics["accuracy"]
        better = self.value is None or value > self.value
        if better:
            self.value, self.validations_since = value, 0
        else:
            self.validations_since += 1
        return better

    def state_dict(self) -> dict:
        return {"value": self.value, "since": self.validations_since, "exported": self.exported}

    def load_state_dict(self, state: dict) -> None:
        self.value, self.validations_since = state["value"], state["since"]
        self.exported = state.get("exported", 0)


def save_checkpoint(folder: Path | None, trainer: "Engine", to_save: Mapping, *, n_saved: int) -> None:
    """Save the states of `to_save` as `checkpoint_STEP.pt`, whole or not at all; keep the newest `n_saved`.

    All processes must call it, since each has a random state; the one with a folder writes. Where `to_save` has
    `Shards`, all of them write into a folder `checkpoint_STEP`. Where there is no room the older checkpoints stay, and
    one line says so.
    """
    if shards := to_save.get("shards"):
        _save_shards(gather(folder)[0], trainer.state.optimizer_step, to_save, shards, n_saved)
        return
    state = {name: item.state_dict() for name, item in to_save.items()}
    if folder is None:
        return
    path = folder / f"checkpoint_{trainer.state.optimizer_step}.pt"
    try:
        with open_atomically(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer answers an OSError with a RuntimeError that hides it
        _tell_not_written(path, error)
        return
    _remove_old(folder, n_saved)


def _save_shards(folder: Path, step: int, to_save: Mapping, shards: Shards, n_saved: int) -> None:
    """Have each process write its rows, by torch.distributed.checkpoint as safetensors, which hold no pickle.

    The folder has its name when all files are there.
    """
    path = folder / f"checkpoint_{step}"
    temporary = folder / f"{path.name}{TEMPORARY}"
    tensors = shards.tensors()
    state = {name: item.state_dict() for name, item in to_save.items()}
    error: BaseException | None = None
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=_group())
        if rank() == 0:
            sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
            with open_atomically(temporary / STATE) as file:
                torch.save(state | {"files": sizes}, file)
    except (OSError, RuntimeError, CheckpointException) as raised:  # the last one in every process, if in one
        error = raised
    failed = any(gather(error is not None))
    if rank() == 0:
        if failed:
            _tell_not_written(path, error or OSError())
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            _remove(path)  # of a run that was resumed from an older one
            os.replace(temporary, path)
            _remove_old(folder, n_saved)
    gather(None)  # none begins the next one before this one is in its place


def _group() -> torch.distributed.ProcessGroup:
    """The processes, on their CPUs."""
    group = cpu_group() or torch.distributed.group.WORLD
    assert group
    return group


def _tell_not_written(path: Path, error: BaseException) -> None:
    logger.error("%s: not written (%s); older checkpoints stay", path, first_line(_cause(error)))


def _cause(error: BaseException) -> BaseException:
    """The exception behind one of torch's writers and readers."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return error.__context__ if isinstance(error.__context__, OSError) else error


def _remove_old(folder: Path, n_saved: int) -> None:
    """Remove all but the newest checkpoints; at any instant there is a whole one."""
    for old in list_checkpoints(folder)[:-n_saved]:
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        going = path.with_name(f"{path.name}.old{TEMPORARY}")  # a part of it is no checkpoint
        os.replace(path, going)
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest last; files of other names are the user's own."""
    found = [*folder.glob("checkpoint_*.pt"), *(path for path in folder.glob("checkpoint_*") if path.is_dir())]
    steps = {path: path.name.removesuffix(".pt").removeprefix("checkpoint_") for path in found}
    return sorted((path for path in found if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def load_checkpoint(folder: Path, to_load: Mapping) -> None:
    """Load the newest checkpoint of a run folder into the objects of `to_load`.

    One in shards can be loaded by any number of processes.

    Raises:
        UserError: it is damaged.
    """
    path = list_checkpoints(folder)[-1]
    try:
        state = torch.load(path / STATE if path.is_dir() else path, map_location="cpu", weights_only=True)
        if shards := to_load.get("shards"):
            for name, size in state["files"].items():  # of a tensor that lacks rows the reader would leave them 0
                if (path / name).stat().st_size != size:
                    raise ValueError(f"{name}: not as long as it was")
            dcp.load(shards.tensors(), storage_reader=HuggingFaceStorageReader(str(path)), process_group=_group())
        for name, item in to_load.items():
            item.load_state_dict(state[name])
    except (Exception, CheckpointException) as error:  # whatever unpickling met
        raise UserError(
            f"{path}: damaged ({first_line(_cause(error))}); delete it to go on from an older one"
        ) from error
    logger.info("Resuming from %s", path)
