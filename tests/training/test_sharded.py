"""Processes that hold a share of a model each compute what one with the whole model computes."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import DATASET, dialog, make_base, run_processes, run_training
from safetensors.torch import load_file, save_file
from transformers import GPT2DoubleHeadsModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from convai_evaluation import run as evaluate
from interact import run as chat
from train import train
from transfertransfo.errors import UserError
from transfertransfo.model import saving
from transfertransfo.model.loading import into_shards_, load_model
from transfertransfo.model.sharding import blocks_of
from transfertransfo.processes import rank, setup_distributed
from transfertransfo.training import checkpoints
from transfertransfo.training.precision import NativePrecision
from transfertransfo.training.runs import divide_batch

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


def start_sharded(count: int, cwd: Path, base: Path, *flags) -> list[int]:
    """Begin a run by processes that share batches of four; returns their exit statuses."""
    cwd.mkdir(exist_ok=True)
    (cwd / "dataset.json").write_text(json.dumps(DIALOGS))
    argv = ["--model_checkpoint", base, "--dataset_path", "dataset.json", "--device", "cpu", "--sharded",
            "--train_batch_size", 4 // count, *flags]  # fmt: skip
    return run_processes(count, cwd, train, argv)


def resume(count: int, cwd: Path, *flags) -> str:
    """Go on with the run; returns the log of the first process."""
    statuses = run_processes(count, cwd, train, ["--resume", run_folder(cwd), "--device", "cpu", *flags])
    assert statuses == [0] * count, said(cwd, count)
    assert not list(run_folder(cwd).glob("*.tmp*"))
    return (cwd / "log0").read_text()


def said(cwd: Path, count: int) -> str:
    return "".join((cwd / f"log{rank}").read_text()[-2000:] for rank in range(count))


def train_sharded(count: int, cwd: Path, base: Path, *flags) -> Path:
    """Train by processes that share batches of four; returns the run folder."""
    assert start_sharded(count, cwd, base, *flags) == [0] * count, said(cwd, count)
    return run_folder(cwd)


def check_equal(one: Path, several: Path) -> None:
    assert len(figures(one)) > 3
    for a, b in zip(figures(one), figures(several), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    ours, theirs = weights(one), weights(several)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--sharded"], [], ["--batch_by", "dialog"]], ids=["shards", "copies", "dialogs"])
def test_processes_share_a_mean_over_tokens(bases, tmp_path, flags):
    """Of steps of two forwards, the last of which has fewer examples: without any for the second process."""
    (tmp_path / "dataset.json").write_text(json.dumps(DIALOGS))
    argv = ["--model_checkpoint", bases["gpt2"], "--dataset_path", tmp_path / "dataset.json", "--device", "cpu",
            *FLAGS, *flags, "--token_mean"]  # fmt: skip
    runs = []
    for count in (1, 2):
        cwd = tmp_path / str(count)
        assert run_processes(count, cwd, train, [*argv, "--train_batch_size", 4 // count]) == [0] * count, said(cwd, 1)
        runs.append(run_folder(cwd))
    check_equal(*runs)


@pytest.mark.slow
def test_a_run_folder_of_shards_is_a_checkpoint(bases, tmp_path, monkeypatch):
    """For transformers, the chat and the evaluation, whole or by two processes; here its weights are several files."""
    monkeypatch.setattr(saving, "LARGEST_FILE", "20KB")
    flags = ["--n_epochs", 2, "--gradient_accumulation_steps", 1, "--fp16", "bf16"]
    run = train_sharded(2, tmp_path / "cwd", bases["gpt2"], *flags)
    index = json.loads((run / "model.safetensors.index.json").read_text())
    files = {path.name for path in run.glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) and len(files) > 2  # those of the first epoch are gone
    ours, theirs = load_model(run).pretrained.state_dict(), GPT2DoubleHeadsModel.from_pretrained(run).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    argv = ["--model_checkpoint", str(run), "--dataset_path", str(tmp_path / "cwd" / "dataset.json"), "--device", "cpu",
            "--eval_type", "all", "--max_length", "4", "--report", str(tmp_path / "report.json")]  # fmt: skip
    whole = evaluate(argv)
    assert run_processes(2, tmp_path / "both", evaluate, [*argv, "--sharded"]) == [0, 0], said(tmp_path / "both", 2)
    told = json.loads((tmp_path / "report.json").read_text())
    assert {name: told[name] for name in whole} == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi !\n"))
    talk = tmp_path / "talk.jsonl"
    chat([*argv[:4], "--device", "cpu", "--min_length", "2", "--transcript", str(talk)])
    last = json.loads(talk.read_text().splitlines()[-1])
    assert last["speaker"] == "model" and last["text"]


def measure_shards(argv: list[str]) -> None:
    """Write how many bytes of parameters this process has."""
    (folder,) = argv
    device = setup_distributed("cpu", int(os.environ["LOCAL_RANK"]))
    model = load_model(folder, device, in_shards=True)
    assert all(parameter.is_meta for parameter in blocks_of(model.pretrained).parameters())
    into_shards_(model, folder, device)
    own = sum(parameter.to_local().nbytes for parameter in model.parameters())
    Path(f"shard{rank()}.json").write_text(json.dumps(own))


def test_a_process_holds_its_share_of_the_parameters(checkpoints, tmp_path):
    """Rounded up to whole rows; the blocks' values are read by those alone who keep them."""
    whole = sum(parameter.nbytes for parameter in load_model(checkpoints["llama"]).parameters())
    assert run_processes(3, tmp_path, measure_shards, [checkpoints["llama"]]) == [0, 0, 0], said(tmp_path, 3)
    own = [json.loads((tmp_path / f"shard{rank}.json").read_text()) for rank in range(3)]
    assert sum(own) == whole and max(own) < 1.1 * whole / 3


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--fp16", "O1"], "--sharded: not with --fp16 O1, whose weights and scale are of one device; use bf16"),
        (["--compile"], "--sharded: not with --compile"),
        (["--lora_rank", "2", "--merge_lora"], "--sharded: not with --merge_lora; without it the run folder holds the"),
    ],
)
def test_flags_that_do_not_go_with_shards(flags, line):
    with pytest.raises(UserError) as told:
        train(["--sharded", *flags])
    assert str(told.value).startswith(line)


