"""A loaded model checked: settings, weights, both heads, a training step; transformers takes them as they come."""

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from transfertransfo.errors import UserError, first_line
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.lora import HEAD
from transfertransfo.model.sharding import weight_places

logger = logging.getLogger(__name__)

SHORTEST = 4  # tokens of a dialog turn: <bos>, a speaker, a word, <eos>
MASKS = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$")  # constants in files of old
SUMMARY_TYPES = ("cls_index", "last", "first", "mean")  # all the same to a head that is given one token


def check_settings(model: DoubleHeads) -> None:
    """Check the settings that transformers takes as they come.

    Raises:
        ValueError: a value that is none.
    """
    layers = getattr(model.pretrained.config.get_text_config(), "num_hidden_layers", 1)
    if type(layers) is not int or layers < 1:
        raise ValueError(f"num_hidden_layers, n_layer: at least 1 is needed, got {layers!r}")
    if model.quantize not in ("", "4bit"):
        raise ValueError(f'quantize: expected "4bit" or "", got {model.quantize!r}')
    if type(model.token_types) is not bool:
        raise ValueError(f"token_types: expected true or false, got {model.token_types!r}")
    if model.n_positions < SHORTEST:
        raise ValueError(f"n_positions: at least {SHORTEST} are needed, got {model.n_positions}")
    if type(model.history_start) is not int or not 0 <= model.history_start <= model.latest_history_start:
        first = f"expected one of the first {model.latest_history_start} positions"
        raise ValueError(f"history_start: {first}, got {model.history_start!r}")
    if (kind := getattr(model.pretrained.config, "summary_type", "last")) not in SUMMARY_TYPES:
        raise ValueError(f"summary_type: expected one of {', '.join(SUMMARY_TYPES)}, got {kind!r}")


@torch.no_grad()
def check_heads(model: DoubleHeads) -> None:
    """Run both heads on the shortest dialog turn: transformers takes many a configuration that none can be run with.

    Raises:
        ValueError: the choice head is none, or whatever the model raises.
    """
    hidden = shortest_turn(model)
    if not model.lm_logits(hidden).isfinite().all():
        raise ValueError("the logits are not finite")
    if model.choice_scores(hidden).shape != hidden.shape[:2]:
        raise ValueError("summary_use_proj, summary_proj_to_labels: the choice head does not give one score")


def check_step(model: DoubleHeads, *, bf16: bool) -> None:
    """Run a step of training on the shortest dialog turn, with the model as it was prepared; it is left as it was.

    Args:
        bf16: whether it is to be trained by autocast to bfloat16.

    Raises:
        UserError: the model's code, or an adapter's, cannot do it.
    """
    training, device = model.training, model.device.type
    model.train()
    try:
        with torch.random.fork_rng(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            hidden = shortest_turn(model)
            score = model.lm_logits(hidden).float().sum() + model.choice_scores(hidden).float().sum()
        score.backward()
    except Exception as error:
        kind = f"a {model.pretrained.config.model_type} model"
        raise UserError(f"{kind} cannot be trained so ({first_line(error)})") from error
    finally:
        model.zero_grad()
        model.train(training)


def shortest_turn(model: DoubleHeads) -> torch.Tensor:
    """The hidden states of the shortest dialog turn, (1, T, C), with a mask as trees have it."""
    tokens = torch.zeros(1, SHORTEST, dtype=torch.long, device=model.device)
    positions = torch.arange(SHORTEST, device=model.device)[None]
    mask = torch.ones(1, 1, SHORTEST, SHORTEST, dtype=torch.bool, device=model.device).tril()
    return model.hidden_states(tokens, tokens, positions, mask)


def check_depth(config: PretrainedConfig, folder: str) -> None:
    """Check that a folder's weights have the configuration's layers, before these are made.

    Raises:
        ValueError: there are fewer.
    """
    names = weight_places(folder) if os.path.isdir(folder) else {}
    if not names:
        return
    # the first number in a name is its layer's, as of model.layers.3.mlp.experts.7
    numbers = [int(found[1]) for name in names if (found := re.search(r"\.(\d{1,9})\.", name))]
    layers, found_layers = getattr(config.get_text_config(), "num_hidden_layers", 0), max(numbers, default=-1) + 1
    if layers > found_layers:
        message = f"num_hidden_layers is {layers} there, {found_layers} layers are here"
        raise ValueError(f"not those of the model in config.json: {message}")


def check_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that a model's parameters, each with its name, are numbers.

    Raises:
        ValueError: some are NaN or infinite.
    """
    for name, parameter in parameters:
        if not parameter.detach().sum(dtype=torch.float32).isfinite():  # half of the time of asking each number
            raise ValueError(f"not finite: {name}")


def check_fit(pretrained: PreTrainedModel, found: Mapping[str, Any], elsewhere: Collection[str] = ()) -> bool:
    """Check that a checkpoint's weights are the model's; transformers gives those that are missing random values.

    A choice head may be missing as a whole. Weights of another part, as of another head, are left unread.

    Args:
        found: names that transformers found to be missing, unexpected, or of another shape, but for those that it
            passes over.
        elsewhere: unexpected names that are expected to be so.

    Returns:
        Whether the choice head is missing.

    Raises:
        ValueError: weights are missing, are of another shape, or are more than the model has in one of its parts.
    """
    names = pretrained.state_dict().keys()
    head = {name for name in names if name.startswith(f"{HEAD}.")}
    new_head = head <= set(found["missing_keys"])
    missing = [name for name in found["missing_keys"] if not (new_head and name in head)]
    unexpected = set(found["unexpected_keys"]) - set(elsewhere)
    parts = {name.removeprefix(f"{pretrained.base_model_prefix}.").partition(".")[0] for name in names}
    parts |= {name.partition(".")[0] for name in names}
    others = [name for name in unexpected if name.partition(".")[0] not in parts and not missing]
    surplus = [name for name in unexpected if name not in others and not MASKS.search(name)]
    faults = []
    if missing:
        faults.append(f"missing {len(missing)}, as {min(missing)}")
    if surplus:
        faults.append(f"too many {len(surplus)}, as {min(surplus)}")
    if misshapen := found["mismatched_keys"]:
        name, there, here = min(misshapen)
        shapes = f"of the shape {tuple(there)}, in place of {tuple(here)}"
        faults.append(f"another shape {len(misshapen)}, as {name} {shapes}")
    if faults:
        raise ValueError(f"not those of the model in config.json: {'; '.join(faults)}")
    if others:
        logger.info("Not read, since the model has no such part: %s", ", ".join(sorted(others)[:5]))
    return new_head
