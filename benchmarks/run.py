"""Measure every speed claim against the plain recipe, in one run: a table, and one JSON line a figure.

python benchmarks/run.py                     # all, GPT's shape; under 15 minutes on two quiet cores
python benchmarks/run.py --quick             # all, a tiny shape: does it run? its ratios mean nothing
python benchmarks/run.py training hits@1 --dataset_path personachat.json --tokenizer openai-gpt
"""

import json
import os
import platform
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.bench_chat import chat  # noqa: E402
from benchmarks.bench_data import data, scaling  # noqa: E402
from benchmarks.bench_distributed import distributed  # noqa: E402
from benchmarks.bench_evaluation import f1, f1_gold_lengths, hits, small_word_ppl, word_ppl  # noqa: E402
from benchmarks.bench_training import candidates, training  # noqa: E402
from benchmarks.bench_trees import dialog_evaluation, dialog_memory, dialogs  # noqa: E402
from benchmarks.measure import format_row, json_line  # noqa: E402
from benchmarks.setting import FULL, QUICK, Setting  # noqa: E402
from transfertransfo.cli import ArgumentParser, number, run_script  # noqa: E402
from transfertransfo.errors import UserError  # noqa: E402

BENCHMARKS: dict[str, Callable[[Setting], Iterator[dict]]] = {
    "data": data,
    "scaling": scaling,
    "training": training,
    "candidates": candidates,
    "dialogs": dialogs,
    "dialogs-memory": dialog_memory,
    "dialogs-evaluation": dialog_evaluation,
    "distributed": distributed,
    "hits@1": hits,
    "ppl": word_ppl,
    "ppl-small": small_word_ppl,
    "f1": f1,
    "f1-gold": f1_gold_lengths,
    "chat": chat,
}


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser("Measure every speed claim against the plain recipe, in one run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)} (none = all)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, once: does it run?")
    parser.add_argument("--dataset_path", default=str(ROOT / "example" / "personachat.json"), help="as for train.py")
    parser.add_argument(
        "--tokenizer",
        default=str(ROOT / "example" / "model"),
        help="folder of a GPT tokenizer and its config.json; the model's vocabulary is GPT's",
    )
    parser.add_argument("--threads", type=number(int, 1), default=len(os.sched_getaffinity(0)), help="torch's threads")
    parser.add_argument("--repetitions", type=number(int, 1), help="of each measurement (unset = 3; with --quick 1)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in BENCHMARKS]:
        raise UserError(f"{', '.join(unknown)}: no such benchmark; known: {', '.join(BENCHMARKS)}")
    return args


def machine() -> dict:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the benchmarks; returns their figures."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    figures = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        sizes = QUICK if args.quick else FULL
        sizes = sizes._replace(repetitions=args.repetitions or sizes.repetitions)
        setting = Setting(args.dataset_path, args.tokenizer, Path(folder), sizes)
        print(json.dumps(machine() | {"dataset": args.dataset_path, "sizes": setting.sizes}))
        print(f"{'benchmark':<46} {'figure':>16} {'goal':>8} {'':6} {'reference':>11} {'ours':>11}  of one repetition")
        for name in args.names or BENCHMARKS:
            start = time.perf_counter()
            for row in BENCHMARKS[name](setting):
                figures.append(row)
                print(format_row(row), flush=True)
            print(f"  ({name}: {time.perf_counter() - start:.0f} s)", file=sys.stderr)
    print(*map(json_line, figures), sep="\n")
    return figures


if __name__ == "__main__":
    run_script(main)
