"""Make docs/figures/chat.svg, the picture of a chat, from what interact.py really prints.

python docs/figures/chat.py                                    # with example/smollm2, as `make chat`
python docs/figures/chat.py runs/Nov21_20-57-01_host_model
"""

import argparse
import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent.parent
LINES = [
    "hello , how are you today ?",
    "what do you do for a living ?",
    "/set num_samples 6",
    "/set rank on",
    "do you have any pets ?",
    "/candidates",
    "/hisotry",
    "/quit",
]
FLAGS = [
    "--preset",
    "original",
    "--personality",
    "i work as a nurse .",
    "i have two dogs .",
    "i love to cook .",
    "--seed",
    "7",
]


def session(checkpoint: str) -> list[str]:
    """The lines that a chat prints."""
    command = [sys.executable, str(ROOT / "interact.py"), "--model_checkpoint", checkpoint, *FLAGS]
    typed = "".join(f"{line}\n" for line in LINES)
    return subprocess.run(command, input=typed, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/figures/chat.svg from a chat with a trained model.")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=str(ROOT / "example" / "smollm2"),
        help="run folder of train.py (not given = example/smollm2)",
    )
    console = Console(record=True, width=90, file=io.StringIO())
    style = "yellow"  # of the persona
    for line in session(parser.parse_args().checkpoint):
        if line.startswith(">>> "):
            console.print(Text(line, style="bold"))
            style = "bright_black" if line.startswith(">>> /") else "cyan"
        else:
            console.print(Text(line, style=style))
    console.save_svg(str(ROOT / "docs" / "figures" / "chat.svg"), title="python interact.py")


if __name__ == "__main__":
    main()
