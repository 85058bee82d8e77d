"""GPT and GPT-2 with two heads behind one interface: hidden states of a batch, next-token logits, choice scores.

The heads are those of TransferTransfo (Wolf et al. 2019, section 3): a language-model head tied to the input embeddings
and a linear choice head that reads one token of each candidate. Parameters keep transformers' names, so that a
checkpoint is exchanged with transformers' own classes in both directions.
"""

import logging
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Cache,
    OpenAIGPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.openai.modeling_openai import MLP, OpenAIGPTModel
from transformers.pytorch_utils import Conv1D

from cli import UserError, default_device, first_line
from files import TEMPORARY, move_into_place
from utils import (
    ATTR_TO_SPECIAL_TOKEN,
    SPECIAL_TOKENS,
    cannot_load,
    download_pretrained_model,
    has_weights,
    knows_dialog_tokens,
    load_config,
    load_tokenizer,
    resolve_checkpoint,
)

logger = logging.getLogger(__name__)

SHORTEST = 4  # tokens of a dialog turn: <bos>, a speaker, a word, <eos>
SUMMARY_TYPES = ("cls_index", "last", "first", "mean")  # all the same to a head that is given one token


class GPTAttention(nn.Module):
    """GPT's self-attention through torch's fused kernels, with a key-value cache and any boolean mask."""

    def __init__(self, config: OpenAIGPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.layer = layer
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        # (B, T, 3 * C) -> 3 of (B, heads, T, C / heads)
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        attended = scaled_dot_product_attention(
            query, key, value,
            attn_mask=attention_mask,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            is_causal=attention_mask is None and query.size(2) > 1,
        )
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).flatten(2)))


class GPTBlock(GradientCheckpointingLayer):
    """One layer of GPT: normalisation after each residual sum (Radford et al. 2018, section 3.1)."""

    def __init__(self, config: OpenAIGPTConfig, layer: int):
        super().__init__()
        self.attn = GPTAttention(config, layer)
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(4 * config.n_embd, config)
        if config.afn == "gelu":
            self.mlp.act = nn.GELU(approximate="tanh")  # transformers' function, in one pass instead of eight
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        x = self.ln_1(x + self.attn(x, attention_mask, past_key_values))
        return self.ln_2(x + self.mlp(x))


class GPTModel(OpenAIGPTModel):
    """transformers' GPT backbone with what it lacks: 4-D masks, a cache, fused attention, gradient checkpointing."""

    supports_gradient_checkpointing = True

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.h = nn.ModuleList(GPTBlock(config, layer) for layer in range(config.n_layer))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C). `attention_mask`: boolean (B, 1, T, keys), True where attended; None = causal."""
        x = self.tokens_embed(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            x = x + self.tokens_embed(token_type_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + x.size(1), device=x.device)
        x = self.drop(x + self.positions_embed(position_ids))
        for block in self.h:
            x = block(x, attention_mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)


class OpenAIGPTDoubleHeadsModel(transformers.OpenAIGPTDoubleHeadsModel):
    """transformers' class of this name, which it also saves itself as, on the faster backbone."""

    supports_gradient_checkpointing = True

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.transformer = GPTModel(config)
        self.post_init()


FAMILIES: dict[str, type[PreTrainedModel]] = {
    "openai-gpt": OpenAIGPTDoubleHeadsModel,
    "gpt2": transformers.GPT2DoubleHeadsModel,
}


