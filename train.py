"""Fine-tune GPT, GPT-2 or another decoder on dialogs with personas: a language model and a choice among candidates.

# CPU, the embedded example, a minute or two
python train.py --dataset_path example/personachat.json --model_checkpoint example/model

# one GPU: GPT on PersonaChat, both downloaded
python train.py

# a model that is too large for one GPU, in shards on eight: docs/scale.md
torchrun --nproc_per_node=8 train.py --sharded --fp16 bf16 --gradient_checkpointing --model FOLDER

# eight GPUs of one machine: the paper's recipe
torchrun --nproc_per_node=8 train.py --gradient_accumulation_steps 4 --lm_coef 2.0 --max_history 2 --n_epochs 1 \
    --num_candidates 4 --personality_permutations 2 --train_batch_size 2 --valid_batch_size 2
"""

import contextlib
import gc
import logging
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from transfertransfo.cli import (
    ArgumentParser,
    add_data_flags,
    add_model_flags,
    add_optimisation_flags,
    add_program_flags,
    add_run_flags,
    add_seed_flag,
    begin_section,
    die_of_interrupts,
    launched,
    number,
    run_script,
    set_seed,
    set_up_logging,
)
from transfertransfo.errors import SettingError, UserError, first_line, flags_named, in_flags, require


def make_parser() -> ArgumentParser:
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
        "--quantize",
        choices=["", "4bit"],
        default="",
        help='hold the frozen weights beside adapters in 4 bits, which takes an eighth of the memory ("" = off)',
    )
    begin_section(parser, "data")
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
    begin_section(parser, "hardware")
    parser.add_argument(
        "--fp16",
        choices=["", "O0", "O1", "O2", "O3", "bf16"],
        default="",
        help='precision: bf16, or apex\'s O0 to O3 ("" or O0 = float32)',
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="save memory by computing each layer twice"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model's blocks with torch.compile: a minute or so at the start, then faster steps",
    )
    parser.add_argument(
        "--sharded",
        action="store_true",
        help="divide parameters, gradients and optimizer state among the processes, instead of a copy in each",
    )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=number(int, -1),
        default=-1,
        help="set by torch.distributed.launch (-1 = one process)",
    )
    add_run_flags(parser)
    add_seed_flag(parser)
    add_program_flags(parser)

    parser.set_defaults(world_size=launched("WORLD_SIZE", 1, low=1))
    return parser


if __name__ == "__main__":  # what follows takes seconds to load: `--help` and a wrong flag are answered without it
    run_script(lambda: make_parser().parse_args())
    die_of_interrupts()

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.dataset import load_dataset, paused_collector
from transfertransfo.data.inputs import (
    MODEL_INPUTS,
    PADDED_INPUTS,
    BucketSampler,
    Example,
    build_input_from_segments,
    pad_dataset,
)
from transfertransfo.data.sources import recorded_dataset
from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, SPECIAL_TOKENS, make_chat_template
from transfertransfo.evaluation.metrics import right_places
from transfertransfo.evaluation.samples import choose_turns, reply_to_turns
from transfertransfo.model.checks import check_step
from transfertransfo.model.double_heads import (
    DoubleHeads,
    add_adapter_,
    add_special_tokens_,
    base_digest,
    compile_blocks_,
    default_device,
    enable_gradient_checkpointing_,
    freeze_embeddings_,
    freeze_unread_,
    halve_frozen_,
    merge_adapter_,
)
from transfertransfo.model.loading import into_shards_, load_model
from transfertransfo.model.lora import is_adapter, rank_of
from transfertransfo.model.packing import use_eager_attention_
from transfertransfo.model.quantization import quantize_
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import files_digest, load_tokenizer
from transfertransfo.processes import one_line_for_a_lost_process, one_process_first, setup_distributed
from transfertransfo.training.checkpoints import (
    Best,
    RandomState,
    Shards,
    TrainedParameters,
    load_checkpoint,
    save_checkpoint,
)
from transfertransfo.training.distribution import (
    average_distributed_scalar,
    check_same_run,
    share_weights_,
)
from transfertransfo.training.engines import Diverged, Optimisation, create_evaluator, create_trainer, make_adamw
from transfertransfo.training.handlers import (
    attach_checkpoints,
    attach_figures,
    attach_replies,
    attach_validation,
)
from transfertransfo.training.loaders import Loaders, first_share, make_loaders
from transfertransfo.training.memory import estimate_memory, free_memory, largest_batch
from transfertransfo.training.outcome import Outcome, Plan, log_outcome, log_plan
from transfertransfo.training.precision import Precision, make_precision
from transfertransfo.training.runs import (
    NOT_RESUMED,
    Found,
    changed_arguments,
    check_kinds,
    divide_batch,
    find_run,
    locked,
    make_record,
    open_run_folder,
    read_arguments,
)

