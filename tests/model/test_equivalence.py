"""Trees of whole dialogs give what transformers' own classes give, one padded sequence a candidate."""

from itertools import chain

import pytest
import torch
import transformers
from helpers import FAMILIES, OTHERS, load_own, slow_but
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from transfertransfo.data.inputs import (
    IGNORED,
    Example,
    build_input_from_segments,
    context_positions,
    make_examples,
    make_fork,
    make_trees,
)
from transfertransfo.data.trees import Batch, pack
from transfertransfo.model.double_heads import DoubleHeads, add_special_tokens_
from transfertransfo.model.loading import load_model
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer

START = 40  # of the history, where it has one: beyond the longest persona
DOUBLE_HEADS = {"gpt": transformers.OpenAIGPTDoubleHeadsModel, "gpt2": transformers.GPT2DoubleHeadsModel}


@pytest.fixture(scope="module")
def checkpoint_of(checkpoints, base_checkpoints, tmp_path_factory) -> dict:
    """Folders of tiny models: those that every test has, and one of Gemma 3's shape, which has layers of two kinds."""
    base, gemma = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("gemma3")
    tokenizer = load_tokenizer(base_checkpoints["llama"])
    Gemma3TextConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        hidden_size=16, intermediate_size=32, max_position_embeddings=512, sliding_window=300, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ).save_pretrained(base)  # fmt: skip
    torch.manual_seed(1)
    model = load_model(base, from_scratch=True)
    add_special_tokens_(model, tokenizer)
    torch.nn.init.normal_(model.pretrained.multiple_choice_head.summary.weight, std=0.3)
    save_model(model, gemma)
    tokenizer.save_pretrained(gemma)
    return {**checkpoints, "gemma3": gemma}


def dialogs(num_candidates: int) -> list[dict]:
    """Two dialogs as PersonaChat has them; candidates are cut from few words, so that some are equal or begin alike."""
    generator = torch.Generator().manual_seed(0)

    def sentence(longest: int = 5, words: int = 60) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(5, 5 + words, (length,), generator=generator).tolist()

    made = []
    for turns, persona in ((4, 3), (2, 0)):
        utterances, said = [], [sentence()]
        for _ in range(turns):
            candidates = [sentence(3, words=3) for _ in range(num_candidates - 1)] + [sentence()]
            utterances.append({"history": said, "candidates": candidates})
            said = [*said, candidates[-1], sentence()]
        made.append({"personality": [sentence() for _ in range(persona)], "utterances": utterances})
    return made


class Plain(torch.nn.Module):
    """transformers' own class of a checkpoint: hidden states of padded sequences, and both heads."""

    def __init__(self, family: str, checkpoint):
        super().__init__()
        self.types = family in DOUBLE_HEADS
        self.model = load_own(checkpoint, DOUBLE_HEADS.get(family, AutoModelForCausalLM).from_pretrained)
        own = load_own(checkpoint).pretrained.multiple_choice_head
        self.head = self.model.multiple_choice_head if self.types else own
        self.config = self.model.config

    def losses(self, examples: list[Example], tokenizer, history_start: int) -> tuple:
        """Each candidate in a row of its own: language-model loss, choice loss, choice scores a row an example."""
        columns: dict[str, list] = {"input_ids": [], "types": [], "positions": [], "labels": [], "last": []}
        for example in examples:
            before = context_positions(example.persona, example.history, history_start)
            for i, reply in enumerate(example.candidates):
                gold = i == len(example.candidates) - 1
                one = build_input_from_segments(*example[:2], reply, tokenizer, lm_labels=gold)
                columns["input_ids"].append(one["input_ids"])
                columns["types"].append(one["token_type_ids"])
                columns["labels"].append(one["lm_labels"])
                columns["positions"].append(before + [before[-1] + 1 + k for k in range(len(reply) + 1)])
                columns["last"].append(one["mc_token_ids"])
        longest = max(map(len, columns["input_ids"]))
        fill = {"input_ids": 0, "types": 0, "positions": 0, "labels": IGNORED}
        ids, types, positions, labels = (
            torch.tensor([row + [fill[name]] * (longest - len(row)) for row in columns[name]]) for name in fill
        )
        more: dict = {"token_type_ids": types, "mc_token_ids": torch.tensor(columns["last"])}
        if not self.types:  # without a mask a gap in the positions would be taken for the end of a sequence
            more = {"attention_mask": torch.ones(longest, longest).tril().bool().expand(len(ids), 1, -1, -1)}
        out = self.model(input_ids=ids, position_ids=positions, output_hidden_states=True, **more)
        hidden = out.hidden_states[-1]
        last = hidden[range(len(ids)), columns["last"]]
        scores = out.mc_logits.flatten() if self.types else self.head.summary(last).squeeze(-1)
        lm = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        rows = scores.split([len(example.candidates) for example in examples])
        choice = torch.stack([cross_entropy(row, torch.tensor(len(row) - 1)) for row in rows]).mean()
        return lm, choice, rows

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: p.grad for name, p in self.model.named_parameters()}
        if not self.types:
            found |= {f"multiple_choice_head.{name}": p.grad for name, p in self.head.named_parameters()}
        return found


