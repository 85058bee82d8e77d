"""In ParlAI: its figures are the native ones, its commands take the agent, and the user's data is left alone.

Runs in an environment that has one of the two ParlAIs, on that one: `make test-parlai`.
"""

import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT
from test_readme import commands

from convai_evaluation import run
from transfertransfo.data.parlai import write_parlai
from transfertransfo.errors import UserError
from transfertransfo.evaluation.parlai_backend import PARLAI

try:
    VERSION = importlib.metadata.version("parlai")
except importlib.metadata.PackageNotFoundError:
    VERSION = ""
BACKEND = {version: backend for backend, version in PARLAI.items()}.get(VERSION)
pytestmark = [
    pytest.mark.parlai,
    pytest.mark.skipif(not VERSION, reason="ParlAI is not installed: make test-parlai"),
]
FLAGS = ["--device", "cpu", "--no_sample", "--max_length", "6", "--dataset_cache", ""]
AGENT = ["-m", "convai_evaluation:TransformerAgent"]


@pytest.fixture
def data(example_json, tmp_path) -> Path:
    """ParlAI's data folder, of a small dataset with dialogs of many lengths and two that are the same."""
    folder = tmp_path / "data" / "ConvAI2"
    folder.mkdir(parents=True)
    valid = example_json["valid"][:4]
    dialogs = [dialog | {"utterances": dialog["utterances"][: 1 + i]} for i, dialog in enumerate(valid)]
    for split, part in (("train", example_json["train"][:4]), ("valid", [*dialogs, dialogs[1]])):
        for candidates in ("", "_no_cands"):
            write_parlai(part, folder / f"{split}_self_original{candidates}.txt")
    (folder / ".built").write_text("today\nv5.0\n")
    return folder.parent


@pytest.fixture
def evaluate(checkpoint, tmp_path, monkeypatch):
    """Run the script as a function; returns its report and details."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def evaluate(*argv) -> tuple[dict, list[dict]]:
        details = tmp_path / "details.jsonl"
        report = run(["--model_checkpoint", str(checkpoint), "--details", str(details), *FLAGS, *map(str, argv)])
        return report, [json.loads(line) for line in details.open()]

    yield evaluate
    assert not list((tmp_path / "temporary").iterdir())  # what was there for ParlAI is removed


def assert_same(results: tuple[dict, list[dict]], native: tuple[dict, list[dict]]) -> None:
    (report, details), (native_report, native_details) = results, native
    for key, value in report.items():
        assert value == (pytest.approx(native_report[key], rel=1e-6) if "ppl" in key else native_report[key]), key
    for row, native_row in zip(details, native_details, strict=True):
        for key in ("index", "ranking", "reply", "f1"):
            assert row[key] == native_row[key]
        assert [word for word, _ in row["words"]] == [word for word, _ in native_row["words"]]
        expected = [None if p is None else pytest.approx(p, rel=1e-4) for _, p in native_row["words"]]
        assert [p for _, p in row["words"]] == expected


def snapshot(folder: Path) -> dict:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("batchsize", [1, 8])
def test_figures_and_details_are_the_native_ones(evaluate, data, batchsize):
    common = ["--eval_type", "all", "--dataset_path", data / "ConvAI2"]
    results = evaluate(*common, "--backend", BACKEND, "--batchsize", batchsize)
    assert set(results[0]) >= {"hits@1", "ppl", "f1", "distinct-1", "scored_words", "examples"}
    assert_same(results, evaluate(*common))


@pytest.mark.parametrize("eval_type", ["hits@1", "ppl", "f1"])
@pytest.mark.parametrize("family", ["gpt"])
def test_one_figure_alone(evaluate, data, eval_type):
    common = ["--eval_type", eval_type, "--dataset_path", data / "ConvAI2"]
    (report, _), (native, _) = evaluate(*common, "--backend", BACKEND), evaluate(*common)
    assert report[eval_type] == pytest.approx(native[eval_type], rel=1e-6)
    assert not {"hits@1", "ppl", "f1"} - {eval_type} & set(report)


@pytest.mark.parametrize("family", ["gpt2"])
def test_json_with_windows_for_histories(evaluate, example_json, tmp_path):
    """A history that does not go on from the one before starts an episode of its own in ParlAI's text."""
    dialogs = [
        dialog | {"utterances": [u | {"history": u["history"][-3:]} for u in dialog["utterances"]]}
        for dialog in example_json["valid"][:2]
    ]
    path = tmp_path / "dialogs.json"
    path.write_text(json.dumps({"valid": dialogs}))
    common = ["--eval_type", "all", "--dataset_path", path]
    assert_same(evaluate(*common, "--backend", BACKEND), evaluate(*common))


@pytest.mark.parametrize("family", ["gpt"])
def test_a_data_folder_is_used_as_it_is_and_left_as_it_was(evaluate, data):
    before = snapshot(data)
    common = ["--eval_type", "all", "--datapath", data]
    assert_same(evaluate(*common, "--backend", BACKEND), evaluate(*common))
    (data / "ConvAI2" / ".built").write_text("today\nv4.0\n")
    with pytest.raises(UserError, match=r"its second line is not v5\.0"):
        evaluate(*common, "--backend", BACKEND)
    (data / "ConvAI2" / ".built").write_text("today\nv5.0\n")
    assert snapshot(data) == before


