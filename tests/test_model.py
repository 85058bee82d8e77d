"""Packed rows give what transformers' own double-head models give, one padded sequence a candidate."""

import json
import random
import shutil

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from cli import UserError
from inputs import IGNORED, Example, build_input_from_segments, make_examples, make_row, pack, pad_dataset
from model import SHORTEST, add_special_tokens_, enable_gradient_checkpointing_, load_model, save_model
from utils import load_tokenizer

PADDED_CLASSES = {
    "gpt": transformers.OpenAIGPTDoubleHeadsModel,
    "gpt2": transformers.GPT2DoubleHeadsModel,
}


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
    padded_model = PADDED_CLASSES[family].from_pretrained(checkpoint)
    for module in [*padded_model.modules(), *model.modules()]:  # dropout draws differ by layout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    padded_model.train(training), model.train(training)
    for block in model.pretrained.base_model.h:
        block.attn.attn_pdrop = 0.0

    want = padded_model(**padded_inputs(examples, tokenizer))
    batch = pack([make_row(example, tokenizer) for example in examples], tokenizer.pad_token_id)
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
    alone = [model(pack([make_row(example, tokenizer)], 0))[1][0] for example in ragged]
    together = model(pack([make_row(example, tokenizer) for example in ragged], 0))[1]
    for scores, row in zip(alone, together):
        torch.testing.assert_close(row[: len(scores)], scores, atol=1e-5, rtol=1e-5)
        assert (row[len(scores) :] == -torch.inf).all()


def test_candidates_do_not_see_one_another(model, tokenizer):
    example = random_examples(3, 4)[2]
    changed = example._replace(candidates=[[7, 8, 9, 10], *example.candidates[1:]])
    before, after = (model(pack([make_row(e, tokenizer)], 0)) for e in (example, changed))
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1][0, 1:], before[1][0, 1:], atol=1e-5, rtol=1e-5)
    assert not torch.isclose(after[1][0, 0], before[1][0, 0], atol=1e-4)


def test_labels_are_the_reply_and_eos(tokenizer):
    example = random_examples(3, 2)[2]
    sequence = build_input_from_segments(*example[:2], example.candidates[-1], tokenizer, lm_labels=True)
    batch = pack([make_row(example, tokenizer)], 0)
    assert batch.lm_labels.tolist() == [label for label in sequence["lm_labels"] if label != IGNORED]
    assert batch.lm_labels.tolist() == [*example.candidates[-1], tokenizer.eos_token_id]


def test_saved_model_loads_in_transformers_and_here(family, model, tmp_path):
    save_model(model, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files - {"generation_config.json"} == {"config.json", "model.safetensors"}
    language_model = {"gpt": transformers.OpenAIGPTLMHeadModel, "gpt2": transformers.GPT2LMHeadModel}[family]
    want = model.pretrained.state_dict()
    for loaded in (
        PADDED_CLASSES[family].from_pretrained(tmp_path),
        language_model.from_pretrained(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        load_model(tmp_path).pretrained,
    ):
        state = loaded.state_dict()
        assert state.keys() <= want.keys() and all(torch.equal(state[name], want[name]) for name in state)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_gradient_checkpointing_changes_no_gradient(model, tokenizer):
    batch = pack([make_row(example, tokenizer) for example in random_examples(3, 2)], 0)
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


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_positions": 3}, "n_positions: at least 4 are needed, got 3"),
        ({"n_positions": "many"}, "Validation error for field 'n_positions':"),
        ({"n_head": 3}, "divisible"),
        ({"n_head": -2}, ""),
        ({"n_embd": 0}, ""),
        ({"resid_pdrop": 5}, "dropout probability has to be between 0 and 1, but got 5"),
        ({"summary_type": "best"}, "summary_type: expected one of cls_index, last, first, mean, got 'best'"),
        ({"summary_use_proj": False}, "summary_use_proj, summary_proj_to_labels: the choice head does not give one"),
        ({"history_start": None}, "history_start: expected a position, got None"),
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
    assert line.startswith(f"--model_checkpoint {folder}: no usable ") and "\n" not in line
    if from_scratch:  # else the weights do not fit
        assert message in line


def test_the_shortest_model_there_can_be(base_checkpoints, family, tmp_path):
    folder = shutil.copytree(base_checkpoints[family], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": SHORTEST}))
    model, tokenizer = load_model(folder, from_scratch=True), load_tokenizer(folder, None)
    add_special_tokens_(model, tokenizer)
    dialogs = [{"personality": [[5, 6]], "utterances": [{"candidates": [[7], [8, 9, 10]], "history": [[5]] * 3}]}]
    examples = make_examples(dialogs, 2, model.n_positions)
    logits, scores = model(pack([make_row(example, tokenizer) for example in examples], tokenizer.pad_token_id))
    assert logits.isfinite().all() and scores.isfinite().all()
