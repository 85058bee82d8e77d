"""The flags that the three scripts share, one-line errors, seeds, devices and the log."""

import argparse
import logging
import os
import random
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from transfertransfo.errors import UserError, first_line, printable, printable_lines
from transfertransfo.files import check_writable

PACKAGE, _, _ = __name__.partition(".")
VERSION = "0.1.0"
DATASET_CACHE = "./dataset_cache.bin"
DEBUG = "CONVAI_DEBUG"  # environment variable, so that processes which a script starts know of it too


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help where there are such; else the help's text says what it means that a flag is unset."""

    def _get_help_string(self, action: argparse.Action) -> str | None:  # argparse's hook
        untold = action.default is None or action.default is False or action.default == ""
        return action.help if untold else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with errors of one line, without the usage above them, and with defaults in the help."""

    def __init__(self, description: str):
        self.section: argparse._ArgumentGroup | None = None
        super().__init__(description=description, formatter_class=HelpFormatter)
        self.sections: dict[str, argparse._ArgumentGroup] = {}

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Declare a flag in the section that has been begun."""
        if self.section:
            return self.section.add_argument(*names, **options)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def begin_section(parser: argparse.ArgumentParser, title: str) -> None:
    """Have the flags that are declared from now on stand under a title in the help; ParlAI's parser has its own."""
    if isinstance(parser, ArgumentParser):
        if title not in parser.sections:
            parser.sections[title] = parser.add_argument_group(title)
        parser.section = parser.sections[title]


def run_script(script: Callable[[], object]) -> None:
    """Run a script's entry function; a `UserError`, and what the system refuses, become one line and exit status 2.

    Any other exception becomes a line and exit status 1. With `--debug` the traceback stands above that line, with
    those of the exceptions behind it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell has closed it, as in `script.py <&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of `die_of_interrupts`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        script()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell counts a death by SIGINT
    except BrokenPipeError:  # the reader of a pipe has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, or a file or folder that has gone meanwhile
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or first_line(error)}")
    except Exception as error:  # a fault of this program, or of another library with what it was given
        fail(f"{type(error).__name__}: {first_line(error)} (not foreseen; --debug shows where it happened)", status=1)


def die_of_interrupts() -> None:
    """Have Ctrl-C end the process as it stands, without a traceback, until `run_script`: while a script is loaded."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def fail(message: str, status: int = 2) -> NoReturn:
    """End the script with a line for the exception that is being handled."""
    if debugging():
        traceback.print_exc()
    print(f"{os.path.basename(sys.argv[0])}: error: {printable_lines(message)}", file=sys.stderr)
    sys.exit(status)


def debugging() -> bool:
    """Whether the exceptions behind one-line errors are to be shown."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def check_output(flag: str, path: str | None) -> None:
    """Check that a file can be made there, if a flag gives a path: before the work that it is to hold, not after.

    Raises:
        UserError: none can.
    """
    try:
        if path:
            check_writable(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: no file can be written there ({error.strerror})") from error


def number(kind: type, low: float = -float("inf"), high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: an int or a float within [low, high]."""
    name = "a whole number" if kind is int else "a number"
    bounds = f" from {low} to {high}" if high != float("inf") else f" of at least {low}"
    expected = name + (bounds if low != -float("inf") else "")

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):  # NaN fails the comparison too
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def launched(name: str, default: int, low: int) -> int:
    """The number that a launcher of several processes has set as an environment variable, else the default.

    Raises:
        UserError: it is no number of at least `low`.
    """
    try:
        return int(number(int, low)(os.environ.get(name, str(default))))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}; a launcher as torchrun sets this environment variable") from error


def add_data_flags(parser: ArgumentParser) -> None:
    begin_section(parser, "data")
    parser.add_argument(
        "--dataset_path",
        default="",
        help='dataset: a file, a folder, a URL or hf:NAME ("" = the one the model was trained on, else PersonaChat,'
        " downloaded)",
    )
    parser.add_argument(
        "--dataset_cache",
        default=DATASET_CACHE,
        help="stem of the tokenised dataset's file; its name gets a key of the content",
    )
    parser.add_argument(
        "--skip_bad_dialogs",
        action="store_true",
        help="leave out the dialogs that have a fault, and say how many, instead of ending there",
    )


