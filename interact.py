"""Chat in the terminal with a fine-tuned model that has a persona.

    python interact.py --model_checkpoint runs/Nov21_20-57-01_host_model   # a run of train.py
    python interact.py                                                      # the model of 2019, downloaded
"""

import logging
import random
import sys
from argparse import Namespace

from cli import (
    ArgumentParser,
    UserError,
    add_data_flags,
    add_decoding_flags,
    add_model_flags,
    add_seed_flag,
    run_script,
    set_seed,
    set_up_logging,
)
from decoding import sample_sequence, top_filtering
from model import load_finetuned
from utils import load_dataset, tokenize

__all__ = ["run", "sample_sequence", "top_filtering"]  # the original's public names, wherever they are defined now

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Chat with a fine-tuned model that has a persona.")
    add_data_flags(parser)
    add_model_flags(parser, default="")
    add_decoding_flags(parser)
    add_seed_flag(parser)
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    """Chat as the command line says, until the input ends.

    Raises:
        UserError: input that cannot be used.
    """
    args = parse_args(argv)
    set_up_logging(logging.WARNING)
    set_seed(args.seed)
    model, tokenizer = load_finetuned(args.model_checkpoint, args.gpt_tokenization, args.device)
    dataset = load_dataset(tokenizer, args.dataset_path, args.dataset_cache)
    personas = [persona for persona in dataset.personalities() if persona]
    if not personas:
        raise UserError(f"{args.dataset_path}: no dialog with a persona")
    persona = random.choice(personas)
    print("Persona:", *(decode_text(tokenizer, sentence) for sentence in persona))

    history = []
    while (text := read_line()) is not None:
        if not text.strip():
            print("(say something, or leave with Ctrl-D)")
            continue
        history.append(tokenize(tokenizer, [text])[0])
        reply = sample_sequence(persona, history, tokenizer, model, args)
        history = [*history, reply][-(2 * args.max_history + 1) :]
        print(decode_text(tokenizer, reply))


def read_line() -> str | None:
    """A line that the user types, or of a pipe, then echoed so that the output reads as a dialog; None at the end."""
    try:
        text = input(">>> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    if not sys.stdin.isatty():
        print(text)
    return text


def decode_text(tokenizer, ids: list[int]) -> str:
    """Text as people write it, without spaces before punctuation and within contractions."""
    return tokenizer.clean_up_tokenization(tokenizer.decode(ids, skip_special_tokens=True))


if __name__ == "__main__":
    run_script(run)