@pytest.mark.parametrize("family", ["gpt"])
def test_data_that_parlai_does_not_take(evaluate, data):
    valid = data / "ConvAI2" / "valid_self_original.txt"
    valid.write_text("1 hi !\tyes .\t\tno .|never .\n")
    with pytest.raises(UserError, match="a reply is not among its candidates"):
        evaluate("--datapath", data, "--backend", BACKEND)
    valid.write_text("1 hi !\tyes .\n")
    with pytest.raises(UserError, match="ParlAI found nothing there to measure hits@1 on"):
        evaluate("--datapath", data, "--backend", BACKEND)


@pytest.mark.parametrize("family", ["gpt"])
def test_the_other_backend_is_not_installed(evaluate, data):
    (other,) = set(PARLAI) - {BACKEND}
    with pytest.raises(UserError, match=rf"needs parlai=={PARLAI[other]} \(found: {VERSION}\)"):
        evaluate("--datapath", data, "--backend", other)


# ParlAI's own commands


def parlai(script: str, checkpoint: Path, *argv, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"parlai.scripts.{script}", *AGENT, "--model_checkpoint", checkpoint, *argv]
    return subprocess.run([str(word) for word in command], cwd=ROOT, input=typed, capture_output=True, text=True)


@pytest.mark.parametrize("family", ["gpt"])
def test_parlais_eval_model_takes_the_agent(evaluate, checkpoint, data):
    flags = ["--eval_type", "all", "--no_sample", "--max_length", "6"]
    if BACKEND == "convai2":
        flags += ["--metrics", "f1"]  # its default would need nltk
    done = parlai("eval_model", checkpoint, "--task", "convai2", "--datapath", data, "--batchsize", "4", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    native, _ = evaluate("--eval_type", "all", "--datapath", data)
    for key in ("hits@1", "ppl", "f1", "token_ppl"):
        assert report[key] == pytest.approx(native[key], rel=1e-3)  # ParlAI prints four digits


@pytest.mark.parametrize("family", ["gpt2"])
def test_parlais_interactive_answers(checkpoint):
    done = parlai("interactive", checkpoint, "--no_sample", typed="hi !\nhow are you ?\n[DONE]\nhi !\n[EXIT]\n")
    assert done.returncode == 0, done.stderr[-2000:]
    replies = [line.split("[TransformerAgent]:")[1] for line in done.stdout.splitlines() if "Agent]:" in line]
    assert len(replies) == 3
    assert all(reply.strip() for reply in replies)
    assert replies[0] == replies[2]  # the first dialog is forgotten


@pytest.mark.skipif(BACKEND == "convai2", reason="the archived ParlAI has no such command")
@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.parametrize("documented", [command for command in commands() if " parlai " in command])
def test_the_documented_commands_find_the_agent(documented, checkpoint, data):
    """They begin with `python -m`: the `parlai` command looks for agents beside itself, not where it is run."""
    _, *argv = shlex.split(documented.replace("runs/NAME", str(checkpoint)))
    command = [sys.executable, *argv, "--datapath", data]
    done = subprocess.run(command, cwd=ROOT, input="hi !\n[EXIT]\n", capture_output=True, text=True)
    expected = {"eval_model": '"hits@1": ', "interactive": "[TransformerAgent]:"}[argv[2]]
    assert expected in done.stdout, done.stdout[-1000:] + done.stderr[-2000:]


@pytest.mark.parametrize("family", ["gpt"])
def test_a_world_in_memory(checkpoint):
    from parlai.core.agents import Agent, create_agent
    from parlai.core.worlds import create_task

    class Human(Agent):
        heard = ()

        def act(self) -> dict:
            return {"id": "human", "text": "your persona: i like tea .\nhi !", "episode_done": len(self.heard) == 2}

        def observe(self, message: dict) -> None:
            self.heard += (message["text"],)

        def epoch_done(self) -> bool:
            return len(self.heard) == 3

    opt = {"task": "interactive", "interactive_task": True, "datatype": "valid", "datapath": "nowhere", "batchsize": 1,
           "model": AGENT[1], "model_checkpoint": str(checkpoint), "device": "cpu", "no_sample": True}  # fmt: skip
    human, agent = Human(opt), create_agent(opt)
    world = create_task(opt, [human, agent])
    while not world.epoch_done():
        world.parley()
    assert len(human.heard) == 3 and all(human.heard)
    assert agent.history == ["hi !", human.heard[0], "hi !", human.heard[1], "hi !"]
    if BACKEND == "parlai":
        assert agent.respond("hi !")


def test_importing_the_script_does_not_import_parlai():
    code = "import sys, convai_evaluation; assert 'parlai' not in sys.modules; convai_evaluation.TransformerAgent"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
