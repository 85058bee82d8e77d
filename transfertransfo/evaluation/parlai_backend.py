"""The evaluation in ParlAI, or by ConvAI2's own scripts in an old ParlAI, with their figures."""

import contextlib
import importlib.metadata
import math
import shutil
import sys
import tempfile
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from transfertransfo.data.dataset import TokenizedDataset
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.parlai import write_parlai
from transfertransfo.errors import SettingError, UserError
from transfertransfo.evaluation.metrics import (
    perplexity,
    split_words,
    write_word_counts,
)
from transfertransfo.evaluation.native import add_result_, make_rows

PARLAI = {"parlai": "1.7.2", "convai2": "0.1.20200610"}  # the release that a backend needs; they exclude each other
DATA_VERSION = "v5.0"  # in the second line of .built; where it says something else ParlAI deletes the folder
MEASURES = ("hits@1", "ppl", "f1")


def evaluate_in_parlai(
    backend: str,
    dataset: TokenizedDataset,
    counts: Callable[[], dict[str, int]],
    options: dict,
    *,
    own_data: Path | None = None,
) -> tuple[list[dict], dict]:
    """As `native.evaluate`, but the figures are ParlAI's.

    Args:
        backend: "parlai" or "convai2".
        counts: gives the dictionary for ppl.
        options: the flags of the agent, `batchsize` and `dataset_path`, by their names without the dashes.
        own_data: the user's own folder of ParlAI's ConvAI2, to be read in place of a copy of the dataset.

    Raises:
        UserError: ParlAI does not take the data.
    """
    eval_type = options["eval_type"]
    measures = MEASURES if eval_type == "all" else (eval_type,)
    with tempfile.TemporaryDirectory(prefix="convai2-") as folder, contextlib.redirect_stdout(sys.stderr):
        make_data_folder(Path(folder), backend, dataset, counts, own_data=own_data)
        dialogs = read_dialogs([Path(folder, "ConvAI2", "valid_self_original.txt")])["valid"]
        details = make_rows(dialogs, options["max_history"])
        opt = options | {"datapath": folder, "dict_file": str(dictionary_in(Path(folder)))}
        with in_one_line(options["dataset_path"]):
            if backend == "parlai":
                figures = run_parlai(opt | {"record": recorder(details, dialogs)}, measures)
                if "f1" in figures:
                    figures["f1"] = in_order(figures["f1"], [row["f1"] for row in details])
            else:
                figures = {}
                for measure in measures:
                    record = recorder(details, dialogs)
                    figures[measure] = run_convai2(opt | {"eval_type": measure, "record": record}, measure)
        return details, figures


@contextlib.contextmanager
def in_one_line(dataset_path: str) -> Iterator[None]:
    """Say in one line that ParlAI does not take the data."""
    try:
        yield
    except KeyError as error:
        if error.args[0] not in MEASURES:
            raise
        raise UserError(f"{dataset_path}: ParlAI found nothing there to measure {error.args[0]} on") from error
    except RuntimeError as error:
        if "true label missing" not in str(error):
            raise
        raise SettingError(
            f"{dataset_path}: a reply is not among its candidates, which ParlAI does not take;"
            f" dataset_path {dataset_path} adds it",
            "dataset_path",
        ) from error


def install_command(backend: str) -> str:
    """The command that installs what a backend needs."""
    return f"pip install -r requirements/{backend}.txt && pip install --no-deps parlai=={PARLAI[backend]}"


def check_installed(backend: str) -> None:
    """Check that the release of ParlAI is there that a backend needs.

    Raises:
        SettingError: none is, or another one.
    """
    try:
        found = importlib.metadata.version("parlai")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != PARLAI[backend]:
        raise SettingError(
            f"backend {backend}: needs parlai=={PARLAI[backend]} (found: {found}). In an environment of"
            f" its own: {install_command(backend)}",
            "backend",
        )


def dictionary_in(folder: Path) -> Path:
    return folder / "models" / "convai2" / "dict_self"


def make_data_folder(
    folder: Path,
    backend: str,
    dataset: TokenizedDataset,
    counts: Callable[[], dict[str, int]],
    *,
    own_data: Path | None = None,
) -> None:
    """Fill a temporary folder with what ParlAI expects of its data folder. It never sees the user's own one.

    Args:
        counts, own_data: as in `evaluate_in_parlai`.

    Raises:
        SettingError: `own_data` has not the data that ParlAI asks for.
    """
    data = folder / "ConvAI2"
    names = ["valid_self_original.txt"]
    if backend == "convai2":
        names.append("valid_self_original_no_cands.txt")
    if own_data:
        check_data(own_data, names)
        data.symlink_to(own_data.resolve(), target_is_directory=True)
    else:
        data.mkdir()
        write_parlai(dataset.dialogs("valid", dataset.texts), data / names[0])
        for name in names[1:]:
            shutil.copyfile(data / names[0], data / name)
        (data / ".built").write_text(f"written by convai_evaluation.py\n{DATA_VERSION}\n")
    dictionary_in(folder).parent.mkdir(parents=True)
    write_word_counts(dictionary_in(folder), counts())


