"""Weights, figures and the wish to stop, shared among the processes of a training run."""

from pathlib import Path

import ignite.distributed as idist
import torch
import torch.distributed

from transfertransfo.errors import SettingError
from transfertransfo.processes import cpu_group, n_processes


def average_distributed_scalar(scalar: float, args: object = None) -> float:
    """Mean of a number over all processes; the number itself where there is one process.

    `args` is the original's second parameter. It is not read: the processes know how many they are.
    """
    return idist.all_reduce(scalar) / idist.get_world_size()


def check_same_run(run: Path | None) -> None:
    """Check that all processes are about to resume the same run.

    Raises:
        SettingError: this one sees another run than the first process, or none.
    """
    first = idist.broadcast(str(run), src=0)
    if first != str(run):
        message = f"resume: {first} for the first process, {run} here: all nodes must see the same run folders"
        raise SettingError(message, "resume")


def share_weights_(model: torch.nn.Module) -> None:
    """Give every process the first one's parameters, as far as they have values, and buffers."""
    if n_processes() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                torch.distributed.broadcast(tensor.detach(), src=0, group=None if tensor.is_cuda else cpu_group())


def max_over_processes(number: int) -> int:
    """The greatest of all processes' numbers, compared from CPU to CPU: no process waits for its GPU."""
    if n_processes() == 1:
        return number
    tensor = torch.tensor(number)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, cpu_group())
    return int(tensor)
