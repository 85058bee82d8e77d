"""A run that ends early and is resumed is the run that went on; what cannot be saved or resumed is said in one line."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import crash
import numpy as np
import pytest
import torch
from helpers import DATASET, QUESTIONS, Run, make_base, process_as_it_was, run_training, slow_but
from ignite.engine import Engine
from safetensors.torch import load_file, save_file
from tensorboardX import record_writer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import train
from transfertransfo import files
from transfertransfo.errors import UserError
from transfertransfo.model import saving
from transfertransfo.model.loading import load_model
from transfertransfo.model.sources import files_digest
from transfertransfo.training import checkpoints, engines, handlers
from transfertransfo.training.checkpoints import Best, RandomState, list_checkpoints
from transfertransfo.training.engines import StepEvents

# 12 examples, 6 forwards an epoch: of a second step's 4 the last 2 fall into the next epoch
FLAGS = ["--n_epochs", 3, "--train_batch_size", 2, "--gradient_accumulation_steps", 4, "--lr", 0.03, "--save_every", 1]


GO_ON = "go on from the last checkpoint with --resume"


class Killed(Exception):
    """Ends a run where a test wants it to end."""


def end_after(monkeypatch, owner, name: str, calls: int, error: BaseException | None = None) -> None:
    """Let a function end the run when it has been called so many times."""
    function, left = getattr(owner, name), [calls]

    def counted(*args, **kwargs):
        value = function(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            raise error or Killed
        return value

    monkeypatch.setattr(owner, name, counted)


def start_and_kill(folder: Path, checkpoint: Path, *flags, **more) -> Path:
    """A run folder in which a run has ended early."""
    with pytest.raises(Killed):
        run_training(folder, checkpoint, *flags, **more)
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def gpt2(base_checkpoints) -> Path:
    return base_checkpoints["gpt2"]


@pytest.fixture(scope="module")
def alone(gpt2, tmp_path_factory) -> Path:
    """Where a run was left alone."""
    folder = tmp_path_factory.mktemp("alone")
    run_training(folder, gpt2, *FLAGS)
    return folder


@pytest.fixture(scope="module")
def ended(gpt2, tmp_path_factory) -> Run:
    """A run of one epoch, for resumptions that fail."""
    return run_training(tmp_path_factory.mktemp("ended"), gpt2, *FLAGS, "--n_epochs", 1)


@pytest.mark.parametrize(("owner", "name", "calls"), [
    (engines, "distributed_losses", 7),  # within an optimizer step
    *(pytest.param(train, "save_checkpoint", calls, marks=pytest.mark.slow) for calls in (1, 3)),
    (Best, "update", 1),  # an epoch's validation is written, and the newest checkpoint of the same step is older
    pytest.param(Best, "update", 2, marks=pytest.mark.slow),
    (train, "save_model", 2),
])  # fmt: skip
def test_a_resumed_run_is_the_run_that_was_not_killed(gpt2, alone, tmp_path, monkeypatch, owner, name, calls):
    with monkeypatch.context() as patch:
        end_after(patch, owner, name, calls)
        run = start_and_kill(tmp_path, gpt2, *FLAGS)
    (run / f"{files.own_prefix('checkpoint_9.pt')}abc.tmp").touch()  # what a kill while saving leaves
    for name in (f"{files.own_prefix('model')}abc.tmp", "checkpoint_9.tmp", "checkpoint_3.old.tmp"):
        (run / name).mkdir()
    run_training(tmp_path, gpt2, *FLAGS, "--resume", "auto")
    assert crash.result(tmp_path) == crash.result(alone)
    assert not crash.leftovers(tmp_path)


def test_a_checkpoint_without_first_learning_rates(gpt2, alone, tmp_path, monkeypatch):
    """Those of the optimizer's groups are its own; the checkpoints of early versions do not hold them."""
    with monkeypatch.context() as patch:
        end_after(patch, train, "save_checkpoint", 3)
        run = start_and_kill(tmp_path, gpt2, *FLAGS)
    newest = list_checkpoints(run)[-1]
    state = torch.load(newest, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        assert group.pop("initial_lr") == 0.03
    torch.save(state, newest)
    run_training(tmp_path, gpt2, *FLAGS, "--resume", "auto")
    assert crash.result(tmp_path) == crash.result(alone)


def test_the_random_state_is_that_of_every_generator():
    def draw() -> list:
        # a normal number of NumPy's leaves a second one behind for the next call
        return [random.random(), np.random.normal(), np.random.normal(), np.random.rand(), torch.rand(1).item()]

    draw()
    np.random.normal()
    file = io.BytesIO()
    torch.save(RandomState().state_dict(), file)
    want = draw()
    file.seek(0)
    RandomState().load_state_dict(torch.load(file, weights_only=True))
    assert draw() == want


BIASES = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def learning_buffers(base_checkpoints, tmp_path_factory) -> Path:
    """A DeepSeek-V3, whose biases that choose experts are a buffer."""
    return make_base(tmp_path_factory.mktemp("deepseek"), base_checkpoints, "deepseek_v3")


@pytest.fixture
def buffers_that_learn(monkeypatch):
    """Biases that each forward in training changes, as in DeepSeek-V3's own training."""
    forward = DeepseekV3TopkRouter.forward

    def learning(self, hidden, *args, **kwargs):
        output = forward(self, hidden, *args, **kwargs)
        if self.training:
            self.e_score_correction_bias += hidden.detach().flatten(0, -2)[-1, :4]  # of 4 experts
        return output

    monkeypatch.setattr(DeepseekV3TopkRouter, "forward", learning)


@pytest.mark.parametrize(
    "more", [[], pytest.param(["--lora_rank", 2], marks=pytest.mark.slow)], ids=["whole", "adapters"]
)
def test_a_run_without_weights_resumes_with_its_buffers(
    learning_buffers, buffers_that_learn, tmp_path, monkeypatch, more
):
    """Killed before its first export, a run began anew with the buffers of no model, or of its base."""
    flags = [*FLAGS, "--n_epochs", 1, "--gradient_accumulation_steps", 2, *more]  # three steps
    run_training(tmp_path / "alone", learning_buffers, *flags)
    with monkeypatch.context() as patch:
        end_after(patch, train, "save_checkpoint", 2)
        run = start_and_kill(tmp_path / "killed", learning_buffers, *flags)
    assert not [*run.glob("*model.safetensors")]
    run_training(tmp_path / "killed", learning_buffers, *flags, "--resume", run)
    assert crash.result(tmp_path / "killed") == crash.result(tmp_path / "alone")
    newest = [torch.load(list_checkpoints(folder)[-1], weights_only=True)["model"]
              for folder in (run, *(tmp_path / "alone" / "runs").iterdir())]  # fmt: skip
    biases = [next(value for name, value in state.items() if name.endswith("bias") and "gate" in name)
              for state in newest]  # fmt: skip
    assert torch.equal(*biases)
    assert not torch.equal(biases[0], load_file(learning_buffers / "model.safetensors")[BIASES])


def test_a_checkpoint_of_before_buffers_were_held(learning_buffers, tmp_path):
    """It was called damaged. One that lacks what is trained is."""
    flags = [*FLAGS, "--n_epochs", 1]
    run = run_training(tmp_path, learning_buffers, *flags)
    newest = list_checkpoints(run.folder)[-1]
    state = torch.load(newest, weights_only=True)
    biases = state["model"].pop(BIASES)
    torch.save(state, newest)
    again = run_training(tmp_path, learning_buffers, *flags, "--resume", run.folder, "--n_epochs", 2)
    assert again.log.count(f"an early version's checkpoint, without {BIASES}: that stays as the run began") == 1
    assert torch.equal(load_file(run.folder / "model.safetensors")[BIASES], biases)
    newest = list_checkpoints(run.folder)[-1]
    torch.save(state | {"model": {}}, newest)
    with pytest.raises(UserError, match=r"damaged \(it lacks lm_head\.weight\)"):
        run_training(tmp_path, learning_buffers, *flags, "--resume", run.folder, "--n_epochs", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "flags"),
    [
        (3, ""),
        (1, "--lora_rank 2 --fp16 bf16"),
        (1, "--lora_rank 2 --merge_lora --token_mean"),
        (1, "--export best --freeze_embeddings"),
    ],
)
def test_kills_at_any_instant(kills, flags, capsys):
    """Real ones: see crash.py. One each with other flags, while it saves, which is where they differ."""
    failed = crash.main(["--kills", str(kills), "--short", "--", *flags.split()])
    said = capsys.readouterr().out
    assert not failed and f"{kills} of {kills} runs that were killed ended like the one that was not" in said, said


