"""Training in two processes of one thread each, and in one: how much of the second core arrives."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import figure
from benchmarks.setting import Setting

ROOT = Path(__file__).parent.parent
LAYERS, WIDTH = 4, 256  # a step of two processes sends all gradients once: enough work that this is not all there is
WARM_UP = 2  # optimizer steps
TWO = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def distributed(setting: Setting) -> Iterator[dict]:
    """Both with the default flags, so that a process sees 8 batches of 4 dialog turns between two steps."""
    flags = prepare(setting)
    speeds = [[examples_per_second(launcher, flags, setting.folder) for launcher in ([], TWO)]
              for _ in range(setting.sizes.repetitions)]  # fmt: skip
    one, two = map(statistics.median, zip(*speeds))
    ratios = [b / a for a, b in speeds]
    yield figure("two processes over one, a thread each", two / one, ">= 1.8", one=one, two=two, lowest=min(ratios),
                 highest=max(ratios), repetitions=len(speeds))  # fmt: skip


def prepare(setting: Setting) -> list[str]:
    """Write a model without weights and a dataset without validation; train.py's flags for them."""
    model = Path(shutil.copytree(setting.tokenizer_path, setting.folder / "distributed", dirs_exist_ok=True))
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    config = json.loads((model / "config.json").read_text())
    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": WIDTH // 64}
    (model / "config.json").write_text(json.dumps(config | shape))
    dialogs = json.loads(Path(setting.path).read_text())["train"][:60]
    (model / "dialogs.json").write_text(json.dumps({"train": dialogs}))
    return ["--model", str(model), "--dataset_path", str(model / "dialogs.json"), "--dataset_cache",
            str(model / "cache.bin"), "--n_epochs", "2", "--log_every", "1", "--gpt_tokenization", "basic"]  # fmt: skip


def examples_per_second(launcher: list[str], flags: list[str], folder: Path, device: str = "cpu") -> float:
    """Of all processes together: the median of a run's steps."""
    with tempfile.TemporaryDirectory(dir=folder) as cwd:
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *flags, "--device", device]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        (metrics,) = Path(cwd).glob("runs/*/metrics.jsonl")
        speeds = [json.loads(line)["examples_per_second"] for line in metrics.read_text().splitlines()]
    return statistics.median(speeds[WARM_UP:])
