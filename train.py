"""Fine-tune GPT or GPT-2 with two heads, a language model and a choice among candidates, on dialogs with personas.

    # CPU, the embedded example, a minute or two
    python train.py --dataset_path example/personachat.json --model_checkpoint example/model

    # one GPU: GPT on PersonaChat, both downloaded
    python train.py

    # eight GPUs of one machine: the paper's recipe
    torchrun --nproc_per_node=8 train.py --gradient_accumulation_steps 4 --lm_coef 2.0 --max_history 2 --n_epochs 1 \
        --num_candidates 4 --personality_permutations 2 --train_batch_size 2 --valid_batch_size 2
"""

import contextlib
import json
import logging
import math
import os
import time
from argparse import Namespace
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, EventEnum, Events
from ignite.handlers import Checkpoint, DiskSaver, PiecewiseLinear, ProgressBar
from ignite.handlers.tensorboard_logger import OptimizerParamsHandler, OutputHandler, TensorboardLogger
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from cli import (
    ArgumentParser,
    UserError,
    add_data_flags,
    add_model_flags,
    add_seed_flag,
    default_device,
    number,
    run_script,
    set_seed,
    set_up_logging,
)
from inputs import (
    MODEL_INPUTS,
    PADDED_INPUTS,
    Batch,
    BucketSampler,
    Example,
    build_input_from_segments,
    format_example,
    make_examples,
    make_row,
    pack,
    pad_dataset,
)
from model import DoubleHeads, add_special_tokens_, load_model, save_model
from utils import ATTR_TO_SPECIAL_TOKEN, SPECIAL_TOKENS, get_dataset, load_tokenizer, make_logdir, write_atomically

__all__ = [  # the original's public names, wherever they are defined now
    "ATTR_TO_SPECIAL_TOKEN", "MODEL_INPUTS", "PADDED_INPUTS", "SPECIAL_TOKENS", "add_special_tokens_",
    "average_distributed_scalar", "build_input_from_segments", "get_data_loaders", "pad_dataset", "train",
]  # fmt: skip

logger = logging.getLogger(__name__)


class StepEvents(EventEnum):
    OPTIMIZER_STEP = "optimizer_step"


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Fine-tune GPT or GPT-2 with two heads on dialogs with personas.")
    add_data_flags(parser)
    parser.add_argument("--valid_share", type=number(float, 0, 0.9), default=0.0,
                        help="share of the training dialogs held out where the dataset has no valid split (0 = off)")
    add_model_flags(parser, default="openai-gpt")
    parser.add_argument("--num_candidates", type=number(int, 0), default=2,
                        help="candidates of a training example, the gold one included (0 = all)")
    parser.add_argument("--personality_permutations", type=number(int, 1), default=1,
                        help="passes over each training dialog an epoch, its persona rotated each time")
    # optimisation
    parser.add_argument("--n_epochs", type=number(int, 1), default=3, help="passes over the training examples")
    parser.add_argument("--train_batch_size", type=number(int, 1), default=4,
                        help="examples of one forward, in each process")
    parser.add_argument("--valid_batch_size", type=number(int, 1), default=4, help="the same in validation")
    parser.add_argument("--gradient_accumulation_steps", type=number(int, 1), default=8,
                        help="forwards of one optimizer step")
    parser.add_argument("--lr", type=number(float, 0), default=6.25e-5, help="first learning rate; it falls to 0")
    parser.add_argument("--lm_coef", type=number(float, 0), default=1.0, help="weight of the language-model loss")
    parser.add_argument("--mc_coef", type=number(float, 0), default=1.0, help="weight of the choice loss")
    parser.add_argument("--max_norm", type=number(float, 0), default=1.0,
                        help="norm to which longer gradients are clipped")
    # run
    parser.add_argument("--eval_before_start", action="store_true", help="validate before the first step too")
    parser.add_argument("--log_every", type=number(int, 0), default=0,
                        help="optimizer steps between logged ones (0 = 1 in a run under 200 steps, else 10)")
    parser.add_argument("--fp16", choices=["", "O0", "O1", "O2", "O3"], default="",
                        help='precision ("" or O0 = float32)')
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1,
                        help="set by torch.distributed.launch (-1 = one process)")
    add_seed_flag(parser)
    return parser.parse_args(argv)


def average_distributed_scalar(scalar: float, args: Namespace | None = None) -> float:
    """Mean of a number over all processes; the number itself where there is one process."""
    return idist.all_reduce(scalar) / idist.get_world_size()


