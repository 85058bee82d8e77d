"""Checkpoints loaded as double-head models."""

import copy
import logging
import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from transfertransfo.data.sources import recorded
from transfertransfo.data.tokenization import knows_dialog_tokens
from transfertransfo.errors import SettingError, UserError, first_line
from transfertransfo.model.checks import check_depth, check_finite, check_fit, check_heads, check_settings
from transfertransfo.model.double_heads import (
    DoubleHeads,
    add_special_tokens_,
    base_digest,
    default_device,
    halve_,
    merge_adapter_,
)
from transfertransfo.model.gguf import load_gguf
from transfertransfo.model.heads import FAMILIES, double_heads_class
from transfertransfo.model.lora import CONFIG, is_adapter, load_adapter, rank_of, read_adapter
from transfertransfo.model.packing import check_packing_
from transfertransfo.model.quantization import can_quantize, quantize_
from transfertransfo.model.sharding import (
    NotStoredSo,
    Place,
    blocks_of,
    on_cpu_without_memory,
    parameters_on_meta,
    places_of,
    shard_,
    weight_places,
    with_drawn_values,
)
from transfertransfo.model.sources import (
    cannot_load,
    download_pretrained_model,
    has_weights,
    load_config,
    load_tokenizer,
    pretrained_arguments,
    resolve_checkpoint,
    unusable,
)

logger = logging.getLogger(__name__)


def load_model(
    checkpoint: str | Path, device: str | torch.device = "cpu", *, from_scratch: bool = False, in_shards: bool = False
) -> DoubleHeads:
    """The double-head model of a hub name, a folder, a GGUF file or the URL of an archive, in float32, for evaluation.

    Args:
        from_scratch: give random weights where the checkpoint is a folder without any, and say so.
        in_shards: leave its blocks without values, as `into_shards_` takes it.

    Raises:
        UserError: no such model, no weights, or a model that cannot be used so.
    """
    folder = resolve_checkpoint(checkpoint)
    config = load_config(checkpoint)
    if not has_weights(folder) and not from_scratch:
        fault = f"model_checkpoint {checkpoint}: no weights there"
        if any(Path(folder).glob("checkpoint_*")):  # a run that ended before its first export
            message = f"{fault} yet; go on with train.py and resume {shlex.quote(folder)}"
            raise SettingError(message, "model_checkpoint", "resume")
        raise SettingError(f"{fault}; train it first, with train.py", "model_checkpoint")
    load = load_adapted if is_adapter(folder) else load_whole
    model = load(checkpoint, folder, config, device, in_shards=in_shards)
    return (model if in_shards else model.to(device)).eval()


def load_whole(
    checkpoint: str | Path, folder: str, config: PretrainedConfig, device: str | torch.device, *, in_shards: bool
) -> DoubleHeads:
    """The model of a resolved checkpoint without an adapter; with random weights where it has none.

    Args:
        device: where a model that is to be in shards is tried.
    """
    try:
        family = double_heads_class(config)
    except UserError as error:
        raise unusable(checkpoint, str(error)) from error
    if not os.path.exists(folder) and find_adapter_config_file(folder):  # whose configuration peft would follow
        raise unusable(checkpoint, "an adapter on the hub; give a local folder instead")
    unread: dict[nn.Parameter, Place] = {}
    try:
        if has_weights(folder) and in_shards:
            pretrained, new_head, unread = read_around_blocks(family, folder, config)
        elif has_weights(folder):
            pretrained, new_head = read_weights(family, folder, config)
            check_finite(pretrained.named_parameters())
        else:
            logger.info("%s holds no weights: the model begins with random ones", checkpoint)
            pretrained, new_head = family(config), True
    except Exception as error:  # of a damaged file: OSError, SafetensorError, UnpicklingError, RuntimeError, ...
        raise cannot_load(checkpoint, "weights" if has_weights(folder) else "config.json", error) from error
    model = DoubleHeads(pretrained).eval()
    model.new_head, model.unread = new_head, unread
    try:
        check_settings(model)
        if unread:  # the answer is the configuration's, whatever the values
            with with_drawn_values(model, device):
                check_computation_(model.to(device), checkpoint)
        else:
            check_computation_(model, checkpoint)
    except ValueError as error:
        raise cannot_load(checkpoint, "config.json", error) from error
    return model


def check_computation_(model: DoubleHeads, checkpoint: str | Path) -> None:
    """Check that a model computes what is asked of it, and find how it takes a mask.

    Raises:
        UserError: it does not.
    """
    try:
        if model.pretrained.config.model_type not in FAMILIES:
            check_packing_(model, checkpoint)
        check_heads(model)
    except UserError:
        raise
    except Exception as error:  # of sizes that do not go together: RuntimeError, IndexError, UnboundLocalError, ...
        raise cannot_load(checkpoint, "config.json", error) from error


