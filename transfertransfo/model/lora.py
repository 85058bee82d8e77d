"""LoRA (Hu et al. 2021) through peft: small trained matrices beside the frozen ones of a model that stays as it is.

A run folder then holds these matrices, the dialog tokens' embeddings, the choice head, and where the model is.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from transfertransfo.errors import UserError, require

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "multiple_choice_head"
Network = Any  # a PreTrainedModel, or peft's around it, an optional library's


def add_adapter(pretrained: PreTrainedModel, rank: int, tokens: Sequence[int], base: str) -> Network:
    """The model with adapters of this rank, scaled by alpha / rank = 2, at all linear layers of its blocks.

    Trained are those, the embeddings of `tokens` (input and output) and the choice head; nothing else.

    Args:
        base: where the model is, for the adapter's record.

    Raises:
        UserError: no peft, or a model whose output has a bias, which peft leaves out.
    """
    require("--lora_rank", "peft")
    from peft import LoraConfig, get_peft_model

    output = pretrained.get_output_embeddings()
    if getattr(output, "bias", None) is not None:
        raise UserError(f"--lora_rank {rank}: a {pretrained.config.model_type} model, whose output layer has a bias")
    adapted, others = linear_layers(pretrained)
    names = {last_part(name) for name in adapted}
    embeddings = (pretrained.get_input_embeddings(), output)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(names),
        exclude_modules=[name for name in others if last_part(name) in names] or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in adapted.values()),
        modules_to_save=[HEAD],
        trainable_token_indices={
            name: list(tokens) for name, module in pretrained.named_modules() if module in embeddings
        },
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a name that transformers changed
        network = get_peft_model(pretrained, config)
    config.base_model_name_or_path = os.path.abspath(base) if os.path.exists(base) else base
    return network


def text_parts(pretrained: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The parts of a model that a text passes through: not a vision tower."""
    return pretrained.get_decoder(), pretrained.get_input_embeddings(), pretrained.get_output_embeddings()


def linear_layers(pretrained: PreTrainedModel) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The linear layers of a model's blocks by their names, and those of parts that no text passes through."""
    inside: dict[str, nn.Module] = {}
    outside: dict[str, nn.Module] = {}
    passed = {layer for part in text_parts(pretrained) for layer in part.modules()}
    heads = (pretrained.get_output_embeddings(), *pretrained.get_submodule(HEAD).modules())
    for name, layer in pretrained.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and layer not in heads:
            (inside if layer in passed else outside)[name] = layer
    return inside, outside


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def is_adapter(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, CONFIG))


def base_of(folder: str) -> str:
    """The checkpoint that a folder's adapter was trained on."""
    try:
        return json.loads(Path(folder, CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{Path(folder, CONFIG)}: no adapter's configuration") from error


def rank_of(network: Network) -> int:
    """The rank of a model's adapter; 0 where it has none."""
    return 0 if isinstance(network, PreTrainedModel) else network.active_peft_config.r


def load_adapter(pretrained: PreTrainedModel, folder: str) -> Network:
    """The model with a folder's adapter, ready to be trained on.

    Raises:
        UserError: no peft.
        Exception: whatever peft raises of a damaged adapter; ValueError of weights that are not the adapter's.
    """
    require(f"--model_checkpoint {folder}", "peft")
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings(action="ignore"):
        network = PeftModel.from_pretrained(pretrained, folder, is_trainable=True)
        wanted = get_peft_model_state_dict(network, save_embedding_layers=False).keys()
    with safe_open(os.path.join(folder, WEIGHTS), "pt") as file:
        if strange := wanted ^ set(file.keys()):  # peft begins what is missing anew, and passes over the rest
            raise ValueError(f"its weights are not those of the adapter: {len(strange)} differ, as {min(strange)}")
    return network


def merge(network: Network) -> PreTrainedModel:
    """The model with its adapter, if it has one, worked into its weights; `network` is of no use then."""
    return network.merge_and_unload() if rank_of(network) else network


def save_network(network: Network, folder: str, weights: dict[str, Tensor] | None, largest: str) -> None:
    """Write a model as transformers does; of one with an adapter write the adapter alone, as peft does.

    Args:
        weights: the tensors by their names, where those of the model itself are in shards.
        largest: size beyond which the weights are several files.
    """
    if not rank_of(network):
        return network.save_pretrained(folder, state_dict=weights, max_shard_size=largest)
    # without the embeddings, else it would ask the hub about the model
    network.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
    os.remove(os.path.join(folder, "README.md"))  # a form to be filled in
