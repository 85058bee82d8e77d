"""What happens around the steps of a training run: validation, figures, checkpoints, an orderly stop."""

import json
import logging
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, EventEnum, Events
from ignite.handlers import ProgressBar
from ignite.handlers.tensorboard_logger import OutputHandler, TensorboardLogger
from torch.utils.data import DataLoader

from checkpoints import METRICS, Best
from cli import UserError
from precision import MAX_BAD_STEPS, Precision

logger = logging.getLogger(__name__)


class StepEvents(EventEnum):
    """Fired by the trainer when the parameters have changed: once in `gradient_accumulation_steps` iterations."""

    OPTIMIZER_STEP = "optimizer_step"


def attach_validation(
    trainer: Engine, evaluator: Engine, loader: DataLoader, best: Best, export: Callable[[], None], args: Namespace
) -> None:
    """Validate after each epoch, and before the first one if asked; export the best model; stop without progress."""

    def validate(engine: Engine):
        evaluator.run(loader)
        logger.info("Validation: %s", ", ".join(f"{key} {value:.4f}" for key, value in evaluator.state.metrics.items()))

    def judge(engine: Engine):
        if best.update(evaluator.state.metrics) and args.export == "best":
            export()
        if args.patience and best.since >= args.patience:
            logger.info("Stopped: %s is no better since %d epochs (--patience)", best.metric, best.since)
            engine.terminate()

    if args.eval_before_start:
        trainer.add_event_handler(Events.STARTED, lambda engine: engine.state.iteration or validate(engine))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, judge)


def attach_figures(
    trainer: Engine,
    evaluator: Engine,
    precision: Precision,
    args: Namespace,
    folder: Path | None,
) -> None:
    """Write each logged step's and each validation's figures to `metrics.jsonl` and TensorBoard; show them on a bar.

    `folder` is None on the processes that do not write. They take part in the reductions.
    """
    logged = StepEvents.OPTIMIZER_STEP(every=args.log_every)
    since = {"time": time.perf_counter(), "iteration": trainer.state.iteration}

    @trainer.on(logged)
    def collect(engine: Engine):
        loss, lm_loss, mc_loss = (idist.all_reduce(engine.state.losses) / idist.get_world_size()).tolist()
        seconds = time.perf_counter() - since["time"]
        iterations = engine.state.iteration - since["iteration"]
        engine.state.metrics = {
            "loss": loss,
            "lm_loss": lm_loss,
            "mc_loss": mc_loss,
            "lr": precision.optimizer.param_groups[0]["lr"],
            "examples_per_second": iterations * args.train_batch_size * idist.get_world_size() / seconds,
            "ms_per_step": 1000 * seconds / args.log_every,
            "skipped_steps": int(precision.skipped_steps),
        }
        since.update(time=time.perf_counter(), iteration=engine.state.iteration)
        if precision.bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"step {engine.state.optimizer_step}: {int(precision.bad_steps)} steps in a row had no finite gradient;"
                " lower --lr, or use --fp16 bf16 or none, and go on from the last checkpoint with --resume"
            )

    if folder is None:
        return

    def write(figures: dict) -> None:
        place = {"step": trainer.state.optimizer_step, "epoch": trainer.state.epoch}
        with open(folder / METRICS, "a") as file:
            file.write(json.dumps(place | figures) + "\n")

    trainer.add_event_handler(logged, lambda engine: write(engine.state.metrics))
    evaluator.add_event_handler(Events.COMPLETED, lambda engine: write({"split": "valid"} | engine.state.metrics))

    bar = ProgressBar(persist=True, disable=None)  # None = only on a terminal
    shown = ("loss", "lr")
    bar.attach(trainer, output_transform=lambda _: {k: v for k, v in trainer.state.metrics.items() if k in shown})
    board = TensorboardLogger(log_dir=str(folder), purge_step=trainer.state.optimizer_step + 1)
    step = lambda *_: trainer.state.optimizer_step  # noqa: E731
    board.attach(trainer, OutputHandler("training", "all", global_step_transform=step), logged)
    board.attach(evaluator, OutputHandler("validation", "all", global_step_transform=step), Events.COMPLETED)
    trainer.add_event_handler(Events.COMPLETED, board.close)


def attach_checkpoints(trainer: Engine, save: Callable[[], None], args: Namespace) -> list[int]:
    """Save after each epoch, every `save_every` steps (0 = off), and when SIGINT or SIGTERM asks the run to stop.

    Only between optimizer steps: a checkpoint holds no gradients.

    Returns:
        A list in which the signal that stopped the run will stand, in every process.
    """
    asked, stopped = [], []
    due = {"epoch": False}

    def request_stop(number: int, _) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}

    @trainer.on(Events.COMPLETED)
    def listen_no_more():
        for number, handler in before.items():
            signal.signal(number, handler)

    def save_if_due(engine: Engine) -> None:
        # launchers signal their processes one after another: they stop together, at the first one's wish
        stop = int(idist.all_reduce(max(asked, default=0), "MAX"))
        every = args.save_every and engine.state.optimizer_step % args.save_every == 0
        if stop or every or due["epoch"]:
            save()
            due["epoch"] = False
        if stop:
            stopped.append(stop)
            engine.terminate()

    @trainer.on(StepEvents.OPTIMIZER_STEP)
    def step_done(engine: Engine):
        if engine.state.iteration % engine.state.epoch_length:  # else the epoch's end is about to be validated first
            save_if_due(engine)

    @trainer.on(Events.EPOCH_COMPLETED)
    def epoch_done(engine: Engine):
        due["epoch"] = True
        if engine.state.iteration % args.gradient_accumulation_steps == 0 or engine.state.epoch == args.n_epochs:
            save_if_due(engine)

    return stopped
