"""The table of docs/scale.md: what models of many sizes need on how many GPUs, computed from their shapes.

python docs/figures/scale.py     # prints it; a minute or two
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from torch.nn import Linear
from transformers import GPT2Config, LlamaConfig, OpenAIGPTConfig, PretrainedConfig

from transfertransfo.data.trees import Batch, Fork, pack
from transfertransfo.model.double_heads import DoubleHeads, halve_frozen_
from transfertransfo.model.heads import double_heads_class
from transfertransfo.model.lora import add_adapter
from transfertransfo.model.sharding import on_cpu_without_memory, parameters_on_meta
from transfertransfo.training.memory import GB, Memory, estimate_memory

CPU = torch.device("cpu")
ROOM = 72  # GB of an 80 GB GPU: what its context, kernels and fragments leave
PEAK, USED = 989e12, 0.4  # FLOP/s of an H100 in bfloat16 by its data sheet; the share that is assumed to arrive
EXAMPLES, TOKENS = 131_438, 200  # of an epoch of PersonaChat; of an example's tree with two candidates, roughly
NF4 = 4.13  # bits of a weight with its quantised scales
CONTEXT, REPLY, TURNS = 256, 32, 4  # tokens of the longest example, and examples of a forward


def llama(width: int, layers: int, inner: int, groups: int) -> PretrainedConfig:
    return LlamaConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
                       num_attention_heads=width // 128, num_key_value_heads=groups)  # fmt: skip


MODELS = {
    "GPT, 117M": OpenAIGPTConfig(),
    "GPT-2 medium, 355M": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 XL, 1.6B": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "Llama's shape, 7B": llama(4096, 32, 11008, 32),
    "13B": llama(5120, 40, 13824, 40),
    "70B": llama(8192, 80, 28672, 8),
}


class Way(NamedTuple):
    """Flags, and what they mean to memory."""

    flags: str
    sharded: bool = False
    checkpointing: bool = False
    rank: int = 0
    quantized: bool = False


WAYS = (
    Way("--fp16 bf16"),
    Way("--fp16 bf16 --gradient_checkpointing", checkpointing=True),
    Way("--fp16 bf16 --sharded", sharded=True),
    Way("--fp16 bf16 --sharded --gradient_checkpointing", sharded=True, checkpointing=True),
    Way("--fp16 bf16 --lora_rank 16 --gradient_checkpointing", checkpointing=True, rank=16),
    Way("--fp16 bf16 --sharded --lora_rank 16 --gradient_checkpointing", sharded=True, checkpointing=True, rank=16),
    Way("--fp16 bf16 --lora_rank 16 --gradient_checkpointing --quantize 4bit", checkpointing=True, rank=16,
        quantized=True),
)  # fmt: skip


def longest() -> Batch:
    turn = Fork([5] * CONTEXT, [1] * CONTEXT, [*range(CONTEXT)], [[6] * REPLY, [7] * REPLY], 1)
    return pack([turn] * TURNS, 0)


def main() -> None:
    print("| model | GPUs | flags | memory a GPU | an epoch of PersonaChat |\n|---|---|---|---|---|")
    for name, config in MODELS.items():
        for gpus in (1, 8, 64):
            print(row(name, config, gpus), flush=True)


def row(name: str, config: PretrainedConfig, gpus: int) -> str:
    """The first way that fits, those first that cost least time."""
    for way in WAYS:
        if way.sharded and gpus == 1:
            continue
        model, memory = needed(config, way, gpus)
        if memory.peak < ROOM * GB:
            # 2 FLOPs a weight and token forward, 4 backward (2 of frozen weights), 2 for computing the forward again
            forward = 2 * sum(map(torch.numel, model.parameters())) * EXAMPLES * TOKENS
            passes = (2 if way.rank else 3) + way.checkpointing
            hours = passes * forward / (gpus * PEAK * USED) / 3600
            time = f"{60 * hours:.2g} min" if hours < 1.5 else f"{hours:.2g} h"
            return f"| {name} | {gpus} | `{way.flags}` | {memory.peak / GB:.0f} GB | {time} |"
    return f"| {name} | {gpus} | does not fit | | |"


def needed(config: PretrainedConfig, way: Way, gpus: int) -> tuple[DoubleHeads, Memory]:
    with parameters_on_meta():
        model = DoubleHeads(double_heads_class(config)(config))
    if way.rank:
        with on_cpu_without_memory(model):
            model.network = add_adapter(model.pretrained, way.rank, range(5), "")
        halve_frozen_(model)
    memory = estimate_memory(
        model, longest(), CPU, half=torch.bfloat16, micro_steps=1, n_processes=gpus, sharded=way.sharded,
        checkpointing=way.checkpointing,
    )  # fmt: skip
    if way.quantized:  # what bitsandbytes makes of them needs the weights themselves: by their number, then
        layers = [
            layer.weight.numel()
            for layer in model.pretrained.get_decoder().modules()
            if isinstance(layer, Linear) and not layer.weight.requires_grad
        ]
        unpacked = 2 * max(layers)  # a layer, and the copy that a product is computed of
        bytes_saved = sum(layers) * (torch.bfloat16.itemsize - NF4 / 8) - unpacked * torch.bfloat16.itemsize
        memory = replace(memory, parameters=memory.parameters - int(bytes_saved))
    return model, memory


if __name__ == "__main__":
    main()
