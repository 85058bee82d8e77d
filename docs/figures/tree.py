"""Make docs/figures/tree.svg: two turns of a dialog with two candidates each as the row the model reads, and its mask.

python docs/figures/tree.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from transfertransfo.data.inputs import make_examples, make_fork  # noqa: E402
from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, tokenize  # noqa: E402
from transfertransfo.data.trees import Batch, pack  # noqa: E402
from transfertransfo.model.sources import load_tokenizer  # noqa: E402

COLOURS = ["#f6e3c5", "#d5ead1"]  # of the first turn and of the second; what both share is of the context's colour
CONTEXT = "#dce6f2"
matplotlib.rcParams |= {"svg.hashsalt": "tree", "font.size": 8}


def make_batch() -> tuple[Batch, list[str]]:
    """A row, and its tokens as text."""
    tokenizer = load_tokenizer(ROOT / "example" / "model")
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    persona, hi, no, yes, name, rex = tokenize(
        tokenizer, ["i like dogs .", "any pets ?", "no , i cook .", "yes !", "a name ?", "yes , rex ."]
    )
    turns = [
        {"history": [hi], "candidates": [no, yes]},
        {"history": [hi, yes, name], "candidates": [no, rex]},
    ]
    examples = make_examples([{"personality": [persona], "utterances": turns}], -1, 512)
    batch = pack([make_fork(example, tokenizer) for example in examples], tokenizer.pad_token_id, sizes=[2])
    tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    return batch, [token.replace("</w>", "") for token in tokens]


def draw_row(axes: Axes, batch: Batch, tokens: list[str]) -> None:
    """Tokens, types, positions, ends and labels, a column a token."""
    ids = batch.input_ids[0].tolist()
    labels = [""] * len(tokens)
    for place, label in zip(batch.lm_positions.tolist(), batch.lm_labels.tolist()):
        labels[place] += "\n" * bool(labels[place]) + tokens[ids.index(label)]
    types = [tokens[ids.index(kind)] for kind in batch.token_type_ids[0].tolist()]
    rows = {
        "token": tokens, "type": types, "position": batch.position_ids[0].tolist(), "end": batch.ends[0].tolist(),
        "to predict": labels,
    }  # fmt: skip
    cells = [[str(value) for value in row] for row in rows.values()]
    colours = [[colour(batch, column) for column in range(len(tokens))] for _ in rows]
    table = axes.table(cells, cellColours=colours, rowLabels=list(rows), loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (row, column), cell in table.get_celld().items():
        cell.set(edgecolor="white", height=0.34 if row < 2 else 0.12)
        if row < 2 or row == len(rows) - 1:
            cell.get_text().set_rotation(90 if column >= 0 else 0)
        if row == len(rows) - 1:
            cell.set_height(0.3)
    axes.axis("off")


def colour(batch: Batch, column: int) -> str:
    """By the turns whose candidates go on from a token."""
    last = batch.last_positions
    turns = ((last >= column) & (last < batch.ends[0, column])).any(1).tolist()
    return CONTEXT if all(turns) else COLOURS[turns.index(True)]


def draw_mask(axes: Axes, batch: Batch, tokens: list[str]) -> None:
    """Which token (row) sees which (column)."""
    axes.imshow(batch.attention_mask()[0, 0], cmap="Blues", vmin=0, vmax=1.6)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    axes.set_yticks(range(len(tokens)), tokens)
    axes.set_title("each token (row) sees the blue ones")
    axes.tick_params(length=0)


def main() -> None:
    batch, tokens = make_batch()
    figure, (above, below) = pyplot.subplots(2, figsize=(10, 9.4), height_ratios=(1, 2.2), layout="constrained")
    draw_row(above, batch, tokens)
    draw_mask(below, batch, tokens)
    figure.savefig(ROOT / "docs" / "figures" / "tree.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
