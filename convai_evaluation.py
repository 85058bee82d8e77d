"""Measure a fine-tuned model as ConvAI2 did: hits@1, word perplexity and F1 on the validation split.

python convai_evaluation.py --eval_type all --model_checkpoint runs/Nov21_20-57-01_host_model
python convai_evaluation.py --eval_type hits@1     # the model of 2019 on PersonaChat, both downloaded
torchrun --nproc_per_node=8 convai_evaluation.py --eval_type all --model_checkpoint FOLDER     # on eight GPUs
python convai_evaluation.py --eval_type all --backend parlai --model_checkpoint FOLDER     # in ParlAI
python -m parlai eval_model --task convai2 -m convai_evaluation:TransformerAgent --model_checkpoint FOLDER
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transfertransfo.cli import (
    ArgumentParser,
    add_data_flags,
    add_evaluation_flags,
    add_program_flags,
    begin_section,
    check_output,
    launched,
    number,
    run_script,
    set_seed,
    set_up_logging,
)
from transfertransfo.errors import UserError, flags_named
from transfertransfo.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from transfertransfo.data.dataset import TokenizedDataset

logger = logging.getLogger(__name__)


def __getattr__(name: str) -> type:
    """`TransformerAgent`, ParlAI's agent, not imported before it is asked for: it loads ParlAI, where there is one."""
    if name == "TransformerAgent":
        from transfertransfo.evaluation.parlai_agent import TransformerAgent

        return TransformerAgent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Measure a fine-tuned model as ConvAI2 did.")
    add_evaluation_flags(parser, "selfchat")
    parser.add_argument(
        "--backend",
        choices=["native", "parlai", "convai2"],
        default="native",
        help="what does the evaluation: this script, ParlAI, or ConvAI2's own scripts in an old ParlAI",
    )
    add_data_flags(parser)
    parser.add_argument(
        "--valid_share",
        type=number(float, 0, 0.9),
        help="share of the training dialogs to measure on, the last ones, where the dataset has no valid split"
        " (0 = off; unset = as in the model's training, if it was on this dataset)",
    )
    parser.add_argument(
        "--datapath", help="ParlAI's data folder, in place of --dataset_path: its ConvAI2 is read, never written"
    )
    begin_section(parser, "measurement")
    parser.add_argument(
        "--batchsize",
        type=number(int, 1),
        default=16,
        help="examples of one forward; ConvAI2's own scripts always take one",
    )
    parser.add_argument(
        "--num_chats", type=number(int, 2), default=100, help="talks of --eval_type selfchat, of 8 exchanges each"
    )
    parser.add_argument(
        "--sharded",
        action="store_true",
        help="divide the model among the processes, which then go through each example together: where no GPU holds it",
    )
    parser.add_argument("--report", help="file to write the unrounded figures to, as JSON")
    parser.add_argument("--details", help="file to write each example's results to, one JSON object a line")
    add_program_flags(parser)
    return parser.parse_args(argv)


@flags_named()
def run(argv: list[str] | None = None) -> dict:
    """Evaluate as the command line says; returns the figures, which it prints.

    Raises:
        UserError: input that cannot be used.
    """
    args = parse_args(argv)
    check_flags(args)
    # torch and transformers take seconds to load: `--help` and a wrong flag are answered without them
    from transfertransfo.model.double_heads import default_device
    from transfertransfo.processes import (
        finish_distributed,
        one_line_for_a_lost_process,
        rank,
        setup_distributed,
    )

    with one_line_for_a_lost_process(remedy="start the evaluation anew"):
        local_rank = launched("LOCAL_RANK", -1, low=-1)
        device = setup_distributed(args.device or default_device(), local_rank, alone=args.sharded)
        set_up_logging(logging.ERROR if rank() else logging.INFO)
        set_seed(args.seed)
        if args.dict_file and args.eval_type not in ("ppl", "all"):
            logger.warning("--dict_file: has no effect on --eval_type %s", args.eval_type)
        if args.datapath:
            use_datapath_(args)
        elif not args.dataset_path:
            from transfertransfo.data.sources import recorded_dataset

            args.dataset_path = recorded_dataset(args.model_checkpoint)
        measure = measure_talks if args.eval_type == "selfchat" else measure_replies
        measured = measure(args, str(device))
        if not rank():
            print(*measured.lines, sep="\n", flush=True)  # a file that is standard output too comes behind
            write_files(args, measured)
        finish_distributed()
    return measured.figures


