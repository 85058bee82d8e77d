"""Chat in the terminal with a fine-tuned model that has a persona. `/help` there lists the commands.

python interact.py --model_checkpoint runs/Nov21_20-57-01_host_model   # a run of train.py
python interact.py                                                      # the model of 2019, downloaded
python interact.py --model_checkpoint runs/... --personality "i like dogs ." "i live in ohio ."
python interact.py --model_checkpoint runs/... --preset varied          # it says nothing over again
python interact.py --model_checkpoint runs/... --web                    # on a page, at 127.0.0.1:7860
printf 'hello\\n/quit\\n' | python interact.py --model_checkpoint runs/...
"""

import gc
import logging
import re
import secrets
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from transfertransfo.cli import (
    ArgumentParser,
    add_data_flags,
    add_decoding_flags,
    add_model_flags,
    add_precision_flag,
    add_preset_flag,
    add_program_flags,
    add_seed_flag,
    begin_section,
    parse_with_preset,
    run_script,
    set_seed,
    set_up_logging,
)
from transfertransfo.errors import UserError, flags_named, in_flags, printable, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from transfertransfo.decoding import Decoding
    from transfertransfo.model.double_heads import DoubleHeads

logger = logging.getLogger(__name__)

EXAMPLE = Path(__file__).absolute().parent / "example"
EMBEDDED = {"smollm2": "varied", "model": "ranked"}  # the preset of each model there, by what docs/results.md measures
GIVE_PERSONA = 'give a persona instead: --personality "i like dogs ." "i live in ohio ."'


