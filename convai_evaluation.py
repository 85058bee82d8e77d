"""Measure a fine-tuned model as ConvAI2 did: hits@1, word perplexity and F1 on the validation split.

    python convai_evaluation.py --eval_type all --model_checkpoint runs/Nov21_20-57-01_host_model
    python convai_evaluation.py --eval_type hits@1     # the model of 2019 on PersonaChat, both downloaded
"""

import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from cli import (
    ArgumentParser,
    UserError,
    add_data_flags,
    add_decoding_flags,
    add_model_flags,
    add_seed_flag,
    number,
    run_script,
    set_seed,
    set_up_logging,
)
from evaluation import Turn, WordScorer, by_length, make_turns, rank_candidates, reply
from metrics import count_words, distinct_n, f1, hit, read_word_counts
from model import load_finetuned
from utils import TokenizedDataset, load_dataset, write_atomically

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Measure a fine-tuned model as ConvAI2 did.")
    parser.add_argument("--eval_type", choices=["hits@1", "ppl", "f1", "all"], default="hits@1", help="what to measure")
    parser.add_argument("--backend", choices=["native"], default="native", help="what does the evaluation")
    add_data_flags(parser)
    add_model_flags(parser, default="")
    add_decoding_flags(parser)
    parser.add_argument("--batchsize", type=number(int, 1), default=16, help="examples of one forward")
    parser.add_argument("--dict_file",
                        help="ParlAI's dictionary for ppl: word, tab, count a line (unset = the dataset's words)")
    parser.add_argument("--gpt2_ppl", choices=["spaced", "original"], default="spaced",
                        help="GPT-2's words for ppl: with the space before them, or without as in the original")
    parser.add_argument("--report", help="file to write the unrounded figures to, as JSON")
    parser.add_argument("--details", help="file to write each example's results to, one JSON object a line")
    add_seed_flag(parser)
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> dict:
    """Evaluate as the command line says; returns the figures, which it prints.

    Raises:
        UserError: input that cannot be used.
    """
    args = parse_args(argv)
    set_up_logging()
    set_seed(args.seed)
    report = evaluate(args)
    for name, key in (("Hits@1", "hits@1"), ("PPL", "ppl"), ("F1", "f1")):
        if key in report:
            print(f"FINAL {name}: {report[key]:.4g}")
    if args.report:
        write_output("--report", args.report, json.dumps(report, indent=2) + "\n")
    return report


def evaluate(args: Namespace) -> dict:
    """The figures of `--eval_type` on the validation split, with the counts behind them."""
    model, tokenizer = load_finetuned(args.model_checkpoint, args.gpt_tokenization, args.device)
    dataset = load_dataset(tokenizer, args.dataset_path, args.dataset_cache)
    if "valid" not in dataset.splits:
        raise UserError(f"{args.dataset_path}: no valid split to evaluate on")
    texts = dataset.dialogs("valid", dataset.texts)
    turns = make_turns(dataset.dialogs("valid", dataset.tokens), texts, args.max_history)
    details = [{"index": i} for i in range(len(turns))]
    report = {"examples": len(turns)}
    if args.eval_type in ("hits@1", "all"):
        fill(details, "ranking", turns, args, lambda batch: rank_candidates(model, tokenizer, batch))
        hits = [hit(row["ranking"], turn.candidate_texts, turn.label) for row, turn in zip(details, turns)]
        report["hits@1"] = sum(hits) / len(hits)
    if args.eval_type in ("ppl", "all"):
        scorer = WordScorer(tokenizer, word_counts(args, dataset), args.gpt2_ppl)
        fill(details, "words", turns, args, lambda batch: scorer.probabilities(model, batch))
        report |= word_perplexity([p for row in details for _, p in row["words"]])
    if args.eval_type in ("f1", "all"):
        fill(details, "reply", turns, args, lambda batch: reply(model, tokenizer, batch, args))
        for row, turn in zip(details, turns):
            row["f1"] = f1(row["reply"], [turn.label])
        report["f1"] = sum(row["f1"] for row in details) / len(details)
        for n in (1, 2):
            report[f"distinct-{n}"] = distinct_n([row["reply"].lower().split() for row in details], n)
    if args.details:
        write_output("--details", args.details, "".join(json.dumps(row) + "\n" for row in details))
    return report


def fill(
    details: list[dict], key: str, turns: Sequence[Turn], args: Namespace, function: Callable[[list[Turn]], list]
) -> None:
    """Set `key` of each turn's details to what `function` gives for it, a batch of like lengths at a time."""
    with tqdm(total=len(turns), desc=key, unit=" examples", disable=None) as bar:
        for indices in by_length(turns, args.batchsize):
            for i, value in zip(indices, function([turns[i] for i in indices])):
                details[i][key] = value
            bar.update(len(indices))


def word_perplexity(probabilities: list[float | None]) -> dict:
    """exp of the mean of -ln p over the words that the dictionary has, and how many it has and has not."""
    scored = [p for p in probabilities if p is not None]
    nll = math.fsum(-math.log(p) if p else math.inf for p in scored)
    return {
        "ppl": math.exp(nll / len(scored)) if scored else math.nan,
        "scored_words": len(scored),
        "unknown_words": len(probabilities) - len(scored),
    }


def word_counts(args: Namespace, dataset: TokenizedDataset) -> dict[str, int]:
    """The dictionary: `--dict_file`, or the words of the dataset's own texts."""
    if not args.dict_file:
        if "train" not in dataset.splits:
            logger.warning("no train split: the dictionary for ppl has the words of the valid split only")
        return count_words({split: dataset.dialogs(split, dataset.texts) for split in dataset.splits})
    try:
        return read_word_counts(args.dict_file)
    except OSError as error:
        raise UserError(f"--dict_file {args.dict_file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--dict_file {error}") from error


def write_output(flag: str, path: str, content: str) -> None:
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error


if __name__ == "__main__":
    run_script(run)
