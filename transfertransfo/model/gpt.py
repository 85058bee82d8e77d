"""GPT's backbone with what transformers' own lacks: 4-D masks, a key-value cache, fused attention, checkpointing.

Parameters keep transformers' names: a checkpoint is exchanged with transformers' own classes in both directions.
"""

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import Cache, OpenAIGPTConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.openai.modeling_openai import MLP, OpenAIGPTModel
from transformers.pytorch_utils import Conv1D

from transfertransfo.data.trees import Blocks


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

    def forward(self, x: Tensor, attention_mask: Tensor | Blocks | None, past_key_values: Cache | None) -> Tensor:
        # (B, T, 3 * C) -> 3 of (B, heads, T, C / heads)
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        dropout = self.attn_pdrop if self.training else 0.0
        if isinstance(attention_mask, Blocks):
            attended = attend_by_blocks(query, key, value, attention_mask, dropout)
        else:
            attended = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None and query.size(2) > 1,
            )
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).flatten(2)))


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, dropout: float) -> Tensor:
    """Attention where each block of queries sees the keys gathered for it: (B, heads, T, D) -> (B, heads, T, D)."""
    rows, _, length, _ = query.shape
    n, most = blocks.keys.shape[1:]
    size = blocks.mask.size(2)

    def gathered(x: Tensor) -> Tensor:  # (B, heads, T, D) -> (B * n, heads, M, D)
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat.index_select(0, blocks.keys.flatten()).unflatten(0, (rows * n, most)).transpose(1, 2)

    # (B, heads, T, D) -> (B * n, heads, Q, D)
    cut = pad(query, (0, 0, 0, n * size - length)).unflatten(2, (n, size)).transpose(1, 2).flatten(0, 1)
    attended = scaled_dot_product_attention(
        cut, gathered(key), gathered(value), attn_mask=blocks.mask, dropout_p=dropout
    )
    return attended.unflatten(0, (rows, n)).transpose(1, 2).flatten(2, 3)[:, :, :length]


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

    def forward(self, x: Tensor, attention_mask: Tensor | Blocks | None, past_key_values: Cache | None) -> Tensor:
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
        attention_mask: Tensor | Blocks | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C).

        `attention_mask`: boolean (B, 1, T, keys), True where attended; or the same by blocks; None = causal.
        """
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
    # transformers' class has them the other way round, and peft then trains two deltas of the one matrix
    _tied_weights_keys = {"lm_head.weight": "transformer.tokens_embed.weight"}  # noqa: RUF012  # its attribute
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.bias$"]  # noqa: RUF012  # the causal mask, in files of 2019

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.transformer = GPTModel(config)
        self.post_init()
