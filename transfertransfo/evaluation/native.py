"""The evaluation by this project alone: each example's results and the figures of the validation split."""

import logging
import math
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.dataset import TokenizedDataset, load_dataset
from transfertransfo.data.inputs import fit, tell_of_cut, window
from transfertransfo.errors import SettingError
from transfertransfo.evaluation.evaluator import Evaluator, by_length, make_turns, read_dictionary
from transfertransfo.evaluation.metrics import (
    copies,
    count_words,
    distinct_n,
    f1,
    hit,
    mean_error,
    nll,
    normalize,
    perplexity,
    perplexity_error,
    persona_overlap,
)
from transfertransfo.processes import gather, n_processes, rank

logger = logging.getLogger(__name__)

FEW = 0.5  # share of the words in the dictionary below which their perplexity is that of another text


def evaluate(
    evaluator: Evaluator, dataset: TokenizedDataset, *, max_history: int, batchsize: int, together: bool = False
) -> tuple[list[dict], dict]:
    """Each example's results, and the figures on the validation split.

    Several processes share the batches of one process. Each batch seeds its own draws, so that every process returns
    what one alone would.

    Args:
        together: have all processes go through each batch, as they must where each has a share of the model.
    """
    model = evaluator.model
    tokens, texts = (dataset.dialogs("valid", sentences) for sentences in (dataset.tokens, dataset.texts))
    turns = make_turns(tokens, texts, max_history)
    examples = [turn.example for turn in turns]
    cut = sum(fit(example, model.n_positions, model.history_start) is not example for example in examples)
    tell_of_cut(cut, len(turns), model.n_positions)
    labels = [turn.candidate_texts[-1] for turn in turns]
    details = make_rows(texts, max_history)
    batches = list(by_length(turns, batchsize, evaluator.measured))
    results: dict[int, dict] = {}
    seed = gather(torch.initial_seed())[0]  # with a seed of its own each process would draw otherwise
    first, step = (0, 1) if together else (rank(), n_processes())
    hidden = True if rank() else None  # None = shown on a terminal only
    with tqdm(total=len(turns), desc=evaluator.measured, unit=" examples", disable=hidden) as bar:
        for number in range(first, len(batches), step):
            torch.manual_seed((seed + number) % 2**63)
            indices = batches[number]
            results.update(zip(indices, evaluator([turns[i] for i in indices])))
            bar.update(sum(map(len, batches[number : number + step])))
    for share in [results] if together else gather(results):
        for i, result in share.items():
            add_result_(details[i], result, labels[i])
    figures = {}
    if "ranking" in details[0]:
        hits = [hit(row["ranking"], turn.candidate_texts, label) for row, turn, label in zip(details, turns, labels)]
        figures["hits@1"] = sum(hits) / len(hits)
    if "words" in details[0]:
        scored = [p for row in details for _, p in row["words"] if p is not None]
        figures["ppl"] = perplexity(math.fsum(map(nll, scored)), len(scored))
    if "reply" in details[0]:
        figures["f1"] = sum(row["f1"] for row in details) / len(details)
    return details, figures


def make_rows(dialogs: list[dict], max_history: int) -> list[dict]:
    """A row for each example of a split's dialogs of text, to which its results are added.

    "index"; "persona"; "history" as far as the model is given it; "candidates"; "gold", the right one of these.
    """
    rows: list[dict] = []
    for dialog in dialogs:
        for utterance in dialog["utterances"]:
            history, candidates = window(utterance["history"], max_history), utterance["candidates"]
            shown = {"history": history, "candidates": candidates, "gold": candidates[-1]}
            rows.append({"index": len(rows), "persona": dialog["personality"]} | shown)
    return rows


def standard_errors(details: list[dict]) -> dict[str, float]:
    """How far each figure would be from another draw of as many examples, by the examples' own spread."""
    errors = {}
    if "ranking" in details[0]:
        errors["hits@1"] = mean_error([hit(row["ranking"], row["candidates"], row["gold"]) for row in details])
    if "words" in details[0]:
        scored = [[p for _, p in row["words"] if p is not None] for row in details]
        nlls = [math.fsum(map(nll, row)) for row in scored]
        errors["ppl"] = perplexity_error(nlls, list(map(len, scored)))
    if "reply" in details[0]:
        errors["f1"] = mean_error([row["f1"] for row in details])
    if "token_nll" in details[0]:
        errors["token_ppl"] = perplexity_error(*zip(*(row["token_nll"] for row in details)))
    return errors


