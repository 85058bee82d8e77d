"""The plain recipe that every speed claim is measured against, on today's transformers.

It is that of the 2019 TransferTransfo code: each string tokenised wherever it occurs, each candidate a sequence of its
own, all of them padded to the dataset's longest and held in memory, transformers' own double-head model with its
language-model head at every position, one forward a token when decoding, one forward a word for word perplexity. It
has no handicap that the original did not have, and takes the same batches, threads and weights as the other side.
"""

import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from transfertransfo.data.inputs import IGNORED, MODEL_INPUTS, PADDED_INPUTS, Example, build_input_from_segments
from transfertransfo.data.tokenization import special_ids
from transfertransfo.decoding import Decoding, top_filtering
from transfertransfo.evaluation.metrics import SMOOTHING
from transfertransfo.model.double_heads import DoubleHeads

DOUBLE_HEADS = {"openai-gpt": OpenAIGPTDoubleHeadsModel, "gpt2": GPT2DoubleHeadsModel}
LM_HEAD = {"openai-gpt": OpenAIGPTLMHeadModel, "gpt2": GPT2LMHeadModel}


# ---- models ----


def double_heads(model: DoubleHeads) -> PreTrainedModel:
    """transformers' own double-head model on the very parameters of `model`."""
    config = model.pretrained.config
    plain = DOUBLE_HEADS[config.model_type](config).to(model.device)
    parameters = dict(model.pretrained.named_parameters(remove_duplicate=False))
    plain.load_state_dict(parameters, strict=False, assign=True)  # not strict: older checkpoints' buffers
    own = dict(plain.named_parameters(remove_duplicate=False))
    assert all(own[name] is parameter for name, parameter in parameters.items()) and own.keys() == parameters.keys()
    return plain.eval()


def lm_head(plain: PreTrainedModel) -> PreTrainedModel:
    """The model without the choice head, on the same parameters: what the original chats with."""
    model = LM_HEAD[plain.config.model_type](plain.config)
    model.transformer, model.lm_head = plain.transformer, plain.lm_head
    return model.eval()


# ---- data ----


def read_dataset(tokenizer: PreTrainedTokenizerBase, path: str, cache: str) -> dict:
    """The dataset in token ids; written to `cache`."""
    with open(path, encoding="utf-8") as file:
        dataset = tokenize(json.load(file), tokenizer)
    torch.save(dataset, cache)
    return dataset


