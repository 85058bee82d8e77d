"""What a folder holds is the model that is loaded, or it is refused: weights, tokenizers, kinds of decoders."""

import contextlib
import io
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import AS_IN_5_3, slow_but, tiny_config
from safetensors.torch import load_file, save_file

from transfertransfo.cli import run_script
from transfertransfo.data.tokenization import tokenize
from transfertransfo.errors import UserError
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.heads import double_heads_class
from transfertransfo.model.loading import load_finetuned, load_model
from transfertransfo.model.packing import check_packing_
from transfertransfo.model.saving import save_model
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
        (lambda name: name if ".1." not in name else None, "num_hidden_layers is 2 there, 1 layers are here[)]$"),
        (lambda name: name if ".0." not in name else None, "missing [0-9]+, as .*[.]0[.][a-z_.0-9]+[)]$"),
        (lambda name: name.replace(".1.", ".2."), "missing [0-9]+, as .*[.]1[.].*; too many [0-9]+, as .*[.]2[.]"),
        (
            lambda name: name if "ln_2" not in name and "post_" not in name else None,
            r"missing [1-4], as .*[.](ln_2|post_)",
        ),
        (lambda name: name if not name.endswith("summary.bias") else None, "missing 1, as multiple_choice_head.summa"),
    ],
)
@pytest.mark.parametrize("family", slow_but(["gpt2", "llama"], ["gpt", "gpt2", "llama", "gpt_neox"]))
def test_weights_that_do_not_fit_are_refused(family, checkpoints, tmp_path, change, message):
    """transformers drew the missing ones, and the model answered as if nothing were amiss."""
    folder = with_weights(tmp_path / "model", checkpoints[family], change)
    expected = f"^model_checkpoint {folder}: no usable weights there .not those of the model in config.json: "
    for from_scratch in (False, True):
        with pytest.raises(UserError, match=expected + message):
            load_model(folder, from_scratch=from_scratch)


@pytest.mark.parametrize("part", ["layer", "choice head"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_line_names_the_weight_of_another_shape(family, checkpoints, tmp_path, kind, part):
    """It named a flag of transformers and a report above it."""
    folder = shutil.copytree(checkpoints[family], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "multiple_choice_head.summary.weight" if part == "choice head" else min(n for n in weights if ".1." in n)
    shape, weights[name] = tuple(weights[name].shape), torch.zeros(3)
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    message = f"another shape 1, as {name} of the shape (3,), in place of {shape}"
    with pytest.raises(UserError, match=re.escape(f"not those of the model in config.json: {message})")):
        load_model(folder)


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


@pytest.mark.skipif(AS_IN_5_3, reason="Gemma 4 is not in the oldest transformers")
def test_a_table_with_a_part_for_each_block_is_read_as_a_whole(checkpoints, tmp_path):
    """Gemma 4's: a process that was to read the blocks later refused its shape."""
    tokenizer = load_tokenizer(checkpoints["llama"])
    tiny_config("gemma4_text", len(tokenizer)).save_pretrained(tmp_path)
    whole = load_model(tmp_path, from_scratch=True)
    save_model(whole, tmp_path)
    for name, tensor in load_model(tmp_path, in_shards=True).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


# Configurations

LAYERS = {"gpt": "n_layer", "gpt2": "n_layer", "llama": "num_hidden_layers"}


def with_config(folder: Path, checkpoint: Path, changed: dict, file: str = "config.json") -> Path:
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changed))
    return folder


@pytest.mark.parametrize(
    ("number", "message"),
    [
        *((number, "expected a number from 0 to 1024, got") for number in (-1, 30_000, 10**30)),
        (0, "not those of the model in config.json: too many"),
        *((number, f"num_hidden_layers is {number} there, 2 layers are here") for number in (3, 1000)),
        *((number, "") for number in ("2", None)),  # in the words of transformers
    ],
)
@pytest.mark.parametrize("family", LAYERS)
def test_layers_are_those_of_the_weights(family, checkpoints, tmp_path, number, message):
    """30,000 were made one by one, before anything was compared; 0 and -1 were taken for none."""
    changed = {LAYERS[family]: number, "layer_types": None}
    folder = with_config(tmp_path / "model", checkpoints[family], changed)
    with pytest.raises(
        UserError, match=f"^model_checkpoint {folder}: no usable (weights|config.json) there .*{message}"
    ) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_labels": 10**9}, "num_labels: expected a number from 0 to 1024, got 1000000000"),
        ({"eos_token_id": [1] * 20_000}, "eos_token_id: a list of 20000, more than 10000"),
        ({"eos_token_id": [1] * 10**6}, "config.json is [0-9]+ bytes, more than 1048576"),
        ({"max_position_embeddings": 10**9, "n_positions": 10**9}, "expected a number from 0 to 16777216"),
        ({"text_config": {"num_hidden_layers": -1}}, "num_hidden_layers: expected a number from 0"),
        ({"token_types": "no"}, "token_types: expected true or false, got 'no'"),
        ({"token_types": 5}, "token_types: expected true or false, got 5"),
        ({"rms_norm_eps": float("nan"), "layer_norm_epsilon": float("nan")}, ""),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_that_no_configuration_has(family, checkpoints, tmp_path, changed, message):
    folder = with_config(tmp_path / "model", checkpoints[family], changed)
    with pytest.raises(UserError, match=f"^model_checkpoint {folder}: .*{message}") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_long_list_in_the_generations_configuration(checkpoints, tmp_path):
    folder = with_config(
        tmp_path / "model", checkpoints["llama"], {"eos_token_id": [1] * 10**6}, "generation_config.json"
    )
    with pytest.raises(UserError, match=r"generation_config.json is [0-9]+ bytes"):
        load_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_that_are_not_finite_are_neither_loaded_nor_written(family, checkpoints, tmp_path, bad):
    """A chat with them ended in a traceback, and they took the place of good ones."""
    folder = shutil.copytree(checkpoints[family], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = max(name for name in weights if ".1." in name)
    weights[name].view(-1)[-1] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"^model_checkpoint {folder}: no usable weights there \(not finite: .*{name}\)"
    ):
        load_model(folder)
    model = load_model(checkpoints[family])
    good = (folder / "model.safetensors").read_bytes()
    model.pretrained.get_parameter(name).data.view(-1)[-1] = bad
    with pytest.raises(UserError, match=rf"model.safetensors: not written \(not finite: .*{name}\)"):
        save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == good and not [*folder.glob("*.tmp")]


@pytest.mark.parametrize(
    ("family", "name"),  # that are said in an error
    [
        *((family, name) for family in ("gpt", "llama") for name in ("model_type", "dtype", "summary_type")),
        ("gpt", "afn"),
        ("llama", "hidden_act"),
    ],
)
def test_escape_sequences_of_a_configuration_do_not_reach_the_terminal(family, checkpoints, tmp_path, name, capsys):
    folder = with_config(tmp_path / "model", checkpoints[family], {name: "\x1b[2J\x07\r\n\x9b1m" * 99})

    def script():
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' bar
            load_model(folder)

    with pytest.raises(SystemExit, match="2"):
        run_script(script)
    error = capsys.readouterr().err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", error)
    assert error.count("\n") <= 1 and len(error) < 1000


# Tokenizers


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama", "qwen2", "gpt_neox", "gemma2", "gemma3", "opt", "mistral"])
def test_a_folder_without_tokenizer_files(family, tmp_path):
    """transformers makes one of 2 tokens for GPT-NeoX, of 5 for Gemma, and every text became nothing or <unk>. Of Llama
    and Mistral it says that it cannot do it "from one of:".
    """
    tiny_config(family, 400).save_pretrained(tmp_path)
    message = f"model_checkpoint {tmp_path}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt)"
    for settings in (None, {"eos_token": "</s>", "extra_special_tokens": [f"<{number}>" for number in range(20)]}):
        if settings:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
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


KNOWN = [
    *(tiny_config(family, 60) for family in ("llama", "gpt_neox", "opt", "gemma3", "mistral", "deepseek_v3")),
    *(tiny_config(family, 60) for family in ("gemma2", "cohere", "cohere2", "granite")),  # which scale their logits
]
UNKNOWN = [
    transformers.BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2),
    transformers.GPTNeoConfig(
        vocab_size=60, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["local"], 1]],
        max_position_embeddings=400,
    ),
    # back over more tokens than are tried
    tiny_config("gpt_neo", 60, max_position_embeddings=1024, window_size=512),
    *(tiny_config(family, 60) for family in ("mpt", "falcon_alibi", "llama4_text", "mamba")),
    *([] if AS_IN_5_3 else [tiny_config("qwen3_5_text", 60)]),
]  # fmt: skip


