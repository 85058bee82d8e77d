"""Input that cannot be used: one clear line, exit status 2, and nothing left behind."""

import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from transformers import BertConfig

import convai_evaluation
import interact
import train
from transfertransfo.cli import DEBUG, run_script
from transfertransfo.data.formats import FORMATS

SCRIPTS = {"train": train.train, "interact": interact.run, "convai_evaluation": convai_evaluation.run}
UTTERANCE = {"candidates": ["no .", "yes ."], "history": ["hi !"]}
DIALOG = {"personality": ["i like tea ."], "utterances": [UTTERANCE]}
DATASET = {"train": [DIALOG], "valid": [DIALOG]}


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, whose log and signals are as they were when a script has ended."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv(DEBUG, "")  # `--debug` sets it for the process
    root, names = logging.getLogger(), (signal.SIGINT, signal.SIGTERM)
    level, handlers, signals = root.level, root.handlers[:], [signal.getsignal(name) for name in names]
    yield folder
    logging.getLogger("transfertransfo").setLevel(logging.NOTSET)
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, handler in zip(names, signals):
        signal.signal(name, handler)


@pytest.fixture
def complaint(workplace, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script as a user does; gives the one line that it ends with, after its "SCRIPT.py: error: "."""

    def run(script: str, *argv) -> str:
        before = files_in(workplace.parent)
        monkeypatch.setattr(sys, "argv", [f"{script}.py"])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as ending:
            run_script(lambda: SCRIPTS[script]([str(argument) for argument in argv]))
        out, err = capsys.readouterr()
        assert (ending.value.code, out) == (2, "")
        *log, line = err.splitlines()
        logged = [entry for entry in log if " INFO " in entry]  # the trainer tells what it has done so far
        assert log == logged and (script != "interact" or not log), err
        assert line.startswith(f"{script}.py: error: "), err
        assert files_in(workplace.parent) == before, "something is left behind"
        return line.removeprefix(f"{script}.py: error: ")

    return run


def files_in(folder: Path) -> dict[str, int]:
    """Every file and folder, with its size."""
    return {str(path): path.stat().st_size if path.is_file() else -1 for path in folder.rglob("*")}


@pytest.fixture
def dataset(tmp_path) -> Path:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(DATASET))
    return path


@pytest.fixture
def model(tmp_path, checkpoints) -> Path:
    """A copy of a checkpoint, for the test to damage."""
    return Path(shutil.copytree(checkpoints["gpt"], tmp_path / "model"))


# Datasets


def with_utterance(utterance: object) -> dict:
    return {"train": [DIALOG, {"personality": [], "utterances": [UTTERANCE, utterance]}]}


@pytest.mark.parametrize("script", ["train", "convai_evaluation"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON at all", f"none of the formats that are read: {FORMATS}"),
        ('{"train": [}', "line 1, column 12: not JSON: Expecting value"),
        ("", "the file is empty"),
        (b"\xff\xfe{", "byte 3: invalid UTF-16"),
        (b"\x89PNG{", f"none of the formats that are read: {FORMATS}"),
        ([[DIALOG]], "train dialog 1: expected an object, got a list"),
        (
            {"test": [DIALOG]},
            'expected a list of dialogs, or an object with "train" or "valid", got an object with test:'
            " rename test to train",
        ),
        ({"train": [DIALOG, {"personality": []}]}, "train dialog 2: no utterances"),
        ({"train": [DIALOG, {"utterances": []}]}, "train dialog 2: no utterances"),
        ({"train": [DIALOG, 3]}, "train dialog 2: expected an object, got a number"),
        ({"train": [DIALOG], "valid": []}, "valid: no dialogs"),
        ({"train": [], "valid": [DIALOG]}, "train: no dialogs"),
        (
            with_utterance({"candidates": ["a", None], "history": []}),
            "train dialog 2, utterance 2, candidates: expected a list of strings, got null in place 2",
        ),
        (
            with_utterance({"candidates": ["a", ["b"]], "history": []}),
            "train dialog 2, utterance 2, candidates: expected a list of strings, got a list in place 2",
        ),
        (
            with_utterance({"candidates": "yes", "history": []}),
            "train dialog 2, utterance 2, candidates: expected a list of strings, got a string",
        ),
        (with_utterance({"candidates": [], "history": []}), "train dialog 2, utterance 2: no reply"),
    ],
)
def test_a_dataset_that_cannot_be_used(complaint, model, dataset, script, content, message):
    if isinstance(content, bytes):
        dataset.write_bytes(content)
    else:
        dataset.write_text(content if isinstance(content, str) else json.dumps(content))
    argv = ["--dataset_path", dataset, "--model_checkpoint", model, "--device", "cpu"]
    assert complaint(script, *argv) == f"{dataset}: {message}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dataset_that_is_not_there(complaint, model, script):
    argv = ["--dataset_path", "nothing.json", "--model_checkpoint", model, "--device", "cpu"]
    assert complaint(script, *argv).startswith("nothing.json: no such file or folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("not JSON at all", f"none of the formats that are read: {FORMATS}"),
        ({"train": {}}, "train: expected a list of dialogs, got an object"),
        ({"train": [{"utterances": [UTTERANCE]}, 3]}, "train dialog 2: expected an object, got a number"),
        ({"train": [{"utterances": [UTTERANCE]}]}, "no dialog with a persona"),
    ],
)
def test_a_dataset_without_a_persona_to_chat_with(complaint, model, dataset, content, message):
    dataset.write_text(content if isinstance(content, str) else json.dumps(content))
    line = complaint("interact", "--dataset_path", dataset, "--model_checkpoint", model, "--device", "cpu")
    assert line == f"{dataset}: {message}; or {interact.GIVE_PERSONA}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_dialogs_are_left_out_where_that_is_asked_for(complaint, model, dataset, script):
    """As long as there are good ones."""
    dataset.write_text(json.dumps({"train": [DIALOG | {"utterances": None}]}))
    argv = ["--dataset_path", dataset, "--model_checkpoint", model, "--device", "cpu", "--skip_bad_dialogs"]
    fault = "train dialog 1: no utterances"
    assert complaint(script, *argv).startswith(f"{dataset}: train: no dialogs left; the first fault: {fault}")


def test_a_folder_without_a_dataset(complaint, model, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("notes")
    message = complaint("train", "--dataset_path", tmp_path / "folder", "--model_checkpoint", model)
    assert message.startswith(f"{tmp_path / 'folder'}: no dataset in this folder: ")


# Checkpoints


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer there (tokenizer.json, or vocab.json"),
        (lambda model: (model / "config.json").unlink(), "the folder has no config.json, so it is not a checkpoint"),
        (lambda model: (model / "config.json").write_text("{"), "no usable config.json there ("),
        (lambda model: (model / "config.json").write_text("[1]"), "no usable config.json there ("),
        (lambda model: (model / "config.json").write_text('{"model_type": "new"}'), "no usable config.json there ("),
        (lambda model: cut(model / "model.safetensors"), "no usable weights there ("),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "no usable weights there ("),
        (lambda model: replace_weights(model, b"GGUF\x03\0\0\0"), "no usable weights there ("),
        (lambda model: replace_weights(model, pickle.dumps(Path("/"))), "no usable weights there ("),
        (lambda model: replace_weights(model, b""), "no usable weights there ("),
        (lambda model: other_family(model), "a bert model, an encoder, which predicts no next token; a decoder is"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint(complaint, model, dataset, script, damage, message):
    damage(model)
    line = complaint(script, "--dataset_path", dataset, "--model_checkpoint", model, "--device", "cpu")
    assert line.startswith(f"--model_checkpoint {model}: {message}")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_weights(model: Path, content: bytes) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(content)


def other_family(model: Path) -> None:
    BertConfig(vocab_size=305, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(model)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.bin", "expected a folder, a GGUF file, a hub name or a URL, got a file"),
        ("./nothing/there", "no such folder"),
        ("some text", "no such folder"),
    ],
)
def test_a_checkpoint_that_is_no_folder(complaint, workplace, dataset, script, name, message):
    (workplace / "model.bin").write_bytes(b"weights")
    line = complaint(script, "--dataset_path", dataset, "--model", name)
    assert line == f"--model_checkpoint {name}: {message}"


@pytest.mark.parametrize("script", ["interact", "convai_evaluation"])
def test_a_checkpoint_that_is_not_fine_tuned(complaint, base_checkpoints, dataset, script):
    """The original chatted with it all the same: blank replies, and a special token "with probability 1"."""
    line = complaint(script, "--dataset_path", dataset, "--model_checkpoint", base_checkpoints["gpt2"])
    assert line == (
        f"--model_checkpoint {base_checkpoints['gpt2']}: not fine-tuned on dialogs yet; do that first, with train.py"
    )


@pytest.mark.parametrize("script", ["interact", "convai_evaluation"])
def test_a_fine_tuned_checkpoint_without_weights(complaint, model, dataset, script):
    (model / "model.safetensors").unlink()
    line = complaint(script, "--dataset_path", dataset, "--model_checkpoint", model)
    assert line == f"--model_checkpoint {model}: no weights there; train it first, with train.py"
    (model / "checkpoint_3.pt").touch()
    line = complaint(script, "--dataset_path", dataset, "--model_checkpoint", model)
    assert line == f"--model_checkpoint {model}: no weights there yet; go on with train.py and --resume {model}"


# Flags


@pytest.mark.parametrize("script", ["train", "interact", "convai_evaluation"])
def test_help_loads_no_torch(script):
    """Torch and transformers take seconds to load, and `--help` waited for them."""
    code = (
        f"import runpy, sys\nsys.argv = ['{script}.py', '--help']\n"
        f"try: runpy.run_path('{script}.py', run_name='__main__')\nexcept SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *help_lines, modules = done.stdout.splitlines()
    assert "--max_history" in "".join(help_lines) and not {"numpy", "torch"} & {*modules.split()}
    titles = [line for line in help_lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "options:" and titles[-1] == "program:" and {"data:", "model:"} < {*titles}
    assert len(titles) == len({*titles}) and "None" not in "".join(help_lines)


@pytest.mark.parametrize("script", ["train", "interact", "convai_evaluation"])
def test_the_version_is_the_changelogs(script):
    done = subprocess.run([sys.executable, f"{script}.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    newest = re.search(r"^## (.*)", (ROOT / "docs/CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert done.stdout == f"TransferTransfo {newest}\n" and done.returncode == 0


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("interact", ["--top_p", "2"], "argument --top_p: expected a number from 0 to 1, got '2'"),
        ("convai_evaluation", ["--top_p", "2"], "argument --top_p: expected a number from 0 to 1, got '2'"),
        ("convai_evaluation", ["--eval_type", "all of it"], "argument --eval_type: invalid choice: 'all of it'"),
        ("train", ["--n_epochs", "-1"], "argument --n_epochs: expected a whole number of at least 1, got '-1'"),
        ("train", ["--lr", "fast"], "argument --lr: expected a number of at least 0, got 'fast'"),
        ("train", ["--valid_share", "1"], "argument --valid_share: expected a number from 0 to 0.9, got '1'"),
        ("train", ["--train_batch_size", "0"], "argument --train_batch_size: expected a whole number of at least 1"),
        ("train", ["--fp16", "O9"], "argument --fp16: invalid choice: 'O9'"),
        ("interact", ["--web_token", "12345678"], "--web_token: needs --web"),
        ("train", ["dataset.json"], "unrecognized arguments: dataset.json"),
    ],
)
def test_a_flag_that_cannot_be_used(complaint, script, argv, message):
    assert complaint(script, *argv).startswith(message)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_not_there(complaint, monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "argument --device: 'cuda' asked for, but torch sees no GPU here; use --device cpu"
    assert complaint(script, "--device", "cuda") == message


@pytest.mark.parametrize("script", ["train", "convai_evaluation"])
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: expected a whole number of at least 1, got 'abc'; a launcher as torchrun"),
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK: expected a whole number of at least -1, got 'abc'; a launcher as "),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK or --local_rank: given, but the environment variable RANK is ''; start "),
        (
            {"LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "LOCAL_RANK or --local_rank: given, but the environment variable MASTER_PORT is 'x'; start several",
        ),
    ],
)
def test_a_launcher_that_says_half(complaint, monkeypatch, script, environment, message):
    """They were exceptions of Python's and torch's."""
    for name, value in ({"WORLD_SIZE": "1"} | environment).items():
        monkeypatch.setenv(name, value)
    assert complaint(script, "--device", "cpu").startswith(message)


# The exception behind the line


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("how", ["off", "by the flag", "by the environment"])
def test_the_traceback_on_demand(workplace, monkeypatch, capsys, model, dataset, script, how):
    (model / "config.json").write_text("{")
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    argv = ["--dataset_path", str(dataset), "--model_checkpoint", str(model), "--device", "cpu"]
    if how == "by the flag":
        argv.append("--debug")
    elif how == "by the environment":
        monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(SystemExit) as ending:
        run_script(lambda: SCRIPTS[script](argv))
    *above, line = capsys.readouterr().err.splitlines()
    assert ending.value.code == 2
    assert line.startswith(f"{script}.py: error: --model_checkpoint {model}: no usable config.json there (")
    if how == "off":
        assert not above
    else:
        shown = "\n".join(above)
        assert "JSONDecodeError" in shown and "The above exception was the direct cause" in shown
        assert above[-1].startswith("transfertransfo.errors.UserError: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flag_leaves_no_trace_in_the_arguments(workplace, script):
    """A run that shows more computes the same: it can be resumed with the flag or without."""
    parse_args = sys.modules[script].parse_args
    assert parse_args(["--debug"]) == parse_args([])


# As the shell sees it


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_while_a_script_is_loaded(tmp_path, script):
    """The trainer answered it with the way that Python had taken into torch."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, f"{script}.py"], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode in (130, -signal.SIGINT) and (done.stdout, done.stderr) == (b"", b"")


def test_a_launcher_s_fault_is_a_line_of_the_first_look_at_the_flags_too():
    environment = os.environ | {"WORLD_SIZE": "abc"}
    done = subprocess.run([sys.executable, "train.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: error: WORLD_SIZE: expected a whole number")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "interact"])  # the third loads and runs as these do
def test_a_real_start_with_a_model_that_nobody_knows(workplace, dataset, script):
    """Without network the hub was tried for 50 seconds, in 30 lines of warnings."""
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--dataset_path", dataset, "--model_checkpoint", "nobody/knows-this"],
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workplace.parent / "hub")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{script}.py: error: --model_checkpoint nobody/knows-this: neither a folder nor a model that can be had from"
        " the hub here; give a local folder, or example/model, the embedded example\n"
    )
    assert list(workplace.iterdir()) == []
