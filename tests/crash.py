"""Kill a training run again and again, resume it each time, and compare it with one that was left alone.

    python tests/crash.py --kills 20        # 20 runs, each killed at a random instant and resumed
    python tests/crash.py --kills 3 --short # what the tests do

A run is killed with -9 at a seeded random moment of its life: while training, validating or saving. It must end with
the same weights, to the bit, and the same figures at every step as the run that nobody killed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMES = ("examples_per_second", "ms_per_step")  # figures that differ from run to run


def start(cwd: Path, flags: list[str]) -> subprocess.Popen:
    cwd.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = open(cwd / "log", "a")  # noqa: SIM115
    command = [sys.executable, str(ROOT / "train.py"), "--resume", "auto", *flags]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def started(cwd: Path) -> bool:
    return any((folder / "metrics.jsonl").exists() for folder in (cwd / "runs").glob("*"))


def result(cwd: Path) -> tuple[bytes, list[dict]]:
    """Weights and figures of the one run that went to its end."""
    folders = [folder for folder in (cwd / "runs").iterdir() if (folder / "model.safetensors").exists()]
    assert len(folders) == 1, f"{cwd}: {len(folders)} run folders with a model"
    leftovers = [file.name for file in folders[0].iterdir() if ".tmp" in file.name or file.name.startswith(".model")]
    if leftovers:
        print(f"  left behind by kills: {leftovers}")
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return (folders[0] / "model.safetensors").read_bytes(), figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="shorter runs")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        example = json.loads((ROOT / "example" / "personachat.json").read_text())
        dialogs = {"train": example["train"][: 3 if args.short else 6], "valid": example["valid"][:2]}
        (top / "dialogs.json").write_text(json.dumps(dialogs))
        flags = ["--dataset_path", str(top / "dialogs.json"), "--dataset_cache", str(top / "cache.bin"),
                 "--model", str(ROOT / "example" / "model"), "--lr", "1e-3", "--n_epochs", "3", "--device", "cpu",
                 "--train_batch_size", "2", "--gradient_accumulation_steps", "3", "--save_every", "1"]  # fmt: skip
        assert start(top / "alone", flags).wait() == 0, (top / "alone" / "log").read_text()[-2000:]
        want = result(top / "alone")
        (metrics,) = (top / "alone" / "runs").glob("*/metrics.jsonl")
        folder_made = (metrics.parent / "training_args.json").stat().st_mtime
        life = (metrics.parent / "model.safetensors").stat().st_mtime - folder_made
        failed = 0
        for kill in range(args.kills):
            cwd = top / str(kill)
            process = start(cwd, flags)
            while not started(cwd) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, life))
            process.kill()
            process.wait()
            (metrics,) = (cwd / "runs").glob("*/metrics.jsonl")
            steps = metrics.read_text().count("\n")
            assert start(cwd, flags).wait() == 0, (cwd / "log").read_text()[-2000:]
            ended = len(list((cwd / "runs").iterdir()))
            same = result(cwd) == want
            failed += not same
            verdict = "equal" if same else "DIFFERENT"
            print(f"kill {kill + 1}: after {steps} lines, {ended} run folders: {verdict}", flush=True)
    print(f"{args.kills - failed} of {args.kills} resumed runs equal the uninterrupted one")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
