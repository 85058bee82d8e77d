"""The training state in a run folder: saved so that a run which is killed goes on as if it had not been."""

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed
from torch import nn

from transfertransfo.errors import UserError, first_line
from transfertransfo.files import open_atomically

if TYPE_CHECKING:
    from ignite.engine import Engine

logger = logging.getLogger(__name__)


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
        states: list[dict | None] = [state]
        if torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, state)
        return {"ranks": states}

    def load_state_dict(self, states: dict) -> None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        state = states["ranks"][rank]
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

    Args:
        frozen: whether the other parameters too, where no other checkpoint has them.
    """

    def __init__(self, model: nn.Module, frozen: bool = False):
        saved = model.state_dict()
        self.tensors: dict[str, torch.Tensor] = {name: value for name, value in model.named_buffers() if name in saved}
        self.tensors |= {name: value for name, value in model.named_parameters() if frozen or value.requires_grad}

    def state_dict(self) -> dict:
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        if missing := self.tensors.keys() - state.keys():
            raise ValueError(f"it lacks {min(missing)}")
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


class Best:
    """The best validation so far.

    Attributes:
        metric: decides which validation is better: `hits@1` or `nll`.
        value: of the best validation, the greater the better (None = there was none).
        validations_since: number of validations since the best one.
    """

    def __init__(self, metric: str):
        self.metric = metric
        self.value: float | None = None
        self.validations_since = 0

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
        return {"value": self.value, "since": self.validations_since}

    def load_state_dict(self, state: dict) -> None:
        self.value, self.validations_since = state["value"], state["since"]


def save_checkpoint(folder: Path | None, trainer: "Engine", to_save: Mapping, *, n_saved: int) -> None:
    """Save the states of `to_save` as `checkpoint_STEP.pt`, whole or not at all; keep the newest `n_saved`.

    All processes must call it, since each has a random state; the one with a folder writes. Where there is no room
    the older checkpoints stay, and one line says so.
    """
    state = {name: item.state_dict() for name, item in to_save.items()}
    if folder is None:
        return
    path = folder / f"checkpoint_{trainer.state.optimizer_step}.pt"
    try:
        with open_atomically(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer answers an OSError with a RuntimeError that hides it
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        logger.error("%s: not written (%s); older checkpoints stay", path, first_line(cause))
        return
    for old in list_checkpoints(folder)[:-n_saved]:  # only now, so that at any instant there is a whole one
        old.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest last; files of other names are the user's own."""
    steps = {path: path.stem.removeprefix("checkpoint_") for path in folder.glob("checkpoint_*.pt")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def load_checkpoint(folder: Path, to_load: Mapping) -> None:
    """Load the newest checkpoint of a run folder into the objects of `to_load`.

    Raises:
        UserError: it is damaged.
    """
    path = list_checkpoints(folder)[-1]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, item in to_load.items():
            item.load_state_dict(state[name])
    except Exception as error:  # whatever unpickling met
        raise UserError(f"{path}: damaged ({first_line(error)}); delete it to go on from an older one") from error
    logger.info("Resuming from %s", path)
