"""Several processes of one run: how they find one another, and what one says when another is gone."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.distributed

from transfertransfo.errors import SettingError, UserError, first_line
from transfertransfo.model.double_heads import default_device


def average_distributed_scalar(scalar: float, args: object = None) -> float:
    """Mean of a number over all processes; the number itself where there is one process.

    `args` is the original's second parameter. It is not read: the processes know how many they are.
    """
    return idist.all_reduce(scalar) / idist.get_world_size()


def setup_distributed(device_name: str | None, local_rank: int) -> torch.device:
    """Join the launcher's other processes, if there is a launcher; returns this process's device.

    Args:
        device_name: cpu, cuda or cuda:N (None = cuda where there is one).
        local_rank: this process's number on its machine (-1 = there is no launcher).

    Raises:
        UserError: more processes than GPUs.
    """
    device = torch.device(device_name or default_device())
    if local_rank == -1:
        return device
    if device.type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(f"--nproc_per_node: more processes than this machine has GPUs, {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:  # machines count by themselves
        idist.initialize(backend)
    else:  # the launcher's store still has the addresses of the processes that it restarts
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        torch.distributed.init_process_group(
            backend, store=torch.distributed.PrefixStore(f"attempt {attempt}", store),
            rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        )  # fmt: skip
    return device


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
    """Give every process the first one's parameters and buffers."""
    if idist.get_world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.detach(), src=0)


def max_over_processes(number: int) -> int:
    """The greatest of all processes' numbers, compared from CPU to CPU: no process waits for its GPU."""
    if idist.get_world_size() == 1:
        return number
    tensor = torch.tensor(number)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, _cpu_group())
    return int(tensor)


@functools.cache
def _cpu_group() -> torch.distributed.ProcessGroup | None:
    """A group of all processes that has CPUs talk; None = the default one, if it does."""
    return None if torch.distributed.get_backend() == "gloo" else torch.distributed.new_group(backend="gloo")


@contextlib.contextmanager
def one_line_for_a_lost_process(remedy: str) -> Iterator[None]:
    """Turn what communication raises when another process of the run has died into a UserError that names a remedy."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):  # gloo's errors have no class
            message = f"another process of this run is gone; {remedy} ({first_line(error)[:200]})"
            raise UserError(message) from error
        raise