@pytest.mark.slow
def test_adapters_in_bfloat16_go_on(bases, tmp_path):
    """Whose frozen weights are bfloat16 beside trained ones in float32; from the adapter, and from a checkpoint."""
    run = train_sharded(2, tmp_path / "cwd", bases["llama"], "--lora_rank", 2, "--fp16", "bf16", "--n_epochs", 1)
    first = weights(run)
    moved = shutil.copytree(bases["llama"], tmp_path / "moved")
    assert "Resuming from" in resume(2, tmp_path / "cwd", "--n_epochs", 2, "--model", moved)
    again = train_sharded(2, tmp_path / "again", run, "--fp16", "bf16", "--n_epochs", 1)
    for later in (run, again):
        assert weights(later).keys() == first.keys() != set()
        assert any(not torch.equal(weights(later)[name], first[name]) for name in first)


SAVING = [*FLAGS, "--gradient_accumulation_steps", 1, "--save_every", 1]  # five steps


@pytest.fixture(scope="module")
def undisturbed(bases, tmp_path_factory) -> Path:
    """The folder of a run by two processes that nothing happened to."""
    return train_sharded(2, tmp_path_factory.mktemp("undisturbed") / "cwd", bases["gpt2"], *SAVING)


def die_at(monkeypatch, ranks: tuple[int, ...], module, name: str, count: int) -> None:
    """Have processes die by SIGKILL where they call a function the so many-th time."""
    function, calls = getattr(module, name), []

    def mortal(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and int(os.environ.get("RANK", -1)) in ranks:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, mortal)


