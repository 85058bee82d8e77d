"""Kill a training run again and again, resume it each time, and compare it with one that was left alone.

python tests/crash.py --kills 20        # each run in a process of its own
python tests/crash.py --kills 3 --short # shorter runs, in forks of one process: what the tests do
python tests/crash.py --kills 10 --short -- --lora_rank 2   # runs with other flags of train.py

A run is killed with -9 at a seeded random instant of its life: in turn while it saves, trains and validates. It must
end with the same weights, to the bit, and the same figures at every step as the run that nobody killed, also on
TensorBoard, and leave no temporary file.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from ignite.engine import Events  # noqa: E402
from tensorboardX.proto import event_pb2  # noqa: E402

import train  # noqa: E402
from transfertransfo.model.loading import load_model  # noqa: E402
from transfertransfo.model.saving import save_model  # noqa: E402
from transfertransfo.training.engines import StepEvents  # noqa: E402

PHASES = ("saving", "training", "validating")  # the first is that of a single kill
TIMES = ("examples_per_second", "ms_per_step")  # figures that differ from run to run


class Kill(NamedTuple):
    """An instant: so many seconds after a phase has begun, which it has done `count` times before."""

    phase: str
    count: int
    seconds: float


class Phases:
    """Times the phases of a training run in this process, and ends the process at an instant."""

    def __init__(self, kill: Kill | None):
        self.kill = kill
        self.seconds = {phase: [] for phase in PHASES}
        self.begun = {}

    def begin(self, phase: str) -> None:
        if phase in self.begun:
            return  # a step's second batch
        self.begun[phase] = time.perf_counter()
        if self._is_chosen(phase):
            threading.Timer(self.kill.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def end(self, phase: str) -> None:
        if self._is_chosen(phase):
            time.sleep(60)  # this run has been faster than the one that was timed: it ends here
        self.seconds[phase].append(time.perf_counter() - self.begun.pop(phase))

    def _is_chosen(self, phase: str) -> bool:
        return self.kill is not None and self.kill[:2] == (phase, len(self.seconds[phase]))

    def watch(self) -> None:
        """Have the trainer, the evaluator and both kinds of saving report here."""
        for maker, phase, begin, end in (
            ("create_trainer", "training", Events.GET_BATCH_STARTED, StepEvents.OPTIMIZER_STEP),
            ("create_evaluator", "validating", Events.STARTED, Events.COMPLETED),
        ):
            setattr(train, maker, self._watched_engine(getattr(train, maker), phase, begin, end))
        for name in ("save_model", "save_checkpoint"):
            setattr(train, name, self._watched(getattr(train, name)))

    def _watched_engine(self, make, phase, begin, end):
        def made(*args):
            engine = make(*args)
            engine.add_event_handler(begin, lambda _: self.begin(phase))
            engine.add_event_handler(end, lambda _: self.end(phase))
            return engine

        return made

    def _watched(self, save):
        def watched(*args, **kwargs):
            self.begin("saving")
            save(*args, **kwargs)
            self.end("saving")

        return watched


def run(cwd: Path, flags: list[str], kill: Kill | None, report=None) -> None:
    """Train in `cwd`; what a child process does. `report` is sent the seconds that each phase took."""
    torch.set_num_threads(1)
    cwd.mkdir(exist_ok=True)
    phases = Phases(kill)
    phases.watch()
    with open(cwd / "log", "a") as log, contextlib.chdir(cwd):
        os.dup2(log.fileno(), 2)
        train.train(["--resume", "auto", *flags])
    if report:
        report.send(phases.seconds)


def start(context, *args) -> int:
    """The exit status of a `run` in a process."""
    process = context.Process(target=run, args=args)
    process.start()
    process.join()
    return process.exitcode


class Result(NamedTuple):
    """A run's figures and weights at its end."""

    weights: bytes
    lines: list[dict]
    events: list[tuple]


