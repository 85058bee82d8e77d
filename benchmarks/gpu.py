"""What GPUs have to show, as JSON lines: correctness in each precision, training's speed, the evaluation's, memory.

One GPU does. Where a machine has several, two parts more use all of them.

python benchmarks/gpu.py --dataset_path personachat.json.xz --tokenizer openai-gpt
python benchmarks/gpu.py --dry-run                              # all of it on a CPU with tiny sizes
"""

import contextlib
import copy
import functools
import gc
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.functional import linear  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from benchmarks.bench_distributed import examples_per_second, prepare  # noqa: E402
from benchmarks.bench_training import PackedTraining, PaddedTraining, make_batches  # noqa: E402
from benchmarks.measure import Difference, check_close, figure, json_line  # noqa: E402
from benchmarks.setting import FULL, GPT, QUICK, SMALL, Setting  # noqa: E402
from convai_evaluation import run as evaluate  # noqa: E402
from train import GPU_MULTIPLE  # noqa: E402
from transfertransfo.cli import ArgumentParser, number, run_script  # noqa: E402
from transfertransfo.data.inputs import Example  # noqa: E402
from transfertransfo.model.double_heads import DoubleHeads, add_adapter_, compile_blocks_, halve_frozen_  # noqa: E402
from transfertransfo.model.loading import load_model  # noqa: E402
from transfertransfo.model.quantization import Linear4bit, quantize_, quantized_layers  # noqa: E402
from transfertransfo.model.saving import save_model  # noqa: E402
from transfertransfo.training.memory import estimate_memory  # noqa: E402

