"""Fine-tune GPT, GPT-2 or another decoder on dialogs with personas: a language model and a choice among candidates.

    # CPU, the embedded example, a minute or two
    python train.py --dataset_path example/personachat.json --model_checkpoint example/model

    # one GPU: GPT on PersonaChat, both downloaded
    python train.py

    # eight GPUs of one machine: the paper's recipe
    torchrun --nproc_per_node=8 train.py --gradient_accumulation_steps 4 --lm_coef 2.0 --max_history 2 --n_epochs 1 \
        --num_candidates 4 --personality_permutations 2 --train_batch_size 2 --valid_batch_size 2
"""

import json
import logging
import os
import shutil
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from transfertransfo.cli import (
    ArgumentParser,
    add_data_flags,
    add_debug_flag,
    add_model_flags,
    add_seed_flag,
    number,
    run_script,
    set_seed,
    set_up_logging,
)
from transfertransfo.data.dataset import load_dataset
from transfertransfo.data.inputs import (
    MODEL_INPUTS,
    PADDED_INPUTS,
    BucketSampler,
    build_input_from_segments,
    format_example,
    make_examples,
    pad_dataset,
)
from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, SPECIAL_TOKENS
from transfertransfo.errors import UserError, first_line
from transfertransfo.files import remove_leftovers, write_atomically
from transfertransfo.model.double_heads import (
    DoubleHeads,
    add_adapter_,
    add_special_tokens_,
    default_device,
    enable_gradient_checkpointing_,
    freeze_embeddings_,
    merge_adapter_,
)
from transfertransfo.model.loading import load_model, save_model, use_eager_attention_
from transfertransfo.model.lora import rank_of
from transfertransfo.model.sources import load_tokenizer
from transfertransfo.training.checkpoints import Best, RandomState, TrainedParameters, load_checkpoint, save_checkpoint
from transfertransfo.training.distribution import (
    average_distributed_scalar,
    check_same_run,
    one_line_for_a_lost_process,
    setup_distributed,
    share_weights_,
)
from transfertransfo.training.engines import create_evaluator, create_trainer, make_adamw
from transfertransfo.training.handlers import attach_checkpoints, attach_figures, attach_validation
from transfertransfo.training.loaders import log_examples, make_loader, pack_examples
from transfertransfo.training.precision import LEVELS, make_precision
from transfertransfo.training.runs import (
    ARGUMENTS,
    NOT_RESUMED,
    changed_arguments,
    cut_metrics,
    find_run,
    make_logdir,
    read_arguments,
)

__all__ = [  # the original's public names, wherever they are defined now
    "ATTR_TO_SPECIAL_TOKEN", "MODEL_INPUTS", "PADDED_INPUTS", "SPECIAL_TOKENS", "add_special_tokens_",
    "average_distributed_scalar", "build_input_from_segments", "get_data_loaders", "pad_dataset", "train",
]  # fmt: skip

logger = logging.getLogger(__name__)

COMPILED_MULTIPLE = 64  # tokens; on a GPU a model is compiled anew for each row length


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, Path | None]:
    """The arguments, and the run folder to resume, whose arguments then stand in for flags that are not given."""
    parser = ArgumentParser("Fine-tune a decoder with two heads on dialogs with personas.")
    add_data_flags(parser)
    parser.add_argument(
        "--train_share",
        type=number(float, 1e-6, 1),
        default=1.0,
        help="share of the training dialogs to train on, the first ones of those not held out",
    )
    parser.add_argument(
        "--valid_share",
        type=number(float, 0, 0.9),
        default=0.0,
        help="share of the training dialogs held out where the dataset has no valid split (0 = off)",
    )
    add_model_flags(parser, default="openai-gpt")
    parser.add_argument(
        "--token_types",
        choices=["on", "off"],
        help="whether the speakers' embeddings are added to those of their words (unset = as the"
        " checkpoint records; where it does not, on for GPT and GPT-2, off for others)",
    )
    parser.add_argument(
        "--lora_rank",
        type=number(int, 0),
        help="train adapters of this rank beside the frozen weights, scaled by 2 (0 = all weights;"
        " unset = the checkpoint's adapters, if it has some)",
    )
    parser.add_argument(
        "--merge_lora",
        action="store_true",
        help="write the whole model with its adapters worked in, instead of the adapters",
    )
    parser.add_argument(
        "--num_candidates",
        type=number(int, 0),
        default=2,
        help="candidates of a training example, the gold one included (0 = all)",
    )
    parser.add_argument(
        "--personality_permutations",
        type=number(int, 1),
        default=1,
        help="passes over each training dialog an epoch, its persona rotated each time",
    )
    add_optimisation_flags(parser)
    # hardware
    parser.add_argument(
        "--fp16", choices=LEVELS, default="", help='precision: bf16, or apex\'s O0 to O3 ("" or O0 = float32)'
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="save memory by computing each layer twice"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model with torch.compile: minutes at the start, then faster steps",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by torch.distributed.launch (-1 = one process)"
    )
    add_run_flags(parser)
    add_seed_flag(parser)
    add_debug_flag(parser)

    parser.set_defaults(world_size=int(os.environ.get("WORLD_SIZE", 1)))
    args = parser.parse_args(argv)
    args.unset = [name for name, value in vars(args).items() if value is None]
    run = find_run(args.resume, args) if args.resume else None
    if run:
        saved = {"unset": []} | read_arguments(run)
        parser.set_defaults(**{name: saved[name] for name in saved if name not in NOT_RESUMED})
        args = parser.parse_args(argv)
        if changed := changed_arguments(saved, args):
            raise UserError(f"--resume {run}: {', '.join(changed)}; go on with the same, or start a new run")
    return args, run


