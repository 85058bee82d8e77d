"""Make docs/figures/curves.svg, training and validation curves of runs, from their metrics.jsonl.

python docs/figures/curves.py runs/Nov21_20-57-01_host_model [RUN ...]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

ROOT = Path(__file__).parent.parent.parent
SMOOTHING = 20  # logged steps of a running mean
matplotlib.rcParams |= {"svg.hashsalt": "curves", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def read_figures(run: Path) -> tuple[list[dict], list[dict]]:
    """Of a run's logged steps, and of its validations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "split" not in line], [line for line in lines if "split" in line]


def smooth(values: list[float]) -> list[float]:
    """Means of each value and those before it, up to `SMOOTHING` of them."""
    windows = [values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/figures/curves.svg from runs of train.py.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of train.py")
    parser.add_argument("--out", default=ROOT / "docs" / "figures" / "curves.svg", type=Path, help="file to write")
    args = parser.parse_args()
    figure, (language, choice) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    hits = choice.twinx()
    for number, run in enumerate(args.runs):
        steps, validations = read_figures(run)
        label = run.name if len(args.runs) > 1 else None
        line = {"color": f"C{number}"}
        at, when = [row["step"] for row in steps], [row["step"] for row in validations]
        language.plot(at, smooth([row["lm_loss"] for row in steps]), **line, alpha=0.5, label=label)
        language.plot(when, [row["nll"] for row in validations], "o-", **line)
        choice.plot(at, smooth([row["mc_loss"] for row in steps]), **line, alpha=0.5)
        hits.plot(when, [100 * row["accuracy"] for row in validations], "o-", **line)
    language.set(xlabel="optimizer step", ylabel="nats a token", title="Language model: training, validation (dots)")
    choice.set(xlabel="optimizer step", ylabel="nats", title="Choice: training loss, validation hits@1 (dots)")
    hits.set(ylabel="hits@1, %", ylim=(0, 100))
    if len(args.runs) > 1:
        language.legend(frameon=False)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
