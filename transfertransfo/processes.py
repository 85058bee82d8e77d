"""Several processes of one run: how they find one another, share out work, and what one says when another is gone."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from transfertransfo.errors import SettingError, UserError, first_line


def setup_distributed(device_name: str, local_rank: int, *, alone: bool = False) -> torch.device:
    """Join the launcher's other processes, if there is a launcher; returns this process's device.

    Args:
        device_name: cpu, cuda or cuda:N.
        local_rank: this process's number on its machine (-1 = there is no launcher).
        alone: whether to make a group of this process alone where there is no launcher, as shards need one.

    Raises:
        UserError: more processes than GPUs, or no launcher although there is a number.
    """
    device = torch.device(device_name)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if local_rank == -1:
        if alone:
            own = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=own, rank=0, world_size=1)
        return device
    check_launched()
    if device.type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(f"--nproc_per_node: more processes than this machine has GPUs, {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:  # machines count by themselves
        torch.distributed.init_process_group(backend)
    else:  # the launcher's store still has the addresses of the processes that it restarts
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        torch.distributed.init_process_group(
            backend, store=torch.distributed.PrefixStore(f"attempt {attempt}", store),
            rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        )  # fmt: skip
    return device


def check_launched() -> None:
    """Check that a launcher has said where the processes of the run find one another.

    Raises:
        SettingError: it has not.
    """
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            message = f"LOCAL_RANK or local_rank: given, but the environment variable {name} is {value!r}"
            remedy = "start several processes with torchrun, and one without these"
            raise SettingError(f"{message}; {remedy}", "local_rank")


def finish_distributed() -> None:
    """Take leave of the other processes, if there are some."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    cpu_group.cache_clear()


def rank() -> int:
    """This process's number among all of them; 0 where it is alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def n_processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@functools.cache
def cpu_group() -> torch.distributed.ProcessGroup | None:
    """A group of all processes that has CPUs talk; None = the default one, if it does."""
    return None if torch.distributed.get_backend() == "gloo" else torch.distributed.new_group(backend="gloo")


def gather(item: Any) -> list:
    """The values that the processes have given, in the order of their numbers."""
    items = [item] * n_processes()
    if len(items) > 1:
        torch.distributed.all_gather_object(items, item, cpu_group())
    return items


@contextlib.contextmanager
def one_process_first() -> Iterator[None]:
    """Have the first process of each machine do what the others then find done, as a file in a cache."""
    waits = n_processes() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
    if waits:
        torch.distributed.barrier(cpu_group())
    yield
    if n_processes() > 1 and not waits:
        torch.distributed.barrier(cpu_group())


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
