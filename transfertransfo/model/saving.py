"""A model saved as transformers and peft save it, whole or not at all."""

import copy
import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from transfertransfo.errors import UserError, first_line
from transfertransfo.files import TEMPORARY, move_into_place, own_prefix
from transfertransfo.model.checks import check_finite
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.lora import merge, rank_of, save_network
from transfertransfo.model.sharding import INDEX, is_sharded, whole

LARGEST_FILE = "5GB"  # of weights, as the hub has them


def save_model(model: DoubleHeads, folder: Path | None, *, merge_lora: bool = False) -> None:
    """Write `config.json` and `model.safetensors`, as transformers does, each whole or not at all.

    Weights of more than `LARGEST_FILE` are several files, with an index that changes when all of them are there. All
    processes of a model in shards must call it; those without a folder do not write.

    Of an adapted model `adapter_model.safetensors` and `adapter_config.json` are written in its place, as peft does,
    unless `merge_lora` asks for the whole model that they make.

    Raises:
        UserError: they cannot be written.
    """
    gathered = gather_weights(model, keep=folder is not None) if is_sharded(model) else None
    if folder is None:
        return
    try:
        values: dict[str, torch.Tensor] = dict(model.network.named_parameters())
        if gathered is not None:  # buffers may be infinite, as the bounds in Gemma 4's towers
            values = {name: gathered[name] for name in values.keys() & gathered.keys()}
        check_finite(values.items())
        with tempfile.TemporaryDirectory(dir=folder, prefix=own_prefix("model"), suffix=TEMPORARY) as temporary:
            model.pretrained.config.save_pretrained(temporary)
            if generation := getattr(model.pretrained, "generation_config", None):
                generation.save_pretrained(temporary)
            network = merge(copy.deepcopy(model.network)) if merge_lora else model.network
            save_network(network, temporary, gathered, LARGEST_FILE)
            move_export(Path(temporary), folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder / 'model.safetensors'}: not written ({first_line(error)})") from error


def gather_weights(model: DoubleHeads, *, keep: bool) -> dict[str, torch.Tensor]:
    """The whole tensors that a run folder has of a model in shards, in RAM; one after another is whole on the device.

    Args:
        keep: whether this process is to have them; {} for those that only help.
    """
    model.reshard()  # type: ignore[operator]  # what the last forward has gathered
    adapter = rank_of(model.network)
    gathered: dict[str, torch.Tensor] = {}
    done: dict[int, torch.Tensor] = {}  # tied weights are one tensor
    for name, tensor in model.network.state_dict(keep_vars=True).items():
        if adapter and isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if id(tensor) not in done:
            value = whole(tensor.detach())
            done[id(tensor)] = value.cpu() if keep else torch.empty(0)
        if keep:
            gathered[name] = done[id(tensor)]
    return gathered


def move_export(temporary: Path, folder: Path) -> None:
    """Move a model's files into place; where its weights are several, under new names, so that no two exports mix."""
    index = temporary / INDEX
    files = {file.name: file.name for file in temporary.iterdir() if file != index}
    if index.exists():
        content = json.loads(index.read_text())
        export = "model" + temporary.stem.rpartition(".")[2]
        files |= {name: f"{export}-{name}" for name in set(content["weight_map"].values())}
        content["weight_map"] = {key: files[name] for key, name in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")
    for name, final in files.items():
        move_into_place(temporary / name, folder / final)
    if index.exists():
        move_into_place(index, folder / INDEX)
        for old in folder.glob("model*-of-*.safetensors"):
            if old.name not in files.values():
                old.unlink()
