"""Make docs/figures/training.svg and character.svg: the README's character in training, its replies before and after.

python docs/figures/character.py                                   # on top of example/smollm2
python docs/figures/character.py runs/Nov21_20-57-01_host_model
"""

import argparse
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parent.parent.parent
FIGURES = ROOT / "docs" / "figures"
EMBEDDED = "example/smollm2"


def commands() -> list[list[str]]:
    """The README's commands that train a character and put it beside what it was, on no page."""
    shell = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(rf"^python ((?:train|example/compare)\.py .*{EMBEDDED} .*)", shell, re.MULTILINE)
    return [shlex.split(line.partition("--html")[0], comments=True) for line in lines]


def run(command: list[str], names: dict[str, str]) -> subprocess.CompletedProcess:
    """A command run from the root, some of its words replaced."""
    argv = [sys.executable, *(names.get(word, word) for word in command)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)


def draw_training(command: list[str], log: list[str]) -> None:
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(Text(f"$ python {shlex.join(command)}", style="bold"))
    for line in log:
        console.print(Text(line, style="yellow" if " WARNING " in line else "cyan" if " -> " in line else ""))
    console.save_svg(str(FIGURES / "training.svg"), title="python train.py")


def draw_replies(rows: list[list[str]]) -> None:
    console = Console(record=True, width=110, file=io.StringIO())
    table = Table("said", "before", "after", show_lines=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.save_svg(str(FIGURES / "character.svg"), title="python example/compare.py")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/figures/training.svg and docs/figures/character.svg.")
    parser.add_argument("checkpoint", nargs="?", default=EMBEDDED, help=f"model to begin with (not given = {EMBEDDED})")
    names = {EMBEDDED: parser.parse_args().checkpoint}
    training, comparison = commands()
    log = run(training, names).stderr.splitlines()
    folder = log[-1].split()[-1]
    draw_training(training, log)
    _, _, *rows = run(comparison, names | {"runs/NAME": folder}).stdout.splitlines()
    draw_replies([row.strip("| ").split(" | ") for row in rows])


if __name__ == "__main__":
    main()
