"""Replies from a model: filtering, sampling and greedy choice, over a key-value cache, many contexts at a time."""

import logging
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from inputs import Example, build_input_from_segments, fit
from model import DoubleHeads
from utils import SPECIAL_TOKENS

logger = logging.getLogger(__name__)

Context = tuple[list[list[int]], list[list[int]]]  # persona and history, in token ids


def top_filtering(
    logits: Tensor,
    top_k: float = 0.0,
    top_p: float = 0.9,
    threshold: float = -float("inf"),
    filter_value: float = -float("inf"),
) -> Tensor:
    """Keep only the likeliest tokens, the others set to `filter_value`, in place.

    Args:
        logits: (..., vocabulary).
        top_k: keep the k likeliest (0 = off).
        top_p: then keep the smallest set of the likeliest whose probability exceeds this (0 = off), at least one:
            nucleus sampling (Holtzman et al. 2019, section 3.1).
        threshold: then keep logits of at least this.

    Returns:
        The same tensor.
    """
    if top_k > 0:
        k = min(int(top_k), logits.size(-1))
        logits[logits < logits.topk(k).values[..., -1:]] = filter_value
    if top_p > 0.0:
        ordered, indices = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1)[..., :-1]  # probability of all likelier tokens, but for the first one
        excess = torch.zeros_like(logits, dtype=torch.bool)
        excess.scatter_(-1, indices[..., 1:], before > top_p)
        logits[excess] = filter_value
    logits[logits < threshold] = filter_value
    return logits


def sample_sequence(
    personality: list[list[int]],
    history: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: DoubleHeads,
    args: Namespace,
    current_output: list[int] | None = None,
) -> list[int]:
    """The token ids of one reply, without special tokens.

    Args:
        args: with `max_length`, `min_length`, `no_sample`, `temperature`, `top_k` and `top_p`.
        current_output: the reply's first tokens, if they are given already; the result begins with them.
    """
    reply = list(current_output or [])
    for (token,) in decode(model, [(personality, history)], tokenizer, args, prefix=reply):
        reply.append(token)
    return reply


def generate(
    model: DoubleHeads, contexts: list[Context], tokenizer: PreTrainedTokenizerBase, args: Namespace
) -> list[list[int]]:
    """One reply for each context, as `sample_sequence` gives it, in one batch."""
    replies = [[] for _ in contexts]
    for tokens in decode(model, contexts, tokenizer, args):
        for reply, token in zip(replies, tokens):
            if token is not None:
                reply.append(token)
    return replies


@torch.inference_mode()
def decode(
    model: DoubleHeads,
    contexts: list[Context],
    tokenizer: PreTrainedTokenizerBase,
    args: Namespace,
    prefix: list[int] | None = None,
) -> Iterator[list[int | None]]:
    """The next token of each context's reply, step by step; None for a reply that has ended.

    A reply ends before a special token or at `max_length` tokens. `prefix` are first tokens of every reply.
    """
    special = torch.tensor(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), device=model.device)
    # 1) prefill: the contexts, aligned on the right, so that every row goes on in the same column
    inputs = [_context_inputs(model, context, prefix or [], tokenizer, args) for context in contexts]
    lengths = torch.tensor([len(row["input_ids"]) for row in inputs], device=model.device)
    columns = int(lengths.max())
    ids, types = (
        torch.tensor([[0] * (columns - len(row[name])) + row[name] for row in inputs], device=model.device)
        for name in ("input_ids", "token_type_ids")
    )
    padding = (columns - lengths)[:, None]  # (B, 1)
    attended = torch.arange(columns + args.max_length, device=model.device) >= padding  # (B, all columns)
    causal = torch.ones(columns, columns, dtype=torch.bool, device=model.device).tril()
    # a padding column attends to itself alone, so that no softmax is empty
    mask = (causal & attended[:, None, None, :columns]) | torch.eye(columns, dtype=torch.bool, device=model.device)
    positions = (torch.arange(columns, device=model.device) - padding).clamp(min=0)
    ragged = bool(padding.any())
    cache = DynamicCache()
    hidden = model.hidden_states(ids, types, positions, mask if ragged else None, cache)[:, -1]
    ended = torch.zeros(len(contexts), dtype=torch.bool, device=model.device)
    # 2) a token a step
    for step in range(args.max_length):
        tokens = _choose(model.lm_logits(hidden).float(), args, special, step < args.min_length)
        ended |= torch.isin(tokens, special)
        if ended.all():
            return
        yield [token if going else None for token, going in zip(tokens.tolist(), (~ended).tolist())]
        if step + 1 == args.max_length:
            return
        keys = attended[:, None, None, : columns + step + 1] if ragged else None
        hidden = model.hidden_states(tokens[:, None], types[:, -1:], (lengths + step)[:, None], keys, cache)[:, -1]


def _context_inputs(
    model: DoubleHeads, context: Context, prefix: list[int], tokenizer: PreTrainedTokenizerBase, args: Namespace
) -> dict:
    """The sequence up to the first token to be chosen, with room left for the reply."""
    room = [0] * (len(prefix) + args.max_length)
    persona, history, _ = fit(Example(*context, [room]), model.n_positions)
    return build_input_from_segments(persona, history, prefix, tokenizer, with_eos=False)


def _choose(logits: Tensor, args: Namespace, special: Tensor, go_on: bool) -> Tensor:
    """The next token of each row: (B, vocabulary) -> (B,).

    Args:
        special: ids of the tokens that end a reply.
        go_on: whether the reply is too short to end yet. It ends all the same where filtering leaves no word.
    """
    probabilities = top_filtering(logits / args.temperature, args.top_k, args.top_p).softmax(-1)
    if go_on:
        words = probabilities.index_fill(-1, special, 0.0)
        # original: draws again until it is a word, for ever where no word is left
        probabilities = torch.where(words.sum(-1, keepdim=True) > 0, words, probabilities)
    return probabilities.argmax(-1) if args.no_sample else torch.multinomial(probabilities, 1).squeeze(-1)
