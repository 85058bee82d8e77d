"""Several processes compute what one computes: the same losses, figures and weights; also when one of them dies."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from crash import TIMES
from helpers import AS_IN_5_3, DATASET, ROOT, process_as_it_was, run_processes, tiny_config
from safetensors.numpy import load_file
from test_readme import commands

from train import train
from transfertransfo.model.loading import load_model
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer

PLACES = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"],
          "train.py": [str(ROOT / "train.py")], "./train.py": [str(ROOT / "train.py")]}  # fmt: skip
FEWER = {"--nproc_per_node=8": "--nproc_per_node=2"}
CPU = ["--device", "cpu"]
RECIPE = "--gradient_accumulation_steps=4"  # what tells the paper's recipe from the other commands

# Runs train.py; in its first life the second process dies at its third save.
MORTAL = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from transfertransfo.training import checkpoints
save, saves = checkpoints.save_checkpoint, []
def save_or_die(*args, **kwargs):
    saves.append(save(*args, **kwargs))
    if len(saves) == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save_checkpoint = save_or_die
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


# Each process draws weights of its own, as with --seed 0, and has a number of its own.
SHARED = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from transfertransfo.processes import setup_distributed
from transfertransfo.training.distribution import max_over_processes, share_weights_
setup_distributed("cpu", int(os.environ["LOCAL_RANK"]))
rank = int(os.environ["RANK"])
torch.manual_seed(rank)
layer = torch.nn.BatchNorm1d(3)
torch.nn.init.normal_(layer.weight)
layer.running_mean.fill_(rank)
share_weights_(layer)
with open(f"{{rank}}.json", "w") as file:
    weights = [tensor.tolist() for tensor in layer.state_dict().values()]
    json.dump({{"max": max_over_processes(5 + rank), "weights": weights}}, file)
torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter, which aborts
"""


def documented(*parts: str) -> list[str]:
    """The one command of the README's blocks that has these parts, for two processes a machine instead of eight."""
    (command,) = [words for words in map(shlex.split, commands()) if all(part in words for part in parts)]
    return [FEWER.get(word, word) for word in command]