def add_optimisation_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--n_epochs", type=number(int, 1), default=3, help="passes over the training examples")
    parser.add_argument(
        "--train_batch_size", type=number(int, 1), default=4, help="examples of one forward, in each process"
    )
    parser.add_argument("--valid_batch_size", type=number(int, 1), default=4, help="the same in validation")
    parser.add_argument(
        "--gradient_accumulation_steps", type=number(int, 1), default=8, help="forwards of one optimizer step"
    )
    parser.add_argument("--lr", type=number(float, 0), default=6.25e-5, help="first learning rate; it falls to 0")
    parser.add_argument("--head_lr", type=number(float, 0), help="the same for the choice head (unset = --lr)")
    parser.add_argument(
        "--warmup_steps",
        type=number(int, 0),
        default=0,
        help="optimizer steps over which the learning rates rise from 0 (0 = off)",
    )
    parser.add_argument("--lm_coef", type=number(float, 0), default=1.0, help="weight of the language-model loss")
    parser.add_argument("--mc_coef", type=number(float, 0), default=1.0, help="weight of the choice loss")
    parser.add_argument(
        "--label_smoothing",
        type=number(float, 0, 0.99),
        default=0.0,
        help="probability of a word that training spreads over the vocabulary (0 = off)",
    )
    parser.add_argument(
        "--max_norm", type=number(float, 0), default=1.0, help="norm to which longer gradients are clipped (0 = off)"
    )
    parser.add_argument(
        "--freeze_embeddings", action="store_true", help="of the word embeddings train those of the dialog tokens only"
    )


def add_run_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--resume", default="", help="run folder to go on with; auto = the newest of the same arguments, or a new one"
    )
    parser.add_argument("--eval_before_start", action="store_true", help="validate before the first step too")
    parser.add_argument(
        "--log_every",
        type=number(int, 0),
        default=0,
        help="optimizer steps between logged ones (0 = 1 in a run under 200 steps, else 10)",
    )
    parser.add_argument(
        "--save_every",
        type=number(int, 0),
        default=0,
        help="optimizer steps between checkpoints, beside one an epoch (0 = off)",
    )
    parser.add_argument("--n_saved", type=number(int, 1), default=3, help="checkpoints kept")
    parser.add_argument(
        "--best_metric", choices=["hits@1", "nll"], default="hits@1", help="what makes a validation the best"
    )
    parser.add_argument(
        "--patience",
        type=number(int, 0),
        default=0,
        help="epochs without a better validation until the run stops (0 = off)",
    )
    parser.add_argument(
        "--export",
        choices=["last", "best"],
        default="last",
        help="epoch whose weights are in the run folder's model.safetensors",
    )