class DoubleHeads(nn.Module):
    """The one interface of all model families, over a transformers model with `multiple_choice_head`."""

    def __init__(self, pretrained: PreTrainedModel):
        super().__init__()
        self.pretrained = pretrained

    @property
    def device(self) -> torch.device:
        return self.pretrained.device

    @property
    def n_positions(self) -> int:
        """The longest sequence that the model has position embeddings for, in tokens."""
        return self.pretrained.config.max_position_embeddings

    @property
    def history_start(self) -> int:
        """Position at which the history begins (`inputs.context_positions`); saved with the model."""
        return getattr(self.pretrained.config, "history_start", 0)

    @history_start.setter
    def history_start(self, position: int) -> None:
        self.pretrained.config.history_start = position

    def hidden_states(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Last hidden states.

        Args:
            input_ids, token_type_ids, position_ids: (B, T), int64.
            attention_mask: (B, 1, T, past + T), True where a query attends to a key; None = causal.
            past_key_values: a cache, extended in place by these T positions.

        Returns:
            (B, T, C).
        """
        embeddings = self.pretrained.get_input_embeddings()
        return self.pretrained.base_model(
            # one look-up for both: the gradient of each is a matrix of the vocabulary's size
            inputs_embeds=embeddings(torch.stack([input_ids, token_type_ids])).sum(0),
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Scores of each next token: (..., C) -> (..., vocabulary)."""
        return self.pretrained.lm_head(hidden)

    def choice_scores(self, hidden: Tensor) -> Tensor:
        """Scores of candidates from the hidden states of their last tokens: (..., C) -> (...)."""
        return self.pretrained.multiple_choice_head(hidden.unsqueeze(-2)).squeeze(-1)

    def packed_hidden_states(self, batch) -> Tensor:
        """Hidden states of packed rows (`inputs.Batch`), in one flat line, as its positions count: (B * T, C)."""
        hidden = self.hidden_states(batch.input_ids, batch.token_type_ids, batch.position_ids, batch.attention_mask())
        return hidden.flatten(0, 1)

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """Both heads over packed rows (`inputs.Batch`), each only where it is asked for.

        Returns:
            lm_logits: (number of lm_positions, vocabulary).
            choice_scores: (B, K), -inf where a row has fewer than K replies.
        """
        hidden = self.packed_hidden_states(batch)
        scores = self.choice_scores(hidden[batch.last_positions])
        return self.lm_logits(hidden[batch.lm_positions]), scores.masked_fill(batch.last_positions < 0, -torch.inf)


def load_model(
    checkpoint: str | Path, device: str | torch.device = "cpu", from_scratch: bool = False
) -> DoubleHeads:
    """The double-head model of a hub name, a folder or the URL of an archive, in float32 and evaluation mode.

    Args:
        from_scratch: give random weights where the checkpoint is a folder without any, and say so.

    Raises:
        UserError: no such model, no weights, or a family without double heads.
    """
    folder = resolve_checkpoint(checkpoint)
    config = load_config(checkpoint)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"--model_checkpoint {checkpoint}: a {config.model_type} model; known: {', '.join(FAMILIES)}")
    if not has_weights(folder) and not from_scratch:
        raise UserError(f"--model_checkpoint {checkpoint}: no weights there; train it first, with train.py")
    try:
        if has_weights(folder):
            pretrained = family.from_pretrained(folder, config=config, dtype=torch.float32, weights_only=True)
        else:
            logger.info("%s holds no weights: training from scratch", checkpoint)
            pretrained = family(config)
    except Exception as error:  # of a damaged file: OSError, SafetensorError, UnpicklingError, RuntimeError, ...
        raise UserError(cannot_load(checkpoint, "weights" if has_weights(folder) else "config.json", error)) from error
    model = DoubleHeads(pretrained).eval()
    try:
        check_parts(model)
    except Exception as error:  # of sizes that do not go together: RuntimeError, IndexError, UnboundLocalError, ...
        raise UserError(cannot_load(checkpoint, "config.json", error)) from error
    return model.to(device)


@torch.inference_mode()
def check_parts(model: DoubleHeads) -> None:
    """Run both heads on the shortest dialog turn: transformers takes many a configuration that none can be run with.

    Raises:
        ValueError: a value that is none, or whatever the model raises.
    """
    if type(model.history_start) is not int or model.history_start < 0:
        raise ValueError(f"history_start: expected a position, got {model.history_start!r}")
    if model.n_positions < SHORTEST:
        raise ValueError(f"n_positions: at least {SHORTEST} are needed, got {model.n_positions}")
    if (kind := model.pretrained.config.summary_type) not in SUMMARY_TYPES:
        raise ValueError(f"summary_type: expected one of {', '.join(SUMMARY_TYPES)}, got {kind!r}")
    tokens = torch.zeros(1, SHORTEST, dtype=torch.long)
    hidden = model.hidden_states(tokens, tokens, torch.arange(SHORTEST)[None])
    model.lm_logits(hidden)
    if model.choice_scores(hidden).shape != tokens.shape:
        raise ValueError("summary_use_proj, summary_proj_to_labels: the choice head does not give one score")


def load_finetuned(
    checkpoint: str,
    gpt_tokenization: str | None = None,
    device: str | None = None,
    history_start: int | None = None,
) -> tuple[DoubleHeads, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint that was fine-tuned on dialogs; "" = the one of 2019, downloaded.

    `gpt_tokenization` and `history_start` stand in for what the checkpoint records, where they are given.

    Raises:
        UserError: as `load_model`, or the checkpoint does not know the dialog tokens.
    """
    checkpoint = checkpoint or download_pretrained_model()
    tokenizer = load_tokenizer(checkpoint, gpt_tokenization)
    if not knows_dialog_tokens(tokenizer):
        raise UserError(f"--model_checkpoint {checkpoint}: not fine-tuned on dialogs yet; do that first, with train.py")
    model = load_model(checkpoint, device or default_device())
    add_special_tokens_(model, tokenizer)
    if history_start is not None:
        model.history_start = history_start
    return model, tokenizer


def save_model(model: DoubleHeads, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, as transformers does, each whole or not at all.

    Raises:
        UserError: they cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="model", suffix=TEMPORARY) as temporary:
            model.pretrained.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                move_into_place(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'}: not written ({first_line(error)})") from error


def freeze_embeddings_(model: DoubleHeads, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the word embeddings as they are, but for the rows of the dialog tokens, which nothing has trained yet."""
    weight = model.pretrained.get_input_embeddings().weight
    trained = torch.zeros(len(weight), 1, device=weight.device)
    trained[tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)] = 1.0
    weight.register_hook(lambda gradient: gradient * trained.to(gradient.dtype))


def enable_gradient_checkpointing_(model: DoubleHeads) -> None:
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    pretrained = model.pretrained  # transformers renamed the method
    getattr(pretrained, "activation_checkpointing_enable", pretrained.gradient_checkpointing_enable)()


def add_special_tokens_(model: DoubleHeads | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the five dialog tokens to the tokenizer, and rows for them to the model, where they are not there yet.

    Raises:
        UserError: the tokenizer has tokens that the model does not have.
    """
    pretrained = getattr(model, "pretrained", model)
    if tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN):
        # original: new rows are drawn as any embedding is, not around the mean of the old ones
        pretrained.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = pretrained.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: they do not belong together")