def start(command: list, cwd: Path, *flags) -> subprocess.Popen:
    cwd.mkdir(exist_ok=True)
    places = [part for word in command for part in PLACES.get(word, [str(word)])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*places, *map(str, flags)], cwd=cwd, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    """Wait for the process to end well; returns its stderr."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    return said


def run_folder(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def read_metrics(cwd: Path) -> list[dict]:
    lines = (run_folder(cwd) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def read_weights(cwd: Path) -> dict:
    return load_file(run_folder(cwd) / "model.safetensors")


@pytest.fixture(scope="module")
def flags(base_checkpoints, example_json, tmp_path_factory) -> list:
    """A model whose losses depend on its weights alone, as processes draw dropout differently; 321 examples, twice.

    The last batch of four processes has an example for two of them.
    """
    folder = tmp_path_factory.mktemp("shared")
    for file in base_checkpoints["gpt"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0)
    (folder / "config.json").write_text(json.dumps(config | dropouts))
    dialogs = {"train": example_json["train"][:45], "valid": example_json["valid"][:3]}
    (folder / "dialogs.json").write_text(json.dumps(dialogs))
    return ["--model", folder, "--dataset_path", folder / "dialogs.json", "--dataset_cache", folder / "cache.bin",
            "--lr", 1e-3, "--eval_before_start", "--save_every", 5]  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(flags, tmp_path_factory) -> Path:
    """Where the documented recipe ran, in two processes."""
    cwd = tmp_path_factory.mktemp("two")
    command = documented("torch.distributed.launch", RECIPE)
    assert command[:5] == ["python", "-m", "torch.distributed.launch", "--nproc_per_node=2", "./train.py"]
    finish(start(command, cwd, *flags, *CPU))
    return cwd


def recipe() -> list[str]:
    """The flags of the documented recipe."""
    command = documented("torch.distributed.launch", RECIPE)
    return command[command.index("./train.py") + 1 :]


@pytest.fixture(scope="module")
def one_process(flags, tmp_path_factory) -> Path:
    """Where one process ran the recipe with twice its batch."""
    cwd = tmp_path_factory.mktemp("one")
    argv = [*recipe(), *flags, *CPU, "--train_batch_size", 4]
    with process_as_it_was(), contextlib.chdir(cwd):
        train(list(map(str, argv)))
    return cwd


def check_equal(one: Path, several: Path) -> None:
    """Compare 20 steps and more, two validations and the weights."""
    lines = list(map(read_metrics, (one, several)))
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for a, b in zip(*lines):
        assert a.get("replies") == b.get("replies")
        numbers = [[value for key, value in line.items() if key not in ("split", "replies")] for line in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6, abs=1e-6)
    assert sum("split" not in line for line in lines[0]) > 20 and sum("split" in line for line in lines[0]) == 2
    weights = list(map(read_weights, (one, several)))
    assert all(weights[0][name] == pytest.approx(weights[1][name], abs=2e-5) for name in weights[0])


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(one_process, two_processes):
    check_equal(one_process, two_processes)


@pytest.mark.slow
def test_two_machines_of_two_processes_equal_one_with_four_times_the_batch(one_process, flags, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    command = [word.replace("NODE0:29500", endpoint) for word in documented("torchrun", "--nnodes=2")]
    machines = [start([*command, *recipe()], tmp_path, *flags, *CPU, "--train_batch_size", 1) for _ in range(2)]
    for machine in machines:
        finish(machine)
    check_equal(one_process, tmp_path)


@pytest.mark.slow
def test_weights_and_signals_are_shared(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    finish(start(["torchrun", "--nproc_per_node=2", tmp_path / "shared.py"], tmp_path))
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1] and seen[0]["max"] == 6


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_run_resumed(two_processes, flags, tmp_path):
    (tmp_path / "mortal.py").write_text(MORTAL)
    command = ["torchrun", "--nproc_per_node=2", "--max_restarts=1", tmp_path / "mortal.py", "--resume", "auto"]
    said = finish(start([*command, *recipe()], tmp_path, *flags, *CPU))
    assert "train.py: error: another process of this run is gone; --resume goes on from the last checkpoint" in said
    assert "exitcode: -9" in said and "Resuming from" in said
    assert read_metrics(tmp_path) == read_metrics(two_processes)
    weights = read_weights(two_processes)
    assert all((tensor == weights[name]).all() for name, tensor in read_weights(tmp_path).items())


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora_rank", 2], ["--sharded"]], ids=["whole", "adapters", "shards"])
@pytest.mark.parametrize("family", ["gemma3", *([] if AS_IN_5_3 else ["gemma4"])])
def test_a_model_that_reads_images_too_is_trained_by_several_processes(base_checkpoints, tmp_path, family, more):
    """Its tower for images got no gradient, for which the processes waited until one raised. Gemma 4's towers have
    infinite bounds, with which shards were not written, and a table with a part for each block.
    """
    tokenizer = load_tokenizer(base_checkpoints["gpt2"])
    tiny_config(family, len(tokenizer)).save_pretrained(tmp_path / "base")
    save_model(load_model(tmp_path / "base", from_scratch=True), tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    argv = [*CPU, *more, "--model", tmp_path / "base", "--dataset_path", tmp_path / "dataset.json", "--n_epochs", 1,
            "--gradient_accumulation_steps", 1]  # fmt: skip
    cwd = tmp_path / "cwd"
    assert run_processes(2, cwd, train, argv) == [0, 0], (cwd / "log0").read_text() + (cwd / "log1").read_text()
    assert [line["step"] for line in read_metrics(tmp_path / "cwd")] == [1, 2, 2]