def test_tensorboard_shows_the_lines_of_the_run(alone):
    (run,) = (alone / "runs").iterdir()
    lines = Run(run, "").lines
    want = [
        (line["step"], f"{'validation' if 'split' in line else 'training'}/{name}", pytest.approx(value))
        for line in lines for name, value in line.items() if name not in ("step", "epoch", "split", "replies")
    ]  # fmt: skip
    assert [event for event in crash.read_events(run) if "text_summary" not in event[1]] == want and len(want) > 20
    shown = [event for event in crash.read_events(run) if "text_summary" in event[1]]
    assert [event[:2] for event in shown] == [
        (line["step"], "validation/replies/text_summary") for line in lines if "split" in line
    ]
    for (_, _, text), line in zip(shown, [line for line in lines if "split" in line]):
        assert len(line["replies"]) == 3 and text.count("\n") == 2
        assert all(json.dumps(part) in text for reply in line["replies"] for part in reply.values())


def test_more_epochs(gpt2, ended, tmp_path):
    shutil.copytree(ended.folder.parent.parent, tmp_path, dirs_exist_ok=True)
    run = run_training(tmp_path, gpt2, "--resume", Path("runs", ended.folder.name), "--n_epochs", 3)
    # 6 forwards an epoch: steps of 4, 2 (the first run's end), 2, 4, 4 and 2 of them
    assert [line["step"] for line in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [(line["step"], line["epoch"]) for line in run.validations] == [(2, 1), (4, 2), (6, 3)]
    assert run.steps[2]["loss"] > 0.7 * run.steps[1]["loss"], "a mean over what the step has seen"
    # the learning rate now falls over 18 forwards
    assert [line["lr"] for line in run.steps[2:]] == pytest.approx([0.03 * (1 - i / 18) for i in (7, 11, 15, 17)])


def test_the_epoch_that_is_told_is_the_one_that_was_exported(gpt2, tmp_path):
    """With `--export best` the best epoch was told, though the run had exported its last one before it went on."""
    unlike = [{"history": [text], "candidates": [text]} for text in QUESTIONS]  # training goes away from it
    dataset = {"train": DATASET["train"], "valid": [{"utterances": unlike}]}
    flags = [*FLAGS, "--best_metric", "nll", "--gradient_accumulation_steps", 1]
    run = run_training(tmp_path, gpt2, *flags, dataset=dataset)
    before = (run.folder / "model.safetensors").read_bytes()
    more = ["--resume", run.folder, "--n_epochs", 4, "--export", "best"]
    again = run_training(tmp_path, gpt2, *more, dataset=dataset)
    nll = [line["nll"] for line in again.validations]
    assert nll.index(min(nll)) < 2 and (run.folder / "model.safetensors").read_bytes() == before
    assert f"exported: epoch 3, neither the best nor the last, nll {nll[2]:.4f}" in again.log


# What may change


@pytest.mark.parametrize(("flag", "value"), [
    ("--valid_batch_size", 1), ("--log_every", 2), ("--save_every", 0), ("--n_saved", 1), ("--patience", 5),
    ("--export", "best"), ("--dataset_cache", "other.bin"),
])  # fmt: skip
def test_a_flag_that_may_change(ended, flag, value):
    args, run = parse_args_of(ended, flag, value)
    assert run == ended.folder and getattr(args, flag[2:]) == value


@pytest.mark.parametrize(("flag", "value", "there"), [
    ("--lr", 0.1, "0.03"), ("--train_batch_size", 3, "2"), ("--num_candidates", 3, "2"), ("--seed", 1, "42"),
    ("--gradient_accumulation_steps", 1, "4"), ("--batch_by", "dialog", "'turn'"),
    ("--max_history", 0, "2"), ("--best_metric", "nll", "'hits@1'"), ("--fp16", "bf16", "''"),
])  # fmt: skip
def test_a_flag_that_may_not_change(ended, flag, value, there):
    with pytest.raises(UserError) as complaint:
        parse_args_of(ended, flag, value)
    assert str(complaint.value) == (
        f"--resume {ended.folder}: {flag} is {there} there, {value!r} here; go on with the same, or start a new run"
    )


def test_a_flag_that_is_newer_than_the_run(ended, tmp_path, monkeypatch):
    """It was not compared, so that a run went on with another value than it had begun with."""
    folder = tmp_path / "runs" / "old"
    shutil.copytree(ended.folder, folder)
    saved = json.loads((folder / "training_args.json").read_text())
    del saved["token_mean"]
    (folder / "training_args.json").write_text(json.dumps(saved))
    assert not parse_args_of(Run(folder, ""))[0].token_mean
    with pytest.raises(UserError, match="--token_mean is False there, True here; go on with the same"):
        parse_args_of(Run(folder, ""), "--token_mean")
    monkeypatch.chdir(tmp_path)
    start = ["--model", saved["model_checkpoint"], "--dataset_path", "dataset.json", "--device", "cpu",
             *map(str, FLAGS), "--n_epochs", "1", "--resume", "auto"]  # fmt: skip
    assert train.parse_args(start)[1] and train.parse_args([*start, "--token_mean"])[1] is None


def parse_args_of(run: Run, *flags):
    return train.parse_args(["--resume", str(run.folder), *map(str, flags)])


@pytest.mark.parametrize(
    ("name", "value"), [("train_batch_size", "two"), ("lr", None), ("n_epochs", True), ("lora_rank", [])]
)
def test_an_argument_of_another_kind(ended, tmp_path, name, value):
    """It was called a flag's fault, or ended in an exception."""
    folder = shutil.copytree(ended.folder, tmp_path / "run")
    arguments = folder / "training_args.json"
    arguments.write_text(json.dumps(json.loads(arguments.read_text()) | {name: value}))
    with pytest.raises(UserError) as complaint:
        parse_args_of(Run(folder, ""))
    assert str(complaint.value) == f"{arguments}: {name}: {value!r} cannot be its value"


def test_another_number_of_processes(ended, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="the number of processes is 1 there, 2 here; go on with the same"):
        parse_args_of(ended)


def test_another_file_in_the_place_of_the_dataset(gpt2, ended):
    """Of the same number of examples, each as long as before."""
    text = json.dumps(DATASET)
    other = json.loads(text.replace("i like tea", "i like did"))
    top = ended.folder.parent.parent
    try:
        with pytest.raises(UserError, match=r"^--resume: dataset\.json is not what it was when the run began, as "):
            run_training(top, gpt2, "--resume", ended.folder, dataset=other)
    finally:
        (top / "dataset.json").write_text(text)


def test_a_run_and_its_dataset_that_were_moved(gpt2, ended, tmp_path):
    """Their paths were compared, so that no run went on elsewhere."""
    top = shutil.copytree(ended.folder.parent.parent, tmp_path / "elsewhere")
    (top / "dataset.json").rename(tmp_path / "moved.json")
    (tmp_path / "other.json").write_text(json.dumps(DATASET).replace("i like tea", "i like did"))
    flags = ["--resume", str(top / "runs" / ended.folder.name), "--n_epochs", "2"]
    with process_as_it_was(), contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()):
        with pytest.raises(UserError, match=r"^--resume: other\.json is not what it was when the run began"):
            train.train([*flags, "--dataset_path", "other.json"])
        folder = train.train([*flags, "--dataset_path", "moved.json"])
    assert json.loads(Path(folder, "training_args.json").read_text())["dataset_path"] == "moved.json"


