"""A chat's terminal: it reads lines, shows text in colours, and keeps the lines that were typed."""

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.utils import get_cwidth

from transfertransfo.chat.commands import COMMANDS, answer
from transfertransfo.chat.conversation import Chat
from transfertransfo.download import cache_folder
from transfertransfo.errors import SettingError, UserError, in_flags, printable, printable_lines

logger = logging.getLogger(__name__)

PROMPT = ">>> "
COLOURS = {"reply": "\x1b[36m", "note": "\x1b[2m", "persona": "\x1b[33m"}


def talk(chat: Chat, read: Callable[[], str], show: Callable[..., None]) -> None:
    """Answer line after line until the end of the input, `/quit`, or Ctrl-C twice."""
    interrupted = False
    while True:
        try:
            line = read()
            interrupted = False
            answered = answer(chat, line)
            if isinstance(answered, str):
                show(f"{answered}\n", "note")
                continue
            with unseen_keys(), contextlib.closing(answered) as pieces:
                for piece in pieces:
                    show(piece, "reply")
            show("\n")
        except EOFError:
            return show("\n")
        except KeyboardInterrupt:
            if interrupted:
                return show("\n")
            interrupted = True
            show("\n(Ctrl-C once more, Ctrl-D or /quit leaves)\n", "note")
        except UserError as error:
            logger.debug("behind the next line:", exc_info=True)
            show(f"{in_flags(error)}\n", "note")


@contextlib.contextmanager
def orderly_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit with status 143, so that the terminal is put back as it was."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def unseen_keys() -> Iterator[None]:
    """Hide keys that are typed meanwhile. They appear at the next prompt. Ctrl-C and Ctrl-Z work on."""
    try:
        before = termios.tcgetattr(sys.stdin)
        hushed = before.copy()
        hushed[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSANOW, hushed)
    except (termios.error, ValueError, OSError):  # no terminal
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def make_printer() -> Callable[..., None]:
    """A function that shows text at once. On a terminal it has colours, and words wrap at the width."""
    terminal = sys.stdout.isatty()
    coloured = terminal and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    wrap = Wrapper(lambda: shutil.get_terminal_size().columns) if terminal else str

    def show(text: str, kind: str = "") -> None:
        text = wrap(printable_lines(text))
        print(f"{COLOURS[kind]}{text}\x1b[0m" if coloured and kind else text, end="", flush=True)

    return show


class Wrapper:
    """Breaks lines before words that would not fit. The text comes in pieces of whole words."""

    def __init__(self, width: Callable[[], int]):
        self.width, self.column = width, 0

    def __call__(self, text: str) -> str:
        wrapped = []
        for part in re.findall(r"\n|[^\S\n]*\S+|[^\S\n]+", text):  # line ends, words with the space before them
            begins_word = part[0].isspace() and part.strip()
            if begins_word and self.column and self.column + get_cwidth(part) >= self.width():
                wrapped.append("\n")
                self.column = 0
                part = part.lstrip()
            wrapped.append(part)
            self.column = 0 if part == "\n" else self.column + get_cwidth(part)
        return "".join(wrapped)


def make_reader() -> Callable[[], str]:
    """A function that reads a line. A terminal has editing and a history.

    The function raises EOFError at the end of the input and KeyboardInterrupt at Ctrl-C.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return make_editor() if terminal else read_plainly


def read_plainly() -> str:
    line = input(PROMPT)
    if not sys.stdin.isatty():
        print(printable(line))  # so that the output reads as a dialog
    return line


def make_editor() -> Callable[[], str]:
    completer = WordCompleter([*COMMANDS], sentence=True)
    editor: PromptSession[str] = PromptSession(
        history=open_history(), completer=completer, complete_while_typing=False, enable_suspend=True
    )
    return lambda: editor.prompt(PROMPT)


def open_history() -> History:
    """The history of typed lines, in a file that only the user can read; in memory where there can be none."""
    try:
        path = cache_folder() / "chat_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except (OSError, UserError) as error:
        logger.warning("no history of what is typed is kept: %s", error)
        return InMemoryHistory()
    return FileHistory(path)


@contextlib.contextmanager
def open_transcript(path: str | None) -> Iterator[TextIO | None]:
    """A file to which lines can be added; None without a path.

    Raises:
        SettingError: it cannot be opened.
    """
    if not path:
        yield None
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise SettingError(f"transcript {path}: {error.strerror}", "transcript") from error
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # a full disk, which the chat has told of
            file.close()