def without_dropout_(module: torch.nn.Module) -> None:
    """In training all the same, since a model may compute otherwise there."""
    for part in module.train().modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attn_pdrop"):
            part.attn_pdrop = 0.0


def pack_trees(trees: list[list[Example]], tokenizer, history_start: int) -> Batch:
    forks = [make_fork(example, tokenizer, history_start) for example in chain.from_iterable(trees)]
    return pack(forks, tokenizer.pad_token_id, sizes=[len(tree) for tree in trees])


@pytest.mark.parametrize("num_candidates", slow_but([20], [1, 2, 20]))
@pytest.mark.parametrize(("max_history", "history_start"), [(1, 0), (-1, 0), (-1, START)])
@pytest.mark.parametrize("family", slow_but(["gpt", "gpt2", "llama", "gemma3"], [*FAMILIES, *OTHERS, "gemma3"]))
def test_trees_equal_padded_sequences(family, max_history, history_start, num_candidates, checkpoint_of):
    tokenizer, model = load_tokenizer(checkpoint_of[family]), load_own(checkpoint_of[family])
    plain = Plain(family, checkpoint_of[family])
    without_dropout_(plain)
    without_dropout_(model)
    examples = make_examples(dialogs(num_candidates), max_history, model.n_positions, history_start=history_start)
    trees = make_trees(examples)
    if max_history < 0:
        assert [len(tree) for tree in trees] == [4, 2]
    batch = pack_trees(trees, tokenizer, history_start)
    lm_logits, scores = model(batch)
    lm, choice = cross_entropy(lm_logits, batch.lm_labels), cross_entropy(scores, batch.choice_labels)
    want_lm, want_choice, want_scores = plain.losses(examples, tokenizer, history_start)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(lm, want_lm, **close)
    torch.testing.assert_close(choice, want_choice, **close)
    for row, want in zip(scores, want_scores, strict=True):
        torch.testing.assert_close(row[: len(want)], want, **close)
    (lm + choice).backward()
    (want_lm + want_choice).backward()
    gradients = plain.gradients()
    for name, parameter in model.pretrained.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_dialog_in_parts_is_the_dialog(model: DoubleHeads, tokenizer):
    """Where a row would be too long, its turns go on in another: the sums over examples stay what they are."""
    examples = make_examples(dialogs(5), -1, model.n_positions)
    whole, parts = (pack_trees(make_trees(examples, longest), tokenizer, 0) for longest in (10**6, 60))
    assert len(parts.input_ids) > len(whole.input_ids) == 2
    assert whole.input_ids.size(1) > parts.input_ids.size(1)
    for got, want in zip(model(parts), model(whole)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_equal_candidates_have_equal_scores(model: DoubleHeads, tokenizer):
    """To the last digit: rounding must not order them."""
    examples = [Example([[5, 6]], [[7]], [[8], [9, 9], [8], [10], [9, 9], [8]])] * 3
    with torch.inference_mode():
        scores = model.score_candidates(pack_trees(make_trees(examples), tokenizer, 0))
    assert len(scores[0].unique()) == 3 and (scores == scores[0]).all()
    assert scores[0, 0] == scores[0, 2] == scores[0, 5] and scores[0, 1] == scores[0, 4]


@pytest.mark.parametrize("family", ["gpt"])
@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("max_history", [0, 1, -1])
def test_attention_by_blocks_is_attention(model: DoubleHeads, tokenizer, monkeypatch, block, max_history):
    monkeypatch.setattr("transfertransfo.data.trees.BLOCK", block)
    batch = pack_trees(make_trees(make_examples(dialogs(20), max_history, model.n_positions)), tokenizer, 0)
    blocks = batch.blocks()
    assert blocks is not None or block == 64
    found = []
    for mask in (blocks or batch.attention_mask(), batch.attention_mask()):
        hidden = model.hidden_states(batch.input_ids, batch.token_type_ids, batch.position_ids, mask).flatten(0, 1)
        read = hidden[batch.last_positions[:, -1]], hidden[batch.lm_positions]
        model.zero_grad()
        sum(part.pow(2).sum() for part in read).backward()
        found.append([*read, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_blocks_that_need_most_keys_are_none(tokenizer):
    """Of one turn, or one candidate and the whole history, they would cost more."""
    assert pack([make_fork(Example([[5] * 60], [[6] * 60], [[7] * 60]), tokenizer)], 0).blocks() is None
