"""Add a dataset's training dialogs as their other speaker has them, whose persona is not known.

python example/both_sides.py DATASET FILE.json --valid_share 0.03

There the partner's words are the replies to be learnt, without a persona, from the second one on; train.py draws their
distractors. The last dialogs are held out as FILE.json's valid split, as they are.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from transfertransfo.cli import ArgumentParser, number, run_script
from transfertransfo.data.dataset import read_training_dialogs
from transfertransfo.files import write_atomically


def turn_around(dialog: dict) -> dict:
    """The dialog of the other speaker, each of whose histories begins and ends with the persona owner's words."""
    last = dialog["utterances"][-1]
    turns = [*last["history"], last["candidates"][-1]]
    replies = range(2, len(turns), 2)
    return {"personality": [], "utterances": [{"history": turns[1:i], "candidates": [turns[i]]} for i in replies]}


def main() -> None:
    parser = ArgumentParser("Add a dataset's training dialogs as their other speaker has them.")
    parser.add_argument("dataset", help="dataset: a file, a folder or a URL")
    parser.add_argument("file", type=Path, help="file to write, FILE.json")
    parser.add_argument(
        "--valid_share",
        type=number(float, 0, 0.9),
        default=0.0,
        help="share of the training dialogs held out, the last ones",
    )
    args = parser.parse_args()
    dialogs = read_training_dialogs(args.dataset)
    end = len(dialogs) - round(len(dialogs) * args.valid_share)
    turned = [other for dialog in dialogs[:end] if (other := turn_around(dialog))["utterances"]]
    splits = {"train": turned + dialogs[:end], "valid": dialogs[end:]}
    write_atomically(args.file, json.dumps({name: split for name, split in splits.items() if split}))


if __name__ == "__main__":
    run_script(main)
