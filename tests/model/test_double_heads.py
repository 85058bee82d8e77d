"""Packed rows give what transformers' own models give, one padded sequence a candidate."""

import json
import os
import random
import shutil

import pytest
import torch
import transformers
from helpers import EVERY_FAMILY, FAMILIES, OTHERS, load_own
from torch.nn.functional import cross_entropy

from transfertransfo.data.inputs import (
    IGNORED,
    Example,
    build_input_from_segments,
    make_examples,
    make_fork,
    pad_dataset,
)
from transfertransfo.data.trees import pack
from transfertransfo.errors import UserError
from transfertransfo.model.checks import SHORTEST
from transfertransfo.model.double_heads import (
    add_special_tokens_,
    enable_gradient_checkpointing_,
    halve_,
    has_bfloat16_units,
    prepare_bfloat16,
)
from transfertransfo.model.loading import load_model
from transfertransfo.model.packing import use_eager_attention_
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer

PADDED_CLASSES = {
    "gpt": transformers.OpenAIGPTDoubleHeadsModel,
    "gpt2": transformers.GPT2DoubleHeadsModel,
}


@pytest.fixture(params=EVERY_FAMILY)
def family(request) -> str:
    return request.param


class PaddedDecoder(torch.nn.Module):
    """A decoder of transformers with a choice head, called as its double-head models are, without token types."""

    def __init__(self, checkpoint):
        super().__init__()
        self.decoder = load_own(checkpoint, transformers.AutoModelForCausalLM.from_pretrained)
        self.head = load_own(checkpoint).pretrained.multiple_choice_head

    def forward(self, input_ids, token_type_ids, mc_token_ids, labels, mc_labels):
        out = self.decoder(input_ids.flatten(0, 1), output_hidden_states=True)
        last = out.hidden_states[-1][range(mc_token_ids.numel()), mc_token_ids.flatten()]
        mc_logits = self.head.summary(last).view_as(mc_token_ids)
        loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten(0, 1)[:, 1:].flatten())
        return transformers.utils.ModelOutput(
            loss=loss, mc_logits=mc_logits, mc_loss=cross_entropy(mc_logits, mc_labels)
        )

    def named_parameters(self):
        yield from self.decoder.named_parameters()
        yield from self.head.named_parameters(prefix="multiple_choice_head")


def padded_model_of(family: str, checkpoint) -> torch.nn.Module:
    return PADDED_CLASSES[family].from_pretrained(checkpoint) if family in PADDED_CLASSES else PaddedDecoder(checkpoint)


def random_examples(n: int, num_candidates: int, seed: int = 0) -> list[Example]:
    """Examples of ragged lengths; the first has no persona, the second a history of one turn."""
    generator = random.Random(seed)

    def sentence(low=1, high=9):
        return [generator.randrange(5, 100) for _ in range(generator.randint(low, high))]

    examples = [
        Example(
            [sentence() for _ in range(generator.randint(1, 4))],
            [sentence() for _ in range(generator.choice([1, 3, 5, 2]))],
            [sentence() for _ in range(num_candidates)],
        )
        for _ in range(n)
    ]
    return [examples[0]._replace(persona=[]), examples[1]._replace(history=[sentence()]), *examples[2:]]


def padded_inputs(examples: list[Example], tokenizer) -> dict[str, torch.Tensor]:
    """What the original fed its model: (B, K, T) and (B, K)."""
    instances = [
        build_input_from_segments(e.persona, e.history, reply, tokenizer, lm_labels=reply is e.candidates[-1])
        for e in examples
        for reply in e.candidates
    ]
    padded = pad_dataset({name: [i[name] for i in instances] for name in instances[0]}, tokenizer.pad_token_id)
    shape = (len(examples), len(examples[0].candidates))
    tensors = {name: torch.tensor(values).unflatten(0, shape) for name, values in padded.items()}
    return {
        "input_ids": tensors["input_ids"],
        "token_type_ids": tensors["token_type_ids"],
        "mc_token_ids": tensors["mc_token_ids"],
        "labels": tensors["lm_labels"],
        "mc_labels": torch.full((len(examples),), shape[1] - 1),
    }