def test_a_run_whose_base_was_moved(learning_buffers, tmp_path):
    """Its own folder has all that it needs, yet another path was refused, whatever was there."""
    base, other = (shutil.copytree(learning_buffers, tmp_path / name) for name in ("base", "other"))
    weights = load_file(other / "model.safetensors")
    save_file(weights | {BIASES: weights[BIASES] + 1}, other / "model.safetensors", {"format": "pt"})
    run = run_training(tmp_path, base, *FLAGS, "--n_epochs", 1)
    moved = base.rename(tmp_path / "moved")
    flags = ["--resume", run.folder, "--n_epochs", 2]
    with pytest.raises(UserError, match=f"^--resume: {other} is not the model that the run began with; start a new"):
        run_training(tmp_path, other, *flags)
    run_training(tmp_path, moved, *flags)
    record = run.folder / "training_args.json"
    saved = json.loads(record.read_text())
    assert saved["model_checkpoint"] == str(moved) and saved["base_digest"] == files_digest(moved) != ""
    shutil.rmtree(moved)
    train.parse_args([*map(str, flags)])  # nor is it asked for
    record.write_text(json.dumps(saved | {"base_digest": ""}))  # of an early version, whose base is not known
    with pytest.raises(UserError, match=f"--model_checkpoint is '{moved}' there, 'other' here; go on with the same"):
        train.parse_args([*map(str, flags), "--model", "other"])