def check_identical(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (NativePrecision, "step", 3),
        (checkpoints.dcp, "save", 2),
        (checkpoints, "gather", 7),  # of the second time: the shards are written
        (checkpoints, "gather", 8),  # it has its name
        (checkpoints, "_remove_old", 2),  # of the first process; the other one is not the one to die
    ],
    ids=["step", "save", "written", "renamed", "removing"],
)
def test_a_run_whose_process_is_killed_goes_on(bases, undisturbed, tmp_path, monkeypatch, rank, module, name, count):
    with monkeypatch.context() as patch:
        die_at(patch, (rank,) if name != "_remove_old" else (0, 1), module, name, count)
        statuses = start_sharded(2, tmp_path / "cwd", bases["gpt2"], *SAVING)
        assert statuses[rank if name != "_remove_old" else 0] == -signal.SIGKILL and 0 not in statuses
    assert "Resuming from" in resume(2, tmp_path / "cwd")
    check_identical(undisturbed, run_folder(tmp_path / "cwd"))


@pytest.mark.slow
def test_buffers_that_learn_go_on(base_checkpoints, tmp_path, monkeypatch):
    """A run in shards, too, has them in its checkpoints before it has weights. Here all processes change them alike."""
    base = make_base(tmp_path / "base", base_checkpoints, "deepseek_v3")
    forward = DeepseekV3TopkRouter.forward

    def learning(self, hidden, *args, **kwargs):
        output = forward(self, hidden, *args, **kwargs)
        if self.training:
            self.e_score_correction_bias += torch.tensor([0.5, 0.25, 0.0, -0.5])  # of 4 experts
        return output

    monkeypatch.setattr(DeepseekV3TopkRouter, "forward", learning)
    alone = train_sharded(2, tmp_path / "alone", base, *SAVING)
    with monkeypatch.context() as patch:
        die_at(patch, (0, 1), checkpoints.dcp, "save", 3)
        assert start_sharded(2, tmp_path / "cwd", base, *SAVING) == [-signal.SIGKILL] * 2
    assert not (run_folder(tmp_path / "cwd") / "model.safetensors").exists()
    assert "Resuming from" in resume(2, tmp_path / "cwd", "--model", base.rename(tmp_path / "moved"))
    check_identical(alone, run_folder(tmp_path / "cwd"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(bases, undisturbed, tmp_path, monkeypatch, before, after):
    with monkeypatch.context() as patch:
        die_at(patch, (0, 1), checkpoints.dcp, "save", 3)
        assert start_sharded(before, tmp_path / "cwd", bases["gpt2"], *SAVING) == [-signal.SIGKILL] * before
    log = resume(after, tmp_path / "cwd")
    assert log.count("equal to about 1e-5, not to the bit") == 1
    check_equal(undisturbed, run_folder(tmp_path / "cwd"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told(undisturbed, tmp_path):
    """Also one that only lacks some rows, which torch's reader would pass over."""
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = checkpoints.list_checkpoints(tmp_path / "run")[-1]
    assert newest.name == "checkpoint_5" and newest.is_dir()
    shard = sorted(newest.glob("*.safetensors"))[1]
    (tmp_path / "dataset.json").write_text(json.dumps(DIALOGS))
    flags = ["--resume", tmp_path / "run", "--n_epochs", 2, "--dataset_path", tmp_path / "dataset.json"]
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:-4]), shard.unlink, (newest / "state.pt").unlink):
        damage()
        assert run_processes(2, tmp_path, train, flags) == [2, 2]
        assert f"{newest}: damaged (" in said(tmp_path, 1)


def test_batches_that_cannot_be_divided_are_told():
    saved = {"train_batch_size": 2, "world_size": 2}
    assert divide_batch(saved, 4) == {"train_batch_size": 1, "world_size": 4}
    with pytest.raises(UserError) as told:
        divide_batch(saved, 3)
    assert str(told.value) == "2 processes took 4 examples at a time, which 3 processes cannot share equally"
