"""Measure a fine-tuned model as ConvAI2 did: hits@1, word perplexity and F1 on the validation split.

python convai_evaluation.py --eval_type all --model_checkpoint runs/Nov21_20-57-01_host_model
python convai_evaluation.py --eval_type hits@1     # the model of 2019 on PersonaChat, both downloaded
python convai_evaluation.py --eval_type all --backend parlai --model_checkpoint FOLDER     # in ParlAI
python -m parlai eval_model --task convai2 -m convai_evaluation:TransformerAgent --model_checkpoint FOLDER
"""

import json
from argparse import Namespace
from pathlib import Path

from transfertransfo.cli import (
    ArgumentParser,
    add_data_flags,
    add_evaluation_flags,
    number,
    run_script,
    set_seed,
    set_up_logging,
)
from transfertransfo.errors import UserError
from transfertransfo.files import write_atomically


def __getattr__(name: str) -> type:
    """`TransformerAgent`, ParlAI's agent, not imported before it is asked for: it loads ParlAI, where there is one."""
    if name == "TransformerAgent":
        from transfertransfo.evaluation.parlai_agent import TransformerAgent

        return TransformerAgent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Measure a fine-tuned model as ConvAI2 did.")
    add_evaluation_flags(parser)
    parser.add_argument(
        "--backend",
        choices=["native", "parlai", "convai2"],
        default="native",
        help="what does the evaluation: this script, ParlAI, or ConvAI2's own scripts in an old ParlAI",
    )
    add_data_flags(parser)
    parser.add_argument(
        "--datapath", help="ParlAI's data folder, in place of --dataset_path: its ConvAI2 is read, never written"
    )
    parser.add_argument(
        "--batchsize",
        type=number(int, 1),
        default=16,
        help="examples of one forward; ConvAI2's own scripts always take one",
    )
    parser.add_argument("--report", help="file to write the unrounded figures to, as JSON")
    parser.add_argument("--details", help="file to write each example's results to, one JSON object a line")
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> dict:
    """Evaluate as the command line says; returns the figures, which it prints.

    Raises:
        UserError: input that cannot be used.
    """
    args = parse_args(argv)
    for flag, path in (("--report", args.report), ("--details", args.details)):
        if path and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):  # not after an hour's work
            raise UserError(f"{flag} {path}: no file can be written there")
    # torch and transformers take seconds to load: `--help` and a wrong flag are answered without them
    from transfertransfo.evaluation.native import companions, evaluate
    from transfertransfo.evaluation.parlai_backend import evaluate_in_parlai

    set_up_logging()
    set_seed(args.seed)
    if args.datapath:
        use_datapath_(args)
    details, figures = evaluate(args) if args.backend == "native" else evaluate_in_parlai(args)
    report = {"examples": len(details)} | figures | companions(details)
    for name, key in (
        ("FINAL Hits@1", "hits@1"),
        ("FINAL PPL", "ppl"),
        ("FINAL F1", "f1"),
        ("Token PPL", "token_ppl"),
        ("Distinct-1", "distinct-1"),
        ("Distinct-2", "distinct-2"),
    ):
        if key in report:
            print(f"{name}: {report[key]:.4g}")
    if args.report:
        write_output("--report", args.report, json.dumps(report, indent=2) + "\n")
    if args.details:
        write_output("--details", args.details, "".join(json.dumps(row) + "\n" for row in details))
    return report


def use_datapath_(args: Namespace) -> None:
    """Take dataset and dictionary from ParlAI's data folder."""
    folder = Path(args.datapath)
    args.dataset_path = str(folder / "ConvAI2")
    dictionary = folder / "models" / "convai2" / "dict_self"
    if not args.dict_file and dictionary.is_file():
        args.dict_file = str(dictionary)


def write_output(flag: str, path: str, content: str) -> None:
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error


if __name__ == "__main__":
    run_script(run)
