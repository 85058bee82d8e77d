"""Which class of transformers a model with two heads is: GPT's and GPT-2's own, or any decoder's with a choice head."""

import functools

import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from transfertransfo.errors import UserError, printable
from transfertransfo.model.gpt import OpenAIGPTDoubleHeadsModel

FAMILIES: dict[str, type[PreTrainedModel]] = {  # that have a choice head, and token types, from transformers
    "openai-gpt": OpenAIGPTDoubleHeadsModel,
    "gpt2": transformers.GPT2DoubleHeadsModel,
}


class ChoiceHead(nn.Module):
    """transformers' choice head of GPT, parameter for parameter: dropout and a linear layer on the last position.

    It begins at 0, so with equal scores: hidden states of other models have any length.
    """

    def __init__(self, size: int):
        super().__init__()
        self.first_dropout = nn.Dropout(0.1)
        self.summary = nn.Linear(size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., T, C) -> (..., 1)."""
        return self.summary(self.first_dropout(hidden[..., -1, :]))


@functools.cache
def with_choice_head(language_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A language model's class with `multiple_choice_head`, which saves itself as the class without."""

    class DoubleHeadsModel(language_model):  # type: ignore[valid-type,misc]  # known when it is called only
        def __init__(self, config: PretrainedConfig):
            super().__init__(config)
            self.multiple_choice_head = ChoiceHead(self.get_output_embeddings().in_features)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:  # transformers' hook
            super()._init_weights(module)
            if isinstance(module, ChoiceHead):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    DoubleHeadsModel.__name__ = language_model.__name__
    DoubleHeadsModel.__module__ = language_model.__module__
    return DoubleHeadsModel


def double_heads_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a configuration's model with two heads.

    Raises:
        UserError: no decoder that transformers knows.
    """
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    kind = f"a {printable(config.model_type)} model"
    if config.is_encoder_decoder:
        raise UserError(f"{kind}, which has an encoder; a decoder alone is wanted, as GPT, Llama or Qwen")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UserError(f"{kind}, an encoder, which predicts no next token; a decoder is wanted, as GPT, Llama or Qwen")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{kind}; transformers' AutoModelForCausalLM does not know it")
    return with_choice_head(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
