"""Handlers around the steps of a training run: validation, figures, checkpoints, an orderly stop."""

import contextlib
import json
import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import text as text_summary
from torch.utils.data import DataLoader

from transfertransfo.errors import UserError
from transfertransfo.training.checkpoints import Best
from transfertransfo.training.distribution import max_over_processes
from transfertransfo.training.engines import Diverged, StepEvents
from transfertransfo.training.precision import MAX_BAD_STEPS, Precision
from transfertransfo.training.runs import METRICS

logger = logging.getLogger(__name__)


class FigureWriter:
    """Writes figures to a run folder's `metrics.jsonl` and, the same, to TensorBoard's event file.

    Nothing waits in memory, so a run that is killed has all its lines. tensorboardX's `EventFileWriter` would keep
    events for two minutes, in a thread whose death of a full disk brings the run to a standstill. When a run begins or
    goes on, the event file is made anew from `metrics.jsonl`.

    Raises:
        UserError: the disk is full.
    """

    def __init__(self, folder: Path):
        self.metrics = folder / METRICS
        self.events = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        with self._one_line_for_a_full_disk(self.events):
            self._records = RecordWriter(str(self.events))
            self._add_event(file_version="brain.Event:2")
            if self.metrics.exists():
                for line in self.metrics.read_text().splitlines():
                    self._add_figures(json.loads(line))
            self._records.flush()

    def write(self, figures: dict) -> None:
        """Write a line: `step`, `epoch`, numbers by name, and `split` and `replies` if they are of a validation.

        Raises:
            UserError: the disk is full.
        """
        with self._one_line_for_a_full_disk(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps(figures) + "\n")
        with self._one_line_for_a_full_disk(self.events):
            self._add_figures(figures)
            self._records.flush()  # to the disk: 0.3 ms, on a busy one 4

    def _add_figures(self, figures: dict) -> None:
        group = "validation" if "split" in figures else "training"
        values = [
            summary_pb2.Summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in figures.items() if name not in ("step", "epoch", "split", "replies")
        ]  # fmt: skip
        if replies := figures.get("replies"):
            lines = "\n".join("* " + format_reply(reply) for reply in replies)  # TensorBoard shows Markdown
            values += text_summary(f"{group}/replies", lines).value
        self._add_event(step=figures["step"], summary=summary_pb2.Summary(value=values))

    def _add_event(self, **content: object) -> None:
        self._records.write(event_pb2.Event(wall_time=time.time(), **content).SerializeToString())

    @staticmethod
    @contextlib.contextmanager
    def _one_line_for_a_full_disk(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{path}: not written ({error.strerror})") from error


def format_reply(reply: dict[str, str]) -> str:
    heard, said, gold = (json.dumps(reply[name], ensure_ascii=False) for name in ("heard", "reply", "gold"))
    return f"{heard} -> {said} (in the data: {gold})"


def attach_replies(evaluator: Engine, make_replies: Callable[[], list[dict[str, str]]]) -> None:
    """Have the model reply to a few turns after each validation; to be attached before what writes its figures.

    Args:
        make_replies: must leave the random state as it is. Each reply has `heard`, `reply` and `gold`.
    """

    @evaluator.on(Events.COMPLETED)
    def reply(engine: Engine) -> None:
        engine.state.replies = make_replies()


def attach_validation(
    trainer: Engine,
    evaluator: Engine,
    loader: DataLoader,
    best: Best,
    *,
    export_best: Callable[[], None] | None,
    patience: int,
    before_start: bool,
) -> None:
    """Validate after each epoch.

    Args:
        export_best: called when a validation is the best yet.
        patience: epochs without a better validation after which the run stops (0 = off).
        before_start: whether to validate before the first step too.
    """

    def validate(engine: Engine) -> None:
        evaluator.run(loader)
        metrics = evaluator.state.metrics
        logger.info("Validation: nll %.4f, ppl %.4f, hits@1 %.4f", metrics["nll"], metrics["ppl"], metrics["accuracy"])
        for reply in getattr(evaluator.state, "replies", ()):
            logger.info("  %s", format_reply(reply))

    def judge(engine: Engine) -> None:
        if best.update(evaluator.state.metrics) and export_best:
            export_best()
        if 0 < patience <= best.validations_since:
            logger.info("Stopped: %s is no better since %d epochs, the patience", best.metric, patience)
            engine.terminate()

    def validate_first(engine: Engine) -> None:
        if not engine.state.iteration:
            validate(engine)

    if before_start:
        trainer.add_event_handler(Events.STARTED, validate_first)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, judge)


