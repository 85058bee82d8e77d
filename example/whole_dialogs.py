"""Write each training dialog of a dataset as one text, for a first stage of plain language modelling.

    python example/whole_dialogs.py DATASET FILE.jsonl

A text is the persona and then every turn of both speakers. FILE.jsonl holds it as a dialog of one reply, which train.py
takes with `--num_candidates 1`. Its one distractor is a full stop: where there is none, 19 texts would be drawn.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from dialogs import read_dialogs
from files import write_atomically
from utils import locate_dataset


def whole_text(dialog: dict) -> str:
    last = dialog["utterances"][-1]
    return " ".join([*dialog["personality"], *last["history"], last["candidates"][-1]])


if __name__ == "__main__":
    dataset, path = sys.argv[1:]
    texts = map(whole_text, read_dialogs(locate_dataset(dataset))["train"])
    lines = [json.dumps({"utterances": [{"history": [], "candidates": [".", text]}]}) + "\n" for text in texts]
    write_atomically(Path(path), "".join(lines))