def result(cwd: Path) -> Result:
    """Of the one run that went to its end."""
    (weights,) = (cwd / "runs").glob("*/*model.safetensors")  # an adapter's, or the whole model's
    folder = weights.parent
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    events = [event for event in read_events(folder) if not event[1].endswith(TIMES)]
    return Result(weights.read_bytes(), lines, events)


def read_events(folder: Path) -> list[tuple[int, str, float | str]]:
    """Step, tag and value of all that a run folder has for TensorBoard; records of length, checksum, content, again."""
    found = []
    for path in folder.glob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                (text,) = value.tensor.string_val or [b""]
                found.append((event.step, value.tag, text.decode() or value.simple_value))
            content = content[16 + length :]
    return found


def leftovers(cwd: Path) -> list[str]:
    return [path.name for path in (cwd / "runs").glob("*/*.tmp*")]


def prepare(top: Path, short: bool) -> list[str]:
    """Write dataset and model; the flags of a run. An epoch's last forwards count for the next epoch's first step."""
    example = json.loads((ROOT / "example" / "personachat.json").read_text())
    dialogs = {"train": example["train"][: 2 if short else 6], "valid": example["valid"][: 1 if short else 2]}
    (top / "dialogs.json").write_text(json.dumps(dialogs))
    weights = shutil.ignore_patterns("*.safetensors")
    model = shutil.copytree(ROOT / "example" / "model", top / "model", ignore=weights)
    config = json.loads((model / "config.json").read_text())
    config |= {"n_layer": 1, "n_embd": 12} if short else {"n_layer": 4, "n_embd": 192}
    (model / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    save_model(load_model(model, from_scratch=True), model)  # adapters need weights beside them
    return ["--dataset_path", str(top / "dialogs.json"), "--dataset_cache", str(top / "cache.bin"), "--device", "cpu",
            "--model", str(model), "--lr", "1e-3", "--n_epochs", "2" if short else "3", "--train_batch_size", "2",
            "--gradient_accumulation_steps", "3", "--save_every", "1"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="shorter runs, in forks of one process")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a fork cannot go on with the threads of its parent
    generator = random.Random(args.seed)
    context = multiprocessing.get_context("fork" if args.short else "spawn")
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        flags = prepare(top, args.short) + args.flags
        receiver, sender = context.Pipe(duplex=False)
        assert start(context, top / "alone", flags, None, sender) == 0, (top / "alone" / "log").read_text()[-2000:]
        seconds, want = receiver.recv(), result(top / "alone")
        print("alone:", ", ".join(f"{len(of)} times {phase}, {sum(of):.2f} s" for phase, of in seconds.items()))
        for number in range(args.kills):
            cwd, phase = top / str(number), PHASES[number % 3]
            count = generator.randrange(len(seconds[phase]))
            kill = Kill(phase, count, generator.uniform(0, seconds[phase][count]))
            assert start(context, cwd, flags, kill) == -signal.SIGKILL, (cwd / "log").read_text()[-2000:]
            left = leftovers(cwd)
            assert start(context, cwd, flags, None) == 0, (cwd / "log").read_text()[-2000:]
            # a run killed before its first checkpoint is begun anew, in a folder of its own
            got, anew = result(cwd), len(list((cwd / "runs").iterdir())) > 1
            wrong = [name for name in Result._fields if getattr(got, name) != getattr(want, name)]
            wrong += [] if anew else leftovers(cwd)
            failed += bool(wrong)
            print(f"kill {number + 1}: {phase} the {count + 1}. time, after {1000 * kill.seconds:.1f} ms"
                  f"{f', leaving {left}' if left else ''}; {'begun anew' if anew else 'resumed'}:"
                  f" {f'DIFFERENT {wrong}' if wrong else 'equal'}", flush=True)  # fmt: skip
    print(f"{args.kills - failed} of {args.kills} runs that were killed ended like the one that was not")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