@pytest.mark.parametrize("std", slow_but([0.0, 0.5], [0.0, 1e-3, 0.5]))
@pytest.mark.parametrize("config", [*KNOWN, *UNKNOWN], ids=lambda config: config.model_type)
def test_the_configuration_decides_whether_a_model_can_be_used_not_the_size_of_its_weights(config, std):
    """With small weights no logit came near Gemma 2's cap; what was trained from them was refused. With zeros every
    model was refused, and GPT-Neo with a long window was taken whatever its weights.
    """
    model = decoder(config, std)
    if config in KNOWN:
        check_packing_(model, "there")
    else:
        with pytest.raises(UserError, match=f"^model_checkpoint there: a {config.model_type} model, whose attention"):
            check_packing_(model, "there")
        assert not model.additive_mask
    assert not model.token_types


@pytest.mark.parametrize("family", ["gpt_neo", "mpt"])
def test_zeros_behind_attention_do_not_hide_its_kind(family):
    """As some begin: the model was taken, and refused when it had been trained."""
    model = decoder(tiny_config(family, 60), 0.02)
    for name, layer in model.pretrained.named_modules():
        if name.endswith(("out_proj", "c_proj", "down_proj")):
            torch.nn.init.zeros_(layer.weight)
    with pytest.raises(UserError, match="whose attention"):
        check_packing_(model, "there")


def test_a_model_that_raises_is_left_as_it_was(monkeypatch):
    model = decoder(KNOWN[0], 0.02)
    model.token_types = True

    def fail(*_, **__):
        raise IndexError("of its own")

    monkeypatch.setattr(type(model.pretrained), "forward", fail)
    with pytest.raises(UserError, match=r"that is not known here \(of its own\)$"):
        check_packing_(model, "there")
    assert model.token_types and not model.additive_mask


def test_learnt_buffers_are_saved_and_loaded(tmp_path):
    model = decoder(tiny_config("deepseek_v3", 60), 0.02)
    (name,) = [name for name, _ in model.pretrained.named_buffers() if name in model.pretrained.state_dict()]
    torch.nn.init.normal_(model.pretrained.get_buffer(name))
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).pretrained.get_buffer(name), model.pretrained.get_buffer(name))