def check_flags(args: Namespace) -> None:
    """Check that the flags go together, and that their files are there or can be made.

    Raises:
        UserError: they do not, or a file is not.
    """
    check_output("--report", args.report)
    check_output("--details", args.details)
    if args.report and args.details and os.path.realpath(args.report) == os.path.realpath(args.details):
        raise UserError("--report and --details: the same file")
    if args.datapath and args.dataset_path:
        raise UserError("--datapath and --dataset_path: give one of the two")
    if args.dict_file and not Path(args.dict_file).is_file():
        raise UserError(f"--dict_file {args.dict_file}: no such file")
    if args.eval_type == "selfchat" and args.backend != "native":
        raise UserError("--eval_type selfchat: --backend native alone has it")
    several = args.sharded or launched("WORLD_SIZE", 1, low=1) > 1
    if several and args.backend != "native":
        raise UserError(f"--backend {args.backend}: takes one process; start it without torchrun and --sharded")
    if several and args.eval_type == "selfchat":
        raise UserError("--eval_type selfchat: takes one process; start it without torchrun and --sharded")


class Measured(NamedTuple):
    """The results of an evaluation."""

    details: list[dict]  # of each example, or talk
    figures: dict
    beside: dict  # what the report has beside the figures
    lines: list[str]  # to be printed


def measure_replies(args: Namespace, device: str) -> Measured:
    """ConvAI2's figures and those beside them, over the examples of the validation split."""
    from transfertransfo.evaluation.native import domains, extra_figures, standard_errors

    native = args.backend == "native"
    details, figures = evaluate_natively(args, device) if native else evaluate_in_backend(args)
    report = {"examples": len(details)} | figures | extra_figures(details)
    measured_on = domains(report)
    errors = standard_errors(details)
    names = {
        "hits@1": "FINAL Hits@1",
        "ppl": "FINAL PPL",
        "f1": "FINAL F1",
        "token_ppl": "Token PPL",
        "distinct-1": "Distinct-1",
        "distinct-2": "Distinct-2",
    }
    lines = []
    for key, name in names.items():
        if key in report:
            lines.append(f"{name}: {report[key]:.4g}" + (f" ({measured_on[key]})" if key in measured_on else ""))
    if "persona_f1" in report:
        for who, prefix in (("Replies", ""), ("Gold replies", "gold_")):
            precision, recall, f1, copies = (
                report[f"{prefix}persona_{key}"] for key in ("precision", "recall", "f1", "copies")
            )
            overlap = f"precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}"
            lines.append(f"{who} and persona: {overlap}; copies {copies:.1%}")
    shown = [f"{names[key].removeprefix('FINAL ')} {error:.2g}" for key, error in errors.items()]
    lines.append(f"Of {len(details)} examples; standard errors: {', '.join(shown)}")
    return Measured(details, report, {"standard_errors": errors}, lines)


def measure_talks(args: Namespace, device: str) -> Measured:
    """How often the model's talks with itself repeat and echo, and people's beside."""
    from transfertransfo.decoding import Decoding
    from transfertransfo.evaluation.selfchat import measure, selfchat
    from transfertransfo.model.loading import load_finetuned

    model, tokenizer = load_finetuned(
        args.model_checkpoint, args.gpt_tokenization, device, args.history_start, args.fp16
    )
    talks, of_people = selfchat(
        model, tokenizer, load_split(args, tokenizer), Decoding.of(args), count=args.num_chats,
        max_history=args.max_history, batchsize=args.batchsize, seed=args.seed,
    )  # fmt: skip
    figures, people = measure(talks), measure(of_people)
    names = {
        "repeated": "repeats an own reply whole",
        "repeats": "repeats four of its own words",
        "echoes": "repeats four of the partner's words",
        "persona_used": "persona's words that are used",
        "words": "words",
        "empty": "empty",
        "distinct-2": "distinct-2",
    }
    lines = [f"{len(talks)} talks, {figures['replies']} replies {'':12} model  people"]
    lines += [f"{name:40} {figures[key]:6.3g} {people[key]:7.3g}" for key, name in names.items()]
    return Measured([talk._asdict() for talk in talks], {"talks": len(talks)} | figures, {"people": people}, lines)


