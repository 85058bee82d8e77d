"""The errors that every module may raise, and how they are said in one line."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
CONTROLS |= dict.fromkeys(map(ord, "\t\n\v\f\r\x85\u2028\u2029"), " ")  # white space


class UserError(Exception):
    """Input that cannot be used. The message is the one line that the user sees; a script then exits with status 2.

    Attributes:
        names: the settings that the message calls by their names in Python.
    """

    names: tuple[str, ...] = ()


class SettingError(UserError):
    """A setting that cannot be used. The message calls it by its name in Python, as `max_length`."""

    def __init__(self, message: str, *names: str):
        """`names` are the settings that the message names."""
        super().__init__(message)
        self.names = names


@contextlib.contextmanager
def flags_named() -> Iterator[None]:
    """Have a `SettingError` call its settings by their flags, as `--max_length`: for whoever reads the command line."""
    try:
        yield
    except SettingError as error:
        raise UserError(in_flags(error)) from error


def in_flags(error: UserError) -> str:
    """The message of an error, its settings called by their flags."""
    text = str(error)
    for name in error.names:
        text = re.sub(rf"(?<!\S){name}(?![\w/.-])", f"--{name}", text, count=1)
    return text


def first_line(error: BaseException) -> str:
    """An error's message in one line, whatever library it came from."""
    text = str(error).strip() or type(error).__name__
    if "weights only" in text.lower().replace("_", " "):  # torch goes on with how to load it all the same
        return "not safe to load: a pickle of more than weights, or damaged"
    return shortened(text.splitlines()[0])


def printable(text: str) -> str:
    """Text from outside in one line, which a terminal shows and does not obey.

    White space, line ends too, becomes a blank. Other control characters, C0 and C1, become `\\x1b`, and what is no
    Unicode, as half of a surrogate pair, `?`.
    """
    return text.translate(CONTROLS).encode("utf-8", "replace").decode()


def printable_lines(text: str) -> str:
    """The same of several lines, which stay so."""
    return "\n".join(map(printable, text.split("\n")))


def shortened(text: str, length: int = 300) -> str:
    """The beginning of a long text."""
    return text if len(text) <= length else f"{text[:length]} ..."


def require(what: str, *packages: str, requirements: str = "extra", setting: str = "") -> None:
    """Check that packages of requirements/extra.txt or another such file, which only some settings need, are installed.

    Args:
        what: what needs them; it begins with the name of `setting`, where it is one.

    Raises:
        SettingError: one is not.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        names = " and ".join(missing)
        message = f"{what}: needs {names}; pip install -r requirements/{requirements}.txt"
        raise SettingError(message, *filter(None, [setting]))
