"""Several processes compute what one computes: the same losses, figures and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
LAUNCH = ["-m", "torch.distributed.launch", "--nproc_per_node=2"]  # as the README has it
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def without_dropout(base_checkpoints, tmp_path_factory) -> Path:
    """A model whose losses depend on its weights alone: processes draw dropout differently."""
    folder = tmp_path_factory.mktemp("without-dropout")
    for file in base_checkpoints["gpt"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0)
    (folder / "config.json").write_text(json.dumps(config | dropouts))
    return folder


@pytest.fixture(scope="module")
def dataset(example_json, tmp_path_factory) -> Path:
    """55 training examples, so that the last batch is not full, and 17 of validation."""
    path = tmp_path_factory.mktemp("data") / "dialogs.json"
    train, valid = example_json["train"][:8], example_json["valid"][:3]
    path.write_text(json.dumps({"train": train, "valid": valid}))
    return path


def run_train(launcher: list[str], cwd: Path, flags: list) -> Path:
    """The run folder of a `train.py` run in `cwd`, under a launcher's arguments to Python ([] = alone)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, flags), "--device", "cpu"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (cwd / "runs").iterdir()
    return folder


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flags(model: Path, dataset: Path, batch_size: int) -> list:
    return ["--dataset_path", dataset, "--dataset_cache", dataset.with_suffix(".cache"), "--model", model,
            "--gradient_accumulation_steps", 2, "--n_epochs", 2, "--lr", 1e-3, "--eval_before_start",
            "--train_batch_size", batch_size, "--valid_batch_size", batch_size]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(without_dropout, dataset, tmp_path_factory) -> Path:
    return run_train([], tmp_path_factory.mktemp("one"), flags(without_dropout, dataset, 6))


@pytest.mark.parametrize("launcher", [LAUNCH, TORCHRUN], ids=["torch.distributed.launch", "torchrun"])
def test_two_processes_equal_one_with_twice_the_batch(launcher, one_process, without_dropout, dataset, tmp_path):
    folders = [one_process, run_train(launcher, tmp_path, flags(without_dropout, dataset, 3))]
    one, two = map(read_metrics, folders)
    assert len(one) == len(two) == 10 + 3  # 10 forwards an epoch, 2 of them a step; 3 validations
    for a, b in zip(one, two):
        keys = ("nll", "accuracy") if "split" in a else ("loss", "lm_loss", "mc_loss", "lr")
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=1e-6, abs=1e-6)
        assert (a["step"], a["epoch"]) == (b["step"], b["epoch"])
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(weights[0][name] == pytest.approx(weights[1][name], abs=2e-5) for name in weights[0])