@pytest.mark.parametrize("num_candidates", [2, 20])
@pytest.mark.parametrize("training", [False, True])
def test_packed_rows_equal_padded_sequences(family, checkpoint, model, tokenizer, num_candidates, training):
    examples = random_examples(5, num_candidates)
    padded_model = padded_model_of(family, checkpoint)
    for module in [*padded_model.modules(), *model.modules()]:  # dropout draws differ by layout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    padded_model.train(training), model.train(training)
    for block in model.pretrained.base_model.h if family == "gpt" else ():
        block.attn.attn_pdrop = 0.0

    want = padded_model(**padded_inputs(examples, tokenizer))
    batch = pack([make_fork(example, tokenizer) for example in examples], tokenizer.pad_token_id)
    lm_logits, choice_scores = model(batch)
    lm_loss = cross_entropy(lm_logits, batch.lm_labels)
    mc_loss = cross_entropy(choice_scores, batch.choice_labels)

    torch.testing.assert_close(choice_scores, want.mc_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lm_loss, want.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mc_loss, want.mc_loss, atol=1e-5, rtol=1e-5)
    if training:
        (lm_loss + mc_loss).backward(), (want.loss + want.mc_loss).backward()
        gradients = dict(padded_model.named_parameters())
        for name, parameter in model.pretrained.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_rows_of_different_numbers_of_candidates(model, tokenizer):
    """Fewer candidates in one utterance ended the original with `shape '[-1, 2, 34]' is invalid`."""
    full = random_examples(3, 4)
    ragged = [full[0], full[1]._replace(candidates=full[1].candidates[-2:]), full[2]]
    alone = [model(pack([make_fork(example, tokenizer)], 0))[1][0] for example in ragged]
    together = model(pack([make_fork(example, tokenizer) for example in ragged], 0))[1]
    for scores, row in zip(alone, together):
        torch.testing.assert_close(row[: len(scores)], scores, atol=1e-5, rtol=1e-5)
        assert (row[len(scores) :] == -torch.inf).all()


def test_candidates_do_not_see_one_another(model, tokenizer):
    example = random_examples(3, 4)[2]
    changed = example._replace(candidates=[[7, 8, 9, 10], *example.candidates[1:]])
    before, after = (model(pack([make_fork(e, tokenizer)], 0)) for e in (example, changed))
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1][0, 1:], before[1][0, 1:], atol=1e-5, rtol=1e-5)
    assert not torch.isclose(after[1][0, 0], before[1][0, 0], atol=1e-4)


@pytest.mark.parametrize("token_types", [False, True])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_eager_attention_is_the_same_function(family, token_types, model, tokenizer):
    model.token_types = token_types
    batch = pack([make_fork(example, tokenizer) for example in random_examples(3, 4)], 0)
    want = model(batch)
    use_eager_attention_(model)
    assert model.additive_mask == (family in OTHERS)
    for got, wanted in zip(model(batch), want):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_bfloat16_has_words_rounded_but_not_scores(family, model, tokenizer):
    batch = pack([make_fork(example, tokenizer) for example in random_examples(3, 4)], 0)
    with torch.inference_mode():
        want_logits, want_scores = model(batch)
        halve_(model)
        logits, scores = model(batch)
    assert logits.dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(logits.float(), want_logits, atol=0.1 * want_logits.std().item(), rtol=0)
    torch.testing.assert_close(scores, want_scores, atol=0.01, rtol=0.02)
    assert (scores.bfloat16() != scores).any()