def __getattr__(name: str) -> Callable:
    """The original's public names that live in `decoding` now: loaded, with torch, when they are asked for."""
    if name in ("sample_sequence", "top_filtering"):
        from transfertransfo import decoding

        return getattr(decoding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser("Chat with a fine-tuned model that has a persona.")
    begin_section(parser, "persona")
    parser.add_argument(
        "--personality", nargs="+", metavar="SENTENCE", help="the model's persona (unset = one drawn from the dataset)"
    )
    parser.add_argument("--personality_file", metavar="FILE", help="the same, a sentence a line")
    add_data_flags(parser)
    add_model_flags(parser, default="")
    add_precision_flag(parser)
    parser.add_argument("--force", action="store_true", help="chat with a model that was not fine-tuned on dialogs too")
    add_preset_flag(parser)
    add_decoding_flags(parser)
    begin_section(parser, "session")
    parser.add_argument(
        "--web",
        type=address,
        nargs="?",
        const=("127.0.0.1", 7860),
        metavar="HOST:PORT",
        help="chat on a page, and answer programs in OpenAI's form, there (without a value 127.0.0.1:7860; unset = in"
        " the terminal)",
    )
    parser.add_argument(
        "--web_token",
        type=token,
        metavar="TOKEN",
        help="what the page and its endpoint ask for (unset = none on 127.0.0.1, else one that is made and shown)",
    )
    parser.add_argument(
        "--transcript", metavar="FILE", help="file to which each turn is added as it is said, a JSON object a line"
    )
    add_seed_flag(parser)
    add_program_flags(parser)
    return parse_with_preset(parser, argv, best_preset)


def best_preset(args: Namespace) -> str:
    """The preset that shows a model at its best, of those that come with the project; the original's way for others."""
    folder = Path(args.model_checkpoint).absolute()
    embedded = args.model_checkpoint and folder.parent == EXAMPLE
    return EMBEDDED.get(folder.name, "original") if embedded else "original"


def address(text: str) -> tuple[str, int]:
    """An argparse type: host and port, or one of the two."""
    found = re.fullmatch(r"(?:(?P<host>[\w.-]*|\[[\da-fA-F:.]+\]):)?(?P<port>\d{1,5})|(?P<alone>[\w.-]+|\[.+\])", text)
    if not found or int(found["port"] or 0) > 65535:
        raise ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return (found["host"] or found["alone"] or "127.0.0.1").strip("[]"), int(found["port"] or 7860)


def token(text: str) -> str:
    """An argparse type: what can stand in an address and in a cookie, and cannot be guessed."""
    if not re.fullmatch(r"[\w.~-]{8,200}", text, re.ASCII):
        raise ArgumentTypeError("expected at least 8 letters, digits or -._~")
    return text


@flags_named()
def run(argv: list[str] | None = None) -> None:
    """Chat as the command line says, until the input ends.

    Raises:
        UserError: input that cannot be used.
    """
    args = parse_args(argv)
    if args.web_token and not args.web:
        raise UserError("--web_token: needs --web")
    if args.web:
        require("web", "gradio", "fastapi", "uvicorn", requirements="web", setting="web")
    name = args.model_checkpoint or "the model of 2019"
    if sys.stdout.isatty():  # what follows takes seconds
        print(f"Loading {printable(name)} ...", flush=True)
    # torch and transformers take seconds to load: `--help` and a wrong flag are answered without them
    from transfertransfo.chat.conversation import Chat
    from transfertransfo.chat.terminal import make_printer, make_reader, open_transcript, orderly_sigterm, talk
    from transfertransfo.decoding import Decoding, check_room
    from transfertransfo.model.loading import load_finetuned

    set_up_logging(logging.WARNING)
    set_seed(args.seed)
    decoding = Decoding.of(args)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # whatever bytes a pipe brings, whatever a terminal can show
    show = make_printer()

    def tell(text: str) -> None:
        show(f"{text}\n", "note")

    def draw() -> list[str]:
        return draw_from_dataset(args, tell)

    persona = given_persona(args)
    model, tokenizer = load_finetuned(
        args.model_checkpoint,
        args.gpt_tokenization,
        args.device,
        args.history_start,
        args.fp16,
        force=args.force,
    )
    check_room(model, decoding.max_length)
    persona = draw() if persona is None else persona  # after the model: a wrong one is said before a dataset is needed
    with open_transcript(args.transcript) as transcript:
        if args.web:
            return serve(args, model, tokenizer, decoding, persona, draw, transcript)
        chat = Chat(model, tokenizer, decoding, args.max_history, persona, draw, tell, transcript)
        if sys.stdin.isatty() and sys.stdout.isatty():
            tell(f"Model: {name}; /help lists commands, Ctrl-D leaves")
        show(f"{chat.introduction()}\n", "persona")
        with orderly_sigterm():
            talk(chat, make_reader(), show)


def serve(
    args: Namespace,
    model: "DoubleHeads",
    tokenizer: "PreTrainedTokenizerBase",
    decoding: "Decoding",
    persona: list[str],
    draw: Callable[[], list[str]],
    transcript: TextIO | None,
) -> None:
    """Chat on a page, with as many as come, until Ctrl-C."""
    from transfertransfo.chat.page import Page, settings_of
    from transfertransfo.chat.server import Endpoint, Server, is_loopback, listen
    from transfertransfo.chat.sharing import SharedChat, SharedModel, check_limits

    check_limits(decoding)
    host, port = args.web
    with listen(host, port) as socket:
        secret = args.web_token or ("" if is_loopback(host) else secrets.token_urlsafe(16))
        shared = SharedModel(model, tokenizer)

        def make_chat(transcript: TextIO | None = transcript) -> SharedChat:
            return SharedChat(shared, args.seed, decoding, args.max_history, persona, draw, transcript=transcript)

        name = Path(args.model_checkpoint or "transfertransfo").name
        own = make_chat(None)  # no visitor's
        page = Page(make_chat, settings_of(own), name)
        server = Server(page.mounted(Endpoint(shared, own, name), secret), shared.close)
        place = f"[{host}]" if ":" in host else host
        print(
            f"http://{place}:{socket.getsockname()[1]}/{f'?token={secret}' if secret else ''} (Ctrl-C stops)",
            flush=True,
        )
        server.run(sockets=[socket])
        shared.thread.join(1)
        gc.freeze()  # else Python looks once more through all that was loaded before it ends: seconds


def given_persona(args: Namespace) -> list[str] | None:
    """The persona that the flags give, if they do."""
    if args.personality and args.personality_file:
        raise UserError("--personality and --personality_file: give one of the two")
    if not args.personality_file:
        return args.personality
    try:
        return Path(args.personality_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise UserError(f"--personality_file {args.personality_file}: {reason}") from error


def draw_from_dataset(args: Namespace, tell: Callable[[str], None]) -> list[str]:
    """A persona out of the dataset: `--dataset_path`, else the one that the model was trained on, else PersonaChat."""
    from transfertransfo.data.dataset import locate_dataset
    from transfertransfo.data.personas import draw_persona
    from transfertransfo.data.sources import recorded_dataset

    path = args.dataset_path or recorded_dataset(args.model_checkpoint)
    if path and not args.dataset_path:
        tell(f"(a persona from {path})")
    try:
        return draw_persona(locate_dataset(path), args.skip_bad_dialogs)
    except UserError as error:
        raise UserError(f"{in_flags(error)}; or {GIVE_PERSONA}") from error


if __name__ == "__main__":
    run_script(run)
