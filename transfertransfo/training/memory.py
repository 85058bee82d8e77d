"""A device's memory that a training step needs, from the shapes of the tensors that it computes."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # tensors of shapes alone; torch.compile is built on it
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from transfertransfo.data.trees import Batch
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.quantization import quantized_layers
from transfertransfo.model.sharding import blocks_of

GB = 1e9


class Whole(Batch):
    """A batch that always gives the whole mask: blocks depend on its values, and here are shapes only."""

    def blocks(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a training step needs on each device.

    Attributes:
        parameters: what the device holds of them, and what of shards it gathers, or unpacks of 4 bits, at a time.
        gradients: of the parameters that are trained.
        optimizer: AdamW's two moments, and float32 masters where there are some.
        activations: what the forward of the largest batch keeps for the backward, and what the loss needs beside it.
        gradients_stay: whether gradients are there beside all of the activations.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gradients_stay: bool

    @property
    def peak(self) -> int:
        """Bytes at a step's greatest need: gradients come as activations go, unless they were there before."""
        both = self.gradients + self.activations
        return (
            self.parameters + self.optimizer + (both if self.gradients_stay else max(self.gradients, self.activations))
        )

    def __str__(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "activations")
        told = ", ".join(f"{name} {getattr(self, name) / GB:.2f}" for name in parts)
        return f"about {self.peak / GB:.2f} GB a device ({told})"


def estimate_memory(
    model: DoubleHeads,
    batch: Batch,
    device: torch.device,
    *,
    half: torch.dtype | None,
    micro_steps: int,
    n_processes: int,
    sharded: bool,
    checkpointing: bool,
) -> Memory:
    """The memory of steps on batches as long as this one, of a model that is not in shards yet.

    Args:
        half: dtype of the computation, beside parameters in float32 (None = float32 too).
        micro_steps: forwards of an optimizer step.
        checkpointing: whether each block's activations are computed again in the backward.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole, own_gradients = sum(map(_size, model.parameters())), sum(map(_size, trained))
    parameters, gradients, optimizer = whole, own_gradients, 2 * sum(4 * parameter.numel() for parameter in trained)
    if layers := quantized_layers(model):
        unpacked = max(2 * layer.weight.numel() * layer.state.dtype.itemsize for layer in layers)
        parameters += sum(layer.scale_bytes() for layer in layers) + unpacked
    # beside a block's activations that are computed again there are the gradients of all blocks after it
    stay = micro_steps > 1 or checkpointing
    if sharded and n_processes > 1:
        width = (half or torch.float32).itemsize
        count = sum(map(torch.numel, model.parameters()))
        blocks = [sum(map(torch.numel, block.parameters())) for block in blocks_of(model.pretrained)]
        # gathered are the embeddings and heads, a block and the next one, and the block's gradients
        parameters = whole // n_processes + width * (count - sum(blocks) + 3 * max(blocks))
        optimizer //= n_processes
        if micro_steps == 1:  # else they are whole up to the last forward
            gradients //= n_processes
    elif n_processes > 1:
        gradients *= 2  # and the buckets in which they are sent
    activations = activation_bytes(
        model, batch, device, half, cast_parameters=sharded and n_processes > 1, checkpointing=checkpointing
    )
    return Memory(parameters=parameters, gradients=gradients, optimizer=optimizer, activations=activations,
                  gradients_stay=stay)  # fmt: skip


def activation_bytes(
    model: DoubleHeads,
    batch: Batch,
    device: torch.device,
    half: torch.dtype | None,
    *,
    cast_parameters: bool,
    checkpointing: bool,
) -> int:
    """Bytes that the forward and the losses of a batch keep for the backward, beside the parameters.

    The forward runs on tensors without values.

    Args:
        half: as of `estimate_memory`.
        cast_parameters: whether parameters come as `half`, as out of shards. Else autocast copies them, and the copies
            are kept.
    """
    kept: dict[int, Tensor] = {}  # by their memory
    within: dict[int, Tensor] = {}  # of those, what blocks have kept
    depth: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        kept[place] = tensor
        if depth:
            within[place] = tensor
        return tensor

    blocks = blocks_of(model.pretrained)
    hooks = [block.register_forward_pre_hook(lambda *_: depth.append(1)) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: depth.pop() and None) for block in blocks]
    training = model.training
    model.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
            cast = half if cast_parameters else None  # None = as it is
            tensors: dict[Tensor, Tensor] = {
                tensor: torch.empty_like(tensor, device=device, requires_grad=tensor.requires_grad, dtype=cast)
                for tensor in model.parameters()
            }
            tensors |= {tensor: torch.empty_like(tensor, device=device) for tensor in model.buffers()}
            autocast = torch.autocast(device.type, half, enabled=half is not None and not cast_parameters)
            own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
            batch = Whole(*(torch.empty_like(tensor, device=device) for tensor in batch))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                with autocast, replaced(model, tensors):
                    logits, scores = model(batch)
                losses = (cross_entropy(logits.float(), batch.lm_labels, reduction="sum"),
                          cross_entropy(scores.float(), batch.choice_labels, reduction="sum"))  # fmt: skip
            sizes = {place: tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own}
            total = sum(sizes.values())
            if checkpointing:
                again = sum(size for place, size in sizes.items() if place in within)
                embeddings: Any = model.pretrained.get_input_embeddings()
                hidden = batch.input_ids.numel() * embeddings.weight.shape[1]
                total += again // len(blocks) + len(blocks) * hidden * logits.element_size() - again
            del losses
            return total + 2 * logits.numel() * 4  # two gradients of the logits, one after the other softmax's
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def replaced(model: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Compute with other parameters and buffers in place of a model's own.

    `torch.func.functional_call` does not put all of them back where a module has two names, as peft's of tied
    embeddings has.
    """
    own = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    try:
        for held, name, tensor in own:
            held[name] = tensors[tensor]  # type: ignore[assignment]  # torch computes with any tensor
        yield
    finally:
        for held, name, tensor in own:
            held[name] = tensor  # type: ignore[assignment]


def largest_batch(loader: DataLoader) -> Batch:
    """The batch of an epoch that takes the most room, which many short trees can do as well as few long ones."""
    trees: Any = loader.dataset  # torch knows no sequence
    sampler: Any = loader.batch_sampler
    chosen = max(sampler, key=lambda batch: len(batch) * max(sampler.lengths[batch], default=0))
    assert loader.collate_fn
    return loader.collate_fn([trees[i] for i in chosen])


def free_memory(device: torch.device) -> int:
    """Bytes that a device has to give; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return 0


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
