"""Any decoder with two heads behind one interface: hidden states of a batch, next-token logits, choice scores.

The heads are those of TransferTransfo (Wolf et al. 2019, section 3): the model's own language-model head and a linear
choice head that reads one token of each candidate. Parameters keep transformers' names, so that a checkpoint is
exchanged with transformers' own classes in both directions.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, SPECIAL_TOKENS, nearest_tokens, special_ids
from transfertransfo.data.trees import Batch, Blocks
from transfertransfo.errors import SettingError, UserError
from transfertransfo.model.gpt import GPTModel
from transfertransfo.model.heads import FAMILIES
from transfertransfo.model.lora import (
    HEAD,
    Network,
    add_adapter,
    merge,
    rank_of,
    text_parts,
    token_tables,
)
from transfertransfo.model.sharding import Place, blocks_of, on_cpu_without_memory, own_part, whole

logger = logging.getLogger(__name__)


class DoubleHeads(nn.Module):
    """The one interface of all model families, over a transformers model with `multiple_choice_head`.

    Args:
        network: that model, or peft's around it.

    Attributes:
        additive_mask: whether its attention adds the mask to the scores; if not, it takes True and False.
        window_by: how it takes masks of the layers that look back over a sliding window only: "layer type", each kind
            of layer its own; "model", as all are of that kind; "" = it does not, and sequences end with the window.
        new_head: whether the choice head was in no checkpoint and waits to be trained.
        unread: parameters that have no values yet, and where these are.
        digest: what `base_digest` gave before the weights were quantised ("" = they are not).
    """

    def __init__(self, network: Network):
        super().__init__()
        self.network = network
        self.additive_mask = False
        self.window_by = ""
        self.new_head = False
        self.unread: dict[nn.Parameter, Place] = {}
        self.digest = ""

    @property
    def pretrained(self) -> PreTrainedModel:
        return self.network if isinstance(self.network, PreTrainedModel) else self.network.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.pretrained.device

    @property
    def n_positions(self) -> int:
        """The longest sequence that the model attends to, in tokens: its positions, or what `window_by` leaves."""
        positions = getattr(self.pretrained.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        return positions if self.window_by else min(positions, self.window or sys.maxsize)

    @property
    def window(self) -> int | None:
        """How many tokens a token attends to, with itself, in layers with a sliding window; None = no such layer."""
        return getattr(self.pretrained.config.get_text_config(), "sliding_window", None) or None

    @property
    def latest_history_start(self) -> int:
        """Half of the positions: the rest is for the history and the reply."""
        return self.n_positions // 2

    @property
    def history_start(self) -> int:
        """Position at which the history begins (`inputs.context_positions`); saved with the model."""
        return getattr(self.pretrained.config, "history_start", 0)

    @history_start.setter
    def history_start(self, position: int) -> None:
        if position > self.latest_history_start:
            message = f"history_start {position}: leaves too few of the model's {self.n_positions} positions"
            raise SettingError(message, "history_start")
        self.pretrained.config.history_start = position

    @property
    def token_types(self) -> bool:
        """Whether the speakers' embeddings are added to those of their words; saved with the model."""
        config = self.pretrained.config
        return getattr(config, "token_types", config.model_type in FAMILIES)

    @token_types.setter
    def token_types(self, on: bool) -> None:
        self.pretrained.config.token_types = on

    @property
    def quantize(self) -> str:
        """How the weights beside an adapter are quantised while it is trained: "4bit", or ""; saved with the model."""
        return getattr(self.pretrained.config, "quantize", "")

    @quantize.setter
    def quantize(self, how: str) -> None:
        if how or self.quantize:
            self.pretrained.config.quantize = how

    def hidden_states(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Blocks | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Last hidden states.

        Args:
            input_ids, token_type_ids, position_ids: (B, T), int64.
            attention_mask: (B, 1, T, past + T), True where a query attends to a key; None = causal. GPT takes it
                by blocks too.
            past_key_values: a cache, extended in place by these T positions.

        Returns:
            (B, T, C).
        """
        embeddings: Any = self.pretrained.get_input_embeddings()
        if self.token_types:
            # one look-up for both: the gradient of each is a matrix of the vocabulary's size
            inputs = {"inputs_embeds": embeddings(torch.stack([input_ids, token_type_ids])).sum(0)}
        else:  # Gemma 4 has embeddings of each layer too, which it looks up itself
            inputs = {"input_ids": input_ids}
        masks: Any = attention_mask
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if self.window and self.window_by and past + input_ids.size(1) > self.window:
            assert not isinstance(attention_mask, Blocks)
            masks = self._masks_of_layers(attention_mask, input_ids.size(1), past)
        if self.additive_mask:
            masks = _additive(masks, embeddings.weight.dtype)
        return self.pretrained.base_model(
            **inputs,
            position_ids=position_ids,
            attention_mask=masks,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state

    def _masks_of_layers(self, mask: Tensor | None, length: int, past: int) -> Tensor | dict[str, Tensor]:
        """The mask, (B, 1, T, past + T), as `window_by` says, with the window in it.

        A token's distance to another is that in a tree. Of tokens that go on from a past it is that of their columns.
        """
        assert self.window
        column = torch.arange(past + length, device=self.device)
        if mask is None:
            mask = (column <= column[past:, None])[None, None]
        depth = column.expand(*mask.shape[:2], -1) if past else mask.sum(-1)  # (B, 1, past + T)
        windowed = mask & (depth[..., past:, None] - depth[..., None, :] < self.window)
        return {"full_attention": mask, "sliding_attention": windowed} if self.window_by == "layer type" else windowed

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Scores of each next token: (..., C) -> (..., vocabulary), scaled and capped as the model's own are.

        `packing.check_packing_` compares them with what the model gives.
        """
        config = self.pretrained.config.get_text_config()
        logits = self.pretrained.get_output_embeddings()(hidden)
        if isinstance(scale := getattr(config, "logit_scale", None), int | float):  # Cohere
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 (Riviere et al. 2024, section 2)
            logits = cap * (logits / cap).tanh()
        return logits

    def choice_scores(self, hidden: Tensor) -> Tensor:
        """Scores of candidates from the hidden states of their last tokens: (..., C) -> (...)."""
        head = self.pretrained.get_submodule(HEAD)
        with torch.autocast(hidden.device.type, enabled=False):  # of rounded scores some are equal
            return head(hidden.unsqueeze(-2).to(next(head.parameters(), hidden).dtype)).squeeze(-1)

    def packed_hidden_states(self, batch: Batch) -> Tensor:
        """Hidden states of trees, in one flat line, as a batch's positions count: (B * T, C)."""
        # a GPU would have to be waited for: how many keys the blocks need is a value of the batch
        by_blocks = isinstance(self.pretrained.base_model, GPTModel) and self.device.type == "cpu"
        mask = (batch.blocks() if by_blocks else None) or batch.attention_mask()
        return self.hidden_states(batch.input_ids, batch.token_type_ids, batch.position_ids, mask).flatten(0, 1)

    def score_candidates(self, batch: Batch) -> Tensor:
        """Choice scores of a batch's replies, (E, K), those of equal replies equal to the last digit."""
        positions, places = batch.last_positions.unique(return_inverse=True)
        scores = self.choice_scores(self.packed_hidden_states(batch.to(self.device))[positions.to(self.device)])
        return finite(scores)[places.to(self.device)]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both heads over trees, each only where it is asked for.

        Returns:
            lm_logits: (N, vocabulary), N as in `Batch`.
            choice_scores: (E, K), -inf where a fork has fewer than K replies.
        """
        hidden = self.packed_hidden_states(batch)
        scores = self.choice_scores(hidden[batch.last_positions])
        return self.lm_logits(hidden[batch.lm_positions]), scores.masked_fill(batch.last_positions < 0, -torch.inf)


def _additive(mask: Any, dtype: torch.dtype) -> Any:
    """A mask of True and False, or several of them by name, as numbers to be added to the scores."""
    if isinstance(mask, dict):
        return {name: _additive(part, dtype) for name, part in mask.items()}
    if not isinstance(mask, Tensor):
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def finite(scores: Tensor) -> Tensor:
    """Return logits or scores as they are, after a check.

    Raises:
        UserError: the greatest is NaN or infinite, so that no reply and no figure can be made of them.
    """
    if scores.numel() and not scores.max().isfinite():
        raise UserError("the model gives scores that are not finite: its weights or its precision are at fault")
    return scores


def default_device() -> str:
    """The device of a model where none is asked for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_bfloat16(device: torch.device) -> None:
    """Prepare a device for a model in bfloat16, and say where that is slow.

    A CPU is to keep fewer of its bfloat16 kernels, of which there is one a shape: rows of all lengths filled 8 GB.
    """
    if device.type == "cpu":
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "64")  # not 1024
        if not has_bfloat16_units():
            logger.warning("this processor has no units for bfloat16, so that float32 is faster here: five times or so")