__all__ = [  # the original's public names, wherever they are defined now
    "ATTR_TO_SPECIAL_TOKEN", "MODEL_INPUTS", "PADDED_INPUTS", "SPECIAL_TOKENS", "add_special_tokens_",
    "average_distributed_scalar", "build_input_from_segments", "get_data_loaders", "pad_dataset", "train",
]  # fmt: skip

logger = logging.getLogger(__name__)

GO_ON = "go on from the last checkpoint with --resume"
SMALL = 10_000_000  # parameters of a model whose memory is no question
GPU_MULTIPLE = 8  # tokens; a GPU's matrix units and attention take rows of such lengths


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, Path | None]:
    """The flags and the run folder to resume, whose arguments stand in for flags that are not given.

    Raises:
        UserError: there is no such run, or a flag differs that may not.
    """
    parser = make_parser()
    args, run = parser.parse_args(argv), None
    defaults = vars(parser.parse_args([]))
    args.dataset_path = args.dataset_path or recorded_dataset(args.model_checkpoint)
    if args.resume:
        run = find_run(args.resume, vars(args), defaults)
    if run:
        args = resume_args(parser, argv, run, defaults)
    args.local_rank = launched("LOCAL_RANK", args.local_rank, low=-1)
    if args.sharded:
        check_sharded(args)
    if args.quantize:
        check_quantized(args)
    return args, run


def check_sharded(args: Namespace) -> None:
    """Check that no flag is given that shards do not go with.

    Raises:
        UserError: one is.
    """
    if args.fp16 in ("O1", "O2", "O3"):
        raise UserError(f"--sharded: not with --fp16 {args.fp16}, whose weights and scale are of one device; use bf16")
    if args.compile:
        raise UserError("--sharded: not with --compile")
    if args.merge_lora:
        raise UserError("--sharded: not with --merge_lora; without it the run folder holds the adapter")


def check_quantized(args: Namespace) -> None:
    """Check that quantised weights have adapters, and that no flag is given that they do not go with.

    Raises:
        UserError: they have none, or one is.
    """
    flag = f"--quantize {args.quantize}"
    if args.lora_rank == 0 or (args.lora_rank is None and not is_adapter(args.model_checkpoint)):
        raise UserError(f"{flag}: needs --lora_rank; weights of 4 bits cannot be trained themselves")
    if args.merge_lora:
        raise UserError(f"{flag}: not with --merge_lora; without it the run folder holds the adapter")
    if args.sharded:
        raise UserError(f"{flag}: not with --sharded; each process has the weights in 4 bits")
    if args.fp16 in ("O2", "O3"):
        raise UserError(f"{flag}: not with --fp16 {args.fp16}, which makes float16 of all weights; use bf16")
    require(flag, "bitsandbytes")


def resume_args(parser: ArgumentParser, argv: list[str] | None, run: Path, defaults: Mapping) -> Namespace:
    """The flags as given, else as the run to resume has them; of flags that are newer than the run, their defaults.

    Raises:
        UserError: one differs that may not.
    """
    saved = {**defaults, **read_arguments(run)}
    check_kinds(run, saved, defaults)
    if saved.get("sharded"):
        saved |= divide_batch(saved, launched("WORLD_SIZE", 1, low=1))
    parser.set_defaults(**{name: saved[name] for name in defaults.keys() - NOT_RESUMED})
    args = parser.parse_args(argv)
    if changed := changed_arguments(saved, vars(args)):
        names = {name: f"--{name}" for name in changed} | {"world_size": "the number of processes"}
        told = [f"{names[name]} is {there!r} there, {here!r} here" for name, (there, here) in changed.items()]
        raise UserError(f"--resume {run}: {', '.join(told)}; go on with the same, or start a new run")
    return args


def get_data_loaders(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, n_positions: int = 512, history_start: int = 0
) -> Loaders:
    """Loaders of packed batches, and their samplers: train, valid, train, valid.

    The valid ones are None where the dataset has no such split.

    Raises:
        UserError: no dataset, no training split, or token ids that the tokenizer does not have.
    """
    return load_batches(args, tokenizer, n_positions, history_start)[0]