def write_files(args: Namespace, measured: Measured) -> None:
    """Write the files that are asked for, the second one also where the first one cannot be.

    Raises:
        UserError: one cannot be written.
    """
    try:
        if args.report:
            written = finite(measured.figures | measured.beside | provenance(args))
            write_output("--report", args.report, json.dumps(written, indent=2, allow_nan=False) + "\n")
    finally:
        if args.details:
            lines = (json.dumps(finite(row), allow_nan=False) + "\n" for row in measured.details)
            write_output("--details", args.details, "".join(lines))


def finite(value: Any) -> Any:
    """The same lists and objects, with None in the place of what JSON has no number for: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def provenance(args: Namespace) -> dict:
    """Model, dataset, seed, versions and all flags: the figures' origin."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {
        "model": args.model_checkpoint or "the model of 2019",
        "dataset": args.dataset_path or "PersonaChat",
        "seed": args.seed,
        "versions": {"python": platform.python_version()} | versions,
        "flags": vars(args),
    }


def use_datapath_(args: Namespace) -> None:
    """Take dataset and dictionary from ParlAI's data folder."""
    folder = Path(args.datapath)
    args.dataset_path = str(folder / "ConvAI2")
    dictionary = folder / "models" / "convai2" / "dict_self"
    if not args.dict_file and dictionary.is_file():
        args.dict_file = str(dictionary)


def load_split(args: Namespace, tokenizer: "PreTrainedTokenizerBase") -> "TokenizedDataset":
    """The dataset to measure on; with the validation split of the training where it has none of its own."""
    from transfertransfo.data.sources import recorded
    from transfertransfo.evaluation.native import load_validation
    from transfertransfo.processes import one_process_first

    with one_process_first():
        return load_validation(
            tokenizer, args.dataset_path, args.dataset_cache, skip_bad_dialogs=args.skip_bad_dialogs,
            valid_share=args.valid_share, run=recorded(args.model_checkpoint),
        )  # fmt: skip


def evaluate_natively(args: Namespace, device: str) -> tuple[list[dict], dict]:
    """Each example's results, and the figures, by this project alone."""
    from transfertransfo.decoding import Decoding
    from transfertransfo.evaluation.evaluator import Evaluator
    from transfertransfo.evaluation.native import evaluate, word_counts
    from transfertransfo.model.loading import load_finetuned

    decoding = Decoding.of(args)
    model, tokenizer = load_finetuned(
        args.model_checkpoint, args.gpt_tokenization, device, args.history_start, args.fp16, sharded=args.sharded
    )
    dataset = load_split(args, tokenizer)
    counts = partial(word_counts, dataset, args.dict_file)
    evaluator = Evaluator(model, tokenizer, args.eval_type, decoding, counts=counts, gpt2_words=args.gpt2_ppl)
    together = args.sharded  # no process has the whole model to go through batches of its own
    return evaluate(evaluator, dataset, max_history=args.max_history, batchsize=args.batchsize, together=together)


def evaluate_in_backend(args: Namespace) -> tuple[list[dict], dict]:
    """Each example's results, and the figures, by ParlAI, which loads the model in an agent of its own."""
    from transfertransfo.evaluation.native import word_counts
    from transfertransfo.evaluation.parlai_backend import check_installed, evaluate_in_parlai
    from transfertransfo.model.sources import download_pretrained_model, load_tokenizer

    check_installed(args.backend)
    tokenizer = load_tokenizer(args.model_checkpoint or download_pretrained_model(), args.gpt_tokenization)
    dataset = load_split(args, tokenizer)
    counts = partial(word_counts, dataset, args.dict_file)
    own_data = Path(args.dataset_path) if args.datapath else None
    return evaluate_in_parlai(args.backend, dataset, counts, vars(args), own_data=own_data)


def write_output(flag: str, path: str, content: str) -> None:
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error


if __name__ == "__main__":
    run_script(run)
