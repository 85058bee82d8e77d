"""The evaluation in ParlAI, or by ConvAI2's own scripts in an old ParlAI: as `native.evaluate`, with their figures."""

import contextlib
import importlib.metadata
import math
import shutil
import sys
import tempfile
import types
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from transfertransfo.data.dataset import TokenizedDataset
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.formats import write_parlai
from transfertransfo.errors import UserError
from transfertransfo.evaluation.metrics import (
    perplexity,
    split_words,
    write_word_counts,
)
from transfertransfo.evaluation.native import add_result_, load_validation, word_counts
from transfertransfo.model.sources import download_pretrained_model, load_tokenizer

PARLAI = {"parlai": "1.7.2", "convai2": "0.1.20200610"}  # the release that a backend needs; they exclude each other
DATA_VERSION = "v5.0"  # in the second line of .built; where it says something else ParlAI deletes the folder
MEASURES = ("hits@1", "ppl", "f1")


def evaluate_in_parlai(args: Namespace) -> tuple[list[dict], dict]:
    """As `evaluate`, but the figures are ParlAI's."""
    check_installed(args.backend)
    tokenizer = load_tokenizer(args.model_checkpoint or download_pretrained_model(), args.gpt_tokenization)
    dataset = load_validation(tokenizer, args)
    measures = MEASURES if args.eval_type == "all" else (args.eval_type,)
    with tempfile.TemporaryDirectory(prefix="convai2-") as folder, contextlib.redirect_stdout(sys.stderr):
        make_data_folder(Path(folder), args, dataset)
        dialogs = read_dialogs([Path(folder, "ConvAI2", "valid_self_original.txt")])["valid"]
        details = [{"index": i} for i in range(sum(len(dialog["utterances"]) for dialog in dialogs))]
        opt = vars(args) | {"datapath": folder, "dict_file": str(dictionary_in(Path(folder)))}
        with in_one_line(args):
            if args.backend == "parlai":
                figures = run_parlai(opt | {"record": recorder(details, dialogs)}, measures)
                if "f1" in figures:
                    figures["f1"] = in_order(figures["f1"], [row["f1"] for row in details])
            else:
                figures = {
                    measure: run_convai2(opt | {"eval_type": measure, "record": recorder(details, dialogs)}, measure)
                    for measure in measures
                }
        return details, figures


@contextlib.contextmanager
def in_one_line(args: Namespace) -> Iterator[None]:
    """What ParlAI says of data that it does not take."""
    try:
        yield
    except KeyError as error:
        if error.args[0] not in MEASURES:
            raise
        raise UserError(f"{args.dataset_path}: ParlAI found nothing there to measure {error.args[0]} on") from error
    except RuntimeError as error:
        if "true label missing" not in str(error):
            raise
        raise UserError(
            f"{args.dataset_path}: a reply is not among its candidates, which ParlAI does not take;"
            f" --dataset_path {args.dataset_path} adds it"
        ) from error


def install_command(backend: str) -> str:
    return f"pip install -r requirements/{backend}.txt && pip install --no-deps parlai=={PARLAI[backend]}"


def check_installed(backend: str) -> None:
    try:
        found = importlib.metadata.version("parlai")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != PARLAI[backend]:
        raise UserError(
            f"--backend {backend}: needs parlai=={PARLAI[backend]} (found: {found}). In an environment of"
            f" its own: {install_command(backend)}"
        )


def dictionary_in(folder: Path) -> Path:
    return folder / "models" / "convai2" / "dict_self"


def make_data_folder(folder: Path, args: Namespace, dataset: TokenizedDataset) -> None:
    """Fill a temporary folder with what ParlAI expects of its data folder. It never sees the user's own one.

    Raises:
        UserError: `--datapath` has not the data that ParlAI asks for.
    """
    data = folder / "ConvAI2"
    names = ["valid_self_original.txt"] + ["valid_self_original_no_cands.txt"] * (args.backend == "convai2")
    if args.datapath:
        check_data(Path(args.dataset_path), names)
        data.symlink_to(Path(args.dataset_path).resolve(), target_is_directory=True)
    else:
        data.mkdir()
        write_parlai(dataset.dialogs("valid", dataset.texts), data / names[0])
        for name in names[1:]:
            shutil.copyfile(data / names[0], data / name)
        (data / ".built").write_text(f"written by convai_evaluation.py\n{DATA_VERSION}\n")
    dictionary_in(folder).parent.mkdir(parents=True)
    write_word_counts(dictionary_in(folder), word_counts(args, dataset))


def check_data(folder: Path, names: list[str]) -> None:
    mark = folder / ".built"
    lines = mark.read_text(errors="replace").splitlines() if mark.is_file() else []
    if lines[1:2] != [DATA_VERSION]:
        raise UserError(
            f"{mark}: its second line is not {DATA_VERSION}, so that ParlAI would delete or replace the"
            f" folder; evaluate a copy of its data: --dataset_path {folder}"
        )
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: not there; --dataset_path {folder} does without")


def recorder(details: list[dict], dialogs: list[dict]) -> Callable:
    """A function that adds an example's results to its row. ParlAI's batches mix the dialogs, so texts tell the row."""
    utterances = ((dialog["personality"], utterance) for dialog in dialogs for utterance in dialog["utterances"])
    rows: dict[str, deque] = defaultdict(deque)
    for row, (persona, utterance) in zip(details, utterances):
        rows[example_key(persona, utterance["history"], utterance["candidates"][-1])].append(row)

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
