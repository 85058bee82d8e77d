"""Write each training dialog of a dataset as one text, for a first stage of plain language modelling.

    python example/whole_dialogs.py DATASET FILE.jsonl

A text is the persona and then every turn of both speakers. FILE.jsonl holds it as a dialog of one reply, which train.py
takes with `--num_candidates 1`. Its one distractor is a full stop: where there is none, 19 texts would be drawn.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cli import ArgumentParser, UserError, run_script
from dialogs import read_dialogs
from files import write_atomically
from utils import locate_dataset


def whole_text(dialog: dict) -> str:
    last = dialog["utterances"][-1]
    return " ".join([*dialog["personality"], *last["history"], last["candidates"][-1]])


def main() -> None:
    parser = ArgumentParser("Write each training dialog of a dataset as one text.")
    parser.add_argument("dataset", help="dataset: a file, a folder or a URL")
    parser.add_argument("file", type=Path, help="file to write, FILE.jsonl")
    args = parser.parse_args()
    dialogs = read_dialogs(locate_dataset(args.dataset)).get("train")
    if not dialogs:
        raise UserError(f"{args.dataset}: no train split")
    turns = ({"history": [], "candidates": [".", whole_text(dialog)]} for dialog in dialogs)
    write_atomically(args.file, "".join(json.dumps({"utterances": [turn]}) + "\n" for turn in turns))


if __name__ == "__main__":
    run_script(main)
