"""Make docs/figures/packed_row.svg: a dialog turn with two candidates as the row that the model reads, and its mask.

python docs/figures/packed_row.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from transfertransfo.data.inputs import IGNORED, Batch, Example, make_row, pack  # noqa: E402
from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, tokenize  # noqa: E402
from transfertransfo.model.sources import load_tokenizer  # noqa: E402

COLOURS = ["#dce6f2", "#f6e3c5", "#d5ead1", "#eeeeee"]  # context, candidates, padding
matplotlib.rcParams |= {"svg.hashsalt": "packed row", "font.size": 8}


def make_batch() -> tuple[Batch, list[str]]:
    """A row, and its tokens as text."""
    tokenizer = load_tokenizer(ROOT / "example" / "model")
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    persona, history, wrong, gold = (
        tokenize(tokenizer, [text]) for text in ("i like dogs .", "hi ! any pets ?", "no , i am a cook .", "yes !")
    )
    row = make_row(Example(persona, history, [*wrong, *gold]), tokenizer)
    batch = pack([row], tokenizer.pad_token_id)
    tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    return batch, [token.replace("</w>", "") for token in tokens]


def draw_row(axes: Axes, batch: Batch, tokens: list[str]) -> None:
    """Tokens, types, positions, segments and labels, a column a token."""
    labels = [""] * len(tokens)
    for place, label in zip(batch.lm_positions.tolist(), batch.lm_labels.tolist()):
        if label != IGNORED:
            labels[place] = tokens[batch.input_ids[0].tolist().index(label, place)]
    segments = batch.segment_ids[0].tolist()
    types = [tokens[batch.input_ids[0].tolist().index(kind)] for kind in batch.token_type_ids[0].tolist()]
    rows = {
        "token": tokens, "type": types, "position": batch.position_ids[0].tolist(), "segment": segments,
        "to predict": labels,
    }  # fmt: skip
    cells = [[str(value) for value in row] for row in rows.values()]
    colours = [[COLOURS[segment] for segment in segments] for _ in rows]
    table = axes.table(cells, cellColours=colours, rowLabels=list(rows), loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (row, column), cell in table.get_celld().items():
        cell.set(edgecolor="white", height=0.34 if row < 2 else 0.12)
        if row < 2 or row == len(rows) - 1:
            cell.get_text().set_rotation(90 if column >= 0 else 0)
        if row == len(rows) - 1:
            cell.set_height(0.2)
    axes.axis("off")


def draw_mask(axes: Axes, batch: Batch, tokens: list[str]) -> None:
    """Which token (row) sees which (column)."""
    axes.imshow(batch.attention_mask()[0, 0], cmap="Blues", vmin=0, vmax=1.6)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    axes.set_yticks(range(len(tokens)), tokens)
    axes.set_title("each token (row) sees the blue ones")
    axes.tick_params(length=0)


def main() -> None:
    batch, tokens = make_batch()
    figure, (above, below) = pyplot.subplots(2, figsize=(10, 8.4), height_ratios=(1, 2.2), layout="constrained")
    draw_row(above, batch, tokens)
    draw_mask(below, batch, tokens)
    figure.savefig(ROOT / "docs" / "figures" / "packed_row.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