def load_validation(
    tokenizer: PreTrainedTokenizerBase,
    dataset_path: str,
    dataset_cache: str,
    *,
    skip_bad_dialogs: bool,
    valid_share: float | None,
    run: dict,
) -> TokenizedDataset:
    """A dataset that has a validation split, if only one that is held out as in training.

    Args:
        valid_share: share of the training dialogs to hold out where it has none (None = as `run`, on its own dataset).
        run: the arguments of the run that made the model.

    Raises:
        SettingError: it has none.
        UserError: as `load_dataset`.
    """
    dataset = load_dataset(tokenizer, dataset_path, dataset_cache, skip_bad_dialogs)
    if "valid" in dataset.splits:
        return dataset
    held_out = run.get("valid_share", 0.0) if run.get("dataset_digest") == dataset.digest else None
    share = held_out if valid_share is None else valid_share
    if not share:
        raise SettingError(
            f"{dataset_path}: no valid split to evaluate on; a file is one if its name or its folder's says so, as"
            " valid.jsonl; valid_share holds some of the training dialogs out",
            "valid_share",
        )
    if held_out is not None and share > held_out:
        logger.warning("of a share of %g the model was trained on a part: its run held out %g", share, held_out)
    return dataset.hold_out(share)


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
        row["label_words"] = len(normalize(label))


def extra_figures(details: list[dict]) -> dict:
    """The figures that ConvAI2 has not: numbers of candidates and words, perplexity of tokens, distinct n-grams, and
    what replies take from their personas. The gold replies' own stand beside as "gold_..."."""
    report: dict = {}
    if "ranking" in details[0]:
        candidates = [len(row["ranking"]) for row in details]
        report |= {"fewest_candidates": min(candidates), "most_candidates": max(candidates)}
        report["sole_candidates"] = candidates.count(1)
    if "words" in details[0]:
        words = [p for row in details for _, p in row["words"]]
        report |= {"scored_words": len(words) - words.count(None), "unknown_words": words.count(None)}
    if "token_nll" in details[0]:
        losses, tokens = zip(*(row["token_nll"] for row in details))
        report["token_ppl"] = perplexity(math.fsum(losses), sum(tokens))
    if "reply" in details[0]:
        report["label_words"] = sum(row["label_words"] for row in details) / len(details)
        replies = [row["reply"].lower().split() for row in details]
        report |= {f"distinct-{n}": distinct_n(replies, n) for n in (1, 2)}
        personas = [row["persona"] for row in details]
        report |= persona_figures([row["reply"] for row in details], personas)
        of_people = persona_figures([row["gold"] for row in details], personas)
        report |= {f"gold_{key}": value for key, value in of_people.items()}
    return report


def persona_figures(replies: Sequence[str], personas: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over replies: precision, recall and F1 of their persona's content words, and the share that copies it."""
    n = len(replies)
    overlaps = [persona_overlap(reply, persona) for reply, persona in zip(replies, personas)]
    precision, recall, f1_ = (sum(values) / n for values in zip(*overlaps))
    copied = sum(copies(reply, persona) for reply, persona in zip(replies, personas)) / n
    return {"persona_precision": precision, "persona_recall": recall, "persona_f1": f1_, "persona_copies": copied}


def domains(report: dict) -> dict[str, str]:
    """A note on the data behind each figure of a report, to print beside it. Warns where there is little."""
    measured_on = {}
    if "hits@1" in report:
        fewest, most, sole = (report[f"{name}_candidates"] for name in ("fewest", "most", "sole"))
        measured_on["hits@1"] = f"candidates: {most}" if fewest == most else f"candidates: {fewest} to {most}"
        if sole:
            logger.warning("hits@1: %d of %d replies are the only candidate, always a hit", sole, report["examples"])
    if "ppl" in report:
        scored = report["scored_words"]
        words = scored + report["unknown_words"]
        share = scored / max(words, 1)
        measured_on["ppl"] = f"words: {scored} of {words}, {share:.1%}"
        if share < FEW:
            logger.warning(
                "ppl: %d of %d words are not in the dictionary and so do not count; of a language written without"
                " spaces token ppl tells more", report["unknown_words"], words,
            )  # fmt: skip
    if "f1" in report:
        measured_on["f1"] = f"words of a gold reply: {report['label_words']:.1f}"
        if report["label_words"] < 2:
            logger.warning(
                "f1: compares words, of which the gold replies have %.1f; it says nothing of a language that is written"
                " without spaces", report["label_words"],
            )  # fmt: skip
    return measured_on
