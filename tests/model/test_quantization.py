"""A model in 4 bits is that of the unpacked weights; it is trained, stopped, resumed and loaded as any other."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Run, adapt, make_base, run_processes, run_training, slow_but
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from convai_evaluation import run as evaluate
from train import train
from transfertransfo.data.inputs import Example, make_fork
from transfertransfo.data.trees import pack
from transfertransfo.errors import UserError
from transfertransfo.model.double_heads import (
    DoubleHeads,
    base_digest,
    enable_gradient_checkpointing_,
)
from transfertransfo.model.loading import load_finetuned, load_model
from transfertransfo.model.quantization import can_quantize, quantize_, quantized_layers
from transfertransfo.training.checkpoints import list_checkpoints
from transfertransfo.training.memory import estimate_memory

pytest.importorskip("peft", reason="needs requirements/extra.txt")
quantizing = pytest.mark.skipif(not can_quantize(), reason="needs bitsandbytes of requirements/extra.txt")

EXAMPLES = [
    Example([[7, 8], [9]], [[9, 10, 11], [13, 14], [15, 16]], [[12, 13], [14], [15, 16, 17]]),
    Example([[20, 8]], [[19, 10, 11]], [[22, 13], [14, 12], [13, 14, 23]]),
]


@pytest.fixture(scope="module")
def base(base_checkpoints, tmp_path_factory) -> Path:
    """A Llama whose rows are whole blocks of 64 weights."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return make_base(tmp_path_factory.mktemp("llama-base"), base_checkpoints, "llama", **shape)


def unpack(model: DoubleHeads) -> DoubleHeads:
    """The same model with `nn.Linear` of the unpacked weights."""
    model = copy.deepcopy(model)
    for parent in [*model.modules()]:
        for name, layer in [*parent.named_children()]:
            if layer in quantized_layers(parent):
                weight = layer.unpacked().float()
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None).requires_grad_(False)
                linear.weight.data = weight
                if layer.bias is not None:
                    linear.bias.data = layer.bias.data
                setattr(parent, name, linear)
    return model