def has_bfloat16_units(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the CPU multiplies bfloat16 matrices by itself; True where the system does not say."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return True
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return not flags or bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's


def halve_(model: DoubleHeads) -> None:
    """Hold the weights of a model that is not trained in bfloat16."""
    prepare_bfloat16(model.device)
    # but for the choice head: of scores that are rounded so, some are equal
    for part in (model.pretrained.base_model, model.pretrained.get_output_embeddings()):
        for parameter in part.parameters():
            if parameter.is_floating_point():  # not 4-bit weights. Buffers stay: rotary angles need float32
                parameter.data = parameter.data.bfloat16()


def halve_frozen_(model: DoubleHeads) -> None:
    """Hold the frozen weights of the linear layers in bfloat16, which autocast to it makes of them anyway.

    Losses stay what they are, to the bit: norms, embeddings, adapters and both heads stay in float32.
    """
    for layer in model.pretrained.get_decoder().modules():
        if isinstance(layer, nn.Linear | Conv1D):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def freeze_unread_(model: DoubleHeads) -> None:
    """Freeze the parameters that no text passes through, as those of a vision tower.

    They get no gradient, and several processes would wait for it.
    """
    pretrained = model.pretrained
    parts = (*text_parts(pretrained), pretrained.get_submodule(HEAD))
    read = {parameter for part in parts for parameter in part.parameters()}
    for parameter in pretrained.parameters():
        if parameter not in read:
            parameter.requires_grad_(False)


@torch.no_grad()
def base_digest(model: DoubleHeads) -> str:
    """Fingerprint of the frozen weights beside an adapter, from some 256 numbers of each; "" = no adapter.

    All processes of a sharded model must call it. Embeddings and choice head do not count: some of their numbers were
    drawn here.
    """
    if not rank_of(model.network) or model.digest:
        return model.digest
    pretrained = model.pretrained
    drawn = {parameter for table in token_tables(pretrained) for parameter in table.parameters()}
    key = hashlib.blake2b(digest_size=16)
    for name, parameter in pretrained.get_decoder().named_parameters():
        if not parameter.requires_grad and parameter not in drawn:
            sample = whole(parameter).flatten()[:: max(1, parameter.numel() // 256)]
            key.update(f"{name} {tuple(parameter.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return key.hexdigest()


def freeze_embeddings_(model: DoubleHeads, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the word embeddings as they are, but for the rows of the dialog tokens, which nothing has trained yet.

    An output bias, one number a word, is kept likewise. A model with an adapter may have it in the adapter's copy of
    the output layer.
    """
    pretrained, ids = model.pretrained, special_ids(tokenizer)
    for weight in {parameter for table in token_tables(pretrained) for parameter in table.parameters()}:  # one if tied
        if not weight.requires_grad or len(weight) <= max(ids):  # peft's five rows are the dialog tokens' alone
            continue
        trained = torch.zeros(len(weight), *[1] * (weight.dim() - 1), device=weight.device)
        trained[ids] = 1.0
        if isinstance(weight, DTensor):  # whose gradient no hook of autograd's sees
            own = own_part(trained, weight)
            weight.register_post_accumulate_grad_hook(lambda weight, trained=own: weight.grad.mul_(trained))
        else:
            weight.register_hook(lambda gradient, trained=trained: gradient * trained.to(gradient.dtype))


def add_adapter_(model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, rank: int, base: str) -> None:
    """Give the model of the checkpoint `base` an adapter to be trained in its place (`lora.add_adapter`).

    Raises:
        UserError: it has one of another rank, or cannot have one.
    """
    present = rank_of(model.network)
    if not present:
        with on_cpu_without_memory(model):
            model.network = add_adapter(model.pretrained, rank, special_ids(tokenizer), base)
    elif present != rank:
        message = f"lora_rank {rank}: {base} has an adapter of rank {present}, which goes on without this"
        raise SettingError(message, "lora_rank")


def merge_adapter_(model: DoubleHeads) -> None:
    """Work a model's adapter, if it has one, into its weights, all of which are trained from then on."""
    model.network = merge(model.network).requires_grad_()


def enable_gradient_checkpointing_(model: DoubleHeads) -> None:
    """Compute each layer's activations again in the backward pass instead of keeping them.

    Raises:
        UserError: the model cannot.
    """
    pretrained = model.pretrained  # transformers renamed the method
    try:
        getattr(pretrained, "activation_checkpointing_enable", pretrained.gradient_checkpointing_enable)()
    except ValueError as error:
        message = f"gradient_checkpointing: a {pretrained.config.model_type} model cannot do it"
        raise SettingError(message, "gradient_checkpointing") from error


def compile_blocks_(model: DoubleHeads) -> None:
    """Compile a model's blocks, for rows of any length: of one code, they are compiled once for all of them."""
    for block in blocks_of(model.pretrained):
        block.compile(dynamic=True)


def add_special_tokens_(model: DoubleHeads | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the five dialog tokens to the tokenizer, and rows for them to the model, where they are not there yet.

    Raises:
        UserError: the tokenizer has tokens that the model does not have.
    """
    pretrained = model.pretrained if isinstance(model, DoubleHeads) else model
    before, nearest = len(tokenizer), nearest_tokens(tokenizer)
    if tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN):
        if embedding_rows(pretrained) > before:  # rows that no token has, as Qwen's
            pretrained.resize_token_embeddings(before)
        # original: new rows are drawn as any embedding is, not around the mean of the old ones
        pretrained.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if pretrained.config.model_type not in FAMILIES:
            ids = zip(SPECIAL_TOKENS, special_ids(tokenizer))  # of which Gemma has some already
            copy_rows_(pretrained, {new: nearest[token] for token, new in ids if new >= before and token in nearest})
    name_special_tokens_(pretrained, tokenizer)
    rows = embedding_rows(pretrained)
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: they do not belong together")


@torch.no_grad()
def copy_rows_(pretrained: PreTrainedModel, sources: Mapping[int, int]) -> None:
    """Give tokens, by their ids, the embeddings of others, input and output, and their biases.

    Drawn ones are a sixth as long as SmolLM2's own, and to a model that has learnt its control tokens they say nothing.
    """
    for table in token_tables(pretrained):
        for parameter in table.parameters():
            parameter[list(sources)] = parameter[list(sources.values())]


def name_special_tokens_(pretrained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the tokenizer's special tokens in a model's configuration: transformers' `generate` ends at `<eos>`."""
    config, generation = pretrained.config, getattr(pretrained, "generation_config", None)
    # XGLM leaves out the position of this number, which would be another when the model is loaded again
    pads_positions = any(
        hasattr(module, "padding_idx") and not isinstance(module, nn.Embedding | PreTrainedModel)
        for module in pretrained.modules()
    )
    for owner in filter(None, (config, config.get_text_config(), generation)):
        owner.bos_token_id = tokenizer.bos_token_id
        owner.eos_token_id = tokenizer.eos_token_id
        if owner is generation or not pads_positions:
            owner.pad_token_id = tokenizer.pad_token_id
    embeddings: Any = pretrained.get_input_embeddings()
    if getattr(embeddings, "padding_idx", None) is not None:
        embeddings.padding_idx = config.get_text_config().pad_token_id  # as it will be when the model is loaded again


def embedding_rows(pretrained: PreTrainedModel) -> int:
    """How many tokens a model has embeddings for: at least its tokenizer's."""
    embeddings: Any = pretrained.get_input_embeddings()  # torch's layer, or peft's around it
    return len(embeddings.weight)