@pytest.mark.parametrize(("line", "has"), [
    ("flags\t\t: fpu avx2 avx512f", False), ("flags\t\t: fpu avx512_bf16", True), ("flags\t: amx_bf16", True),
    ("Features\t: fp asimd bf16", True), ("Features\t: fp asimd", False), ("vendor_id: x", True),
])  # fmt: skip
def test_a_processor_without_bfloat16_units_is_told_of(line, has, tmp_path, monkeypatch, caplog):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert has_bfloat16_units(str(tmp_path / "cpuinfo")) == has and has_bfloat16_units(str(tmp_path / "none"))
    monkeypatch.setattr("transfertransfo.model.double_heads.has_bfloat16_units", lambda: has)
    monkeypatch.setattr("os.environ", dict(os.environ))
    prepare_bfloat16(torch.device("cpu"))
    assert len(caplog.records) == (not has)


def test_where_eager_attention_is_another_function_the_model_keeps_its_own(checkpoints, tokenizer, monkeypatch):
    model = load_model(checkpoints["llama"])
    monkeypatch.setattr("transfertransfo.model.packing.check_packing_", raise_user_error)
    use_eager_attention_(model)
    assert model.pretrained.config._attn_implementation == "sdpa" and not model.additive_mask


def raise_user_error(*_) -> None:
    raise UserError("of another kind")


def test_labels_are_the_reply_and_eos(tokenizer):
    example = random_examples(3, 2)[2]
    sequence = build_input_from_segments(*example[:2], example.candidates[-1], tokenizer, lm_labels=True)
    batch = pack([make_fork(example, tokenizer)], 0)
    assert batch.lm_labels.tolist() == [label for label in sequence["lm_labels"] if label != IGNORED]
    assert batch.lm_labels.tolist() == [*example.candidates[-1], tokenizer.eos_token_id]