def into_shards_(model: DoubleHeads, checkpoint: str | Path, device: torch.device, *, bf16: bool = False) -> None:
    """Leave to this process its share of a model that was loaded for it (`shard_`).

    Raises:
        UserError: the values cannot be read.
    """
    try:
        shard_(model, device, model.unread, bf16=bf16)
    except (OSError, SafetensorError) as error:
        raise cannot_load(checkpoint, "weights", error) from error
    model.unread = {}


def read_around_blocks(
    family: type[PreTrainedModel], checkpoint: str, config: PretrainedConfig
) -> tuple[PreTrainedModel, bool, dict[nn.Parameter, Place]]:
    """As `read_weights`, without the values of the blocks' parameters; and the places of these.

    Where they cannot be read one by one the model is read as a whole, and a line says so.

    Raises:
        ValueError: the weights are not those of the configuration's model.
    """
    check_depth(config, checkpoint)
    without = copy.deepcopy(config)
    without.get_text_config().num_hidden_layers = 0
    with parameters_on_meta():
        hollow, around = family(config), family(without)
    blocks = blocks_of(hollow)
    prefix = hollow.base_model_prefix
    (path,) = (name for name, module in hollow.named_modules() if module is blocks)
    inside = {name: value for name, value in hollow.state_dict(keep_vars=True).items() if name.startswith(f"{path}.")}
    parameters: dict[str, Any] = {name: value for name, value in inside.items() if isinstance(value, nn.Parameter)}
    try:
        if any(value.shape != hollow.get_parameter(name).shape for name, value in around.named_parameters()):
            raise NotStoredSo("there are tables with a part for each block")  # Gemma 4's
        places = places_of(inside, prefix, weight_places(checkpoint))
    except NotStoredSo as reason:
        logger.info("Each process reads the whole model before it leaves all but its share: %s", reason)
        return *read_weights(family, checkpoint, config), {}
    for name in inside.keys() - parameters.keys():  # buffers, as the biases by which DeepSeek-V3 chooses experts
        with safe_open(places[name].file, "pt") as file:
            inside[name].copy_(file.get_tensor(places[name].key))
    elsewhere = {key for name in inside for key in (name, name.removeprefix(f"{prefix}."))}
    pretrained, new_head = read_weights(family, checkpoint, without, elsewhere)
    parent, _, attribute = path.rpartition(".")
    setattr(pretrained.get_submodule(parent), attribute, blocks)
    pretrained.config.get_text_config().num_hidden_layers = config.get_text_config().num_hidden_layers
    return pretrained, new_head, {parameter: places[name] for name, parameter in parameters.items()}


