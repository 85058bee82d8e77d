"""Put several checkpoints beside one another: figures of the validation split and replies, or replies to questions.

python example/compare.py example/model example/smollm2 --dataset_path example/personachat.json
python example/compare.py example/smollm2 runs/NAME --dataset_path example/character.jsonl --valid_share 0.1
python example/compare.py example/smollm2 runs/NAME --questions example/character_questions.txt \\
    --dataset_path example/character.jsonl --html replies.html

The table goes to stdout in Markdown, and with --html to a page. Replies are the likeliest ones (--no_sample) unless
flags say otherwise.
"""

import html
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from transfertransfo.cli import (
    DATASET_CACHE,
    ArgumentParser,
    add_decoding_flags,
    add_seed_flag,
    check_output,
    device,
    number,
    run_script,
    set_seed,
    set_up_logging,
)
from transfertransfo.errors import UserError, flags_named
from transfertransfo.files import write_atomically

FIGURES = {"hits@1": "hits@1", "ppl": "word ppl", "f1": "F1", "token_ppl": "token ppl", "distinct-2": "distinct-2"}
Table = list[list[str]]  # rows of cells, the head first


def compare_figures(args: Namespace) -> tuple[Table, Table]:
    """Tables of the checkpoints' figures on the validation split, and of their replies to its first examples."""
    from transfertransfo.data.sources import recorded
    from transfertransfo.decoding import Decoding
    from transfertransfo.evaluation.evaluator import Evaluator
    from transfertransfo.evaluation.native import (
        evaluate,
        extra_figures,
        load_validation,
        standard_errors,
        word_counts,
    )
    from transfertransfo.model.loading import load_finetuned

    figures: Table = [["checkpoint", "examples", *FIGURES.values()]]
    asked: list[dict] = []
    replies = []
    for checkpoint in args.checkpoints:
        set_seed(args.seed)
        model, tokenizer = load_finetuned(checkpoint, device=args.device)
        dataset = load_validation(
            tokenizer, args.dataset_path, args.dataset_cache, skip_bad_dialogs=False, valid_share=args.valid_share,
            run=recorded(checkpoint),
        )  # fmt: skip
        counts = partial(word_counts, dataset, None)
        evaluator = Evaluator(model, tokenizer, "all", Decoding.of(args), counts=counts)
        asked, found = evaluate(evaluator, dataset, max_history=2, batchsize=16)
        found |= extra_figures(asked)
        errors = standard_errors(asked)
        cells = [
            f"{found[key]:.4g}" + (f" ± {errors[key]:.2g}" if key in errors else "") for key in FIGURES if key in found
        ]
        figures.append([checkpoint, str(len(asked)), *cells])
        replies.append([row["reply"] for row in asked])
    head = ["persona", "said last", *args.checkpoints, "the right reply"]
    rows = list(zip(asked, zip(*replies)))[: args.replies]
    beside = [[" ".join(row["persona"]), (row["history"] or [""])[-1], *said, row["gold"]] for row, said in rows]
    return figures, [head, *beside]


def compare_answers(args: Namespace) -> Table:
    """A table of the checkpoints' replies to the lines of a file, each checkpoint in a chat of its own."""
    from transfertransfo.chat.conversation import Chat
    from transfertransfo.data.dataset import locate_dataset
    from transfertransfo.data.personas import draw_persona
    from transfertransfo.decoding import Decoding
    from transfertransfo.model.loading import load_finetuned

    questions = read_lines("--questions", args.questions)
    persona = args.personality or read_lines("--personality_file", args.personality_file)
    if not persona and args.dataset_path:
        persona = draw_persona(locate_dataset(args.dataset_path))
    replies = []
    for checkpoint in args.checkpoints:
        set_seed(args.seed)
        model, tokenizer = load_finetuned(checkpoint, device=args.device)
        chat = Chat(model, tokenizer, Decoding.of(args), 2, persona, lambda: persona, lambda _: None)
        replies.append(["".join(chat.say(question)) for question in questions])
    return [["said", *args.checkpoints], *map(list, zip(questions, *replies))]


def read_lines(flag: str, path: str | None) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeError) as error:
        raise UserError(f"{flag} {path}: {getattr(error, 'strerror', None) or 'no UTF-8 text'}") from error


def as_markdown(table: Table) -> str:
    head, *rows = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in table]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def as_html(table: Table) -> str:
    rows = []
    for i, row in enumerate(table):
        kind = "td" if i else "th"
        rows.append("<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>\n")
    return f"<table>\n{''.join(rows)}</table>\n"


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Checkpoints beside one another</title>
<style>
body {{ font-family: sans-serif }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ border: 1px solid #bbb; padding: .3em .6em; text-align: left; vertical-align: top }}
</style>
{}"""


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Put several checkpoints beside one another.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="run folders, or what else --model takes")
    parser.add_argument(
        "--dataset_path",
        default="",
        help="dataset whose validation split is measured; with --questions a persona is drawn from it",
    )
    parser.add_argument("--dataset_cache", default=DATASET_CACHE, help="as in convai_evaluation.py")
    parser.add_argument(
        "--valid_share",
        type=number(float, 0, 0.9),
        default=0.0,
        help="share of the training dialogs to measure on where the dataset has no valid split (0 = off)",
    )
    parser.add_argument("--replies", type=number(int, 0), default=20, help="examples of that split shown with replies")
    parser.add_argument("--questions", help="file of lines to say to each checkpoint instead")
    parser.add_argument(
        "--personality", nargs="+", metavar="SENTENCE", help="the persona for --questions (unset = one of the dataset)"
    )
    parser.add_argument("--personality_file", help="the same, a sentence a line")
    parser.add_argument("--html", metavar="FILE", help="page to write the tables to")
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (unset = cuda if there)")
    add_decoding_flags(parser)
    add_seed_flag(parser)
    parser.set_defaults(no_sample=True)
    args = parser.parse_args(argv)
    if args.num_samples > 1:
        args.no_sample = False
    return args


@flags_named()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not (args.questions or args.dataset_path):
        raise UserError("--questions or --dataset_path: give one of the two")
    check_output("--html", args.html)
    set_up_logging()
    tables = [compare_answers(args)] if args.questions else compare_figures(args)
    print("\n".join(map(as_markdown, tables)), end="")
    if args.html:
        try:
            write_atomically(Path(args.html), PAGE.format("".join(map(as_html, tables))))
        except OSError as error:
            raise UserError(f"--html {args.html}: {error.strerror}") from error


if __name__ == "__main__":
    run_script(main)