def test_saved_model_loads_in_transformers_and_here(family, model, tmp_path):
    save_model(model, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files - {"generation_config.json"} == {"config.json", "model.safetensors"}
    want = model.pretrained.state_dict()
    assert {"multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"} <= want.keys()
    classes = [transformers.AutoModelForCausalLM, getattr(transformers, type(model.pretrained).__name__)]
    for loaded in (*(c.from_pretrained(tmp_path) for c in classes), load_model(tmp_path).pretrained):
        state = loaded.state_dict()
        assert state.keys() <= want.keys() and all(torch.equal(state[name], want[name]) for name in state)
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied == (family != "gpt_neox")
    assert load_model(tmp_path).pretrained.state_dict().keys() == want.keys()


def test_gradient_checkpointing_changes_no_gradient(model, tokenizer):
    batch = pack([make_fork(example, tokenizer) for example in random_examples(3, 2)], 0)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing_(model)
        model.zero_grad()
        torch.manual_seed(0)
        model.train()(batch)[0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


# Configurations


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_positions": 3}, "n_positions: at least 4 are needed, got 3"),
        ({"n_positions": "many"}, "no usable config.json there ("),
        ({"n_head": 3}, "divisible"),
        ({"n_head": -2}, ""),
        ({"n_embd": 0}, ""),
        ({"resid_pdrop": 5}, "dropout probability has to be between 0 and 1, but got 5"),
        ({"summary_type": "best"}, "summary_type: expected one of cls_index, last, first, mean, got 'best'"),
        ({"summary_use_proj": False}, "summary_use_proj, summary_proj_to_labels: the choice head does not give one"),
        ({"history_start": None}, "history_start: expected one of the first 64 positions, got None"),
        ({"history_start": 65}, "history_start: expected one of the first 64 positions, got 65"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_one_clear_line(
    base_checkpoints, checkpoints, family, tmp_path, changed, message, from_scratch
):
    """Many of them were taken, and ended in a traceback at the first step."""
    folder = shutil.copytree((base_checkpoints if from_scratch else checkpoints)[family], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError) as error:
        load_model(folder, from_scratch=True)
    line = str(error.value)
    assert line.startswith(f"model_checkpoint {folder}: no usable ") and "\n" not in line
    if from_scratch:  # else the weights do not fit
        assert message in line


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shortest_model_there_can_be(base_checkpoints, family, tmp_path):
    folder = shutil.copytree(base_checkpoints[family], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": SHORTEST}))
    model, tokenizer = load_model(folder, from_scratch=True), load_tokenizer(folder, None)
    add_special_tokens_(model, tokenizer)
    dialogs = [{"personality": [[5, 6]], "utterances": [{"candidates": [[7], [8, 9, 10]], "history": [[5]] * 3}]}]
    examples = make_examples(dialogs, 2, model.n_positions)
    logits, scores = model(pack([make_fork(example, tokenizer) for example in examples], tokenizer.pad_token_id))
    assert logits.isfinite().all() and scores.isfinite().all()


# Other families


@pytest.mark.parametrize("family", OTHERS)
def test_token_types_add_the_speakers_embeddings(model, tokenizer):
    batch = pack([make_fork(example, tokenizer) for example in random_examples(3, 2)], 0)
    plain, _ = model(batch)
    embeddings = model.pretrained.get_input_embeddings()
    summed = model.pretrained.base_model(
        inputs_embeds=embeddings(batch.input_ids) + embeddings(batch.token_type_ids),
        position_ids=batch.position_ids, attention_mask=batch.attention_mask(),
    )  # fmt: skip
    assert not model.token_types
    model.token_types = True
    with_types, _ = model(batch)
    want = model.lm_logits(summed.last_hidden_state.flatten(0, 1)[batch.lm_positions])
    torch.testing.assert_close(with_types, want)
    assert not torch.allclose(with_types, plain, atol=0.1)


@pytest.mark.parametrize("family", OTHERS)
def test_a_new_head_gives_all_candidates_the_same_score_and_tokens_rows_of_their_own(family, base_checkpoints):
    model, tokenizer = load_model(base_checkpoints[family], from_scratch=True), load_tokenizer(base_checkpoints[family])
    old = model.pretrained.get_input_embeddings().weight[: len(tokenizer)].clone()
    model.pretrained.get_input_embeddings().weight.data[len(tokenizer) :] = 0  # as rows that no token has may be
    add_special_tokens_(model, tokenizer)
    for embeddings in (model.pretrained.get_input_embeddings(), model.pretrained.get_output_embeddings()):
        assert len(embeddings.weight) == len(tokenizer) == len(old) + 5 == model.pretrained.config.vocab_size
    rows = model.pretrained.get_input_embeddings().weight
    assert torch.equal(rows[:-5], old) and 0.1 < rows[-5:].std() < 0.5
    _, scores = model(pack([make_fork(example, tokenizer) for example in random_examples(3, 4)], 0))
    assert torch.equal(scores, torch.zeros(3, 4))


TINY = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BertConfig(**TINY, intermediate_size=16), "a bert model, an encoder, which predicts no next"),
        (transformers.T5Config(vocab_size=50, d_model=16), "a t5 model, which has an encoder; a decoder alone is"),
        (transformers.ViTConfig(), "a vit model; transformers' AutoModelForCausalLM does not know it"),
        (transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2), "a bloom model, whose"),
        (transformers.GPTNeoConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, initializer_range=0.5,
                                   attention_types=[[["local"], 1]]), "a gpt_neo model, whose"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_used(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model_checkpoint {tmp_path}: {message}"):
        load_model(tmp_path, from_scratch=True)


@pytest.mark.parametrize(
    "config",
    [
        transformers.OPTConfig(**TINY, ffn_dim=16, word_embed_proj_dim=8),
        transformers.MistralConfig(**TINY, intermediate_size=16, num_key_value_heads=1, sliding_window=32),
        transformers.PhiConfig(**TINY, intermediate_size=16),
    ],
)
def test_other_decoders(config, tmp_path):
    """OPT has positions with an offset, and hidden states narrower within than at their ends."""
    config.save_pretrained(tmp_path)
    model = load_model(tmp_path, from_scratch=True)
    assert model.n_positions == config.max_position_embeddings
    assert model.pretrained.multiple_choice_head.summary.in_features == (8 if config.model_type == "opt" else 16)
