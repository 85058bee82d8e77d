"""Layers that look back over a sliding window: trees and cached steps are what transformers gives a sequence alone."""

import pytest
import torch
import transformers
from helpers import slow_but, tiny_config

from transfertransfo.data.inputs import Example, make_fork
from transfertransfo.data.trees import pack
from transfertransfo.decoding import Context, Decoding, candidate_replies
from transfertransfo.model.cache import CachedRows, PrefixCache
from transfertransfo.model.double_heads import DoubleHeads, add_special_tokens_
from transfertransfo.model.loading import load_model
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer

FAMILIES = {"mistral": "model", "gemma2": "layer type", "gemma3_text": "layer type", "gpt_oss": "layer type"}
PERSONA = [[*range(7, 20)], [*range(30, 38)]]
TURNS = [[40, 41, 42, 43], [50, 51, 52], [60, 61, 62, 63, 64]]
REPLIES = [[71, 72, 73], [74, 75], [71, 72, 76, 77]]


@pytest.fixture(params=slow_but(["mistral", "gemma2"], FAMILIES))
def folder(request, base_checkpoints, tmp_path_factory):
    """A model that looks back over 8 tokens, with random weights at which each part matters."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = load_tokenizer(base_checkpoints["llama"])
    tiny_config(request.param, len(tokenizer), sliding_window=8).save_pretrained(folder)
    model = load_model(folder, from_scratch=True)
    assert model.window_by == FAMILIES[request.param] and model.window == 8 and model.n_positions == 128
    add_special_tokens_(model, tokenizer)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits_alone(folder, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def test_trees_are_sequences_alone(folder):
    """Sequences were cut to the window, and training's figures were others than transformers'."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    examples = [Example(PERSONA, TURNS[:1], REPLIES), Example(PERSONA, TURNS, REPLIES[::-1])]
    forks = [make_fork(example, tokenizer) for example in examples]
    batch = pack(forks, tokenizer.pad_token_id, sizes=[2])
    logits, _ = model(batch)
    for fork in forks:
        reply = fork.replies[fork.lm_reply]
        want = logits_alone(folder, fork.context + reply)[len(fork.context) - 1 : -1]
        got, logits = logits[: len(reply)], logits[len(reply) :]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("others", [0, 1])
def test_cached_steps_are_sequences_alone(folder, others):
    """Rows of several lengths too, which are padded on the left."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    fork = make_fork(Example(PERSONA, TURNS, [[]]), tokenizer)
    row = {"input_ids": fork.context, "token_type_ids": fork.token_types, "position_ids": fork.positions}
    short = {name: values[:5] for name, values in row.items()}
    rows = CachedRows(model, [row, short][: 1 + others], 4)
    ids = list(fork.context)
    for token in (71, 72, 73):
        torch.testing.assert_close(rows.logits[0], logits_alone(folder, ids)[-1], atol=1e-4, rtol=1e-4)
        rows.append_(torch.tensor([token] * (1 + others)))
        ids.append(token)


def test_a_chats_memory_changes_nothing(folder):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    decoding, memory = Decoding(no_sample=True, max_length=5, min_length=5), PrefixCache()
    for turns in (TURNS[:1], TURNS):
        context = Context(PERSONA, turns)
        with_memory = candidate_replies(model, [context], tokenizer, decoding, memory=memory)
        assert with_memory == candidate_replies(model, [context], tokenizer, decoding)


def test_a_model_that_takes_no_such_mask_is_cut_to_the_window():
    model = DoubleHeads(transformers.MistralForCausalLM(tiny_config("mistral", 60)))
    assert model.n_positions == 64
    model.window_by = "model"
    assert model.n_positions == 128