def step(model: DoubleHeads, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, and the gradient of what is trained."""
    batch = pack([make_fork(example, tokenizer) for example in EXAMPLES], tokenizer.pad_token_id)
    logits, scores = model(batch)
    losses = torch.stack([
        cross_entropy(logits.float(), batch.lm_labels), cross_entropy(scores.float(), batch.choice_labels),
    ])  # fmt: skip
    losses.sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return losses.detach(), gradient


@quantizing
@pytest.mark.parametrize(
    "family",
    slow_but(
        ["gpt", "llama", "mixtral"], ["gpt", "gpt2", "llama", "qwen2", "gpt_neox", "opt", "mixtral", "gemma3_text"]
    ),
)
def test_it_computes_as_with_the_unpacked_weights(family, base_checkpoints, tmp_path):
    """Losses, and gradients of adapters, embeddings and the choice head; Conv1D has its weights the other way round."""
    model, tokenizer = adapt(make_base(tmp_path, base_checkpoints, family))
    before, _ = step(model, tokenizer)
    quantize_(model, "cpu")
    (losses, gradient), (want, wanted) = step(model, tokenizer), step(unpack(model), tokenizer)
    assert torch.allclose(losses, want, rtol=1e-5)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()
    assert not torch.allclose(losses, before, rtol=1e-5)


@quantizing
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_decides_what_it_computes_in(family, base_checkpoints, tmp_path):
    model, tokenizer = adapt(make_base(tmp_path, base_checkpoints, family))
    quantize_(model, "cpu", bf16=True)
    types = []
    for layer in quantized_layers(model):
        multiply = layer.multiply
        layer.multiply = lambda inputs, *rest, multiply=multiply, **more: (
            types.append(inputs.dtype) or multiply(inputs, *rest, **more)
        )
    with torch.autocast("cpu", torch.bfloat16):
        (losses, _), (want, _) = step(model, tokenizer), step(unpack(model), tokenizer)
    assert torch.allclose(losses, want, rtol=1e-5)
    assert set(types) == {torch.bfloat16}


@quantizing
def test_layers_of_the_blocks_alone_are_quantised(base):
    model, _ = adapt(base)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantize_(model, "cpu")
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(packed) == 2 * len(names) and all(name.split(".")[-3] in names for name in packed)
    for name, parameter in model.named_parameters():
        assert name in packed or torch.equal(parameter, kept[name])
    for name in packed:
        assert model.get_parameter(name).numel() == kept[name].numel() / 2


@quantizing
def test_the_base_is_recognised_as_before(base):
    model, _ = adapt(base)
    digest = base_digest(model)
    quantize_(model, "cpu")
    assert base_digest(model) == digest != ""


@quantizing
def test_checkpointing_changes_nothing(base):
    model, tokenizer = adapt(base)
    quantize_(model, "cpu")
    torch.manual_seed(3)  # of the choice head's dropout
    losses, gradient = step(model.train(), tokenizer)
    enable_gradient_checkpointing_(model)
    torch.manual_seed(3)
    again, gradient_again = step(model, tokenizer)
    assert torch.equal(losses, again) and torch.allclose(gradient, gradient_again, rtol=1e-5, atol=1e-7)


FLAGS = ("--quantize", "4bit", "--lora_rank", 2, "--lr", 1e-2, "--seed", 5, "--n_epochs", 2, "--train_batch_size", 2,
         "--gradient_accumulation_steps", 1)  # fmt: skip


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    if not can_quantize():
        pytest.skip("needs bitsandbytes of requirements/extra.txt")
    return run_training(tmp_path_factory.mktemp("quantized"), base, *FLAGS)


def test_a_run_learns_and_exports_its_adapter(run):
    losses = [line["lm_loss"] for line in run.steps]
    assert losses[-1] < losses[0]
    assert not list(run.folder.glob("model*.safetensors")) and (run.folder / "adapter_model.safetensors").exists()
    assert json.loads((run.folder / "training_args.json").read_text())["quantize"] == "4bit"
    assert json.loads((run.folder / "config.json").read_text())["quantize"] == "4bit"
    assert "quant" not in (run.folder / "adapter_config.json").read_text()


def test_the_evaluation_and_the_chat_hold_the_weights_as_training_did(run, monkeypatch, caplog):
    """In full precision, with one line, where bitsandbytes is not installed."""
    model, tokenizer = load_finetuned(str(run.folder), device="cpu")
    assert len(quantized_layers(model)) == 14 and not caplog.records
    halved, _ = load_finetuned(str(run.folder), device="cpu", fp16="bf16")
    assert len(quantized_layers(halved)) == 14
    caplog.clear()
    monkeypatch.setattr("transfertransfo.model.loading.can_quantize", lambda: False)
    whole, _ = load_finetuned(str(run.folder), device="cpu")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "was trained over 4-bit weights" in line and not quantized_layers(whole)
    batch = pack([make_fork(example, tokenizer) for example in EXAMPLES], tokenizer.pad_token_id)
    with torch.inference_mode():
        want, close, far = (either(batch)[0].float() for either in (model, halved, whole))
    assert (close - want).norm() < 0.03 * want.norm() and not torch.allclose(far, want, rtol=1e-3)


def test_an_adapter_loaded_again_goes_on_as_it_was_left(run, tmp_path):
    """Without --lora_rank: the first figure of the next run is the last one of this one."""
    flags = ["--quantize", "4bit", "--n_epochs", 1, "--eval_before_start"]
    after = run_training(tmp_path, run.folder, *flags)
    (want, got) = (validations.validations[place] for validations, place in ((run, -1), (after, 0)))
    assert got["nll"] == pytest.approx(want["nll"], rel=1e-5) and got["replies"] == want["replies"]
    whole = run_training(tmp_path / "whole", run.folder, *flags[2:]).validations[0]
    assert whole["nll"] != pytest.approx(want["nll"], rel=1e-5)


def test_a_resumed_run_equals_one_left_alone(run, tmp_path, base):
    shutil.copytree(run.folder.parents[1], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "runs" / run.folder.name
    want = load_file(folder / "adapter_model.safetensors")
    newest = list_checkpoints(folder)[-1]
    for file in (newest, folder / "adapter_model.safetensors"):
        file.unlink()
    moved = shutil.copytree(base, tmp_path / "moved")
    run_training(tmp_path, moved, "--resume", folder)
    got = load_file(folder / "adapter_model.safetensors")
    assert list_checkpoints(folder)[-1] == newest
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@quantizing
@pytest.mark.slow
def test_several_processes_train_it(base, run, tmp_path):
    """The first loss is that of one process; the choice head's dropout then differs."""
    flags = ["--dataset_path", run.folder.parents[1] / "dataset.json", "--device", "cpu", *FLAGS,
             "--train_batch_size", 1]  # fmt: skip
    assert run_processes(2, tmp_path, train, ["--model_checkpoint", base, *flags]) == [0, 0]
    (folder,) = (tmp_path / "runs").iterdir()
    losses = [[line["lm_loss"] for line in lines] for lines in (run.steps, Run(folder, "").steps)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5) and losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(
    "more",
    [["--max_history", 1], pytest.param(["--fp16", "bf16", "--gradient_checkpointing"], marks=pytest.mark.slow)],
)
def test_the_script_evaluates_it(run, more, base, tmp_path, monkeypatch):
    """hits@1, perplexity and F1 are those of a model with the unpacked weights."""
    folder = run.folder if more[0] == "--max_history" else run_training(tmp_path, base, *FLAGS, *more).folder
    argv = ["--model_checkpoint", folder, "--dataset_path", folder.parents[1] / "dataset.json", "--eval_type", "all",
            "--device", "cpu", "--no_sample"]  # fmt: skip

    def quantize_and_unpack_(model: DoubleHeads, *arguments, **more) -> None:
        quantize_(model, *arguments, **more)
        model.network = unpack(model).network

    report = evaluate([str(argument) for argument in argv])
    monkeypatch.setattr("transfertransfo.model.loading.quantize_", quantize_and_unpack_)
    other = evaluate([str(argument) for argument in argv])
    for name in ("hits@1", "ppl", "f1"):
        assert report[name] == pytest.approx(other[name], rel=1e-5)


@quantizing
def test_the_memory_of_four_bits_is_told(base):
    model, tokenizer = adapt(base)
    batch = pack([make_fork(example, tokenizer) for example in EXAMPLES], tokenizer.pad_token_id)
    flags = {"half": None, "micro_steps": 1, "n_processes": 1, "sharded": False, "checkpointing": False}
    before = estimate_memory(model, batch, torch.device("cpu"), **flags)
    packed = {name: parameter.numel() for name, parameter in model.named_parameters() if "proj.base" in name}
    quantize_(model, "cpu")
    memory = estimate_memory(model, batch, torch.device("cpu"), **flags)
    blocks = [n // 64 for n in packed.values()]  # each with a scale of one byte, 256 of them with one of four
    scales = sum(n + 4 * math.ceil(n / 256) + 4 * (16 + 256 + 1) for n in blocks)
    unpacked = 4 * max(packed.values())
    assert memory.parameters == before.parameters - 3.5 * sum(packed.values()) + scales + unpacked
    assert memory.optimizer == before.optimizer and memory.activations == before.activations


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "needs --lora_rank; weights of 4 bits cannot be trained themselves"),
        (["--lora_rank", "0"], "needs --lora_rank; weights of 4 bits cannot be trained themselves"),
        (["--lora_rank", "2", "--merge_lora"], "not with --merge_lora; without it the run folder holds the adapter"),
        (["--lora_rank", "2", "--sharded"], "not with --sharded; each process has the weights in 4 bits"),
        (["--lora_rank", "2", "--fp16", "O2"], "not with --fp16 O2, which makes float16 of all weights; use bf16"),
        (["--lora_rank", "2"], "needs bitsandbytes; pip install -r requirements/extra.txt"),
    ],
)
def test_what_does_not_go_with_it_is_a_line(flags, line, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as told:
        train(["--quantize", "4bit", *flags])
    assert str(told.value) == f"--quantize 4bit: {line}"


@quantizing
def test_a_device_that_it_does_not_work_on_is_a_line(base, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel\nfor this device")

    model, _ = adapt(base)
    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    with pytest.raises(UserError, match=r"^quantize 4bit: bitsandbytes does not work on cpu \(no kernel\)$"):
        quantize_(model, "cpu")


@quantizing
def test_a_checkpoint_that_asks_for_another_kind_is_refused(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "changed")
    values = json.loads((folder / "config.json").read_text()) | {"quantize": ["8bit"]}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="quantize: expected"):
        load_model(folder)
