"""Processes that hold a share of a model each compute what one with the whole model computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DATASET, dialog, run_processes, run_training
from safetensors.torch import load_file, save_file

from train import train
from transfertransfo.errors import UserError

DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout")  # drawn differently by each process
DIALOGS = {"train": [dialog(i) for i in range(9)], "valid": DATASET["valid"]}  # the last batch of four has two
FLAGS = ["--lr", 1e-4, "--gradient_accumulation_steps", 2, "--n_epochs", 1, "--valid_batch_size", 1]
FAMILIES = ("gpt", "gpt2", "llama")


@pytest.fixture(scope="module")
def bases(checkpoints, base_checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Models without dropout; the one of Llama's shape knows neither the dialog tokens nor the choice head."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(family)
        source = checkpoints[family] if family != "llama" else base_checkpoints[family]
        shutil.copytree(source, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(DROPOUTS, 0.0)))
        if family == "llama":
            weights = load_file(checkpoints[family] / "model.safetensors")
            size = config["vocab_size"]
            kept = {name: value[:size] if "embed" in name else value for name, value in weights.items()}
            kept = {name: value.contiguous() for name, value in kept.items() if "multiple_choice" not in name}
            save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folders


@pytest.fixture(autouse=True)
def no_dropout(monkeypatch):
    """Of the choice head, whose dropout no configuration names."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *args, **kwargs: x)


def figures(folder: Path) -> list[list[float]]:
    """Losses of each step and validation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "lm_loss", "mc_loss", "lr", "nll", "accuracy")
    return [[line[name] for name in names if name in line] for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = {"model.safetensors", "adapter_model.safetensors"} & {path.name for path in folder.iterdir()}
    return load_file(folder / file)


def run_folder(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def train_sharded(count: int, cwd: Path, base: Path, *flags) -> Path:
    """Train by processes that share batches of four; returns the run folder."""
    cwd.mkdir(exist_ok=True)
    (cwd / "dataset.json").write_text(json.dumps(DIALOGS))
    argv = ["--model_checkpoint", base, "--dataset_path", "dataset.json", "--device", "cpu", "--sharded",
            "--train_batch_size", 4 // count, *flags]  # fmt: skip
    statuses = run_processes(count, cwd, train, argv)
    assert statuses == [0] * count, "".join((cwd / f"log{rank}").read_text()[-2000:] for rank in range(count))
    return run_folder(cwd)


def check_equal(one: Path, several: Path) -> None:
    assert len(figures(one)) > 3
    for a, b in zip(figures(one), figures(several), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    ours, theirs = weights(one), weights(several)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [[], ["--lora_rank", 2]], ids=["whole", "adapters"])
def test_shards_compute_what_the_whole_model_does(bases, tmp_path, family, more):
    """Two and four processes, and one with a batch as large; tensors of fewer rows than processes too."""
    flags = [*FLAGS, "--eval_before_start", *more]
    if family == "gpt2":
        flags += ["--gradient_checkpointing"]
    if family == "gpt" and not more:
        flags += ["--freeze_embeddings"]
    one = run_training(tmp_path / "one", bases[family], *flags, "--train_batch_size", 4, dataset=DIALOGS).folder
    for count in (2, 4):
        check_equal(one, train_sharded(count, tmp_path / str(count), bases[family], *flags))