def tokenize(content: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Any nesting of lists and dicts, its strings as token ids."""
    if isinstance(content, str):
        return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(content))
    if isinstance(content, dict):
        return {key: tokenize(value, tokenizer) for key, value in content.items()}
    return [tokenize(value, tokenizer) for value in content]


def padded_tensors(
    dialogs: list[dict], tokenizer: PreTrainedTokenizerBase, args: Namespace, num_candidates: int
) -> dict[str, Tensor]:
    """A split as one `to_tensors`, each sequence padded to the longest of all."""
    examples = []
    for dialog in dialogs:
        persona = dialog["personality"]
        for _ in range(args.personality_permutations):
            for utterance in dialog["utterances"]:
                history = utterance["history"][-(2 * args.max_history + 1) :]
                examples.append(Example(persona, history, utterance["candidates"][-num_candidates:]))
            persona = persona[-1:] + persona[:-1]
    return to_tensors(examples, tokenizer)


def to_tensors(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, length: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The `MODEL_INPUTS`, a sequence a candidate, labels on the last: (examples, candidates, longest).

    Args:
        length: tokens to pad to, where the longest sequence has fewer.
    """
    columns = defaultdict(list)
    for example in examples:
        last = len(example.candidates) - 1
        for i, candidate in enumerate(example.candidates):
            instance = build_input_from_segments(
                example.persona, example.history, candidate, tokenizer, lm_labels=i == last
            )
            for name, values in instance.items():
                columns[name].append(values)
        columns["mc_labels"].append(last)
    longest = max(length, max(map(len, columns["input_ids"])))
    pad = tokenizer.pad_token_id
    for name in PADDED_INPUTS:
        filler = [IGNORED if name == "lm_labels" else pad]
        columns[name] = [values + filler * (longest - len(values)) for values in columns[name]]
    shapes: dict[str, tuple[int, ...]] = {name: (len(examples), -1, longest) for name in PADDED_INPUTS}
    shapes |= {"mc_token_ids": (len(examples), -1), "mc_labels": (-1,)}
    return {name: torch.tensor(columns[name], device=device).view(shapes[name]) for name in MODEL_INPUTS}


# ---- training ----


def losses(plain: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Language-model and choice loss of a batch of `to_tensors`."""
    output = plain(
        input_ids=batch["input_ids"],
        token_type_ids=batch["token_type_ids"],
        mc_token_ids=batch["mc_token_ids"],
        labels=batch["lm_labels"],
        mc_labels=batch["mc_labels"],
    )
    return output.loss, output.mc_loss


def training_step(
    plain: PreTrainedModel, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, args: Namespace
) -> float:
    """Forward, backward, clipping, optimizer step; the loss."""
    lm_loss, mc_loss = losses(plain, batch)
    loss = args.lm_coef * lm_loss + args.mc_coef * mc_loss
    loss.backward()
    clip_grad_norm_(plain.parameters(), args.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def conversation_tensors(
    dialogs: list[Example], tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """What a language model is trained on whole conversations with: a sequence each, all its own replies labelled.

    Args:
        dialogs: the last turn of each, with the whole history.
    """
    columns = defaultdict(list)
    for dialog in dialogs:
        instance = build_input_from_segments(
            dialog.persona, dialog.history, dialog.candidates[-1], tokenizer, lm_labels=True
        )
        place = 1 + sum(map(len, dialog.persona))
        for i, turn in enumerate(dialog.history):
            place += 1  # its speaker
            if (len(dialog.history) - i) % 2 == 0:
                instance["lm_labels"][place : place + len(turn)] = turn
            place += len(turn)
        for name in PADDED_INPUTS:
            columns[name].append(instance[name])
    longest = max(map(len, columns["input_ids"]))
    fillers = {"lm_labels": IGNORED}
    rows = {
        name: torch.tensor(
            [
                values + [fillers.get(name, tokenizer.pad_token_id)] * (longest - len(values))
                for values in columns[name]
            ],
            device=device,
        )
        for name in PADDED_INPUTS
    }
    return {"input_ids": rows["input_ids"], "token_type_ids": rows["token_type_ids"], "labels": rows["lm_labels"]}


def language_model_step(
    lm: PreTrainedModel, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, args: Namespace
) -> float:
    """As `training_step`, of the language model's loss alone."""
    loss = lm(**batch).loss
    loss.backward()
    clip_grad_norm_(lm.parameters(), args.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# ---- evaluation ----


@torch.no_grad()
def rank_candidates(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Indices of the candidates, the best choice score first: each a sequence, padded to the turn's longest."""
    batch = to_tensors([example], tokenizer, device=plain.device)
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "mc_token_ids")}
    return plain(**inputs).mc_logits[0].sort(descending=True, stable=True).indices.tolist()


@torch.no_grad()
def next_token_logits(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example, reply: list[int]
) -> Tensor:
    """(vocabulary,): of the token after the reply's first ones, by one forward of all tokens."""
    instance = build_input_from_segments(example.persona, example.history, reply, tokenizer, with_eos=False)
    ids, types = (torch.tensor([instance[name]], device=lm.device) for name in ("input_ids", "token_type_ids"))
    return lm(ids, token_type_ids=types).logits[0, -1]


def greedy_reply(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example, decoding: Decoding
) -> list[int]:
    """A reply's token ids, the likeliest each, by one forward a token, filtered as if one were drawn."""
    special = special_ids(tokenizer)
    reply: list[int] = []
    for _ in range(decoding.max_length):
        logits = next_token_logits(lm, tokenizer, example, reply) / decoding.temperature
        token = int(top_filtering(logits, decoding.top_k, decoding.top_p).softmax(-1).argmax())
        if token in special:
            break
        reply.append(token)
    return reply


class WordScorer:
    """Word perplexity's probabilities as ConvAI2's scripts ask the original for them: of all words, a forward a word.

    Args:
        counts: the dictionary, word -> count.
        first_piece: gives a word's first piece as a token id.
    """

    def __init__(self, counts: dict[str, int], first_piece: Callable[[str], int]):
        self.known = set(counts)
        self.words_of: dict[int, dict[str, float]] = defaultdict(dict)  # first piece -> word -> count, then ratio
        for word, count in counts.items():
            self.words_of[first_piece(word)][word] = count + SMOOTHING
        for words in self.words_of.values():
            total = sum(words.values())
            for word in words:
                words[word] /= total

    def probabilities(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example, words: list[str]
    ) -> list[tuple[str, float | None]]:
        """Each word of a reply with its probability, None for one that the dictionary does not have."""
        return [(word, self._probability(lm, tokenizer, example, words[:i], word)) for i, word in enumerate(words)]

    def _probability(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example, before: list[str], word: str
    ) -> float | None:
        if word not in self.known:
            return None
        next_piece = next_token_logits(lm, tokenizer, example, tokenize(" ".join(before), tokenizer)).softmax(-1)
        distribution = {
            word: next_piece[piece].item() * ratio
            for piece, words in self.words_of.items()
            for word, ratio in words.items()
        }
        return distribution[word] / sum(distribution.values())