def add_model_flags(parser: ArgumentParser, default: str) -> None:
    begin_section(parser, "model")
    parser.add_argument(
        "--model_checkpoint",
        "--model",
        default=default,
        help="model: a hub name, a folder, a GGUF file, or the URL of an archive"
        + ("" if default else ' ("" = download the fine-tuned model)'),
    )
    parser.add_argument(
        "--gpt_tokenization",
        choices=["spacy", "basic"],
        help="how GPT's text is split into words (unset = as the checkpoint records; where it does"
        " not, basic for a fine-tuned one and spacy for a new run)",
    )
    parser.add_argument(
        "--max_history",
        type=number(int, -1),
        default=2,
        help="earlier exchanges kept in the history, so 2 * max_history + 1 turns (-1 = the whole dialog)",
    )
    parser.add_argument(
        "--history_start",
        type=number(int, 0),
        help="position at which the history begins whatever the persona's length, as in the"
        " competition's system (0 = after the persona; unset = as the checkpoint records)",
    )
    parser.add_argument("--device", type=device, default=None, help="cpu, cuda or cuda:N (unset = cuda if there)")


def add_precision_flag(parser: ArgumentParser) -> None:
    """`--fp16` of a model that is not trained."""
    parser.add_argument(
        "--fp16",
        choices=["", "bf16"],
        default="",
        help='precision of the model: bf16, which takes half the memory ("" = float32)',
    )


def add_decoding_flags(parser: ArgumentParser) -> None:
    begin_section(parser, "replies")
    parser.add_argument("--no_sample", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--max_length", type=number(int, 1), default=20, help="longest reply, in tokens")
    parser.add_argument(
        "--min_length",
        type=number(int, 0),
        default=1,
        help="shortest reply, in tokens, where top_k and top_p leave a word to go on with",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 1e-6),
        default=0.7,
        help="sampling temperature: below 1 sharper, above 1 flatter",
    )
    parser.add_argument("--top_k", type=number(int, 0), default=0, help="sample among the k likeliest tokens (0 = off)")
    parser.add_argument(
        "--top_p",
        type=number(float, 0, 1),
        default=0.9,
        help="sample among the likeliest tokens with this much probability together (0 = off)",
    )
    parser.add_argument(
        "--num_beams",
        type=number(int, 0),
        default=0,
        help="beam search with this many beams in place of sampling (0 = off, 1 = greedy)",
    )
    parser.add_argument(
        "--length_penalty",
        type=number(float, 0, 100),
        default=1.0,
        help="a beam's log-probability is divided by its length to this power (0 = off)",
    )
    parser.add_argument(
        "--no_repeat_ngram_size",
        type=number(int, 0),
        default=0,
        help="no sequence of this many tokens twice in a reply (0 = off)",
    )
    parser.add_argument(
        "--repetition_penalty",
        type=number(float, 1e-6, 100),
        default=1.0,
        help="above 1, a token that the reply has already is less likely to come again (1 = off)",
    )
    parser.add_argument(
        "--block_history_ngram",
        type=number(int, 0),
        default=0,
        help="no sequence of this many tokens from the model's own earlier turns (0 = off)",
    )
    parser.add_argument("--num_samples", type=number(int, 1), default=1, help="replies to sample, in one batch")
    parser.add_argument(
        "--rank", action="store_true", help="of several replies give the one that the model's choice head scores best"
    )
    parser.add_argument(
        "--consensus", action="store_true", help="of several replies give the one that shares most with the others"
    )


PRESETS: dict[str, dict[str, Any]] = {  # ways to choose a reply, as values of flags
    "original": {},
    "varied": {"max_history": -1, "no_repeat_ngram_size": 3, "block_history_ngram": 3},
    "ranked": {"num_samples": 4, "rank": True},
    "beams": {"num_beams": 4, "no_repeat_ngram_size": 3, "block_history_ngram": 4},
}
WAYS = {"no_sample", "num_beams", "num_samples"}  # of which one alone is taken


def add_preset_flag(parser: ArgumentParser) -> None:
    flags = "; ".join(
        f"{name} = " + " ".join(f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in values.items())
        for name, values in PRESETS.items()
        if values
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help=f"several flags in one, each of which can still be given: original = their defaults; {flags}"
        " (unset = varied for example/smollm2, ranked for example/model, else original)",
    )


def parse_with_preset(
    parser: ArgumentParser, argv: list[str] | None, preset_of: Callable[[argparse.Namespace], str]
) -> argparse.Namespace:
    """The arguments with the values of a preset where no flag gives another one.

    A flag for another way to choose a reply takes the place of the preset's way.

    Args:
        preset_of: gives the preset where none is asked for.
    """
    unset = object()
    decoding = {name for values in PRESETS.values() for name in values} | WAYS | {"consensus"}
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(decoding, unset)))
    args.preset = args.preset or preset_of(args)
    given = {name for name in decoding if getattr(args, name) is not unset}
    values = dict(PRESETS[args.preset])
    if chosen := given & WAYS:
        ranked = "num_samples" in chosen and args.num_samples > 1
        values = {name: value for name, value in values.items() if name not in WAYS and (name != "rank" or ranked)}
    if "consensus" in given:  # another choice among the same replies
        values.pop("rank", None)
    for name in decoding - given:
        setattr(args, name, values.get(name, parser.get_default(name)))
    return args