TOLERANCE = {"": 1e-4, "bf16": 3e-2, "O1": 5e-3}  # of a loss, relative; half precisions keep 8 and 11 bits
DTYPES = {"": torch.float32, "bf16": torch.bfloat16, "O1": torch.float16}
PAPER = 131_438 * 2  # examples of one epoch of the paper's recipe: two personality permutations
LLAMA: dict[str, Any] = {  # Llama 3.2's of 1B: 0.97e9 weights in its blocks
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
SMALL_LLAMA = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
PARTS = ("matmul", "correctness", "learning", "evaluation", "epoch", "training", "quantized")  # methods of `Bench`
PARTS_OF_SEVERAL = ("shared_evaluation", "sharded")  # which need more than one GPU
PAPER_BATCH = 64  # examples of its optimizer step: 8 GPUs * 2 * 4 accumulated


class Plan(NamedTuple):
    """Sizes and durations, in seconds."""

    batches: tuple[int, ...]
    reference_batch: int
    steady: float  # of each measurement of speed
    epoch: float  # of the steady run that the epoch's time is extrapolated from
    matmul: int
    evaluation_batch: int
    steps: int  # of training in each precision


REAL = Plan((32, 128, 512), 32, steady=3, epoch=20, matmul=8192, evaluation_batch=128, steps=200)
DRY = Plan((2, 4), 2, steady=0.1, epoch=0.2, matmul=256, evaluation_batch=8, steps=10)


class Bench:
    def __init__(self, setting: Setting, plan: Plan, deadline: float):
        self.setting, self.plan, self.deadline = setting, plan, deadline
        self.cuda = setting.device == "cuda"
        self.levels = ("", "bf16", "O1") if self.cuda else ("", "bf16")  # float16 needs a GPU
        self.examples = setting.examples()
        self.peaks: dict[str, float] = {}  # precision -> FLOP/s of a large matrix product

    # ------------------------------------------------------------------------------------------------------ the parts

    def matmul(self) -> Iterator[dict]:
        """The card's own rate in each precision, which utilisation is measured against."""
        size = self.plan.matmul
        for name, dtype, tf32 in (("", torch.float32, False), ("tf32", torch.float32, True),
                                  ("bf16", torch.bfloat16, False)):  # fmt: skip
            a, b = (torch.randn(size, size, device=self.setting.device, dtype=dtype) for _ in range(2))
            with matmul_precision(tf32):
                count, seconds = self.for_seconds(functools.partial(torch.matmul, a, b), min(2.0, self.plan.steady))
            self.peaks[name] = 2 * size**3 * count / seconds
            yield figure(f"matmul, {name or 'float32'}", self.peaks[name] / 1e12, unit="TFLOP/s")

    def correctness(self) -> Iterator[dict]:
        """Packed rows against one sequence a candidate, both under the same autocast, without dropout."""
        batch = make_batches(self.examples, 4, 1)[0]
        packed, padded = PackedTraining(self.setting), PaddedTraining(self.setting, 0)
        packed.model.eval()
        padded.model.eval()
        for level in self.levels:
            with torch.no_grad(), self.autocast(level):
                ours, other = packed.losses(batch), padded.losses(batch)
            for name, a, b in zip(("lm", "choice"), ours.tolist(), other.tolist()):
                check_close(f"{name} loss, {level or 'float32'}", a, b, TOLERANCE[level])
            yield figure(f"correctness, {level or 'float32'}: largest difference of a loss",
                         (ours - other).abs().max().item(), f"<= {10 * TOLERANCE[level]}", "nats")  # fmt: skip

    def training(self) -> Iterator[dict]:
        """Examples a second and utilisation, by precision and batch size; then compiled; then the reference."""
        sizes = self.plan.batches
        runs = [("", False, sizes[0]), ("", True, sizes[0]), *(("bf16", False, size) for size in sizes)]
        speeds: dict[tuple[str, bool, int], float] = {}
        for level, tf32, size in runs:
            speeds[level, tf32, size] = yield from self.speed(level, tf32, size)
        for level, tf32 in (("", False), ("", True), ("bf16", False)):
            theirs = yield from self.reference_speed(level, tf32)
            yield figure(f"training, {precision_name(level, tf32)}", speeds[level, tf32, sizes[0]] / theirs, ">= 10")
        yield from self.speed("bf16", False, sizes[1], compiled=True)

    def reference_speed(self, level: str, tf32: bool) -> Generator[dict, None, float]:
        size = self.plan.reference_batch
        padded = PaddedTraining(self.setting, self.setting.sizes.longest)
        padded.model.train()
        stream = itertools.cycle(make_batches(self.examples, size, 4))
        with self.autocast(level), matmul_precision(tf32):
            count, seconds = self.for_seconds(lambda: padded.step(next(stream)), self.plan.steady)
        yield figure(f"reference, {precision_name(level, tf32)}, batch {size}", size * count / seconds,
                     unit="examples/s")  # fmt: skip
        return size * count / seconds

    def speed(
        self, level: str, tf32: bool, size: int, compiled: bool = False, seconds: float = 0
    ) -> Generator[dict, None, float]:
        """Steps of the project's own trainer on batches of all lengths, packing included."""
        setting = self.setting
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        packed = PackedTraining(setting, level)
        packed.multiple = GPU_MULTIPLE
        if compiled:
            compile_blocks_(setting.model)
        setting.model.train()
        batches = make_batches(self.examples, size, 16)
        stream = itertools.cycle(batches)
        with matmul_precision(tf32):
            for _ in range(2):
                packed.step(next(stream))
            with self.no_waiting():
                packed.step(next(stream))
            count, took = self.for_seconds(lambda: packed.step(next(stream)), seconds or self.plan.steady)
        name = precision_name(level, tf32) + ", compiled" * compiled
        per_batch = sum(map(self.flops, batches)) / len(batches)
        speed = size * count / took
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
        utilisation = per_batch * count / took / self.peaks["tf32" if tf32 else level]
        yield figure(f"training, {name}, batch {size}", speed, unit="examples/s", steps=count, seconds=took,
                     peak_gb=memory)  # fmt: skip
        goal = ">= 0.4" if level == "bf16" and size == self.plan.batches[-1] else ""
        yield figure(f"training, {name}, batch {size}: utilisation", utilisation, goal)
        return speed

    def learning(self) -> Iterator[dict]:
        """The same steps in every precision, from the same weights: the mean loss of the last tenth against float32's.

        Without dropout, whose masks would differ. float16's levels need a GPU.
        """
        model = self.setting.model.eval()
        batches = make_batches(self.examples, self.plan.batches[0], 16)
        last = {}
        for level in ("", "bf16", "O1", "O2", "O3") if self.cuda else ("", "bf16"):
            packed, losses = PackedTraining(self.setting, level, copy.deepcopy(model)), []
            for step, batch in zip(range(self.plan.steps), itertools.cycle(batches)):
                packed.step(batch)
                if step >= 0.9 * self.plan.steps:
                    losses.append(packed.trainer.state.losses[0].item())
            last[level] = sum(losses) / len(losses)
            yield figure(f"training, {level or 'O0'}: loss over O0's after {self.plan.steps} steps, less 1",
                         abs(last[level] / last[""] - 1), "<= 0.02", loss=last[level])  # fmt: skip

    def epoch(self) -> Iterator[dict]:
        """One epoch of the paper's recipe, extrapolated from a steady run, in bf16 and steps of the paper's size."""
        size = PAPER_BATCH if self.cuda else self.plan.batches[-1]
        rows = list(self.speed("bf16", False, size, seconds=self.plan.epoch))
        rate = rows[0]["examples/s"]
        yield figure("one epoch of the paper's recipe, bf16, extrapolated", PAPER / rate / 60, "<= 3", "min",
                     measured_s=rows[0]["seconds"], measured_examples=rows[0]["steps"] * size)  # fmt: skip

    def evaluation(self) -> Iterator[dict]:
        """hits@1, word ppl and F1 of the whole valid split by the script itself, from the files to the figures."""
        argv = self.evaluation_flags()
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            report = evaluate(argv)
        yield figure("the three figures of the valid split", (time.perf_counter() - start) / 60, "<= 2", "min",
                     examples=report["examples"])  # fmt: skip

    def quantized(self) -> Iterator[dict]:
        """Steps of adapters over a Llama of 1B, in bf16, its frozen weights in bfloat16 and in 4 bits."""
        if missing := [name for name in ("peft", "bitsandbytes") if importlib.util.find_spec(name) is None]:
            yield {"benchmark": "quantized", "skipped": f"needs {' and '.join(missing)}"}
            return
        whole = self.make_llama()
        speed_16, peak_16 = yield from self.adapter_speed(copy.deepcopy(whole), 16)
        speed_4, peak_4 = yield from self.adapter_speed(whole, 4)
        yield figure("adapters over weights in 4 bits over 16: steps a second", speed_4 / speed_16)
        if self.cuda:
            yield figure("adapters over weights in 4 bits over 16: peak memory", peak_4 / peak_16)

    def adapter_speed(self, model: DoubleHeads, bits: int) -> Generator[dict, None, tuple[float, int]]:
        """Steps a second, and the bytes of the GPU that they take at their peak."""
        gc.collect()  # what is left of the model before
        before = self.allocated()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if bits == 4:
            quantize_(model, self.setting.device, bf16=True)
        else:
            halve_frozen_(model)
            model.to(self.setting.device)
        weights, batches = self.allocated() - before, make_batches(self.examples, 4, 4)
        packed = PackedTraining(self.setting, "bf16", model.train())
        estimate = estimate_memory(
            model, packed.batch(batches[-1]), packed.device, half=torch.bfloat16, micro_steps=1, n_processes=1,
            sharded=False, checkpointing=False,
        )  # fmt: skip
        stream = itertools.cycle(batches)
        count, seconds = self.for_seconds(lambda: packed.step(next(stream)), self.plan.steady)
        peak = torch.cuda.max_memory_allocated() - before if self.cuda else 0
        yield figure(f"training, adapters over weights in {bits} bits, batch 4", count / seconds, unit="steps/s",
                     weights_gb=weights / 1e9, peak_gb=peak / 1e9, estimated_gb=estimate.peak / 1e9)  # fmt: skip
        for layer in quantized_layers(model)[:1]:
            yield from self.unpacking(layer)
        return count / seconds, peak

    def unpacking(self, layer: Linear4bit) -> Iterator[dict]:
        """Products of a layer in 4 bits over those of its unpacked weights, of few rows and of many: other kernels."""
        weight = layer.unpacked().float()
        for rows in (1, 16, 1024):
            inputs = torch.randn(rows, weight.shape[1], device=self.setting.device)
            with torch.no_grad():
                got, want = layer(inputs.bfloat16()).float(), linear(inputs.bfloat16().float(), weight)
            yield figure(f"weights in 4 bits, {rows} rows: relative error of a product",
                         ((got - want).norm() / want.norm()).item(), "<= 0.01")  # fmt: skip

    def make_llama(self) -> DoubleHeads:
        """A Llama with random weights and an adapter, in float32 on the CPU."""
        folder, tokenizer = self.setting.folder / "llama", self.setting.tokenizer
        shape = LLAMA if self.cuda else SMALL_LLAMA
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape).save_pretrained(folder)
        model = load_model(folder, from_scratch=True)
        add_adapter_(model, tokenizer, rank=16, base="")
        return model

    def shared_evaluation(self) -> Iterator[dict]:
        """The same by a process a GPU over the same by one, from the start of the processes on; equal figures."""
        times, reports = [], []
        for launcher in ([], self.launcher):
            path = self.setting.folder / "report.json"
            command = [sys.executable, *launcher, str(ROOT / "convai_evaluation.py"), *self.evaluation_flags()]
            start = time.perf_counter()
            run_quietly([*command, "--report", str(path)], self.setting.folder)
            times.append(time.perf_counter() - start)
            reports.append(json.loads(path.read_text()))
        for name in ("hits@1", "ppl", "f1"):
            check_close(name, reports[0][name], reports[1][name], 0.0 if not self.cuda else 1e-6)
        yield figure(f"evaluation, {self.processes} processes over one: time", times[1] / times[0], one=times[0],
                     several=times[1])  # fmt: skip

    def sharded(self) -> Iterator[dict]:
        """Training in shards over the GPUs, and on each of them a copy, over training on one: examples a second."""
        flags = [*prepare(self.setting), "--n_epochs", "1", "--gradient_accumulation_steps", "1"]
        flags += ["--fp16", "bf16"] if self.cuda else ["--train_share", "0.1"]
        device = self.setting.device
        one = examples_per_second([], flags, self.setting.folder, device)
        for name, more in (("copies", []), ("shards", ["--sharded"])):
            speed = examples_per_second(self.launcher, [*flags, *more], self.setting.folder, device)
            yield figure(f"training, {self.processes} processes with {name}, over one", speed / one, one=one,
                         several=speed)  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- tools

    @property
    def processes(self) -> int:
        return torch.cuda.device_count() if self.cuda else 2

    @property
    def launcher(self) -> list[str]:
        return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]

    def evaluation_flags(self) -> list[str]:
        """Flags of the evaluation script for the setting's model, which is written where it is not there yet."""
        folder = self.setting.folder / "run"
        if not folder.exists():
            folder.mkdir()
            save_model(self.setting.model, folder)
            self.setting.tokenizer.save_pretrained(folder)
        return ["--eval_type", "all", "--no_sample", "--model_checkpoint", str(folder), "--batchsize",
                str(self.plan.evaluation_batch), "--dataset_path", self.setting.path, "--dataset_cache",
                str(self.setting.folder / "cache.bin"), "--device", self.setting.device]  # fmt: skip

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """RuntimeError where anything inside waits for the device."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.cuda:
                torch.cuda.set_sync_debug_mode("default")

    def autocast(self, level: str) -> contextlib.AbstractContextManager:
        return torch.autocast(self.setting.device, DTYPES[level]) if level else contextlib.nullcontext()

    def for_seconds(self, function: Callable[[], object], seconds: float) -> tuple[int, float]:
        """Number of calls in about so many seconds, and the exact time; two calls before it are warm-up."""
        for _ in range(2):
            function()
        self.synchronize()
        start, count = time.perf_counter(), 0
        while (took := time.perf_counter() - start) < seconds:
            for _ in range(8 if self.cuda else 1):
                function()
                count += 1
            self.synchronize()
        return count, took

    def flops(self, batch: list[Example]) -> float:
        """Of a step on real tokens: 6 a weight of a matrix and token, the head at the labels; attention left out."""
        backbone = self.setting.model.pretrained.base_model
        weights = sum(p.numel() for p in backbone.get_submodule("h").parameters() if p.dim() == 2)
        labels = sum(len(example.candidates[-1]) + 1 for example in batch)
        return 6 * (weights * sum(example.row_length for example in batch)
                    + backbone.get_parameter("tokens_embed.weight").numel() * labels)  # fmt: skip


def run_quietly(command: list[str], folder: Path) -> None:
    """Run a command in a folder; RuntimeError with what it said where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def precision_name(level: str, tf32: bool) -> str:
    return "tf32" if tf32 else level or "float32"


