"""What a folder holds is the model that is loaded, or it is refused: weights, tokenizers, kinds of decoders."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny_config
from safetensors.torch import load_file, save_file

from transfertransfo.data.tokenization import tokenize
from transfertransfo.errors import UserError
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.heads import double_heads_class
from transfertransfo.model.loading import check_packing_, load_finetuned, load_model, save_model
from transfertransfo.model.sources import load_tokenizer


def with_weights(folder: Path, checkpoint: Path, change) -> Path:
    """A copy of a checkpoint whose weights have been changed by a function of name and tensor, which may be None."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {change(name): tensor for name, tensor in weights.items() if change(name)}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: f"module.{name}", r"missing \d+, as .*; too many \d+, as module"),
        (lambda name: f"_orig_mod.{name}", r"missing \d+, as .*; too many \d+, as _orig_mod"),
        (lambda name: name if ".1." not in name else None, "missing [0-9]+, as .*[.]1[.][a-z_.0-9]+[)]$"),
        (lambda name: name.replace(".1.", ".2."), "missing [0-9]+, as .*[.]1[.].*; too many [0-9]+, as .*[.]2[.]"),
        (
            lambda name: name if "ln_2" not in name and "post_" not in name else None,
            r"missing [1-4], as .*[.](ln_2|post_)",
        ),
        (lambda name: name if not name.endswith("summary.bias") else None, "missing 1, as multiple_choice_head.summa"),
    ],
)
@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama", "gpt_neox"])
def test_weights_that_do_not_fit_are_refused(family, checkpoints, tmp_path, change, message):
    """transformers drew the missing ones, and the model answered as if nothing were amiss."""
    folder = with_weights(tmp_path / "model", checkpoints[family], change)
    expected = f"^--model_checkpoint {folder}: no usable weights there .not those of the model in config.json: "
    for from_scratch in (False, True):
        with pytest.raises(UserError, match=expected + message):
            load_model(folder, from_scratch=from_scratch)


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama", "gpt_neox"])
def test_a_layer_that_the_configuration_has_not_is_refused(family, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[family], tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    name = "n_layer" if family in ("gpt", "gpt2") else "num_hidden_layers"
    (folder / "config.json").write_text(json.dumps(values | {name: 1, "layer_types": None}))
    with pytest.raises(UserError, match=r"too many \d+, as .*[.]1[.]"):
        load_model(folder)


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama", "gpt_neox"])
def test_without_a_choice_head_one_is_begun_which_is_said_where_it_is_asked(family, checkpoints, tmp_path, caplog):
    folder = with_weights(
        tmp_path / "model", checkpoints[family], lambda name: name if "choice_head" not in name else None
    )
    assert load_model(folder).new_head and not load_model(checkpoints[family]).new_head
    load_finetuned(str(checkpoints[family]))
    own = "transfertransfo.model.loading"
    assert own not in {record.name for record in caplog.records}, "in training it is what is to be expected"
    load_finetuned(str(folder))
    (message,) = [message for name, level, message in caplog.record_tuples if (name, level) == (own, logging.WARNING)]
    assert message.startswith(f"{folder} has no choice head: hits@1 and all that ranks replies")


@pytest.mark.parametrize("family", ["gpt", "gpt2", "gpt_neox"])
def test_masks_of_old_files_and_heads_for_other_ends_are_passed_over(family, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[family], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    attention = {name[: name.index("att")] for name in weights if "att" in name}
    module = "attention" if family == "gpt_neox" else "attn"
    for prefix in attention:
        weights |= {
            f"{prefix}{module}.bias": torch.ones(1, 1, 8, 8),
            f"{prefix}{module}.masked_bias": torch.tensor(-1e4),
        }
    weights |= {"v_head.summary.weight": torch.ones(1, 16), "score.weight": torch.ones(2, 16)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    want = load_model(checkpoints[family]).pretrained.state_dict()
    got = load_model(folder).pretrained.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


# Tokenizers


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama", "qwen2", "gpt_neox", "gemma2", "gemma3", "opt", "mistral"])
def test_a_folder_without_tokenizer_files(family, tmp_path):
    """transformers makes one of 2 tokens for GPT-NeoX, of 5 for Gemma, and every text became nothing or <unk>."""
    tiny_config(family, 400).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^--model_checkpoint {tmp_path}: no .*tokenizer there"):
        load_tokenizer(tmp_path)


def test_a_file_that_would_have_texts_cut_or_padded(checkpoints, tmp_path, family):
    folder = shutil.copytree(checkpoints[family], tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    texts = ["i like tea , and dogs , and big houses .", "hi"]
    want = tokenize(tokenizer, texts)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    state["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert tokenize(load_tokenizer(folder), texts) == want


# Kinds of decoders


def decoder(config: transformers.PretrainedConfig, std: float) -> DoubleHeads:
    torch.manual_seed(0)
    model = DoubleHeads(double_heads_class(config)(config)).eval()
    for module in model.modules():
        if (weight := getattr(module, "weight", None)) is not None and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.0 if isinstance(module, torch.nn.Embedding) else std)
    return model


KNOWN = [tiny_config(family, 60) for family in ("llama", "gpt_neox", "opt", "gemma3", "mistral", "deepseek_v3")]
UNKNOWN = [
    tiny_config("gemma2", 60),  # a cap on the logits
    transformers.CohereConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    ),
    transformers.GraniteConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        logits_scaling=2.0,
    ),
    transformers.GPTNeoConfig(
        vocab_size=60, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["local"], 1]],
        max_position_embeddings=400,
    ),
]  # fmt: skip


@pytest.mark.parametrize("std", [1e-3, 0.02, 0.5])
@pytest.mark.parametrize("config", [*KNOWN, *UNKNOWN], ids=lambda config: config.model_type)
def test_the_configuration_decides_whether_a_model_can_be_used_not_the_size_of_its_weights(config, std):
    """With small weights no logit came near Gemma 2's cap; what was trained from them was refused."""
    model = decoder(config, std)
    hooks = {module: len(module._forward_hooks) for module in model.modules()}
    if config in KNOWN:
        check_packing_(model, "there")
    else:
        with pytest.raises(UserError, match=f"^--model_checkpoint there: a {config.model_type} model, whose attention"):
            check_packing_(model, "there")
        assert not model.additive_mask
    assert not model.token_types
    assert hooks == {module: len(module._forward_hooks) for module in model.modules()}


def test_a_model_that_raises_is_left_as_it_was(monkeypatch):
    model = decoder(KNOWN[0], 0.02)
    model.token_types = True

    def fail(*_, **__):
        raise IndexError("of its own")

    monkeypatch.setattr(type(model.pretrained), "forward", fail)
    with pytest.raises(UserError, match=r"that is not known here \(of its own\)$"):
        check_packing_(model, "there")
    assert model.token_types and not model.additive_mask
    assert not any(module._forward_hooks for module in model.modules())


def test_learnt_buffers_are_saved_and_loaded(tmp_path):
    model = decoder(tiny_config("deepseek_v3", 60), 0.02)
    (name,) = [name for name, _ in model.pretrained.named_buffers() if name in model.pretrained.state_dict()]
    torch.nn.init.normal_(model.pretrained.get_buffer(name))
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).pretrained.get_buffer(name), model.pretrained.get_buffer(name))