def get_data_loaders(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, n_positions: int = 512, history_start: int = 0
) -> tuple[DataLoader, DataLoader | None, BucketSampler, BucketSampler | None]:
    """Loaders of packed batches, and their samplers: train, valid, train, valid.

    The valid ones are None where the dataset has no such split.

    Raises:
        UserError: no dataset, no training split, or token ids that the tokenizer does not have.
    """
    with idist.one_rank_first(local=True):  # one process a machine tokenises, the others find its cache
        content = load_dataset(tokenizer, args.dataset_path, args.dataset_cache, args.skip_bad_dialogs)
    name = args.dataset_path or "PersonaChat"
    if getattr(args, "dataset_digest", content.digest) != content.digest:
        raise UserError(f"--resume: {name} is not what it was when the run began; start a new run")
    args.dataset_digest = content.digest
    dataset = content.all_dialogs(content.tokens)
    if "train" not in dataset:
        raise UserError(f"{name}: no train split to train on")
    if "valid" not in dataset and args.valid_share:
        held_out = max(1, round(len(dataset["train"]) * args.valid_share))
        dataset["train"], dataset["valid"] = dataset["train"][:-held_out], dataset["train"][-held_out:]
        logger.info("%s: the last %d training dialogs are held out for validation", name, held_out)
        if not dataset["train"]:
            raise UserError(f"--valid_share {args.valid_share}: {name} has too few dialogs to hold some out")
    if args.train_share < 1:
        dataset["train"] = dataset["train"][: max(1, round(len(dataset["train"]) * args.train_share))]
    train = make_examples(
        dataset["train"], args.max_history, n_positions, args.num_candidates, args.personality_permutations,
        history_start,
    )  # fmt: skip
    multiple = COMPILED_MULTIPLE if args.compile and (args.device or default_device()) != "cpu" else 1
    collate = partial(pack_examples, tokenizer=tokenizer, history_start=history_start, multiple=multiple)
    # every process takes part in a training step, so where a share is empty one works on what does not count
    train_collate = partial(collate, filler=train[0])
    train_loader, train_sampler = make_loader(train, train_collate, args.train_batch_size, shuffle=True, seed=args.seed)
    log_examples("train", train, train_sampler)
    logger.info("One example as the model sees it:\n%s", format_example(train[0], tokenizer))
    if "valid" not in dataset:
        logger.warning("%s: no valid split: nothing is validated; --valid_share holds some of train out", name)
        return train_loader, None, train_sampler, None
    # original: the persona rotates in validation too; here each validation example counts once
    valid = make_examples(dataset["valid"], args.max_history, n_positions, history_start=history_start)
    valid_loader, valid_sampler = make_loader(valid, collate, args.valid_batch_size, shuffle=False)
    log_examples("valid", valid, valid_sampler)
    return train_loader, valid_loader, train_sampler, valid_sampler


def prepare_model(
    args: Namespace, run: Path | None, device: torch.device
) -> tuple[DoubleHeads, PreTrainedTokenizerBase]:
    """The model that is to be trained and its tokenizer, with the dialog tokens; `args` then say what they record.

    Args:
        run: the run folder to resume; of a run with adapters it has not the weights beside them.
    """
    source = args.model_checkpoint if args.lora_rank else run or args.model_checkpoint
    tokenizer = load_tokenizer(source, args.gpt_tokenization)
    args.gpt_tokenization = tokenizer.init_kwargs.get("gpt_tokenization")
    model = load_model(source, device, from_scratch=not args.lora_rank)
    add_special_tokens_(model, tokenizer)
    if args.lora_rank:
        add_adapter_(model, tokenizer, args.lora_rank, args.model_checkpoint)
    elif args.lora_rank == 0:
        merge_adapter_(model)
    args.lora_rank = rank_of(model.network)
    if args.token_types is not None:
        model.token_types = args.token_types == "on"
    args.token_types = "on" if model.token_types else "off"
    if args.history_start is not None:
        model.history_start = args.history_start
    args.history_start = model.history_start
    if args.freeze_embeddings and not args.lora_rank:
        freeze_embeddings_(model, tokenizer)
    if device.type == "cpu" and args.fp16 == "bf16":
        use_eager_attention_(model)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing_(model)
    if args.compile:
        # not the heads, whose rows change in number from batch to batch. On a CPU code for any length costs less than
        # rows of few lengths
        model.pretrained.base_model.compile(dynamic=device.type == "cpu" or None)
    parameters = sum(map(torch.numel, model.parameters()))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "Model: %s, %d parameters%s",
        model.pretrained.config.model_type,
        parameters,
        f", of which {trained} are trained" if trained < parameters else "",
    )
    return model, tokenizer