@contextlib.contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


def main(argv: list[str] | None = None) -> list[dict]:
    parser = ArgumentParser("What one GPU has to show.")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--dataset_path", default=str(ROOT / "example" / "personachat.json"), help="as for train.py")
    parser.add_argument(
        "--tokenizer", default=str(ROOT / "example" / "model"), help="folder of a GPT tokenizer and its config.json"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS + PARTS_OF_SEVERAL, help="these parts alone, beside matmul (unset = all)"
    )
    parser.add_argument("--budget", type=number(float, 0), default=520, help="seconds after which no part is begun")
    args = parser.parse_args(argv)
    figures, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        sizes = QUICK._replace(shape=SMALL, longest=64) if args.dry_run else FULL._replace(shape=GPT)
        setting = Setting(args.dataset_path, args.tokenizer, Path(folder), sizes, "cpu" if args.dry_run else "cuda")
        bench = Bench(setting, DRY if args.dry_run else REAL, start + args.budget)
        name = "CPU" if args.dry_run else torch.cuda.get_device_name()
        print(json_line({"device": name, "torch": torch.__version__, "dataset": args.dataset_path}))
        parts = PARTS + PARTS_OF_SEVERAL if bench.processes > 1 else PARTS
        for part in parts:
            if args.only and part not in ("matmul", *args.only):
                continue
            if time.perf_counter() > bench.deadline:
                print(json_line({"benchmark": part, "skipped": "no time left"}))
                continue
            try:
                for row in getattr(bench, part)():
                    figures.append(row)
                    print(json_line(row), flush=True)
            except (Difference, RuntimeError) as error:  # the other parts still have something to say
                print(json_line({"benchmark": part, "failed": str(error)}), flush=True)
    return figures


if __name__ == "__main__":
    run_script(main)
