"""The evaluation by this project alone: each example's results and the figures of the validation split."""

import logging
import math

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.dataset import TokenizedDataset, load_dataset
from transfertransfo.data.inputs import fit, tell_of_cut
from transfertransfo.errors import UserError
from transfertransfo.evaluation.evaluator import Evaluator, by_length, make_turns, read_dictionary
from transfertransfo.evaluation.metrics import (
    count_words,
    distinct_n,
    f1,
    hit,
    perplexity,
)

logger = logging.getLogger(__name__)


def evaluate(
    evaluator: Evaluator, dataset: TokenizedDataset, *, max_history: int, batchsize: int
) -> tuple[list[dict], dict]:
    """Each example's results, and the figures on the validation split."""
    model = evaluator.model
    tokens, texts = (dataset.dialogs("valid", sentences) for sentences in (dataset.tokens, dataset.texts))
    turns = make_turns(tokens, texts, max_history)
    examples = [turn.example for turn in turns]
    cut = sum(fit(example, model.n_positions, model.history_start) is not example for example in examples)
    tell_of_cut(cut, len(turns), model.n_positions)
    labels = [turn.candidate_texts[-1] for turn in turns]
    details: list[dict] = [{"index": i} for i in range(len(turns))]
    with tqdm(total=len(turns), desc=evaluator.measured, unit=" examples", disable=None) as bar:
        for indices in by_length(turns, batchsize, evaluator.measured):
            for i, result in zip(indices, evaluator([turns[i] for i in indices])):
                add_result_(details[i], result, labels[i])
            bar.update(len(indices))
    figures = {}
    if "ranking" in details[0]:
        hits = [hit(row["ranking"], turn.candidate_texts, label) for row, turn, label in zip(details, turns, labels)]
        figures["hits@1"] = sum(hits) / len(hits)
    if "words" in details[0]:
        scored = [p for row in details for _, p in row["words"] if p is not None]
        figures["ppl"] = perplexity(math.fsum(-math.log(p) if p else math.inf for p in scored), len(scored))
    if "reply" in details[0]:
        figures["f1"] = sum(row["f1"] for row in details) / len(details)
    return details, figures


def load_validation(
    tokenizer: PreTrainedTokenizerBase, dataset_path: str, dataset_cache: str, *, skip_bad_dialogs: bool
) -> TokenizedDataset:
    """A dataset that has a validation split.

    Raises:
        UserError: it has none, or as `load_dataset`.
    """
    dataset = load_dataset(tokenizer, dataset_path, dataset_cache, skip_bad_dialogs)
    if "valid" not in dataset.splits:
        raise UserError(
            f"{dataset_path}: no valid split to evaluate on; a file of one split is valid if its name begins so"
        )
    return dataset


def word_counts(dataset: TokenizedDataset, dict_file: str | None) -> dict[str, int]:
    """The dictionary: that of a file, or the words of the dataset's own texts."""
    if dict_file:
        return read_dictionary(dict_file)
    if "train" not in dataset.splits:
        logger.warning("no train split: the dictionary for ppl has the words of the valid split only")
    return count_words(dataset.all_dialogs(dataset.texts))


def add_result_(row: dict, result: dict, label: str) -> None:
    """Add an example's results to its row, and the F1 of its reply."""
    row.update(result)
    if "reply" in result:
        row["f1"] = f1(result["reply"], [label])


def extra_figures(details: list[dict]) -> dict:
    """The figures that ConvAI2 has not: counts of words, perplexity of tokens, distinct n-grams of the replies."""
    report: dict = {}
    if "words" in details[0]:
        words = [p for row in details for _, p in row["words"]]
        report |= {"scored_words": len(words) - words.count(None), "unknown_words": words.count(None)}
    if "token_nll" in details[0]:
        losses, tokens = zip(*(row["token_nll"] for row in details))
        report["token_ppl"] = perplexity(math.fsum(losses), sum(tokens))
    if "reply" in details[0]:
        replies = [row["reply"].lower().split() for row in details]
        report |= {f"distinct-{n}": distinct_n(replies, n) for n in (1, 2)}
    return report