def setup_distributed(args: Namespace) -> torch.device:
    """Join the launcher's other processes, if there is a launcher; returns this process's device."""
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    device = torch.device(args.device or default_device())
    if args.local_rank == -1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", args.local_rank)
        torch.cuda.set_device(device)
    idist.initialize("nccl" if device.type == "cuda" else "gloo")
    return device


def get_data_loaders(args: Namespace, tokenizer: PreTrainedTokenizerBase, n_positions: int = 512):
    """Loaders of packed batches, and their samplers: train, valid, train, valid.

    The valid ones are None where the dataset has no such split.

    Raises:
        UserError: no dataset, no training split, or token ids that the tokenizer does not have.
    """
    with idist.one_rank_first(local=True):  # one process a machine tokenises, the others find its cache
        dataset = get_dataset(tokenizer, args.dataset_path, args.dataset_cache)
    name = args.dataset_path or "PersonaChat"
    if "train" not in dataset:
        raise UserError(f"{name}: no train split to train on")
    if "valid" not in dataset and args.valid_share:
        held_out = max(1, round(len(dataset["train"]) * args.valid_share))
        dataset["train"], dataset["valid"] = dataset["train"][:-held_out], dataset["train"][-held_out:]
        logger.info("%s: the last %d training dialogs are held out for validation", name, held_out)
        if not dataset["train"]:
            raise UserError(f"--valid_share {args.valid_share}: {name} has too few dialogs to hold some out")
    train = make_examples(
        dataset["train"], args.max_history, n_positions, args.num_candidates, args.personality_permutations
    )
    train_loader = make_loader(train, tokenizer, args.train_batch_size, shuffle=True, seed=args.seed)
    log_examples("train", train, train_loader)
    logger.info("One example as the model sees it:\n%s", format_example(train[0], tokenizer))
    if "valid" not in dataset:
        logger.warning("%s: no valid split: nothing is validated; --valid_share holds some of train out", name)
        return train_loader, None, train_loader.batch_sampler, None
    # original: the persona rotates in validation too; here each validation example counts once
    valid = make_examples(dataset["valid"], args.max_history, n_positions)
    valid_loader = make_loader(valid, tokenizer, args.valid_batch_size, shuffle=False)
    log_examples("valid", valid, valid_loader)
    return train_loader, valid_loader, train_loader.batch_sampler, valid_loader.batch_sampler


def make_loader(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int, shuffle: bool, seed: int = 0
) -> DataLoader:
    """A loader of packed batches: of this process's share of the examples."""
    sampler = BucketSampler(
        [example.row_length for example in examples],
        batch_size, shuffle, seed, idist.get_rank(), idist.get_world_size(),
    )  # fmt: skip

    def collate(batch: list[Example]) -> Batch | None:
        return pack([make_row(example, tokenizer) for example in batch], tokenizer.pad_token_id) if batch else None

    return DataLoader(examples, batch_sampler=sampler, collate_fn=collate, pin_memory=torch.cuda.is_available())


def log_examples(split: str, examples: list[Example], loader: DataLoader) -> None:
    lengths = loader.batch_sampler.lengths
    candidates = max(len(example.candidates) for example in examples)
    logger.info("%s: %d examples of up to %d candidates, %d tokens in packed rows, the longest %d",
                split, len(examples), candidates, lengths.sum(), lengths.max())


def create_trainer(model: torch.nn.Module, optimizer: AdamW, args: Namespace, device: torch.device) -> Engine:
    """An engine whose iteration is one forward and backward, and every so many of them an optimizer step.

    It fires `StepEvents.OPTIMIZER_STEP`, with the step's own losses in `state.losses`, a tensor of the weighted sum,
    the language-model and the choice loss, of this process.
    """
    accumulated = torch.zeros(3, device=device)
    coefficients = torch.tensor([args.lm_coef, args.mc_coef], device=device)

    def step(engine: Engine, batch: Batch) -> None:
        state = engine.state
        micro_steps = args.gradient_accumulation_steps
        # original: what is left over at the end of the run is thrown away
        full = state.iteration % micro_steps == 0 or state.iteration == state.max_epochs * state.epoch_length
        with contextlib.nullcontext() if full or idist.get_world_size() == 1 else model.no_sync():
            losses = distributed_losses(model, batch.to(device))
            loss = losses @ coefficients
            (loss / micro_steps).backward()
        accumulated.add_(torch.cat([loss[None], losses]).detach())
        if not full:
            return
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
        state.optimizer_step += 1
        set_adam_eps_(optimizer, state.optimizer_step)
        optimizer.step()
        optimizer.zero_grad()
        state.losses = accumulated / ((state.iteration - 1) % micro_steps + 1)
        accumulated.zero_()
        engine.fire_event(StepEvents.OPTIMIZER_STEP)

    trainer = Engine(step)
    trainer.register_events(*StepEvents, event_to_attr={StepEvents.OPTIMIZER_STEP: "optimizer_step"})
    return trainer