@paused_collector()  # each end of a pause would look at all again
def load_batches(
    args: Namespace,
    tokenizer: PreTrainedTokenizerBase,
    n_positions: int,
    history_start: int,
    saved_digest: str | None = None,
) -> tuple[Loaders, str]:
    """The result of `get_data_loaders`, and the dataset's digest, which must be that of a run to resume."""
    with one_process_first():  # one process a machine tokenises, the others find its cache
        content = load_dataset(tokenizer, args.dataset_path, args.dataset_cache, args.skip_bad_dialogs)
    name, digest = args.dataset_path or "PersonaChat", content.digest
    if saved_digest not in (None, digest):
        told = f"--resume: {name} is not what it was when the run began, as text or as token ids"
        raise UserError(f"{told}; start a new run")
    if "train" not in content.splits:
        raise UserError(f"{name}: no train split to train on")
    if "valid" not in content.splits and args.valid_share:
        content = content.hold_out(args.valid_share)
    valid, places = None, list[list[int]]()
    if "valid" in content.splits:
        places = right_places(content.candidates("valid"), content.texts)  # first: what it takes is given back
        valid = content.dialogs("valid", content.tokens)
    else:
        void = "".join(f", {flag} has no effect" for flag in flags_of_validation(args))
        told = "%s: no valid split: nothing is validated%s; --valid_share holds some of train out"
        logger.warning(told, name, void)
    stop = first_share(content.count("train"), args.train_share)
    train = content.dialogs("train", content.tokens, stop=stop, num_candidates=args.num_candidates)
    on_gpu = (args.device or default_device()) != "cpu"
    loaders = make_loaders(
        train, valid, places, tokenizer, n_positions=n_positions, history_start=history_start,
        max_history=args.max_history, personality_permutations=args.personality_permutations,
        by_dialog=args.batch_by == "dialog",
        train_batch_size=args.train_batch_size, valid_batch_size=args.valid_batch_size, seed=args.seed,
        multiple=GPU_MULTIPLE if on_gpu else 1,
    )  # fmt: skip
    return loaders, digest


def flags_of_validation(args: Namespace) -> list[str]:
    """The flags that are given and do something where there is a validation alone."""
    given = {
        "--export best": args.export == "best",
        "--best_metric": args.best_metric != "hits@1",
        "--patience": args.patience,
        "--eval_before_start": args.eval_before_start,
    }
    return [flag for flag, value in given.items() if value]


def digest_of_base(args: Namespace, model: DoubleHeads, saved: Mapping) -> str:
    """Fingerprint of the run's base model.

    A resumed run without adapters does not read that model. Its files are hashed only where the path has changed.
    """
    if rank_of(model.network):
        return base_digest(model)
    is_named_so = args.model_checkpoint == saved.get("model_checkpoint")
    return saved.get("base_digest", "") if is_named_so else files_digest(args.model_checkpoint)


def make_optimisation(args: Namespace) -> Optimisation:
    return Optimisation(**{field.name: getattr(args, field.name) for field in fields(Optimisation)})


def prepare_model(
    args: Namespace, run: Path | None, device: torch.device
) -> tuple[DoubleHeads, PreTrainedTokenizerBase]:
    """The model that is to be trained and its tokenizer, with the dialog tokens.

    Args:
        run: the run folder to resume. With adapters it holds these alone.
    """
    source = args.model_checkpoint if args.lora_rank else run or args.model_checkpoint
    tokenizer = load_tokenizer(source, args.gpt_tokenization)
    # what is quantised goes to the device after that: as a whole it may not fit
    first_device = "cpu" if args.quantize else device
    model = load_model(source, first_device, from_scratch=not args.lora_rank, in_shards=args.sharded)
    add_special_tokens_(model, tokenizer)
    tokenizer.chat_template = make_chat_template(tokenizer, args.max_history)
    if args.lora_rank:
        add_adapter_(model, tokenizer, args.lora_rank, args.model_checkpoint)
    elif args.lora_rank == 0:
        merge_adapter_(model)
    if args.merge_lora and not rank_of(model.network):
        logger.warning("--merge_lora: has no effect without adapters; --lora_rank trains some")
    # set even if unchanged: the run folder records only what is set
    model.token_types = model.token_types if args.token_types is None else args.token_types == "on"
    if args.history_start is not None:
        model.history_start = args.history_start
    freeze_unread_(model)
    if device.type == "cpu" and args.fp16 == "bf16" and not args.sharded:
        use_eager_attention_(model)
    log_size(model)
    model.quantize = args.quantize
    if args.quantize:
        quantize_(model, device, bf16=args.fp16 == "bf16")
    # merged weights are exported, so they stay as they are
    if args.fp16 == "bf16" and rank_of(model.network) and not args.merge_lora:
        halve_frozen_(model)
    return model, tokenizer


