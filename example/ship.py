"""Copy a run folder's model in float16, which is half the size, to the folder that it is shipped in.

python example/ship.py runs/NAME FOLDER

A chat with it draws its persona from the example's dialogs: those that it was trained on are not shipped.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from transfertransfo.cli import ArgumentParser, run_script
from transfertransfo.errors import UserError
from transfertransfo.training.runs import ARGUMENTS

FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")


def ship(run: Path, folder: Path) -> None:
    weights = next(run.glob("*model.safetensors"), None)
    if weights is None:
        raise UserError(f"{run}: no model.safetensors or adapter_model.safetensors there")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (run / name).exists():
            shutil.copy(run / name, folder)
    halved = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halved, folder / weights.name, metadata={"format": "pt"})
    (folder / ARGUMENTS).write_text(json.dumps({"dataset_path": "example/personachat.json"}) + "\n")


def main() -> None:
    parser = ArgumentParser("Copy a run folder's model in float16.")
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("folder", type=Path, help="folder to copy it to")
    args = parser.parse_args()
    ship(args.run, args.folder)


if __name__ == "__main__":
    run_script(main)
