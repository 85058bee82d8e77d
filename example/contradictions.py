"""Does a model prefer what agrees with its persona over the contrary? By its own two heads, on sentences of personas.

    python example/contradictions.py example/model --dataset_path example/personachat.json

Each sentence of the validation split's personas that a rule can turn into its contrary is given as a reply to
`tell me about yourself .`, and so is the contrary. The choice head's scores of the two are compared, and the language
model's mean log-probabilities of their tokens.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from transfertransfo.cli import DATASET_CACHE, ArgumentParser, device, number, run_script, set_up_logging
from transfertransfo.errors import UserError, flags_named

QUESTION = "tell me about yourself ."
VERBS = "have|own|play|work|live|drive|eat|want|collect|teach|sing|dance|cook|read|swim|run|study|attend"
# How a sentence begins, and how its contrary does. The first one that fits is taken.
OF_NEGATIVE = [
    (r"i (?:do not|don't) (\w+)", r"i \1"),
    (r"i (?:hate|dislike)", "i love"),
    (r"i(?: am|'m) not", "i am"),
    (r"i (?:cannot|can't|can not)", "i can"),
    (r"(my(?: \w+){1,3} (?:is|are)) not", r"\1"),
]
OF_POSITIVE = [
    (r"i (?:like|love|enjoy|adore)", "i hate"),
    (r"i(?: am|'m)", "i am not"),
    (r"i can", "i cannot"),
    (rf"i ({VERBS})", r"i do not \1"),
    (r"(my(?: \w+){1,3} (?:is|are))", r"\1 not"),
]
BATCH = 16


def contrary(sentence: str, rules: Sequence[tuple[str, str]]) -> str | None:
    """The sentence's contrary by the first rule that fits; None where none does."""
    for pattern, replacement in rules:
        found, count = re.subn(rf"^{pattern}\b", replacement, sentence)
        if count:
            return found
    return None


def make_cases(dialogs: Sequence[dict]) -> dict[str, list[tuple[list[str], str, str]]]:
    """Persona, sentence and contrary of each distinct sentence, by what the sentence is."""
    cases: dict[str, dict[str, tuple[list[str], str, str]]] = {"positive": {}, "negative": {}}
    for dialog in dialogs:
        for sentence in dialog["personality"]:
            for kind, rules in (("negative", OF_NEGATIVE), ("positive", OF_POSITIVE)):
                if other := contrary(sentence, rules):
                    cases[kind].setdefault(sentence, (dialog["personality"], sentence, other))
                    break
    return {kind: list(found.values()) for kind, found in cases.items()}


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Does a model prefer what agrees with its persona over the contrary?")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, or what else --model takes")
    parser.add_argument("--dataset_path", default="", help="dataset whose validation split has the personas")
    parser.add_argument("--dataset_cache", default=DATASET_CACHE, help="as in convai_evaluation.py")
    parser.add_argument("--count", type=number(int, 1), default=500, help="sentences of each kind at most")
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (unset = cuda if there)")
    return parser.parse_args(argv)


@flags_named()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from transfertransfo.data.dataset import load_dataset
    from transfertransfo.data.inputs import Example
    from transfertransfo.data.tokenization import tokenize
    from transfertransfo.model.loading import load_finetuned
    from transfertransfo.ranking import weigh_candidates

    set_up_logging()
    model, tokenizer = load_finetuned(args.checkpoint, device=args.device)
    dataset = load_dataset(tokenizer, args.dataset_path, args.dataset_cache, skip_bad_dialogs=False)
    if "valid" not in dataset.splits:
        raise UserError(f"{args.dataset_path}: no valid split")
    (question,) = tokenize(tokenizer, [QUESTION])
    print(f"{'persona says':16} {'sentences':>9} {'choice head':>12} {'language model':>15}")
    for kind, found in make_cases(dataset.dialogs("valid", dataset.texts)).items():
        cases = found[: args.count]
        right_scores = right_log_ps = 0
        for start in range(0, len(cases), BATCH):
            part = cases[start : start + BATCH]
            examples = [
                Example(tokenize(tokenizer, persona), [question], tokenize(tokenizer, [sentence, other]))
                for persona, sentence, other in part
            ]
            for (agrees, contradicts), example in zip(weigh_candidates(model, tokenizer, examples), examples):
                lengths = [len(ids) + 1 for ids in example.candidates]  # with <eos>
                right_scores += agrees.score > contradicts.score
                right_log_ps += agrees.log_p / lengths[0] > contradicts.log_p / lengths[1]
        n = max(len(cases), 1)
        print(f"{kind:16} {len(cases):9} {right_scores / n:12.3f} {right_log_ps / n:15.3f}")


if __name__ == "__main__":
    run_script(main)