def open_run_folder(
    args: Namespace, run: Path | None, trainer: Engine, model: DoubleHeads, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Make the run folder, or go back in it to where the run resumes; write what is known before the first step."""
    folder = run or Path(make_logdir(args.model_checkpoint))
    logger.info("Arguments: %s", json.dumps(vars(args)))
    logger.info("Run folder: %s", folder)
    try:
        remove_leftovers(folder)
        cut_metrics(folder, trainer.state)
        write_atomically(folder / ARGUMENTS, json.dumps(vars(args), indent=2) + "\n")
        if not run:  # not written again: a run that is killed meanwhile would have none
            model.pretrained.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises no OSError, but Exception itself
        if not run:
            shutil.rmtree(folder, ignore_errors=True)  # nothing has been trained
        raise UserError(f"{folder}: cannot be written to ({first_line(error)})") from error
    return folder


def attach_handlers(
    args: Namespace,
    folder: Path | None,
    trainer: Engine,
    evaluator: Engine,
    model: DoubleHeads,
    to_save: dict,
    sampler: BucketSampler,
    valid_loader: DataLoader | None,
) -> list[int]:
    """Attach what happens around the steps: the batches' order, figures, validation, export, checkpoints.

    Args:
        folder: the run folder, None on the processes that do not write.
        to_save: the training state, which checkpoints hold.

    Returns:
        A list in which the signal that stopped the run will stand.
    """

    def export() -> None:
        if folder is not None:
            save_model(model, folder, args.merge_lora)

    @trainer.on(Events.EPOCH_STARTED)
    def begin_epoch(engine: Engine) -> None:
        done = engine.state.iteration % len(sampler)  # more than 0 where a resumed run goes on within an epoch
        sampler.set_epoch(engine.state.epoch, done)

    attach_figures(trainer, evaluator, to_save["precision"], args, folder)
    if valid_loader is not None:
        attach_validation(trainer, evaluator, valid_loader, to_save["best"], export, args)
    if args.export == "last" or valid_loader is None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, export)
    save = partial(save_checkpoint, folder, trainer, to_save, args.n_saved)
    return attach_checkpoints(trainer, save, args)


@one_line_for_a_lost_process()
def train(argv: list[str] | None = None) -> str:
    """Train as the command line says; returns the run folder, which is a checkpoint itself.

    Raises:
        UserError: input that cannot be used.
    """
    args, run = parse_args(argv)
    device = setup_distributed(args)
    check_same_run(run)
    set_up_logging(logging.INFO if idist.get_rank() == 0 else logging.ERROR)
    set_seed(args.seed)

    model, tokenizer = prepare_model(args, run, device)
    train_loader, valid_loader, sampler, _ = get_data_loaders(args, tokenizer, model.n_positions, model.history_start)
    if not args.log_every:
        steps = args.n_epochs * len(train_loader) / args.gradient_accumulation_steps
        args.log_every = 1 if steps < 200 else 10

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    make_optimizer = partial(make_adamw, args=args, names=names)
    share_weights_(model)  # before their float32 copies are made: --seed 0 draws others in each process
    precision = make_precision(args.fp16, model, make_optimizer, device)  # before the model is distributed
    distributed = DistributedDataParallel(model) if idist.get_world_size() > 1 else model
    trainer = create_trainer(distributed, precision, args, device)
    evaluator = create_evaluator(model, precision, device)
    best = Best(args.best_metric)
    to_save = {
        "trainer": trainer, "model": TrainedParameters(model.pretrained), "optimizer": precision.optimizer,
        "precision": precision, "best": best, "random": RandomState(),
    }  # fmt: skip
    set_seed(args.seed and (args.seed + idist.get_rank()) % 2**32)  # each process drops out units of its own
    if run:
        load_checkpoint(run, to_save)
        trainer.state.max_epochs = args.n_epochs
    stale = 0 < args.patience <= best.since
    done = stale or trainer.state.epoch >= args.n_epochs
    if done and args.resume != "auto":
        done_by = "--patience" if stale else "--n_epochs"
        raise UserError(f"--resume {run}: it is done; a greater {done_by} adds more")
    folder = open_run_folder(args, run, trainer, model, tokenizer) if idist.get_rank() == 0 else None

    stopped = attach_handlers(args, folder, trainer, evaluator, model, to_save, sampler, valid_loader)
    model.train()
    if not done:  # else a launcher has restarted a run at its very end
        trainer.run(train_loader, max_epochs=args.n_epochs)
    idist.finalize()
    if stopped:
        logger.info("Stopped; go on with: python train.py --resume %s", folder)
        sys.exit(128 + stopped[0])
    logger.info("Done; chat with it: python interact.py --model_checkpoint %s", folder)
    return str(folder)


if __name__ == "__main__":
    run_script(train)