def read_weights(
    family: type[PreTrainedModel], checkpoint: str, config: PretrainedConfig, elsewhere: Collection[str] = ()
) -> tuple[PreTrainedModel, bool]:
    """The model of a resolved checkpoint, in float32, and whether its choice head is a new one.

    Args:
        elsewhere: names of weights that the model has no place for, and need not have.

    Raises:
        ValueError: the weights are not those of the configuration's model.
    """
    arguments = pretrained_arguments(checkpoint)
    loaded: Any  # a pair, since it is asked for
    if "gguf_file" in arguments:
        return load_gguf(family, checkpoint, config, check_fit)
    check_depth(config, checkpoint)
    loaded = family.from_pretrained(
        **arguments, config=config, dtype=torch.float32, weights_only=True, output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_fit` names them
    )  # fmt: skip
    pretrained, found = loaded
    new_head = check_fit(pretrained, found, elsewhere)
    separate_(pretrained)
    return pretrained, new_head


def separate_(pretrained: PreTrainedModel) -> None:
    """Record that input and output embeddings are not the same, where a checkpoint holds both and they differ.

    transformers keeps them apart then, but would tie them when it resizes them, and the output's be lost. Version 5.3
    keeps equal ones apart too, as a checkpoint of 2019 holds them. Those are tied here.
    """
    inputs: Any = pretrained.get_input_embeddings()
    outputs: Any = pretrained.get_output_embeddings()
    tied = getattr(pretrained.config.get_text_config(), "tie_word_embeddings", False)
    if tied and torch.equal(inputs.weight, outputs.weight):
        outputs.weight = inputs.weight
    if inputs.weight is not outputs.weight:
        for config in (pretrained.config, pretrained.config.get_text_config()):
            config.tie_word_embeddings = False


def load_adapted(
    checkpoint: str | Path, folder: str, config: PretrainedConfig, device: str | torch.device, *, in_shards: bool
) -> DoubleHeads:
    """The model of a run folder that holds an adapter; the model that it adapts is loaded from where it was then."""
    fields = read_adapter(folder)
    base = fields["base_model_name_or_path"]
    try:
        base_folder = resolve_checkpoint(base)
        if is_adapter(base_folder):
            raise UserError(f"{base}: an adapter itself")
        if not has_weights(base_folder):
            raise UserError(f"{base}: no weights there")
        model = load_whole(base, base_folder, load_config(base), device, in_shards=in_shards)
    except UserError as error:
        where = f"base_model_name_or_path of {os.path.join(folder, CONFIG)} says where that is"
        raise SettingError(f"{checkpoint} adapts another model: {error}; {where}", *error.names) from error
    for name in ("history_start", "token_types", "quantize"):
        if hasattr(config, name):
            setattr(model.pretrained.config, name, getattr(config, name))
    try:
        check_settings(model)
        model.pretrained.resize_token_embeddings(config.get_text_config().vocab_size, mean_resizing=False)
        with on_cpu_without_memory(model):
            model.network = load_adapter(model.pretrained, folder, fields)
        check_finite((name, tensor) for name, tensor in model.network.named_parameters() if tensor.requires_grad)
    except UserError:  # no peft
        raise
    except Exception as error:  # of a damaged file: OSError, SafetensorError, TypeError, RuntimeError, ...
        raise cannot_load(checkpoint, "adapter", error) from error
    model.new_head = False
    begun_beside = recorded(folder).get("base_digest")
    if begun_beside and not in_shards and begun_beside != base_digest(model):
        logger.warning("%s was trained beside other weights than %s has now: expect other replies", checkpoint, base)
    return model


def load_finetuned(
    checkpoint: str,
    gpt_tokenization: str | None = None,
    device: str | None = None,
    history_start: int | None = None,
    fp16: str = "",
    *,
    force: bool = False,
    sharded: bool = False,
) -> tuple[DoubleHeads, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint that was fine-tuned on dialogs; "" = the one of 2019, downloaded.

    `gpt_tokenization` and `history_start` stand in for what the checkpoint records, where they are given. An adapter is
    worked into the weights, unless it was trained over quantised ones, which they are again. `fp16` is "" or "bf16".
    With `force` any checkpoint is taken. With `sharded` the model is in shards over all processes, and an adapter stays
    beside its weights.

    Raises:
        UserError: as `load_model`, or the checkpoint does not know the dialog tokens.
    """
    checkpoint = checkpoint or download_pretrained_model()
    tokenizer = load_tokenizer(checkpoint, gpt_tokenization)
    if not knows_dialog_tokens(tokenizer):
        if not force:
            raise unusable(checkpoint, "not fine-tuned on dialogs yet; do that first, with train.py")
        logger.warning("%s was not fine-tuned on dialogs: expect nonsense, or no reply at all", checkpoint)
    device = device or default_device()
    model = load_model(checkpoint, device if sharded else "cpu", in_shards=sharded)
    if model.new_head:
        logger.warning("%s has no choice head: hits@1 and all that ranks replies are as good as chance", checkpoint)
    add_special_tokens_(model, tokenizer)
    if history_start is not None:
        model.history_start = history_start
    if must_quantize(model, checkpoint, sharded=sharded):
        quantize_(model, device, bf16=bool(fp16))
    elif not sharded:
        model.to(device)
        merge_adapter_(model)
    if fp16:
        halve_(model)
    if fp16 and not sharded:
        try:
            check_heads(model)
        except Exception as error:  # whatever a model's code does with weights of two types
            kind = f"a {model.pretrained.config.model_type} model"
            message = f"fp16 {fp16}: {kind} does not run in it ({first_line(error)}); leave it out"
            raise SettingError(message, "fp16") from error
    if sharded:
        into_shards_(model.requires_grad_(False), checkpoint, torch.device(device))
    return model, tokenizer


def must_quantize(model: DoubleHeads, checkpoint: str, *, sharded: bool) -> bool:
    """Whether the weights beside a model's adapter are to be in 4 bits, as they were in training.

    Where they were, and cannot be now, a line says so.
    """
    if not (model.quantize and rank_of(model.network)):
        return False
    if reason := "in shards" if sharded else "" if can_quantize() else "without bitsandbytes":
        told = "%s was trained over 4-bit weights; %s they are in full precision, and figures differ a little"
        logger.warning(told, checkpoint, reason)
    return not reason
