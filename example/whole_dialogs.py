"""Write each training dialog of a dataset as one text, for a first stage of plain language modelling.

python example/whole_dialogs.py DATASET FILE.jsonl --permutations 3

A text is the persona and then every turn of both speakers; each dialog gives as many texts as are asked for, one after
another, its persona rotated by one sentence each time. FILE.jsonl holds it as a dialog of one reply, which train.py
takes with `--num_candidates 1`. Its one distractor is a full stop: where there is none, 19 texts would be drawn.
"""

import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from transfertransfo.cli import ArgumentParser, number, run_script
from transfertransfo.data.dataset import read_training_dialogs
from transfertransfo.files import write_atomically


def whole_texts(dialog: dict, permutations: int) -> Iterator[str]:
    persona, last = dialog["personality"], dialog["utterances"][-1]
    for _ in range(permutations):
        yield " ".join([*persona, *last["history"], last["candidates"][-1]])
        persona = persona[-1:] + persona[:-1]


def main() -> None:
    parser = ArgumentParser("Write each training dialog of a dataset as one text.")
    parser.add_argument("dataset", help="dataset: a file, a folder or a URL")
    parser.add_argument("file", type=Path, help="file to write, FILE.jsonl")
    parser.add_argument("--permutations", type=number(int, 1), default=1, help="texts of each dialog")
    args = parser.parse_args()
    dialogs = read_training_dialogs(args.dataset)
    texts = chain.from_iterable(whole_texts(dialog, args.permutations) for dialog in dialogs)
    turns = ({"history": [], "candidates": [".", text]} for text in texts)
    write_atomically(args.file, "".join(json.dumps({"utterances": [turn]}) + "\n" for turn in turns))


if __name__ == "__main__":
    run_script(main)