def check_data(folder: Path, names: list[str]) -> None:
    """Check that ParlAI would read these files of a data folder and leave it alone."""
    mark = folder / ".built"
    lines = mark.read_text(errors="replace").splitlines() if mark.is_file() else []
    if lines[1:2] != [DATA_VERSION]:
        raise SettingError(
            f"{mark}: its second line is not {DATA_VERSION}, so that ParlAI would delete or replace the"
            f" folder; evaluate a copy of its data: dataset_path {folder}",
            "dataset_path",
        )
    for name in names:
        if not (folder / name).is_file():
            message = f"{folder / name}: not there; dataset_path {folder} does without"
            raise SettingError(message, "dataset_path")


def recorder(details: list[dict], dialogs: list[dict]) -> Callable:
    """A function that adds an example's results to its row. ParlAI's batches mix the dialogs, so texts tell the row."""
    rows: dict[str, deque] = defaultdict(deque)
    remaining = iter(details)
    for dialog in dialogs:
        for utterance in dialog["utterances"]:
            key = example_key(dialog["personality"], utterance["history"], utterance["candidates"][-1])
            rows[key].append(next(remaining))

    def record(dialog: Any, result: dict) -> None:
        waiting = rows[example_key(dialog.persona, dialog.history, dialog.label)]
        if not waiting:
            raise UserError(f"the dataset, as ParlAI reads it, has a reply more than here: {dialog.label!r}")
        add_result_(waiting.popleft(), result, dialog.label)

    return record


def example_key(persona: list[str], history: list[str], label: str) -> str:
    return " ".join(" ".join([*persona, *history, label]).split())


def run_parlai(opt: dict, measures: tuple[str, ...]) -> dict[str, float]:
    """The figures of ParlAI's eval_model."""
    from parlai.scripts.eval_model import eval_model, setup_args

    report = eval_model(opt_of(setup_args(), opt, ["--task", "convai2:self", "--metrics", "f1"]))
    return {measure: float(report[measure]) for measure in measures}


def in_order(mean: float, values: list[float]) -> float:
    """The mean of the values in this order: ParlAI's is that of its batches, which the last digit shows."""
    again = sum(values) / len(values)
    return again if math.isclose(mean, again, rel_tol=1e-12) else mean


def run_convai2(opt: dict, measure: str) -> float:
    """The figure of one of ConvAI2's own scripts."""
    opt = opt | {"batchsize": 1}  # for ppl they refuse more
    # Missing in every release, but asked to download the dictionary, which is there already
    stub = types.ModuleType("parlai.zoo.convai2.build")
    vars(stub)["download"] = lambda datapath: None
    sys.modules[stub.__name__] = stub
    if measure == "ppl":
        return run_convai2_ppl(opt)
    if measure == "hits@1":
        from projects.convai2.eval_hits import eval_hits as script
        from projects.convai2.eval_hits import setup_args
    else:
        from projects.convai2.eval_f1 import eval_f1 as script
        from projects.convai2.eval_f1 import setup_args
    return float(script(opt_of(setup_args(), opt, print_args=False), None)[measure])


def run_convai2_ppl(opt: dict) -> float:
    """The archived script's perplexity: its world and its loop, without its rounding to four digits."""
    from parlai.core.agents import create_agent
    from parlai.core.worlds import create_task
    from parlai.scripts.eval_ppl import PerplexityWorld
    from projects.convai2.eval_ppl import build_dict, setup_args

    opt = opt_of(setup_args(), opt, print_args=False)
    agent = create_agent(opt)
    found: dict[int, dict[str, float]] = {}  # number of words before -> probabilities of the next word
    ask = agent.next_word_probability
    agent.next_word_probability = lambda words: found.setdefault(len(words), ask(words))
    world = create_task(opt, [agent, build_dict()], default_world=PerplexityWorld)
    while not world.epoch_done():
        found.clear()
        world.parley()
        dialog = agent.observation["dialog"]
        words = [(word, found[i][word] if i in found else None) for i, word in enumerate(split_words(dialog.label))]
        opt["record"](dialog, {"words": words})
    return perplexity(world.metrics["loss"], world.metrics["num_tokens"])


def opt_of(parser: Any, opt: dict, flags: Iterable[str] = (), **options: Any) -> dict:
    """ParlAI's own options with `flags`, and over them `opt`, which the agent reads."""
    flags = ["--model", "convai_evaluation:TransformerAgent", "--datapath", opt["datapath"], *flags]
    parsed = parser.parse_args(flags, **options)
    parsed.update(opt)
    return parsed