@pytest.mark.parametrize(
    "names", [["config.json"], ["model.safetensors"], ["model-1-of-2.safetensors", "b.safetensors"],
              ["pytorch_model.bin"], ["a.gguf"]],
)  # fmt: skip
def test_a_base_is_known_by_what_its_files_hold(tmp_path, names):
    """One byte of each 4096 and more, at the end as at the beginning."""
    if names == ["a.gguf"]:
        pytest.importorskip("gguf", reason="needs requirements/extra.txt")
    content = random.Random(1).randbytes(256 * 4096)
    digests = set()
    for number, place in enumerate((None, 0, -1, 100_000)):
        for copy in "ab":
            folder = tmp_path / f"{number}{copy}"
            folder.mkdir()
            (folder / "config.json").write_bytes(b"{}")
            (folder / "training_args.json").write_text(copy)  # is no part of it
            for name in names:
                changed = bytearray(content)
                if place is not None and name == names[-1]:
                    changed[place] ^= 1
                (folder / name).write_bytes(changed)
            digests.add(files_digest(folder / names[0] if names == ["a.gguf"] else folder))
    assert len(digests) == 4 and files_digest("gpt2") == ""


@pytest.mark.parametrize(("resume", "message"), [
    ("nowhere", r"^--resume nowhere: no run folder \(it has no training_args.json\)$"),
    ("begun", "^--resume begun: the run has no checkpoint yet; start it anew$"),
])  # fmt: skip
def test_nothing_to_resume(tmp_path, monkeypatch, resume, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "training_args.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        train.train(["--resume", resume])


def damage_figures(run: Path, number: int, line: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[number] = line
    (run / "metrics.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    "line", ["{", "\x00\x00", "7", '{"step": 1}', '{"epoch": 1, "loss": 2.0}', '{"step": "1", "loss": 1}']
)
def test_figures_that_cannot_be_read(gpt2, ended, tmp_path, line):
    """All lines behind one were dropped, and the run was said to have learnt nothing."""
    shutil.copytree(ended.folder.parent.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / ended.folder.name
    damage_figures(run, 1, line)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=rf"^{run}/metrics\.jsonl line 2: no figures of a step or a validation; remove it$"
    ):
        run_training(tmp_path, gpt2, "--resume", run, "--n_epochs", 2)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_figures_that_a_killed_run_did_not_write_whole(gpt2, ended, tmp_path):
    shutil.copytree(ended.folder.parent.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / ended.folder.name
    damage_figures(run, -1, '{"step": 2, "epo')
    again = run_training(tmp_path, gpt2, "--resume", run, "--n_epochs", 2)
    assert [line["step"] for line in again.steps] == [1, 2, 3, 4] and len(again.validations) == 1


def test_a_run_folder_takes_one_process_at_a_time(gpt2, tmp_path, monkeypatch):
    """Two of them wrote their lines and checkpoints among one another."""
    runs = tmp_path / "runs"

    def resume(*_) -> None:
        with pytest.raises(UserError, match=rf"^--resume {runs}/\S+: another process trains in it$"):
            train.train(["--resume", *map(str, runs.iterdir())])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Best, "update", resume)
        run = start_and_kill(tmp_path, gpt2, *FLAGS)
        assert start_and_kill(tmp_path, gpt2, "--resume", run) == run
    run_training(tmp_path, gpt2, "--resume", run)


def test_a_run_that_is_done(gpt2, ended):
    """A launcher that restarts a job in its last instant is content; who asks for more than there is, is told."""
    top, before = ended.folder.parent.parent, crash.result(ended.folder.parent.parent)
    with pytest.raises(UserError, match="it is done; a greater --n_epochs adds more"):
        run_training(top, gpt2, "--resume", ended.folder)
    again = run_training(top, gpt2, *FLAGS, "--n_epochs", 1, "--resume", "auto")
    assert again.folder == ended.folder and crash.result(top) == before


def test_auto_takes_a_run_whose_unset_flags_were_unset_too(ended, tmp_path, monkeypatch, caplog):
    shutil.copytree(ended.folder.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (arguments,) = (tmp_path / "runs").glob("*/training_args.json")
    saved = json.loads(arguments.read_text())
    start = ["--model", saved["model_checkpoint"], "--dataset_path", "dataset.json", "--device", "cpu",
             *map(str, FLAGS), "--n_epochs", "1", "--resume", "auto"]  # fmt: skip
    assert train.parse_args(start)[1] == arguments.parent.relative_to(tmp_path)
    assert train.parse_args([*start, "--token_types", "on"])[1]  # what it had been by itself
    for name, value in (("token_types", "on"), ("head_lr", 0.5)):  # given there, and not here
        unset = [other for other in saved["unset"] if other != name]
        arguments.write_text(json.dumps(saved | {"unset": unset, name: value}))
        assert train.parse_args(start)[1] is None
    arguments.write_text("[]")
    assert train.parse_args(start)[1] is None and "expected an object" in caplog.text


def test_a_run_that_patience_ended(gpt2, tmp_path):
    """Within a step of 8 forwards: of an epoch of 6, or of the second one."""
    flags = [*FLAGS, "--gradient_accumulation_steps", 8, "--lr", 0, "--patience", 1, "--save_every", 0]
    run = run_training(tmp_path, gpt2, *flags)
    assert len(run.validations) == 2 and [path.name for path in list_checkpoints(run.folder)] == ["checkpoint_1.pt"]
    with pytest.raises(UserError, match=r"it is done; a greater --patience adds more$"):
        run_training(tmp_path, gpt2, "--resume", run.folder, "--n_epochs", 20)
    with pytest.raises(UserError, match=r"it is done; a greater --patience and a greater --n_epochs adds more$"):
        run_training(tmp_path, gpt2, "--resume", run.folder, "--n_epochs", 2)
    assert len(run_training(tmp_path, gpt2, "--resume", run.folder, "--patience", 2).validations) == 3


def test_files_beside_the_checkpoints_are_the_users_own(ended):
    kept = ended.folder / "checkpoint_best.pt"
    kept.write_bytes(b"")
    try:
        assert kept not in list_checkpoints(ended.folder) != []
    finally:
        kept.unlink()


def test_a_damaged_checkpoint(gpt2, ended, tmp_path):
    top = shutil.copytree(ended.folder.parent.parent, tmp_path / "copy")
    (run,) = (top / "runs").iterdir()
    newest = list_checkpoints(run)[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    with pytest.raises(UserError, match=f"^{newest}: damaged .*; delete it to go on from an older one$"):
        run_training(top, gpt2, "--resume", run, "--n_epochs", 2)


# What cannot be written


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.BytesIO):
    """On a disk that is about to be full: torch answers the error with one of its own, which does not name it."""

    def write(self, content):
        return super().write(content) if self.tell() < 1000 else full()


def test_no_room_for_a_checkpoint(gpt2, tmp_path, monkeypatch):
    """The run goes on, and can be resumed from the checkpoint before."""
    save, saved = train.save_checkpoint, []

    def save_the_first(*args, **kwargs):
        if saved:
            monkeypatch.setattr(checkpoints, "open_atomically", lambda path: FullDisk())
        saved.append(save(*args, **kwargs))

    monkeypatch.setattr(train, "save_checkpoint", save_the_first)
    run = run_training(tmp_path, gpt2, *FLAGS)
    assert len(saved) > 3 and [path.name for path in list_checkpoints(run.folder)] == ["checkpoint_1.pt"]
    lines = [line for line in run.log.splitlines() if "not written" in line]
    assert len(lines) == len(saved) - 1
    place = run.folder.relative_to(tmp_path)
    assert lines[0].endswith(
        f" ERROR {place}/checkpoint_2.pt: not written ([Errno 28] No space left on device); older checkpoints stay"
    )
    monkeypatch.undo()
    load_model(run.folder)
    assert run_training(tmp_path, gpt2, "--resume", run.folder, "--n_epochs", 4, *FLAGS[2:]).steps[-1]["step"] == 6


@pytest.mark.parametrize(("owner", "name", "message"), [
    (record_writer, "open", r"^runs/.*/events.*: not written \(No space left on device\); go on from the"),
    (files.os, "replace", r"^runs/.*: cannot be written to \(\[Errno 28\] No space left on device\)$"),
])  # fmt: skip
def test_no_room_for_the_first_files(gpt2, tmp_path, monkeypatch, owner, name, message):
    monkeypatch.setattr(owner, name, full, raising=False)
    with pytest.raises(UserError, match=message):
        run_training(tmp_path, gpt2, *FLAGS, "--dataset_cache", "")
    if owner is not record_writer:
        assert list((tmp_path / "runs").iterdir()) == [], "an empty run folder stays"


@pytest.mark.parametrize(("owner", "name", "what"), [
    (handlers, "open", "metrics.jsonl"), (record_writer.os, "fsync", r"events\..*"),
    (saving, "move_into_place", "model.safetensors"),
])  # fmt: skip
def test_no_room_in_the_middle_of_a_run(gpt2, tmp_path, alone, monkeypatch, owner, name, what):
    """It ends with one line, and is resumed as one that was killed."""
    with monkeypatch.context() as patch:
        losses, calls = engines.distributed_losses, []

        def fill_the_disk(*args):
            calls.append(None)
            if len(calls) == 5:
                patch.setattr(owner, name, full, raising=False)
            return losses(*args)

        patch.setattr(engines, "distributed_losses", fill_the_disk)
        with pytest.raises(UserError, match=rf"^runs/.*/{what}: not written \(.*No space left on device\); {GO_ON}$"):
            run_training(tmp_path, gpt2, *FLAGS)
    run_training(tmp_path, gpt2, *FLAGS, "--resume", "auto")
    assert crash.result(tmp_path) == crash.result(alone)


# Steps without a finite gradient


def test_ten_bad_steps_in_a_row_end_the_run(gpt2, tmp_path, monkeypatch):
    flags = ["--n_epochs", 3, "--train_batch_size", 2, "--gradient_accumulation_steps", 1, "--save_every", 3]
    losses, calls = engines.distributed_losses, []

    def spoiled(*args):
        calls.append(None)
        return losses(*args) * (float("nan") if len(calls) == 2 or len(calls) > 4 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "distributed_losses", spoiled)
        advice = "start a new run with a lower --lr, or with --fp16 bf16 or none"  # a resumed one cannot have these
        message = f"^step 14: 10 steps in a row had no finite gradient; {advice}$"
        with pytest.raises(UserError, match=message):
            run_training(tmp_path, gpt2, *flags)
    (run,) = (tmp_path / "runs").iterdir()
    assert [line["skipped_steps"] for line in Run(run, "").steps] == [0, 1, 1, 1, *range(2, 11)]
    states = [torch.load(path, weights_only=True)["model"] for path in list_checkpoints(run)]
    assert len(states) == 3 and all(tensor.isfinite().all() for state in states for tensor in state.values())
    assert run_training(tmp_path, gpt2, *flags, "--resume", "auto").steps[-1]["step"] == 18


@pytest.mark.parametrize("valid", [True, False])
def test_a_good_export_stays_where_the_next_would_not_be_finite(gpt2, tmp_path, monkeypatch, valid):
    """Weights of NaN took its place."""
    losses, calls = engines.distributed_losses, []

    def spoiled(model, *args):
        calls.append(None)
        if len(calls) == 8:  # of 6 an epoch
            model.pretrained.lm_head.weight.data[0, 0] = float("nan")
        return losses(model, *args)

    monkeypatch.setattr(engines, "distributed_losses", spoiled)
    saved, save = [], train.save_model
    monkeypatch.setattr(train, "save_model", lambda *args, **kwargs: (save(*args, **kwargs), saved.append(None)))
    dataset = DATASET if valid else {"train": DATASET["train"]}
    reason = "validation: the model's loss is nan" if valid else "step 12: the loss is not finite; nothing is exported"
    with pytest.raises(UserError, match=f"^{reason}"):
        run_training(tmp_path, gpt2, *FLAGS, "--gradient_accumulation_steps", 1, dataset=dataset)
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(saved) == 1 and len(calls) == 12
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


# An orderly stop


@pytest.mark.parametrize("number", slow_but([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]))
def test_a_signal_saves_once_and_says_how_to_go_on(gpt2, alone, tmp_path, monkeypatch, number):
    flags = [*FLAGS, "--save_every", 0]
    losses, calls, said = engines.distributed_losses, [], []

    def signalled(*args):
        calls.append(None)
        if len(calls) == 2:  # of a step of 4
            os.kill(os.getpid(), number)
        return losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "distributed_losses", signalled)
        for module in (train, handlers):
            patch.setattr(module.logger, "info", lambda message, *args: said.append(message % args))
        with pytest.raises(SystemExit) as ending:
            run_training(tmp_path, gpt2, *flags)
    (run,) = (tmp_path / "runs").iterdir()
    assert ending.value.code == 128 + number and len(calls) == 4
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint_1.pt"]
    assert said.count("Asked to stop: after this step or validation, with a checkpoint; once more stops at once") == 1
    assert said[-1] == f"Stopped; go on with: python train.py --resume {run.relative_to(tmp_path)}"
    run_training(tmp_path, gpt2, "--resume", run)
    assert crash.result(tmp_path) == crash.result(alone)


def test_commands_that_are_told_can_be_pasted(gpt2, tmp_path):
    """A run is named after its model, whose folder may have a blank in its name."""
    run = run_training(tmp_path, shutil.copytree(gpt2, tmp_path / "my model"), *FLAGS, "--n_epochs", 1)
    assert run.log.endswith(f"python interact.py --model_checkpoint '{run.folder.relative_to(tmp_path)}'\n")


def ask_twice(number: int) -> None:
    """Run two iterations, in each of which a signal asks the run to stop."""
    trainer = Engine(lambda engine, batch: os.kill(os.getpid(), number))
    trainer.register_events(*StepEvents, event_to_attr={StepEvents.OPTIMIZER_STEP: "optimizer_step"})
    handlers.attach_checkpoints(trainer, lambda: None, n_epochs=1, save_every=0, gradient_accumulation_steps=2)
    trainer.run([1, 2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(number):
    process = multiprocessing.get_context("fork").Process(target=ask_twice, args=[number])
    process.start()
    process.join(60)
    assert process.exitcode == -number


def test_a_signal_in_the_last_validation_comes_too_late(gpt2, tmp_path, monkeypatch):
    update = Best.update

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(Best, "update", signalled)
    assert "Done; chat with it" in run_training(tmp_path, gpt2, *FLAGS, "--n_epochs", 1).log