def distributed_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """(2,): language-model and choice loss, whose mean over processes is the loss of all their rows in one batch.

    Each is a sum divided by what all processes count, not a mean of means: k processes are one with a k-fold batch.
    """
    lm_logits, choice_scores = model(batch)
    sums = torch.stack([
        cross_entropy(lm_logits.float(), batch.lm_labels, reduction="sum"),
        cross_entropy(choice_scores.float(), batch.choice_labels, reduction="sum"),
    ])  # fmt: skip
    counts = torch.tensor([len(batch.lm_labels), len(batch.choice_labels)], device=sums.device, dtype=sums.dtype)
    return sums * idist.get_world_size() / idist.all_reduce(counts)


def set_adam_eps_(optimizer: AdamW, step: int, eps: float = 1e-6) -> None:
    """Make torch's AdamW at step `step` (from 1) that of transformers 2, which added eps before the bias correction."""
    for group in optimizer.param_groups:
        group["eps"] = eps / math.sqrt(1 - group["betas"][1] ** step)


def create_evaluator(model: torch.nn.Module, device: torch.device) -> Engine:
    """An engine that leaves `nll` (nats a token), `ppl` and `accuracy` (hits@1) of all examples in `state.metrics`."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # nll, tokens, hits, examples

    @torch.inference_mode()
    def step(engine: Engine, batch: Batch | None) -> None:
        if batch is None:  # this process's share of the last batch
            return
        batch = batch.to(device)
        lm_logits, choice_scores = model(batch)
        nll = cross_entropy(lm_logits.float(), batch.lm_labels, reduction="sum")
        hits = (choice_scores.argmax(-1) == batch.choice_labels).sum()
        counts = torch.tensor([len(batch.lm_labels), len(batch.choice_labels)], device=device)
        sums.add_(torch.stack([nll, counts[0], hits, counts[1]]))

    evaluator = Engine(step)

    @evaluator.on(Events.STARTED)
    def begin():
        model.eval()
        sums.zero_()

    @evaluator.on(Events.COMPLETED)
    def finish(engine: Engine):
        nll, tokens, hits, examples = idist.all_reduce(sums.clone()).tolist()
        nll /= max(tokens, 1)
        engine.state.metrics = {"nll": nll, "ppl": math.exp(min(nll, 700)), "accuracy": hits / examples}
        model.train()

    return evaluator


def attach_validation(trainer: Engine, evaluator: Engine, loader: DataLoader, before_start: bool) -> None:
    """Validate after each epoch, and before the first one if asked."""

    def validate():
        evaluator.run(loader)
        logger.info("Validation: %s", ", ".join(f"{key} {value:.4f}" for key, value in evaluator.state.metrics.items()))

    if before_start:
        trainer.add_event_handler(Events.STARTED, validate)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)


def attach_figures(trainer: Engine, evaluator: Engine, optimizer: AdamW, args: Namespace, folder: Path | None) -> None:
    """Write each logged step's and each validation's figures to `metrics.jsonl` and TensorBoard; show them on a bar.

    `folder` is None on the processes that do not write. They take part in the reductions.
    """
    logged = StepEvents.OPTIMIZER_STEP(every=args.log_every)
    since = {"time": time.perf_counter(), "iteration": 0}

    @trainer.on(logged)
    def collect(engine: Engine):
        loss, lm_loss, mc_loss = (idist.all_reduce(engine.state.losses) / idist.get_world_size()).tolist()
        seconds = time.perf_counter() - since["time"]
        iterations = engine.state.iteration - since["iteration"]
        engine.state.metrics = {
            "loss": loss,
            "lm_loss": lm_loss,
            "mc_loss": mc_loss,
            "lr": optimizer.param_groups[0]["lr"],
            "examples_per_second": iterations * args.train_batch_size * idist.get_world_size() / seconds,
            "ms_per_step": 1000 * seconds / args.log_every,
        }
        since.update(time=time.perf_counter(), iteration=engine.state.iteration)

    if folder is None:
        return
    metrics_file = folder / "metrics.jsonl"

    def write(figures: dict) -> None:
        place = {"step": trainer.state.optimizer_step, "epoch": trainer.state.epoch}
        with open(metrics_file, "a") as file:
            file.write(json.dumps(place | figures) + "\n")

    trainer.add_event_handler(logged, lambda engine: write(engine.state.metrics))
    evaluator.add_event_handler(Events.COMPLETED, lambda engine: write({"split": "valid"} | engine.state.metrics))

    bar = ProgressBar(persist=True, disable=None)  # None = only on a terminal
    bar.attach(trainer, ["loss", "lr"])
    board = TensorboardLogger(log_dir=str(folder))
    step_of_trainer = lambda *_: trainer.state.optimizer_step  # noqa: E731
    board.attach(trainer, OutputHandler("training", "all", global_step_transform=step_of_trainer), logged)
    board.attach(trainer, OptimizerParamsHandler(optimizer), Events.ITERATION_STARTED(every=args.log_every))
    board.attach(evaluator, OutputHandler("validation", "all", global_step_transform=step_of_trainer), Events.COMPLETED)
    trainer.add_event_handler(Events.COMPLETED, board.close)


def attach_checkpoints(trainer: Engine, to_save: dict, folder: Path) -> None:
    """Save the training state each epoch; the newest three are kept."""
    saver = DiskSaver(folder, require_empty=False)  # writes to a temporary name first
    checkpoint = Checkpoint(to_save, saver, n_saved=3, global_step_transform=lambda *_: trainer.state.epoch)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)


def write_run_folder(folder: Path, args: Namespace, model: DoubleHeads, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what is known of a run before its first step: arguments, configuration, tokenizer."""
    logger.info("Arguments: %s", json.dumps(vars(args)))
    logger.info("Run folder: %s", folder)
    write_atomically(folder / "training_args.json", json.dumps(vars(args), indent=2) + "\n")
    model.pretrained.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(argv: list[str] | None = None) -> str:
    """Train as the command line says; returns the run folder, which is a checkpoint itself.

    Raises:
        UserError: input that cannot be used.
    """
    args = parse_args(argv)
    device = setup_distributed(args)
    set_up_logging(logging.INFO if idist.get_rank() == 0 else logging.WARNING)
    if args.fp16 not in ("", "O0"):
        raise UserError(f"--fp16 {args.fp16}: half precision is not there yet; leave the flag out for float32")
    set_seed(args.seed)

    tokenizer = load_tokenizer(args.model_checkpoint, args.gpt_tokenization)
    args.gpt_tokenization = tokenizer.init_kwargs.get("gpt_tokenization")
    model = load_model(args.model_checkpoint, device, from_scratch=True)
    add_special_tokens_(model, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("Model: %s, %d parameters", model.pretrained.config.model_type, parameters)
    train_loader, valid_loader, train_sampler, _ = get_data_loaders(args, tokenizer, model.n_positions)
    n_iterations = args.n_epochs * len(train_loader)
    if not args.log_every:
        args.log_every = 1 if n_iterations / args.gradient_accumulation_steps < 200 else 10

    optimizer = AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    scheduler = PiecewiseLinear(optimizer, "lr", [(0, args.lr), (n_iterations, 0.0)])
    forward = DistributedDataParallel(model) if idist.get_world_size() > 1 else model
    trainer = create_trainer(forward, optimizer, args, device)
    evaluator = create_evaluator(model, device)
    trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: train_sampler.set_epoch(engine.state.epoch))

    folder = Path(make_logdir(args.model_checkpoint)) if idist.get_rank() == 0 else None
    attach_figures(trainer, evaluator, optimizer, args, folder)
    if valid_loader is not None:
        attach_validation(trainer, evaluator, valid_loader, args.eval_before_start)
    if folder is not None:
        write_run_folder(folder, args, model, tokenizer)
        to_save = {"trainer": trainer, "model": model.pretrained, "optimizer": optimizer, "lr_scheduler": scheduler}
        attach_checkpoints(trainer, to_save, folder)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: save_model(model, folder))

    model.train()
    trainer.run(train_loader, max_epochs=args.n_epochs)
    if folder is not None:
        logger.info("Done: chat with it by python interact.py --model_checkpoint %s", folder)
    idist.finalize()
    return str(folder)


if __name__ == "__main__":
    run_script(train)
