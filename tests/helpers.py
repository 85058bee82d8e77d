"""What several test modules share: the tree, small datasets, and a training run as a function call."""

import contextlib
import io
import json
import logging
import signal
from dataclasses import dataclass
from pathlib import Path

from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config

from train import train

ROOT = Path(__file__).parent.parent
FAMILIES = ("gpt", "gpt2")
OTHERS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt_neox": GPTNeoXConfig}  # with GPT-2's kind of tokenizer
ANSWERS = ["i like tea .", "i have two dogs .", "no , never .", "yes , i do !", "hello !", "we live in a big house ."]
QUESTIONS = ["what do you like ?", "any pets ?", "did you go there ?", "do you cook ?", "hi !", "where do you live ?"]


def dialog(number: int, turns: int = 2) -> dict:
    """A dialog whose replies answer its questions; each reply has two distractors."""
    utterances, history = [], []
    for turn in range(number, number + turns):
        history = [*history, QUESTIONS[turn % 6]]
        candidates = [ANSWERS[(turn + shift) % 6] for shift in (2, 3, 0)]
        utterances.append({"candidates": candidates, "history": history})
        history = [*history, candidates[-1]]
    return {"personality": [ANSWERS[number % 6], ANSWERS[(number + 1) % 6]], "utterances": utterances}


DATASET = {"train": [dialog(i) for i in range(6)], "valid": [dialog(i, turns=3) for i in (0, 3)]}


@dataclass
class Run:
    """A run folder, what the run logged, and its figures."""

    folder: Path
    log: str

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict]:
        return [line for line in self.lines if "split" not in line]

    @property
    def validations(self) -> list[dict]:
        return [line for line in self.lines if "split" in line]


@contextlib.contextmanager
def process_as_it_was():
    """A script sets up the process's log and its signals; here that ends with the block."""
    root, names = logging.getLogger(), (signal.SIGINT, signal.SIGTERM)
    level, handlers, signals = root.level, root.handlers[:], [signal.getsignal(name) for name in names]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        for name, handler in zip(names, signals):
            signal.signal(name, handler)


def run_training(folder: Path, checkpoint: Path, *flags, dataset: dict = DATASET) -> Run:
    """Train in `folder` on a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(dataset))
    argv = ["--model_checkpoint", checkpoint, "--dataset_path", "dataset.json", "--device", "cpu", *flags]
    with process_as_it_was(), contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()) as log:
        run_folder = train([str(argument) for argument in argv])
    return Run(folder / run_folder, log.getvalue())


def dialogs_of_text(dataset: dict) -> list[str]:
    """Every text of a PersonaChat JSON, repeated as often as it occurs."""
    utterances = [utterance for dialogs in dataset.values() for dialog in dialogs for utterance in dialog["utterances"]]
    return [text for utterance in utterances for name in ("candidates", "history") for text in utterance[name]]
