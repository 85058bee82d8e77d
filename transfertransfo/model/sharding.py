"""A model in shards, one a process, by torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277).

Each block of the decoder is a unit: its parameters are whole on a device while it computes, and else every process
holds a part of their rows. Embeddings, last norm and heads are one more unit, which stays whole from the forward to the
end of the backward.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.utils import cached_file

from transfertransfo.processes import n_processes, rank

INDEX = "model.safetensors.index.json"  # of weights in several files


class NotStoredSo(Exception):
    """A checkpoint whose weights cannot be read one by one, as those in a pickle or under other names."""


class Place(NamedTuple):
    """Where a parameter's values are: a safetensors file, and the name that they have in it."""

    file: str
    key: str


def blocks_of(pretrained: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model's decoder: of its lists of modules that with the most parameters."""
    lists = [module for module in pretrained.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(map(torch.numel, blocks.parameters())))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Make modules whose parameters have shapes and no values; buffers have theirs."""

    def without_values(module: nn.Module, name: str, value: nn.Parameter) -> Any:  # torch's types know of None alone
        return nn.Parameter(value.detach().to("meta"), value.requires_grad)

    hook = register_module_parameter_registration_hook(without_values)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        hook.remove()


@contextmanager
def standing_in(module: nn.Module, make: Callable[[str, nn.Parameter], torch.Tensor]) -> Iterator[None]:
    """Put other tensors in the place of parameters on meta, for a while.

    Args:
        make: gives one, from the parameter and its name.
    """
    places = []
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                places.append((owner, name, parameter))
                setattr(owner, name, nn.Parameter(make(f"{prefix}.{name}", parameter), parameter.requires_grad))
    try:
        yield
    finally:
        for owner, name, parameter in places:
            parameter.requires_grad_(getattr(owner, name).requires_grad)
            setattr(owner, name, parameter)


def on_cpu_without_memory(module: nn.Module) -> AbstractContextManager[None]:
    """Have parameters on meta look like ones on the CPU: peft puts an adapter where the weights beside it are."""
    return standing_in(module, lambda _, parameter: torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))


def with_drawn_values(module: nn.Module, device: torch.device | str) -> AbstractContextManager[None]:
    """Have parameters on meta look like drawn ones, matrices so that what they give has the scale of what they take.

    They are the same each time, and a matrix takes no memory: each row is the one above it, moved on by a number.
    Experts, whose matrices a kernel wants in one piece, are the same in all blocks.
    """
    longest = max((sum(parameter.shape) for parameter in module.parameters()), default=0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * longest + 1, generator=generator).to(device)
    experts: dict[torch.Size, torch.Tensor] = {}

    def draw(_: str, parameter: nn.Parameter) -> torch.Tensor:
        shape, start = parameter.shape, int(torch.randint(longest + 1, (), generator=generator))
        if shape in experts:
            return experts[shape]
        scaled = noise * (max(1, shape[-1]) ** -0.5 if len(shape) > 1 else 1.0)
        drawn = scaled.as_strided(shape, (1,) * len(shape), start)
        if len(shape) > 2:
            drawn = experts[shape] = drawn.contiguous()
        return drawn

    return standing_in(module, draw)


def weight_places(checkpoint: str) -> dict[str, Place]:
    """The tensors of a resolved checkpoint's safetensors files by their names; {} where it has no such files."""
    single = _find(checkpoint, "model.safetensors")
    if single:
        with safe_open(single, "pt") as file:
            return {key: Place(single, key) for key in file.keys()}  # noqa: SIM118  # no dict
    index = _find(checkpoint, INDEX)
    if not index:
        return {}
    with open(index) as file:
        names: dict[str, str] = json.load(file)["weight_map"]
    files = {name: _find(checkpoint, name) for name in sorted(set(names.values()))}
    if missing := [name for name, path in files.items() if not path]:
        raise ValueError(f"{missing[0]} is missing")
    return {key: Place(files[name], key) for key, name in names.items()}


def _find(checkpoint: str, name: str) -> str:
    """The path of a file of a folder, or of a hub's model in the cache; "" where there is none."""
    if os.path.isdir(checkpoint):
        path = os.path.join(checkpoint, name)
        return path if os.path.isfile(path) else ""
    return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False) or ""


def places_of(tensors: Mapping[str, torch.Tensor], prefix: str, found: Mapping[str, Place]) -> dict[str, Place]:
    """Of each tensor the place of its values, by its name in transformers or that without the model's prefix.

    Raises:
        NotStoredSo: one is not there under either name.
        ValueError: one has another shape.
    """
    places = {}
    for name, tensor in tensors.items():
        place = found.get(name) or found.get(name.removeprefix(f"{prefix}."))
        if place is None:
            raise NotStoredSo(f"no {name} in the safetensors files there")
        with safe_open(place.file, "pt") as file:
            shape = file.get_slice(place.key).get_shape()
        if tuple(shape) != tuple(tensor.shape):
            raise ValueError(f"{place.key} has the shape {tuple(shape)}, the model's {tuple(tensor.shape)}")
        places[name] = place
    return places


def own_rows(rows: int) -> slice:
    """The rows of a parameter that this process holds, as torch.chunk cuts them."""
    size = math.ceil(rows / n_processes())
    return slice(min(rank() * size, rows), min((rank() + 1) * size, rows))


def shard_(model: Any, device: torch.device, unread: Mapping[nn.Parameter, Place], *, bf16: bool) -> None:
    """Leave to this process its share of the rows of each of a `DoubleHeads`' parameters, on its device.

    Args:
        unread: parameters on meta. Of these each process reads its share alone.
        bf16: whether parameters are rounded to bfloat16 for all that is computed. The shards, their gradients and what
            the optimizer knows of them stay in their own precision.
    """
    mesh = init_device_mesh(device.type, (n_processes(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    places = {name: unread[parameter] for name, parameter in model.named_parameters() if parameter in unread}
    for block in blocks_of(model.pretrained):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    shards, parameters = {}, dict(model.named_parameters())
    for name, place in places.items():
        parameter = parameters[name]
        with safe_open(place.file, "pt") as file:
            part = file.get_slice(place.key)[own_rows(len(parameter))].to(device, parameter.dtype, copy=True)
        shards[name] = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=parameter.shape,
                                          stride=parameter.stride())  # fmt: skip
    model.load_state_dict(shards, strict=False, assign=True)
    _gather_for_methods_(model, ("hidden_states", "lm_logits", "choice_scores"))


def _gather_for_methods_(model: Any, names: tuple[str, ...]) -> None:
    """Have methods gather parameters as `forward` does, but for a method that another one of them calls."""
    inside: list[str] = []

    def outermost(plain: Callable, gathering: Callable) -> Callable:
        @functools.wraps(plain)
        def method(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return plain(*args, **kwargs)
            inside.append(plain.__name__)
            try:
                return gathering(*args, **kwargs)
            finally:
                inside.pop()

        return method

    model.forward = outermost(model.forward, model.forward)  # whose parameters the module's own hooks gather
    for name in names:
        plain = getattr(model, name)
        register_fsdp_forward_method(model, name)
        setattr(model, name, outermost(plain, getattr(model, name)))


def own_part(tensor: torch.Tensor, like: DTensor) -> DTensor:
    """This process's rows of a tensor that each one has whole, cut as another one's are."""
    part = tensor[own_rows(len(tensor))]
    return DTensor.from_local(part, like.device_mesh, [Shard(0)], run_check=False, shape=tensor.shape,
                              stride=tensor.stride())  # fmt: skip


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