def place_model(args: Namespace, model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
    """Have a model compute as the flags say, with the first process's weights; in shards, if it is to be."""
    if args.gradient_checkpointing:
        enable_gradient_checkpointing_(model)
    if not args.sharded:
        check_prepared(args, model)
    if args.compile:
        compile_blocks_(model)
    share_weights_(model)  # before half precision copies them: with --seed 0 each process has drawn its own
    if args.sharded:
        into_shards_(model, args.model_checkpoint, device, bf16=args.fp16 == "bf16")
    if args.freeze_embeddings or rank_of(model.network):
        freeze_embeddings_(model, tokenizer)


def tell_memory(args: Namespace, model: DoubleHeads, loader: DataLoader, device: torch.device) -> str:
    """Say what a step needs of a device's memory, and what helps where that is too much; returns what was said.

    "" where it is no question, of models under `SMALL` parameters, and where it is not known.
    """
    if sum(map(torch.numel, model.parameters())) < SMALL or args.fp16 in ("O2", "O3"):
        return ""
    half = {"bf16": torch.bfloat16, "O1": torch.float16}.get(args.fp16)
    try:
        memory = estimate_memory(
            model, largest_batch(loader), device, half=half,
            micro_steps=args.gradient_accumulation_steps, n_processes=idist.get_world_size(), sharded=args.sharded,
            checkpointing=args.gradient_checkpointing,
        )  # fmt: skip
    except Exception as error:  # of a model's own code that asks for values, where shapes alone are given
        logger.debug("memory: not known", exc_info=error)
        return ""
    logger.info("Memory: %s", memory)
    if 0 < (free := free_memory(device)) < memory.peak:
        logger.warning("%.2f GB are free: a step will hardly fit. What helps: %s", free / 1e9, memory_savers(args))
    return str(memory)


def memory_savers(args: Namespace) -> str:
    """The flags that save memory and are not given yet, those that cost least first, as docs/questions.md has them."""
    batch, steps = args.train_batch_size, args.gradient_accumulation_steps
    savers = [f"--train_batch_size {batch // 2} --gradient_accumulation_steps {2 * steps}"] if batch > 1 else []
    savers += ["--fp16 bf16"] if args.fp16 in ("", "O0") else []
    savers += [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
    savers += [] if args.num_candidates in (1, 2) else ["--num_candidates 2"]
    savers += ["--gradient_accumulation_steps 1"] if args.sharded and steps > 1 else []
    savers += [] if args.sharded else ["torchrun with --sharded"]
    savers += [] if args.lora_rank else ["--lora_rank 16"]
    savers += ["--quantize 4bit"] if args.lora_rank and not (args.quantize or args.sharded) else []
    return "; ".join(savers) or "more GPUs"


def check_prepared(args: Namespace, model: DoubleHeads) -> None:
    """Check that the model can be trained with the flags that change how it computes.

    Raises:
        UserError: it cannot.
    """
    bf16 = args.fp16 == "bf16"
    given = {
        "fp16 bf16": bf16,
        "gradient_checkpointing": args.gradient_checkpointing,
        "lora_rank": rank_of(model.network),
        "quantize 4bit": args.quantize,
    }
    told = [setting for setting, value in given.items() if value]
    if not told:
        return
    try:
        check_step(model, bf16=bf16)
    except UserError as error:
        advice = "leave it out" if len(told) == 1 else "leave one of them out"
        names = [setting.split()[0] for setting in told]
        raise SettingError(f"{', '.join(told)}: {error}; {advice}", *names) from error


def log_size(model: DoubleHeads) -> None:
    parameters = sum(map(torch.numel, model.parameters()))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = f", of which {trained} are trained" if trained < parameters else ""
    logger.info("Model: %s, %d parameters%s", model.pretrained.config.model_type, parameters, share)


def make_plan(args: Namespace, sampler: BucketSampler) -> Plan:
    return Plan(
        n_examples=int(sampler.counts.sum()), n_batches=len(sampler), n_epochs=args.n_epochs,
        micro_steps=args.gradient_accumulation_steps, batch_size=args.train_batch_size * idist.get_world_size(),
        lr=args.lr,
    )  # fmt: skip


def training_state(args: Namespace, model: DoubleHeads, trainer: Engine, precision: Precision, best: Best) -> dict:
    """The parts of a checkpoint, by name."""
    frozen = not rank_of(model.network)  # else the base model has them
    tensors: dict[str, Any]
    if args.sharded:
        tensors = {"shards": Shards(model, precision.optimizer, frozen)}
    else:
        tensors = {"model": TrainedParameters(model.pretrained, frozen), "optimizer": precision.optimizer}
    return {"trainer": trainer} | tensors | {"precision": precision, "best": best, "random": RandomState()}


def is_done(args: Namespace, run: Path | None, trainer: Engine, best: Best) -> bool:
    """Whether a run to resume is at its end already, as one that a launcher has restarted there may be.

    Raises:
        UserError: it is, and who named it wants more.
    """
    ends = {
        "--patience": 0 < args.patience <= best.validations_since,
        "--n_epochs": trainer.state.epoch >= args.n_epochs,
    }
    ended_by = [f"a greater {flag}" for flag, ended in ends.items() if ended]
    if ended_by and args.resume != "auto":
        raise UserError(f"--resume {run}: it is done; {' and '.join(ended_by)} adds more")
    return bool(ended_by)


def attach_handlers(
    args: Namespace,
    trainer: Engine,
    evaluator: Engine,
    model: DoubleHeads,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path | None,
    log_every: int,
    precision: Precision,
    best: Best,
    save: Callable[[], None],
    sampler: BucketSampler,
    valid_loader: DataLoader | None,
) -> list[int]:
    """Attach what happens around the steps: the batches' order, figures, validation, export, checkpoints.

    Args:
        folder: the run folder, None on the processes that do not write.
        log_every: steps between two lines of figures.
        best: is told of validations and exports.
        save: writes a checkpoint.

    Returns:
        A list in which the signal that stopped the run will stand.
    """

    def export() -> None:
        losses = getattr(trainer.state, "losses", None)
        if valid_loader is None and losses is not None and not losses.isfinite().all():
            raise Diverged(f"step {trainer.state.optimizer_step}: the loss is not finite; nothing is exported")
        if folder is not None or args.sharded:
            save_model(model, folder, merge_lora=args.merge_lora)
        best.exported = trainer.state.epoch

    @trainer.on(Events.EPOCH_STARTED)
    def begin_epoch(engine: Engine) -> None:
        done = engine.state.iteration % len(sampler)  # more than 0 where a resumed run goes on within an epoch
        sampler.set_epoch(engine.state.epoch, done)

    def make_replies(turns: list[Example]) -> list[dict[str, str]]:
        with precision.autocast():
            return reply_to_turns(model, tokenizer, turns)

    if valid_loader is not None and (folder is not None or args.sharded):  # of shards no process computes alone
        trees: Any = valid_loader.dataset  # torch knows no sequence
        attach_replies(evaluator, partial(make_replies, choose_turns([*chain(*trees)])))
    attach_figures(
        trainer, evaluator, precision, folder, log_every=log_every, batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )  # fmt: skip
    if valid_loader is not None:
        attach_validation(
            trainer, evaluator, valid_loader, best, export_best=export if args.export == "best" else None,
            patience=args.patience, before_start=args.eval_before_start,
        )  # fmt: skip
    if args.export == "last" or valid_loader is None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, export)
    return attach_checkpoints(
        trainer, save, n_epochs=args.n_epochs, save_every=args.save_every,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )  # fmt: skip


@contextlib.contextmanager
def naming_flags_that_help(args: Namespace, memory: str) -> Iterator[None]:
    """Add to an error that ends a run in its midst the flags that help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        needed = f"a step needs {memory}" if memory else first_line(error)
        raise UserError(f"out of memory: {needed}; what helps: {memory_savers(args)}") from error
    except Diverged as error:
        raise UserError(f"{error}; start a new run with a lower --lr, or with --fp16 bf16 or none") from error
    except UserError as error:
        raise UserError(f"{in_flags(error)}; {GO_ON}") from error


@flags_named()
@one_line_for_a_lost_process(remedy="--resume goes on from the last checkpoint")
def train(argv: list[str] | None = None) -> str:
    """Train as the command line says; returns the run folder, which is a checkpoint itself.

    Raises:
        UserError: input that cannot be used.
    """
    args, run = parse_args(argv)
    device = setup_distributed(args.device or default_device(), args.local_rank, alone=args.sharded)
    check_same_run(run)
    set_up_logging(logging.INFO if idist.get_rank() == 0 else logging.ERROR)
    set_seed(args.seed)
    with locked(run if idist.get_rank() == 0 else None):
        folder, stopped = train_in(run, args, device)
    # trainer and model hold the group of processes, whose threads must end before Python does: else they abort it
    gc.collect()
    idist.finalize()
    if stopped:
        sys.exit(128 + stopped)
    return folder


def train_in(run: Path | None, args: Namespace, device: torch.device) -> tuple[str, int]:
    """Train in a run folder that is this process's own, or in a new one.

    Returns:
        The folder, and the signal that stopped the run (0 = none).
    """
    saved = read_arguments(run) if run else {}
    model, tokenizer = prepare_model(args, run, device)
    loaders, digest = load_batches(args, tokenizer, model.n_positions, model.history_start, saved.get("dataset_digest"))
    train_loader, valid_loader, sampler, _ = loaders
    memory = tell_memory(args, model, train_loader, device)
    place_model(args, model, tokenizer, device)
    base = digest_of_base(args, model, saved)
    if saved.get("base_digest", base) != base:
        raise UserError(f"--resume: {args.model_checkpoint} is not the model that the run began with; start a new run")
    plan = make_plan(args, sampler)
    found = Found(
        gpt_tokenization=tokenizer.init_kwargs.get("gpt_tokenization"),
        history_start=model.history_start,
        token_types="on" if model.token_types else "off",
        lora_rank=rank_of(model.network),
        log_every=args.log_every or (1 if plan.n_steps < 200 else 10),
        dataset_digest=digest,
        base_digest=base,
    )

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    make_optimizer = partial(make_adamw, names=names, lr=args.lr, head_lr=args.head_lr)
    precision = make_precision(args.fp16, model, make_optimizer, device)  # before the model is distributed
    copied = idist.get_world_size() > 1 and not args.sharded
    distributed = DistributedDataParallel(model) if copied else model
    count_ahead = sampler.count_labels if args.token_mean else None
    trainer = create_trainer(distributed, precision, make_optimisation(args), device, count_ahead)
    evaluator = create_evaluator(model, precision, device)
    best = Best(args.best_metric)
    state = training_state(args, model, trainer, precision, best)
    set_seed(args.seed and (args.seed + idist.get_rank()) % 2**32)  # each process drops out units of its own
    if run:
        load_checkpoint(run, state)
        trainer.state.max_epochs = args.n_epochs
    done = is_done(args, run, trainer, best)
    folder = None
    if idist.get_rank() == 0:
        record = make_record(vars(args), found, saved)
        folder = open_run_folder(run, record, trainer.state, model.pretrained.config, tokenizer)

    log_above_bars = logging_redirect_tqdm()  # else a line begins where the bar of a terminal ends
    with locked(None if run else folder), naming_flags_that_help(args, memory), log_above_bars:
        stopped = attach_handlers(
            args, trainer, evaluator, model, tokenizer, folder=folder, log_every=found.log_every, precision=precision,
            best=best, save=partial(save_checkpoint, folder, trainer, state, n_saved=args.n_saved), sampler=sampler,
            valid_loader=valid_loader,
        )  # fmt: skip
        log_plan(plan)
        model.train()
        began = time.monotonic()
        if not done:
            trainer.run(train_loader, max_epochs=args.n_epochs)
    if stopped:
        logger.info("Stopped; go on with: python train.py --resume %s", shlex.quote(str(folder)))
        return str(folder), stopped[0]
    if folder is not None and not done:
        seconds = time.monotonic() - began
        log_outcome(Outcome.of(folder), args.export, args.best_metric, exported=best.exported, seconds=seconds)
    logger.info("Done; chat with it: python interact.py --model_checkpoint %s", shlex.quote(str(folder)))
    return str(folder), 0


if __name__ == "__main__":
    run_script(train)
