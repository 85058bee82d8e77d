"""LoRA (Hu et al. 2021) through peft: small trained matrices beside the frozen ones of a model that stays as it is.

A run folder then holds these matrices, the dialog tokens' embeddings, the choice head, and where the model is.
"""

import contextlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from transfertransfo.data.reading import kind
from transfertransfo.errors import SettingError, UserError, first_line, require, shortened
from transfertransfo.model.sources import MAX_CONFIG

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "multiple_choice_head"
Network = Any  # a PreTrainedModel, or peft's around it, an optional library's


def _are_names(value: Any) -> bool:
    """Whether a value is a list of names: peft takes a text for a regular expression, which may never end."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_ids(value: Any) -> bool:
    """Whether a value holds lists of different token ids by name."""
    return isinstance(value, dict) and all(
        isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) and len({*ids}) == len(ids)
        for ids in value.values()
    )


def _are_numbers(value: Any) -> bool:
    """Whether a value holds numbers by patterns such as peft writes for layers of experts, in which nothing repeats."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"\.\*\\\.\w+", name) and type(number) in (int, float) and 1 <= number < math.inf
        for name, number in value.items()
    )


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # passed to peft: what each must be, and a check
    "base_model_name_or_path": ("a text", lambda value: isinstance(value, str)),
    "r": ("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
    "lora_alpha": ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf),
    "lora_dropout": ("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value < 1),
    "target_modules": ("names of layers", lambda value: _are_names(value) and value != []),
    "target_parameters": ("names of parameters", lambda value: value is None or _are_names(value)),
    "rank_pattern": ("ranks by names of parameters", _are_numbers),
    "alpha_pattern": ("numbers by names of parameters", _are_numbers),
    "exclude_modules": ("names of layers", lambda value: value is None or _are_names(value)),
    "modules_to_save": (f'["{HEAD}"]', lambda value: _are_names(value) and value[:1] == [HEAD] and len(value) <= 2),
    "trainable_token_indices": ("token ids by the names of embeddings", lambda value: value is None or _are_ids(value)),
    "fan_in_fan_out": ("true or false", lambda value: type(value) is bool),
    "use_rslora": ("true or false", lambda value: type(value) is bool),
}
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}
UNREAD = {  # fields that peft writes, without effect while the feature that they belong to is off
    "auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip


@contextlib.contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Have peft work as if bitsandbytes were not there, whose import takes a quarter of a chat's start.

    peft's own layers of 4 bits are not used: `quantization.Linear4bit` is.
    """
    name = "bitsandbytes"
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]  # so the import system marks what is not to be found
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


@without_bitsandbytes()
def add_adapter(pretrained: PreTrainedModel, rank: int, tokens: Sequence[int], base: str) -> Network:
    """The model with adapters of this rank, scaled by alpha / rank = 2, at all linear layers of its blocks.

    Trained are those, the embeddings of `tokens` (input and output) and the choice head; nothing else. An output layer
    with a bias is copied as a whole, and `double_heads.freeze_embeddings_` has to keep its other rows: peft leaves out
    the bias of a layer some of whose rows are trained, in computing and in saving.

    Args:
        base: where the model is, for the adapter's record.

    Raises:
        UserError: no peft, or a model that cannot have adapters.
    """
    require("lora_rank", "peft", setting="lora_rank")
    from peft import LoraConfig, get_peft_model

    kind = f"a {pretrained.config.model_type} model"
    copied = biased_output(pretrained)
    if copied and pretrained.config.get_text_config().tie_word_embeddings:
        message = f"lora_rank {rank}: {kind}, whose output layer has a bias and the input's embeddings"
        raise SettingError(message, "lora_rank")
    adapted = linear_layers(pretrained)
    names = {last_part(name) for name in adapted}
    # of a kind of their own, or not for text, of whatever class: peft goes by the names
    others = [name for name, _ in pretrained.named_modules() if last_part(name) in names and name not in adapted]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(names),
        exclude_modules=others or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in adapted.values()),
        modules_to_save=[HEAD, *copied],
        trainable_token_indices={name: list(tokens) for name in embedding_names(pretrained) if name not in copied},
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a name that transformers changed
        try:
            network = get_peft_model(pretrained, config)
        except Exception as error:  # whatever peft does with layers that it does not expect
            message = f"lora_rank {rank}: {kind} cannot have adapters ({first_line(error)})"
            raise SettingError(message, "lora_rank") from error
    config.base_model_name_or_path = os.path.abspath(base) if os.path.exists(base) else base
    return network


def text_parts(pretrained: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The parts of a model that a text passes through: not a vision tower."""
    return pretrained.get_decoder(), pretrained.get_input_embeddings(), pretrained.get_output_embeddings()


def linear_layers(pretrained: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of a model's blocks by their names; those of other classes return more, as of experts."""
    passed = {layer for part in text_parts(pretrained) for layer in part.modules()}
    inside = passed - {pretrained.get_output_embeddings()}
    return {
        name: layer
        for name, layer in pretrained.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and layer in inside
    }


def token_tables(pretrained: PreTrainedModel) -> list[Any]:
    """The layers that have a row for each token: the embeddings, input and output, and Gemma 4's for all its layers."""
    of_layers = getattr(pretrained.get_decoder(), "embed_tokens_per_layer", None)
    tables = [pretrained.get_input_embeddings(), pretrained.get_output_embeddings(), of_layers]
    return [table for table in tables if table is not None]


def embedding_names(pretrained: PreTrainedModel) -> list[str]:
    """The names of a model's token tables; of tied ones both."""
    tables = token_tables(pretrained)
    return [name for name, module in pretrained.named_modules() if module in tables]


def biased_output(pretrained: PreTrainedModel) -> list[str]:
    """The name of a model's output layer, if it has a bias, as Phi's."""
    output = pretrained.get_output_embeddings()
    return [name for name, module in pretrained.named_modules() if module is output and module.bias is not None]


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def is_adapter(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, CONFIG))


def read_adapter(folder: str) -> dict[str, Any]:
    """The fields of a folder's `adapter_config.json` that an ordinary LoRA has.

    peft is to see no others: it imports modules, runs regular expressions and repeats layers as the file says.

    Raises:
        UserError: no such file, or a field that asks for something else.
    """
    file = Path(folder, CONFIG)
    try:
        with file.open("rb") as opened:
            values = json.loads(opened.read(MAX_CONFIG))
        kept = {"base_model_name_or_path": values["base_model_name_or_path"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: no adapter's configuration") from error
    for name, value in values.items():
        expected, is_good = FIELDS.get(name, ("", None))
        if is_good and not is_good(value):
            got = kind(value) if isinstance(value, dict | list) else shortened(json.dumps(value))
            raise UserError(f"{file}: {name}: expected {expected}, got {got}")
        if is_good:
            kept[name] = value
        elif name not in UNREAD and value not in FIXED.get(name, (None, False, {}, [])):
            raise UserError(f"{file}: {shortened(name)}: this kind of adapter is not read here; an ordinary LoRA is")
    return kept


def rank_of(network: Network) -> int:
    """The rank of a model's adapter; 0 where it has none."""
    return 0 if isinstance(network, PreTrainedModel) else network.active_peft_config.r


@without_bitsandbytes()
def load_adapter(pretrained: PreTrainedModel, folder: str, fields: dict[str, Any]) -> Network:
    """The model with a folder's adapter, ready to be trained on.

    Args:
        fields: of its configuration, as `read_adapter` gives them.

    Raises:
        UserError: no peft.
        Exception: whatever peft raises of a damaged adapter; ValueError of weights that are not the adapter's.
    """
    require(f"model_checkpoint {folder}", "peft", setting="model_checkpoint")
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    layer: Any = pretrained.get_input_embeddings()
    rows, embeddings = len(layer.weight), embedding_names(pretrained)
    for name, ids in (fields.get("trainable_token_indices") or {}).items():
        if name not in embeddings or max(ids, default=0) >= rows:
            message = f"no embeddings of this model, or beyond their {rows} rows"
            raise ValueError(f"trainable_token_indices: {shortened(name)}: {message}")
    if strange := {*fields.get("modules_to_save", ())} - {HEAD, *biased_output(pretrained)}:
        raise ValueError(f"modules_to_save: {shortened(min(strange))}: no output layer of this model with a bias")
    with safe_open(os.path.join(folder, WEIGHTS), "pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    largest = max((shape[0] for name, shape in there.items() if ".lora_A." in name), default=0)
    config = LoraConfig(**fields)
    if (rank := max(config.r, *(config.rank_pattern or {}).values(), 0)) > largest:  # before memory is taken for it
        raise ValueError(f"r or rank_pattern is {rank}, that of its weights {largest}")
    with warnings.catch_warnings(action="ignore"):
        network = PeftModel(pretrained, config)
        state = get_peft_model_state_dict(network, save_embedding_layers=False)
        wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
        # peft would begin what is missing anew, and pass over the rest
        if strange := {name for name, _ in wanted.items() ^ there.items()}:
            message = f"{len(strange)} differ by name or shape, as {min(strange)}"
            raise ValueError(f"its weights are not those of the adapter: {message}")
        set_peft_model_state_dict(network, load_file(os.path.join(folder, WEIGHTS)))
    return network


@without_bitsandbytes()
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
