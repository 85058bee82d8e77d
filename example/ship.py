"""Copy a run folder's model in float16, which is half the size, to the folder that it is shipped in.

    python example/ship.py runs/NAME FOLDER
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")


def ship(run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (run / name).exists():
            shutil.copy(run / name, folder)
    for weights in run.glob("*.safetensors"):
        halved = {name: tensor.half() for name, tensor in load_file(weights).items()}
        save_file(halved, folder / weights.name, metadata={"format": "pt"})


if __name__ == "__main__":
    ship(*map(Path, sys.argv[1:]))