def add_optimisation_flags(parser: ArgumentParser) -> None:
    """Declare by which settings and for how long training changes a model."""
    begin_section(parser, "optimisation")
    parser.add_argument("--n_epochs", type=number(int, 1), default=3, help="passes over the training examples")
    parser.add_argument(
        "--train_batch_size", type=number(int, 1), default=4, help="examples of one forward, in each process"
    )
    parser.add_argument("--valid_batch_size", type=number(int, 1), default=4, help="the same in validation")
    parser.add_argument(
        "--batch_by",
        choices=["turn", "dialog"],
        default="turn",
        help="what a training batch is made of: single turns, or whole dialogs, which compute what their turns share"
        " once, as many as hold --train_batch_size examples",
    )
    parser.add_argument(
        "--gradient_accumulation_steps", type=number(int, 1), default=8, help="forwards of one optimizer step"
    )
    parser.add_argument(
        "--token_mean",
        action="store_true",
        help="make a step's loss the mean over all reply tokens of its forwards, not the mean of their means",
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
    """Declare a training run's log, validation, checkpoints and resumption."""
    begin_section(parser, "run")
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


def add_seed_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, help="random seed (0 = not seeded)")


class DebugAction(argparse.Action):
    """Sets `DEBUG`. The parsed arguments do not have the flag: it decides nothing that a run computes."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=False, **options)

    def __call__(self, *_: object) -> None:
        os.environ[DEBUG] = "1"


def add_program_flags(parser: ArgumentParser) -> None:
    begin_section(parser, "program")
    parser.add_argument(
        "--version", action="version", version=f"TransferTransfo {VERSION}", help="show the version, and end"
    )
    parser.add_argument(
        "--debug", action=DebugAction, help=f"show the exception behind a one-line error, as {DEBUG}=1 does"
    )


def add_evaluation_flags(parser: ArgumentParser, *more_types: str) -> None:
    """Declare what is measured and how, for the script and for ParlAI's agent alike.

    Args:
        more_types: choices of `--eval_type` that ParlAI does not have.
    """
    begin_section(parser, "measurement")
    parser.add_argument(
        "--eval_type",
        choices=["hits@1", "ppl", "f1", "all", *more_types],
        default="hits@1",
        help="what to measure" + ("; selfchat: what the model's talks with itself suffer from" if more_types else ""),
    )
    add_model_flags(parser, default="")
    add_precision_flag(parser)
    add_decoding_flags(parser)
    begin_section(parser, "measurement")
    parser.add_argument(
        "--dict_file",
        default=None,
        help="ParlAI's dictionary for ppl: word, tab, count a line (unset = the dataset's words)",
    )
    parser.add_argument(
        "--gpt2_ppl",
        choices=["spaced", "original"],
        default="spaced",
        help="words for ppl where pieces carry the space before them, as GPT-2's: with it, or without"
        " as in the original",
    )
    add_seed_flag(parser)


def device(text: str) -> str:
    """An argparse type: a torch device that this machine has."""
    import torch  # not at the top: `--help` answers without it

    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    kind, _, index = text.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} asked for, but torch sees no GPU here; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} asked for, but torch sees {torch.cuda.device_count()} GPUs here")
    return text


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators. 0 leaves them as they are, as in the original's chat."""
    if not seed:
        return
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


class PrintableFormatter(logging.Formatter):
    """Writes lines of the log that a terminal shows and does not obey: they name files, and quote what is in them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr, so that stdout carries only results."""
    logging.basicConfig(level=level, force=True)
    (handler,) = logging.getLogger().handlers
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    for library in ("httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger(PACKAGE).setLevel(logging.DEBUG if debugging() else logging.NOTSET)
    from transformers.utils.logging import disable_progress_bar, hf_hub_utils

    disable_progress_bar()  # of weights that are read or written, which takes a second
    if sys.stderr.isatty():
        hf_hub_utils.enable_progress_bars()  # of downloads, which that silences too
    for library in ("ignite", "transformers.utils.hub"):  # they log an exception that the script goes on to report
        logging.getLogger(library).setLevel(logging.CRITICAL)