def attach_figures(
    trainer: Engine,
    evaluator: Engine,
    precision: Precision,
    folder: Path | None,
    *,
    log_every: int,
    batch_size: int,
    gradient_accumulation_steps: int,
) -> None:
    """Write each logged step's and each validation's figures to `metrics.jsonl` and TensorBoard; show them on a bar.

    Args:
        folder: None on the processes that do not write. They take part in the reductions.
        log_every: optimizer steps from one that is logged to the next.
        batch_size: examples of one iteration of this process.
    """
    logged = StepEvents.OPTIMIZER_STEP(every=log_every)  # type: ignore[operator]  # ignite's events are called
    since = {"time": 0.0, "iteration": 0}  # set where an epoch begins or goes on

    @trainer.on(Events.EPOCH_STARTED)
    def begin_epoch(engine: Engine) -> None:  # what was validated and saved in between is no part of a step
        since.update(time=time.perf_counter(), iteration=engine.state.iteration)

    @trainer.on(logged)
    def collect(engine: Engine) -> None:
        loss, lm_loss, mc_loss = (idist.all_reduce(engine.state.losses) / idist.get_world_size()).tolist()
        seconds = time.perf_counter() - since["time"]
        iterations = engine.state.iteration - since["iteration"]
        engine.state.metrics = {
            "loss": loss,
            "lm_loss": lm_loss,
            "mc_loss": mc_loss,
            "lr": precision.optimizer.param_groups[0]["lr"],
            "examples_per_second": iterations * batch_size * idist.get_world_size() / seconds,
            "ms_per_step": 1000 * seconds / iterations * gradient_accumulation_steps,
            "skipped_steps": int(precision.skipped_steps),
        }
        since.update(time=time.perf_counter(), iteration=engine.state.iteration)
        if not math.isfinite(loss):
            logger.warning("step %d: the loss is %s; the weights stay as they were", engine.state.optimizer_step, loss)
        if precision.bad_steps >= MAX_BAD_STEPS:
            count = int(precision.bad_steps)
            raise Diverged(f"step {engine.state.optimizer_step}: {count} steps in a row had no finite gradient")

    if folder is None:
        return
    writer = FigureWriter(folder)

    def write(figures: dict) -> None:
        writer.write({"step": trainer.state.optimizer_step, "epoch": trainer.state.epoch} | figures)

    trainer.add_event_handler(logged, lambda engine: write(engine.state.metrics))

    @evaluator.on(Events.COMPLETED)
    def write_validation(engine: Engine) -> None:
        replies = {"replies": engine.state.replies} if hasattr(engine.state, "replies") else {}
        write({"split": "valid"} | engine.state.metrics | replies)

    bar = ProgressBar(persist=True, disable=None)  # None = only on a terminal
    shown = ("loss", "lr")
    bar.attach(trainer, output_transform=lambda _: {k: v for k, v in trainer.state.metrics.items() if k in shown})
    ProgressBar(desc="Validation", persist=False, disable=None).attach(evaluator)


def attach_checkpoints(
    trainer: Engine, save: Callable[[], None], *, n_epochs: int, save_every: int, gradient_accumulation_steps: int
) -> list[int]:
    """Save after each epoch, every `save_every` steps (0 = off), and when SIGINT or SIGTERM asks the run to stop.

    It is saved between optimizer steps only, or at the run's end: a checkpoint holds no gradients.

    Returns:
        A list in which the signal that stopped the run will stand, in every process.
    """
    asked, stopped = [], []
    due = {"epoch": False}

    def request_stop(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
        logger.info("Asked to stop: after this step or validation, with a checkpoint; once more stops at once")

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}

    @trainer.on(Events.COMPLETED)
    def listen_no_more() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def save_if_due(engine: Engine) -> None:
        # launchers signal their processes one after another: they stop together, at the first one's wish
        stop = max_over_processes(max(asked, default=0))
        every = save_every and engine.state.optimizer_step % save_every == 0
        if stop or every or due["epoch"]:
            save()
            due["epoch"] = False
        if stop and engine.state.epoch_length * n_epochs > engine.state.iteration:  # else it is done anyway
            stopped.append(stop)
            engine.terminate()

    @trainer.on(StepEvents.OPTIMIZER_STEP)
    def step_done(engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length:  # else the epoch's end is about to be validated first
            save_if_due(engine)

    @trainer.on(Events.EPOCH_COMPLETED)
    def epoch_done(engine: Engine) -> None:
        due["epoch"] = True
        between_steps = engine.state.iteration % gradient_accumulation_steps == 0
        # where --patience ends the run in the midst of a step, that step is never taken
        if between_steps or engine.state.epoch == n_epochs or engine.should_terminate:
            save_if_due(engine)

    return stopped
